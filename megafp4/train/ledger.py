"""The precision ledger of a run: of all its ranks, and of the processes that it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megafp4.backends.ledger import Ledger
from megafp4.train.parallel import gather_objects

if TYPE_CHECKING:
    from megafp4.train.build import Run


def run_ledger(run: Run, earlier: Ledger) -> Ledger:
    """Every GEMM since the run began, on all ranks, which must all call this.

    Ranks of dp and pp run GEMMs of their own, which add up. Those of tp and cp run slices of the
    same GEMMs, which count once: a run has the same ledger on every mesh. If slices ran in
    different formats or on different backends, the ledger holds an entry for each.

    Args:
        run: The run.
        earlier: What this gave for the checkpoint that these processes began from.

    Raises:
        CommunicationError: Another rank is gone.
    """
    mesh, ledger = run.mesh, run.precision.ledger
    for group, sliced in ((mesh.tp, True), (mesh.cp, True), (mesh.dp, False), (mesh.pp, False)):
        texts = gather_objects(group, ledger.to_json())
        ledger = Ledger()
        for text in texts:
            ledger.merge(Ledger.from_json(text), slices=sliced)
    found = Ledger()
    found.merge(earlier)
    found.merge(ledger)
    return found
