"""Quantizers, casts and range statistics, each checked value for value before it is timed."""

from __future__ import annotations

from itertools import chain

import torch

from benchmarks.ceilings import Point
from benchmarks.peers import cast_peers
from benchmarks.quantize_rows import Row, mxfp4_rows, other_rows
from benchmarks.report import Report
from benchmarks.session import Session

_COLUMNS = ("quantizer", "us", "TB/s", "of roofline")


def measure(session: Session, tokens: int, width: int, rounds: int) -> Report:
    """Time every quantizer.

    Args:
        session: Rows that are wanted, budget, timer.
        tokens: Rows of the matrix.
        width: Its columns.
        rounds: Samples of each.
    """
    title = f"Quantizers, {tokens} x {width}, BF16 unless said otherwise"
    report = session.report(title, _COLUMNS, "TB/s")
    spread = torch.randn(width, device=session.device).exp()
    x32 = torch.randn(tokens, width, device=session.device) * spread
    x = x32.bfloat16()
    for row in chain(mxfp4_rows(x, x32), other_rows(x, x32)):
        _add(session, report, row, x.numel(), rounds, peer=False)
    for row in cast_peers(x):
        _add(session, report, row, x.numel(), rounds, peer=True)
    return report


def _add(
    session: Session, report: Report, row: Row, elements: int, rounds: int, peer: bool
) -> None:
    if not session.starts(report, row.name):
        return
    found = session.checked(
        report, row.name, row.limit, row.check, lambda: {"": row.work}, rounds, peer=peer
    )
    if found is None:
        return
    error, times = found
    time = times[""]
    moved = elements * (row.read + row.written)
    point = Point(row.family, elements * row.operations, moved, time.median)
    report.add(
        row.name,
        1e3 * time.median,
        moved / time.median / 1e9,
        point.fraction(report.ceilings),
        error=error,
        limit=row.limit,
        ms=time.as_json(),
        roofline=point._asdict(),
    )
