"""Tables, plots and the HTML page made from run folders, after or during training.

Nothing here is imported by training code's hot path, and nothing here imports training code: a
report of a run from another machine needs only its folder.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from megafp4.errors import UnsupportedError
from megafp4.report.html import render_html
from megafp4.report.load import Run, load_run, load_runs
from megafp4.report.plots import write_plots
from megafp4.report.table import table_rows, to_markdown, to_rich

__all__ = [
    "Run",
    "load_run",
    "load_runs",
    "render_html",
    "require_packages",
    "table_rows",
    "to_markdown",
    "to_rich",
    "write_plots",
    "write_report",
]


def require_packages() -> None:
    """Check, before hours of training, that a report can be written after it.

    Raises:
        UnsupportedError: A package is missing.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"reports need {package}, which is not installed: pip install 'megafp4[report]'"
            )


def write_report(folder: Path | str) -> Path:
    """Write ``report.html``, ``plots/*.png`` and, for a comparison, ``compare.json`` and ``.md``.

    Args:
        folder: A run folder, or a folder of run folders.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: ``folder`` holds no run, or a file in it is damaged.
        UnsupportedError: matplotlib is not installed.
    """
    require_packages()
    folder = Path(folder)
    runs = load_runs(folder)
    rows = table_rows(runs)
    plots = write_plots(runs, folder / "plots")
    if runs[0].folder != folder:
        (folder / "compare.json").write_text(json.dumps(rows, indent=2) + "\n")
        (folder / "compare.md").write_text(to_markdown(rows))
    page = folder / "report.html"
    page.write_text(render_html(folder.resolve().name, runs, rows, plots), encoding="utf-8")
    return page
