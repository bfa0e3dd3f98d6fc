"""Training on several GPUs: meshes and recipes side by side."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.meshes import Layout
from benchmarks.processes import OUT_OF_MEMORY, in_processes
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.train_run import Job, Trained, median_ms
from megafp4.models import flops_per_token
from megafp4.train.metrics import peak_flops

_COLUMNS = (
    "mesh and recipe",
    "GPUs",
    "tokens/s/GPU",
    "ms",
    "x BF16",
    "of one GPU",
    "MFU (half)",
    "MFU (full)",
    "peak GiB",
    "sent GB",
    "first loss",
    "last loss",
)
Runner = Callable[[Job, float], Trained]
"""Runs a job within so many seconds."""


def measure(
    session: Session,
    job: Job,
    layouts: Sequence[Layout],
    recipes: Sequence[str],
    band: float,
    single: Mapping[str, Any] | None = None,
    run: Runner | None = None,
) -> Report:
    """Time training steps of every recipe on every mesh, each job in processes of its own.

    The check of a row is that its last loss lies within a band around that of the recipe's first
    mesh of as many GPUs, which sees the same batches; that of a first mesh, that its loss fell.

    Args:
        session: Rows that are wanted, budget.
        job: What is trained; its recipe and mesh do not matter.
        layouts: Meshes, the most important first.
        recipes: Names, the baseline first.
        band: Largest relative difference of the losses.
        single: Results of this command that hold the rows of one GPU, if it is not among the
            meshes.
        run: Who runs a job; a process a GPU by default.
    """
    title = f"Training {job.preset}, micro-batch {job.micro_batch}, {job.micro_batches} a GPU"
    report = session.report(title, _COLUMNS, "tokens/s/GPU")
    rates = _rates_of_one_gpu(single)
    first: dict[tuple[str, int], Trained] = {}
    base: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            for recipe in recipes:
                name = f"{layout.name}, {recipe}"
                if not session.starts(report, name):
                    continue
                here = replace(
                    job,
                    recipe=recipe,
                    ranks=layout.ranks,
                    parallel=layout.parallel,
                    graph=layout.graph,
                    offload=layout.offload,
                    folder=str(Path(folder) / f"run{len(report.rows) + len(report.left_out)}"),
                    cache=job.cache or str(Path(folder) / "data"),
                )
                found = trained(report, name, here, session.left(), run)
                if found is None:
                    continue
                rate = 1e3 * found.tokens_per_step / median_ms(found) / layout.ranks
                reference = first.setdefault((recipe, layout.ranks), found)
                error = _error(found, reference)
                limit = 0.999 if found is reference else band
                if error <= limit:
                    if layout.ranks == 1:
                        rates.setdefault(recipe, rate)
                    if recipe == recipes[0] == "bf16":
                        base[layout.name] = rate
                _add(report, name, here, found, rate, (base, rates), (error, limit))
    return report


def trained(
    report: Report, name: str, job: Job, seconds: float, run: Runner | None
) -> Trained | None:
    """Run a job; None if it could not be, and the report says why."""
    try:
        return (run or on_ranks)(job, seconds)
    except RuntimeError as error:
        fits = OUT_OF_MEMORY not in str(error)
        reason = str(error) if fits else f"it does not fit: {error}"
        report.leave_out(name, reason, failed=fits)
        return None


def on_ranks(job: Job, seconds: float) -> Trained:
    """Run a job, a process a rank.

    Raises:
        RuntimeError: A rank failed, or they did not finish in time.
    """
    return Trained(**in_processes("benchmarks.train_run", asdict(job), job.ranks, seconds))


def _rates_of_one_gpu(results: Mapping[str, Any] | None) -> dict[str, float]:
    """Tokens/s of one GPU by recipe."""
    found = {}
    for row in results["rows"] if results is not None else ():
        mesh, recipe = row[_COLUMNS[0]].split(", ")
        if mesh == "1" and isinstance(row["tokens/s/GPU"], float):
            found[recipe] = row["tokens/s/GPU"]
    return found


def _error(found: Trained, reference: Trained) -> float:
    if not all(map(math.isfinite, found.losses)):
        return math.nan
    if found is reference:
        return found.losses[-1] / found.losses[0]
    return abs(found.losses[-1] - reference.losses[-1]) / reference.losses[-1]


def _add(
    report: Report,
    name: str,
    job: Job,
    found: Trained,
    rate: float,
    compared: tuple[dict[str, float], dict[str, float]],
    check: tuple[float, float],
) -> None:
    base, rates = compared
    mesh = name.split(", ")[0]
    peak = peak_flops(torch.device(job.device))
    model = job.config().model
    flops = [flops_per_token(model, model.seq_len, kind) for kind in ("half", "full")]
    report.add(
        name,
        job.ranks,
        rate,
        median_ms(found),
        rate / base[mesh] if mesh in base else "",
        rate / rates[job.recipe] if job.recipe in rates else "",
        *(rate * one / peak if peak else "" for one in flops),
        found.peak_gib,
        sum(found.sent.values()) / 1e9,
        found.losses[0],
        found.losses[-1],
        error=check[0],
        limit=check[1],
        outcome=asdict(found),
        job=asdict(job),
        peak_flops=peak,
    )
