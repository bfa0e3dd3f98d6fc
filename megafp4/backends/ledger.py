"""The precision ledger: every GEMM that ran, in which formats, by whom.

Published FP4 code has trained in FP8 without anyone noticing; a count of what really ran is the
cure. A run writes its ledger to disk, and tests assert on it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

from megafp4.errors import CheckpointError


class Entry(NamedTuple):
    """What one GEMM was."""

    layer: str
    gemm: str
    """``fprop``, ``dgrad``, ``wgrad``, or ``residual`` for the outliers of OCC."""
    a: str
    """Format of the first operand."""
    b: str
    """Format of the second operand."""
    backend: str


class Ledger:
    """Counts of GEMMs by (layer, GEMM, formats, backend)."""

    def __init__(self) -> None:
        self._counts: Counter[Entry] = Counter()

    def record(self, layer: str, gemm: str, a: str, b: str, backend: str, count: int = 1) -> None:
        """Count one GEMM, or ``count`` of them."""
        self._counts[Entry(layer, gemm, a, b, backend)] += count

    def rows(self) -> list[dict[str, str | int]]:
        """One dict per kind of GEMM (layer, gemm, a, b, backend, count), in order of first use."""
        return [{**entry._asdict(), "count": count} for entry, count in self._counts.items()]

    def by_format(self) -> dict[str, int]:
        """Count per pair of formats over all layers and GEMMs: ``{"mxfp4 x mxfp4": 1234}``."""
        totals: Counter[str] = Counter()
        for entry, count in self._counts.items():
            totals[f"{entry.a} x {entry.b}"] += count
        return dict(totals)

    def by_gemm(self) -> dict[str, dict[str, int]]:
        """Count per GEMM and pair of formats: ``{"fprop": {"bf16 x bf16": 600}, ...}``."""
        totals: dict[str, Counter[str]] = {}
        for entry, count in self._counts.items():
            totals.setdefault(entry.gemm, Counter())[f"{entry.a} x {entry.b}"] += count
        return {gemm: dict(counts) for gemm, counts in totals.items()}

    def total(self) -> int:
        """All GEMMs."""
        return self._counts.total()

    def merge(self, other: Ledger, *, slices: bool = False) -> None:
        """Add the counts of another ledger (a resumed run's earlier part, another rank's).

        Args:
            other: The other ledger.
            slices: Both count slices of the same GEMMs: keep the larger count of each entry.
        """
        if slices:
            self._counts |= other._counts
        else:
            self._counts.update(other._counts)

    def to_json(self) -> str:
        """Serialize."""
        return json.dumps(self.rows(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: The text is not a ledger.
        """
        ledger = cls()
        try:
            for row in json.loads(text):
                ledger.record(**row)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"a precision ledger cannot be read ({error}): restore ledger.json or delete it"
            ) from error
        return ledger
