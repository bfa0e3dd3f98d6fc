"""What a benchmark found: on the screen, as JSON, as a Markdown table and as plots."""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.plots import draw_bars, draw_roofline

FAILED = "FAILED"


@dataclass
class Report:
    """Rows of one benchmark, all with the same columns."""

    title: str
    columns: tuple[str, ...]
    """Name of the row first."""
    plot: str
    """Column that the bars show."""
    ceilings: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    """Where ``results.json`` is kept up to date, row by row; None writes nothing."""
    command: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Rows that were not measured, each with the reason."""
    failed: bool = False
    complete: bool = False
    environment: dict[str, str] = field(default_factory=environment)

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
        shown = error if math.isfinite(error) else str(error)  # JSON knows no NaN
        self.rows.append({**row, **extra, "error": shown, "limit": limit})
        self.save()

    def leave_out(self, name: str, reason: str, *, failed: bool = False) -> None:
        """Say that a row was not measured, and why; ``failed`` if it should have been."""
        self.failed |= failed
        self.left_out.append({"row": name, "reason": reason})
        self.save()

    def show(self) -> None:
        """Print the table."""
        table = Table(title=self.title)
        for index, column in enumerate((*self.columns, "error")):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*(text(row[column]) for column in (*self.columns, "error")))
        console = Console(width=160)
        console.print(table)
        console.print(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()))
        for one in self.left_out:
            console.print(f"not measured: {one['row']}: {one['reason']}", markup=False)

    def markdown(self) -> str:
        """The table for a document."""
        names = (*self.columns, "error")
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(text(row[name]) for name in names) + " |" for row in self.rows]
        if self.left_out:
            lines += ["", *(f"- {one['row']}: {one['reason']}" for one in self.left_out)]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Everything that is known so far."""
        return {
            "title": self.title,
            "command": shlex.join(self.command),
            "environment": self.environment,
            "complete": self.complete,
            "columns": self.columns,
            "ceilings": self.ceilings,
            "rows": self.rows,
            "left_out": self.left_out,
        }

    def save(self) -> None:
        """Replace ``results.json`` as a whole, so that a killed run leaves a valid one."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "results.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    def finish(self) -> None:
        """Mark the results complete; write ``table.md``, ``plot.png`` and ``roofline.png``."""
        self.complete = True
        if self.folder is None:
            return
        self.save()
        (self.folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        name = self.columns[0]
        bars = {row[name]: row[self.plot] for row in self.rows if _is_number(row[self.plot])}
        draw_bars(self.folder / "plot.png", self.title, self.plot, bars)
        if any("roofline" in row for row in self.rows):
            draw_roofline(self.folder / "roofline.png", self.title, [self.as_json()])


def text(value: Any) -> str:
    """A cell of a table."""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
