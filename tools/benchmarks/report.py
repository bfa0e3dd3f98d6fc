"""What a benchmark found: on the screen, as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FAILED = "FAILED"


@dataclass
class Report:
    """Rows of one benchmark, all with the same columns."""

    title: str
    columns: tuple[str, ...]
    """Name of the row first."""
    plot: str
    """Column that the plot shows."""
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False

    def add(self, *values: Any, error: float, limit: float, **extra: Any) -> None:
        """Add a row, without its measured values if its check failed.

        Args:
            values: One a column.
            error: What the check found.
            limit: Most that is allowed; NaN in ``error`` never passes.
            extra: Goes into the JSON only.
        """
        row = dict(zip(self.columns, values, strict=True))
        if not error <= limit:
            self.failed = True
            name = self.columns[0]
            row = {key: value if key == name else FAILED for key, value in row.items()}
            extra = {}
        self.rows.append({**row, **extra, "error": error, "limit": limit})

    def show(self) -> None:
        """Print the table."""
        table = Table(title=self.title)
        for index, column in enumerate((*self.columns, "error")):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(text(row[column]) for column in (*self.columns, "error")))
        console = Console(width=140)
        console.print(table)
        console.print(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()))

    def markdown(self) -> str:
        """The table for a document."""
        names = (*self.columns, "error")
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(text(row[name]) for name in names) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, command: list[str]) -> None:
        """Write ``results.json``, ``table.md`` and ``plot.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "title": self.title,
            "command": shlex.join(command),
            "environment": environment(),
            "ceilings": self.ceilings,
            "rows": self.rows,
        }
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        self._draw(folder / "plot.png")

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        shown = [row for row in self.rows if isinstance(row[self.plot], int | float)]
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained")
        axes = figure.subplots()
        labels = [str(row[self.columns[0]]) for row in shown]
        bars = axes.barh(range(len(shown)), [row[self.plot] for row in shown], color="#4878a8")
        axes.bar_label(bars, [text(float(row[self.plot])) for row in shown], padding=3)
        axes.set_yticks(range(len(shown)), labels)
        axes.invert_yaxis()
        axes.set_xlabel(self.plot)
        axes.set_title(self.title)
        axes.margins(x=0.15)
        figure.savefig(path, dpi=110)


def text(value: Any) -> str:
    """A cell of a table."""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.4g}"


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found |= {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return found | {"commit": done.stdout.strip() or "unknown"}
