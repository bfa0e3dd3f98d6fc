"""Training what hardly fits: losses of real steps, and what the memory of a GPU holds."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.parallel import Runner, trained
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.train_run import Job, Trained, median_ms
from megafp4.models import get_preset

LEAST_STEPS = 20
_KINDS = ("weights", "states", "gradients", "other", "activations")
_COLUMNS = (
    "states",
    "tokens/s",
    "first losses",
    "last losses",
    "peak GiB",
    "reserved GiB",
    *(f"{kind} B" for kind in _KINDS),
)


def measure(session: Session, job: Job, states: Sequence[str], run: Runner | None = None) -> Report:
    """Train for some steps with each way to keep states, each in a process of its own.

    The check is that the loss fell: its mean over the last quarter of the steps is below that over
    the first.

    Args:
        session: Rows that are wanted, budget.
        job: What is trained; how it keeps states does not matter.
        states: Values of ``optim.states``; ``:offload`` behind one puts them in host memory.
        run: Who runs a job; a process of its own by default.

    Raises:
        ValueError: Fewer steps than 20, or what stands behind a colon is not ``offload``.
    """
    if job.total < LEAST_STEPS:
        raise ValueError(f"{job.total} steps were asked for: give at least {LEAST_STEPS}")
    for name in states:
        if ":" in name and not name.endswith(":offload"):
            raise ValueError(f"states {name!r}: only `:offload` may stand behind them")
    tokens = job.micro_batch * job.micro_batches * get_preset(job.preset).model.seq_len
    title = f"{job.preset} on one GPU, {job.recipe}, {tokens:,} tokens a step"
    report = session.report(title, _COLUMNS, "peak GiB")
    with tempfile.TemporaryDirectory() as folder:
        for at, name in enumerate(states):
            if not session.starts(report, name):
                continue
            kept, offload, _ = name.partition(":offload")
            here = replace(
                job,
                states=kept,
                offload=bool(offload),
                accounts=True,
                folder=str(Path(folder) / f"run{at}"),
                cache=job.cache or str(Path(folder) / "data"),
            )
            found = trained(report, name, here, session.left(), run)
            if found is not None:
                _add(report, name, here, found)
    return report


def _add(report: Report, name: str, job: Job, found: Trained) -> None:
    quarter = max(1, len(found.losses) // 4)
    first, last = (
        statistics.fmean(part) for part in (found.losses[:quarter], found.losses[-quarter:])
    )
    finite = all(map(math.isfinite, found.losses))
    report.add(
        name,
        1e3 * found.tokens_per_step / median_ms(found),
        first,
        last,
        found.peak_gib,
        found.reserved_gib,
        *(found.bytes[kind] / found.parameters if kind in found.bytes else "" for kind in _KINDS),
        error=last / first if finite else math.nan,
        limit=0.999,
        outcome=asdict(found),
        job=asdict(job),
    )
