"""What the commands share: which rows are wanted, how long it may take, and who measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from triton.errors import TritonError

from benchmarks.ceilings import measure_ceilings
from benchmarks.report import Report
from benchmarks.timing import Time, Timer, Work, time_on_gpu

_REFUSALS = (RuntimeError, ValueError, TritonError, ImportError, AttributeError, TypeError)
"""The last three: another library has another version than the one that is known here."""


@dataclass
class Session:
    """One run of one command."""

    rows: str = "*"
    """Glob patterns of the names of rows, separated by semicolons: names hold commas."""
    budget: float = math.inf
    """Seconds after which no further row is started."""
    folder: Path | None = None
    command: tuple[str, ...] = ()
    device: str = "cuda"
    timer: Timer = time_on_gpu
    ceilings: Callable[[], dict[str, float]] = measure_ceilings
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def report(self, title: str, columns: tuple[str, ...], plot: str) -> Report:
        """Begin a report whose rows are kept on disk as they come."""
        report = Report(title, columns, plot, self.ceilings(), self.folder, self.command)
        report.save()
        return report

    def wants(self, name: str) -> bool:
        """Whether the row is asked for."""
        return any(fnmatchcase(name, one.strip()) for one in self.rows.split(";"))

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (self.clock() - self._started)

    def starts(self, report: Report, name: str) -> bool:
        """Whether to measure a row now; if it is wanted and time is up, the report says so."""
        if not self.wants(name):
            return False
        if self.left() > 0:
            return True
        report.leave_out(name, f"the budget of {self.budget:g} s was spent")
        return False

    def checked(
        self,
        report: Report,
        name: str,
        limit: float,
        check: Callable[[], float],
        rows: Callable[[], dict[str, Work]],
        rounds: int,
        *,
        peer: bool = False,
    ) -> tuple[float, dict[str, Time]] | None:
        """Check a row and only then time it, and whatever it is compared with.

        Args:
            report: Where a failure is noted.
            name: The row.
            limit: Largest error that is allowed.
            check: Finds the error.
            rows: Makes what is timed, by name.
            rounds: Samples of each.
            peer: Whether it is another library's, whose refusals are not failures of this project.

        Returns:
            The error and the times; None if there is nothing more to report, because the check
            failed, or the code refused its input.
        """
        try:
            error = check()
            if not error <= limit:
                blank = [""] * (len(report.columns) - 1)
                report.add(name, *blank, error=error, limit=limit)
                return None
            return error, self.timer(rows(), rounds)
        except _REFUSALS as refusal:
            first = next(iter(str(refusal).splitlines()), "")
            report.leave_out(name, f"{type(refusal).__name__}: {first}", failed=not peer)
            return None
