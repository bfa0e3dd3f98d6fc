"""Training steps of a preset: forward, backward, clipping and AdamW, recipe after recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch

from benchmarks.ceilings import COPY, PRODUCTS
from benchmarks.processes import in_processes
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.step_run import Outcome, Setup
from megafp4.models import flops_per_token
from megafp4.train.metrics import peak_flops

LEAST_STEPS = 20
_COLUMNS = (
    "recipe",
    "tokens/s",
    "ms",
    "p10 ms",
    "p90 ms",
    "x BF16",
    "TFLOP/s (half)",
    "TFLOP/s (full)",
    "MFU (half)",
    "MFU (full)",
    "HFU",
    "of roofline",
    "peak GiB",
    "last losses",
)
Runner = Callable[[Setup, float], Outcome]
"""Runs a setup within so many seconds."""


def measure(
    session: Session,
    setup: Setup,
    recipes: Sequence[str],
    band: float,
    run: Runner | None = None,
) -> Report:
    """Time steps of BF16 and of each recipe, each in a process of its own.

    The check of a recipe is that the mean loss of the last quarter of its steps lies within a
    band around BF16's on the same batches; that of BF16, that its loss fell.

    Args:
        session: Rows that are wanted, budget, ceilings.
        setup: What is trained; its recipe does not matter.
        recipes: Names; BF16 always comes first.
        band: Largest relative difference of the losses.
        run: Who runs a setup; a process of its own by default.

    Raises:
        ValueError: Fewer timed steps than 20.
    """
    if setup.steps < LEAST_STEPS:
        raise ValueError(
            f"{setup.steps} timed steps were asked for: give at least {LEAST_STEPS}, or the "
            "percentiles mean nothing"
        )
    micro = f"micro-batch {setup.micro_batch}, {setup.micro_batches} a step"
    report = session.report(f"Training step of {setup.preset}, {micro}", _COLUMNS, "tokens/s")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the processes need all of it
    base: Outcome | None = None
    for recipe in ("bf16", *(name for name in recipes if name != "bf16")):
        if recipe != "bf16" and not session.starts(report, recipe):
            continue
        try:
            found = (run or in_a_process)(replace(setup, recipe=recipe), session.left())
        except RuntimeError as error:
            report.leave_out(recipe, str(error), failed=True)
            if recipe == "bf16":
                return report
            continue
        base = base or found
        _add(report, session, replace(setup, recipe=recipe), found, base, band)
    return report


def in_a_process(setup: Setup, seconds: float) -> Outcome:
    """Run a setup in a process of its own.

    Raises:
        RuntimeError: It failed, or did not finish in time.
    """
    return Outcome(**in_processes("benchmarks.step_run", asdict(setup), 1, seconds))


class Work(NamedTuple):
    """FLOPs of a token."""

    half: float
    """Of the model, a causal query meeting half of the keys."""
    full: float
    """Of the model, a query meeting all keys."""
    hardware: float
    """What is computed: ``half``, the scores that flash attention makes again in backward, and
    recomputed blocks."""
    linears: float
    """The part of ``hardware`` in the linears of the blocks, recomputation included."""


def work_of(setup: Setup) -> Work:
    """Count the FLOPs of a token."""
    model = setup.run_config().model
    half, full = (flops_per_token(model, model.seq_len, kind) for kind in ("half", "full"))
    attention = full - half  # the half convention's share of it
    linears = half - attention - 6 * model.hidden * model.vocab_size
    hardware: float = half + attention / 6  # one of six causal products more
    if setup.recompute == "full":
        hardware += (linears + attention) / 3
        linears *= 4 / 3
    return Work(half, full, hardware, linears)


def least_ms(work: Work, tokens: int, found: Outcome, ceilings: Mapping[str, float]) -> float:
    """Time of a step in which every product ran at its ceiling and AdamW at that of copying.

    The linears' products at the rates of the tensor cores they ran on, everything else in BF16;
    AdamW reads parameter, gradient and states and writes parameter and states.
    """
    count = sum(found.products.values())
    per_tera = sum(
        share / count / ceilings[PRODUCTS[kind]] for kind, share in found.products.items()
    )
    rest = (work.hardware - work.linears) / ceilings[PRODUCTS["bf16"]]
    products = tokens * (work.linears * per_tera + rest) / 1e9
    moved = 12 * found.parameters + 2 * found.state_bytes
    return products + moved / ceilings[COPY] / 1e9


def _add(
    report: Report, session: Session, setup: Setup, found: Outcome, base: Outcome, band: float
) -> None:
    tokens = setup.micro_batches * setup.micro_batch * setup.run_config().model.seq_len
    deciles = statistics.quantiles(found.step_ms, n=10, method="inclusive")
    ms = statistics.median(found.step_ms)
    work = work_of(setup)
    rates = [kind * tokens / ms * 1e3 for kind in (work.half, work.full, work.hardware)]
    peak = peak_flops(torch.device(session.device))
    shares = [rate / peak if peak else "" for rate in rates]
    is_base = found is base
    error = found.losses[-1] / found.losses[0] if is_base else _distance(found, base)
    report.add(
        setup.recipe,
        1e3 * tokens / ms,
        ms,
        deciles[0],
        deciles[-1],
        statistics.median(base.step_ms) / ms,
        rates[0] / 1e12,
        rates[1] / 1e12,
        *shares,
        least_ms(work, tokens, found, report.ceilings) / ms,
        found.peak_gib,
        _last(found),
        error=error if all(map(math.isfinite, found.losses)) else math.nan,
        limit=0.999 if is_base else band,
        outcome=asdict(found),
        setup=asdict(setup),
        peak_flops=peak,
    )


def _last(found: Outcome) -> float:
    """Mean loss of the last quarter of the steps."""
    return statistics.fmean(found.losses[-max(1, len(found.losses) // 4) :])


def _distance(found: Outcome, base: Outcome) -> float:
    return abs(_last(found) - _last(base)) / _last(base)
