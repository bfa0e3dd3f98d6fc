"""The comparison table: as data, for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megafp4.report.load import BASELINE, Run, baseline_of

if TYPE_CHECKING:
    from rich.table import Table

GEMMS = ("fprop", "residual", "dgrad", "wgrad")
"""In the order in which they run; the residual is the product of OCC's outliers."""

HEADINGS = ("Recipe", "Loss", "To BF16", "Bytes/param", "GEMMs run", "Tokens/s")
NUMERIC = ("Loss", "To BF16", "Bytes/param", "Tokens/s")

Row = dict[str, Any]


def table_rows(runs: Sequence[Run]) -> list[Row]:
    """Describe each run by the numbers of the comparison, ready for JSON (missing is None).

    ``gap_percent`` is ``100 (loss - baseline) / baseline`` of the validation losses.
    ``bytes_per_parameter`` counts the weights and the optimizer's state, not the gradients.
    ``gemms`` is the precision ledger: GEMM -> formats of its operands -> how often it ran.
    """
    baseline = baseline_of(list(runs))
    reference = baseline.valid_loss if baseline else math.nan
    rows = []
    for run in runs:
        loss = run.valid_loss
        rows.append(
            {
                "recipe": run.label,
                "folder": run.folder.name,
                "finished": run.finished,
                "step": run.summary.get("steps", run.last_step),
                "steps": run.steps,
                "valid_loss": _finite(loss),
                "gap_percent": _finite(100 * (loss - reference) / reference),
                "bytes_per_parameter": run.summary.get("bytes_per_parameter"),
                "gemms": run.summary.get("ledger", {}),
                "tokens_per_s": run.summary.get("tokens_per_s"),
                "wall_s": run.summary.get("wall_s"),
            }
        )
    return rows


def to_rich(rows: Sequence[Row]) -> Table:
    """Build the table for a terminal of 80 columns or more."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in HEADINGS:
        numeric = heading in NUMERIC
        table.add_column(
            heading, justify="right" if numeric else "left", no_wrap=heading != "GEMMs run"
        )
    for index, row in enumerate(rows):
        cells = [Text("\n".join(cell)) for cell in row_cells(row)]
        last = index == len(rows) - 1
        table.add_row(
            *cells, style="bold" if row["recipe"] == BASELINE else "", end_section=not last
        )
    return table


def to_markdown(rows: Sequence[Row]) -> str:
    """Format the table as GitHub Markdown."""
    rule = ["---:" if heading in NUMERIC else "---" for heading in HEADINGS]
    lines: list[Sequence[str]] = [HEADINGS, rule]
    lines += [["<br>".join(part) for part in row_cells(row)] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def row_cells(row: Row) -> list[list[str]]:
    """Return each column's lines of text, in the order of ``HEADINGS``."""
    size = row["bytes_per_parameter"]
    status = [] if row["finished"] else [f"(step {row['step']} of {row['steps']})"]
    return [
        [row["recipe"], *status],
        [_text(row["valid_loss"], ".4f")],
        [_text(row["gap_percent"], "+.2f", " %") if row["recipe"] != BASELINE else ""],
        [f"{size['total']:.2f}", f"{size['weights']:.2f} + {size['optimizer']:.2f}"]
        if size
        else ["-"],
        gemm_lines(row["gemms"]) or ["-"],
        [_text(row["tokens_per_s"], ",.0f")],
    ]


def gemm_lines(ledger: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Say what each GEMM ran in and how often, the most frequent first: ``dgrad mxfp4 1,200``."""
    return [
        f"{gemm} {short_formats(formats)} {count:,}"
        for gemm in sorted(
            ledger, key=lambda gemm: GEMMS.index(gemm) if gemm in GEMMS else len(GEMMS)
        )
        for formats, count in sorted(ledger[gemm].items(), key=lambda item: -item[1])
    ]


def short_formats(formats: str) -> str:
    """Write a pair of equal formats once: ``mxfp4 x mxfp4`` is ``mxfp4``."""
    a, cross, b = formats.partition(" x ")
    return a if cross and a == b else formats


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
