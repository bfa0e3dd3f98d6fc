"""Sums of gradients over GPUs: the communication library's and this project's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.processes import in_processes
from benchmarks.reduce_run import Found, Setup
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.timing import Time

_COLUMNS = (
    "reduction",
    "ms",
    "x BF16",
    "x FP32",
    "sent MB",
    "sent GB/s",
    "half-correlated",
)
_FP8 = 0.028
"""Largest error of one cast to FP8 with scales of 128 values."""
_FP8_AGAIN = 0.03
"""That of casting a sum of values that were cast."""
_SHARED_SCALE = 0.2
"""FP8-LM's sum is there to be compared with; more than this would be a mistake in it."""
Runner = Callable[[Setup, int, float], dict[str, Found]]
"""Runs a setup on some ranks within so many seconds."""


def measure(session: Session, setup: Setup, ranks: int, run: Runner | None = None) -> Report:
    """Time sums of gradients on some ranks, and hold their errors to what the formats allow.

    Args:
        session: Rows that are wanted, budget.
        setup: What is summed.
        ranks: GPUs.
        run: Who runs the setup; a process a GPU by default.

    Raises:
        ValueError: Fewer than two ranks.
    """
    if ranks < 2:
        raise ValueError(f"sums over {ranks} rank were asked for: give at least 2 GPUs")
    millions = setup.elements / 1e6
    title = f"Sum of {millions:,.0f} M gradients over {ranks} ranks, {setup.backend}"
    report = session.report(title, _COLUMNS, "ms")
    try:
        found = (run or on_ranks)(setup, ranks, session.left())
    except RuntimeError as error:
        report.leave_out("all", str(error), failed=True)
        return report
    if setup.device != "cuda":
        report.leave_out("fp8-peers", "it writes to other GPUs' memory", failed=False)
    base = {
        (operation, kind): Time.of(one.ms).median
        for name, one in found.items()
        for operation, kind in [_library(name, setup.backend)]
        if kind
    }
    for name, one in found.items():
        if session.wants(name):
            _add(report, name, one, base, ranks)
    return report


def on_ranks(setup: Setup, ranks: int, seconds: float) -> dict[str, Found]:
    """Run a setup, a process a rank.

    Raises:
        RuntimeError: A rank failed, or they did not finish in time.
    """
    found: dict[str, Any] = in_processes("benchmarks.reduce_run", asdict(setup), ranks, seconds)
    return {name: Found(**one) for name, one in found.items()}


def limits(name: str, ranks: int) -> tuple[float, float]:
    """Largest error of a row on independent and on half-correlated gradients.

    Errors of independent casts add up as independent gradients do; the sum of half-correlated ones
    is larger by the square root of (ranks + 1) / 2, and the error is not.
    """
    share = math.sqrt(2 / (ranks + 1))
    if "fp8-lm" in name:
        return _SHARED_SCALE, _SHARED_SCALE
    if ", fp8" in name:
        again = 0.0 if name.startswith("reduce-scatter") else _FP8_AGAIN
        return math.hypot(_FP8, again), math.hypot(_FP8 * share, again)
    if name.endswith("FP32"):
        return 1e-6, 1e-6
    # A library rounds its running sum at each of up to so many additions.
    return 0.003 * math.sqrt(ranks), 0.003 * math.sqrt(ranks)


def _library(name: str, backend: str) -> tuple[str, str]:
    """Operation and type of a library's row; the type of any other is empty."""
    operation, way = name.split(" from ")
    kind = way.split(", ")[1]
    return operation, kind.split()[1] if kind.startswith(backend.upper()) else ""


def _add(
    report: Report, name: str, one: Found, base: dict[tuple[str, str], float], ranks: int
) -> None:
    time = Time.of(one.ms)
    operation = name.split(" from ")[0]
    independent, correlated = limits(name, ranks)
    report.add(
        name,
        time.median,
        base[operation, "BF16"] / time.median,
        base[operation, "FP32"] / time.median,
        one.sent / 1e6,
        one.sent / time.median / 1e6,
        one.correlated,
        error=one.independent if one.correlated <= correlated else math.nan,
        limit=independent,
        correlated_limit=correlated,
        time=time.as_json(),
    )
