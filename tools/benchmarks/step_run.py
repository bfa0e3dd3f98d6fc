"""Training steps of one recipe, in a process of its own: ``python -m benchmarks.step_run``.

A process for each recipe: its memory starts empty, and every recipe warms up alike.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.ceilings import product_of
from benchmarks.environment import Sensors
from benchmarks.processes import serve
from megafp4.config import ModelConfig, RunConfig
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory, build_model, get_preset
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.optim import build_optimizer, clip_grad_norm, clip_grad_norm_on_device
from megafp4.precision import Precision
from megafp4.train.batches import MicroBatch
from megafp4.train.graphs import Recorder

_LEARNING_RATE = 1e-5
_SHIFT = 2.7
"""Zipf-Mandelbrot's: flattens the most frequent tokens."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, and how it runs."""

    preset: str
    recipe: str
    steps: int
    """Steps that are timed."""
    warm_up: int = 4
    """Steps before them: one eager, one that records the graph, two that replay it."""
    layers: int = 0
    """Blocks; 0 for the preset's."""
    micro_batch: int = 4
    micro_batches: int = 1
    graph: bool = True
    recompute: str = "none"
    saved_as: str = "recipe"
    optim_states: str = ""
    """How the optimizer keeps its states; empty for the preset's way."""
    backend: str = "hopper"
    device: str = "cuda"

    def run_config(self) -> RunConfig:
        """The preset with what is asked for."""
        run = get_preset(self.preset)
        layers = self.layers or run.model.layers
        kept = {"states": self.optim_states} if self.optim_states else {}
        return replace(
            run,
            model=replace(run.model, dropout=0.0, layers=layers),
            optim=replace(run.optim, **kept),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Outcome:
    """What happened."""

    step_ms: list[float]
    """Of each timed step."""
    losses: list[float]
    """Of every step, warm-up included."""
    products: dict[str, int]
    """GEMMs of the linears by the tensor cores they ran on: ``bf16``, ``fp8``, ``int8``."""
    parameters: int
    state_bytes: int
    """Bytes of the optimizer's states."""
    peak_gib: float
    sensors: dict[str, float] = field(default_factory=dict)


def run(setup: Setup) -> Outcome:
    """Train on synthetic batches, the same for every recipe.

    Tokens are drawn independently from Zipf-Mandelbrot's distribution, which a model learns within
    a few steps; every step has fresh ones.
    """
    config = setup.run_config()
    precision = Precision(seed=1, accumulates=True)
    model = _model(setup, config, precision)
    on_gpu = setup.device == "cuda"
    optimizer = build_optimizer(
        model.named_parameters(), config.optim, 0, fused=on_gpu, weight_amax=on_gpu
    )
    recorder = Recorder(model, precision) if setup.graph else None
    shares = torch.full((setup.micro_batches,), 1.0 / setup.micro_batches, device=setup.device)
    skip = torch.zeros((), device=setup.device)
    total = setup.warm_up + setup.steps
    data = _batches(setup, config.model, total)

    def step(number: int) -> Tensor:
        batches = data[number]
        ahead = optimizer.can_run_ahead
        loss = None
        if recorder is not None:
            on_end = [(*batch, i * batch[0].numel()) for i, batch in enumerate(batches)]
            losses = recorder.accumulate(on_end, shares, number, measures=ahead)
            loss = None if losses is None else losses.sum()
        if loss is None:
            loss = _accumulate(model, precision, batches, shares, number, ahead)
        if ahead:
            _, factor = clip_grad_norm_on_device(
                model.parameters(), config.optim.clip_grad, precision.squares.of
            )
            optimizer.step(number, _LEARNING_RATE, grad_scale=factor, skip=skip)
        else:
            _, scale = clip_grad_norm(model.parameters(), config.optim.clip_grad)
            optimizer.step(number, _LEARNING_RATE, grad_scale=scale)
        optimizer.zero_grad()
        for name, amax in optimizer.weight_amax.items():
            precision.magnitudes.record(optimizer.params[name], amax)
        return loss.clone()

    losses = [step(number) for number in range(setup.warm_up)]
    with Sensors() as sensors:
        timed, step_ms = _timed(step, range(setup.warm_up, total), on_gpu)
    return Outcome(
        step_ms,
        [float(loss) for loss in (*losses, *timed)],
        _products(precision),
        sum(parameter.numel() for parameter in model.parameters()),
        optimizer.state_bytes(),
        torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        sensors.found,
    )


def _model(setup: Setup, config: RunConfig, precision: Precision) -> Decoder:
    shape = config.model
    factory = QuantizedFactory(
        setup.recipe, setup.backend, precision, shape.layers, saved_as=setup.saved_as  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.device("meta"):
        model = build_model(shape, factory, torch.bfloat16)
    model.to_empty(device=setup.device)
    _initialize(model, setup.device)
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    execution = Execution(setup.device == "cuda", setup.recompute)  # type: ignore[arg-type]
    execution.magnitudes = precision.magnitudes
    model.execute(execution)
    return model


def _initialize(model: Decoder, device: str) -> None:
    """Random weights, drawn on the device: a large model's would take the CPU minutes."""
    draws = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=draws)


def _batches(setup: Setup, shape: ModelConfig, steps: int) -> list[list[MicroBatch]]:
    """Micro-batches of every step."""
    draws = torch.Generator(setup.device).manual_seed(0)
    weights = 1.0 / (torch.arange(1, shape.vocab_size + 1, device=setup.device) + _SHIFT)
    size = setup.micro_batches, setup.micro_batch, shape.seq_len + 1
    found = []
    for _ in range(steps):
        ids = torch.multinomial(weights, math.prod(size), replacement=True, generator=draws)
        found.append(
            [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in ids.view(size)]
        )
    return found


def _accumulate(
    model: Decoder,
    precision: Precision,
    batches: list[MicroBatch],
    shares: Tensor,
    number: int,
    measures: bool,
) -> Tensor:
    """Forward and backward of a step, launched kernel by kernel."""
    loss, precision.step = torch.zeros((), device=shares.device), number
    for index, (tokens, targets) in enumerate(batches):
        precision.first_token = index * tokens.numel()
        precision.measures = measures and index == len(batches) - 1
        part = model(tokens, targets) * shares[index]
        part.backward()
        loss += part.detach()
    return loss


def _timed(
    step: Callable[[int], Tensor], numbers: range, on_gpu: bool
) -> tuple[list[Tensor], list[float]]:
    """Losses and milliseconds of consecutive steps; on a GPU nothing waits between them."""
    losses: list[Tensor] = []
    if not on_gpu:
        marks = [time.perf_counter()]
        for number in numbers:
            losses.append(step(number))
            marks.append(time.perf_counter())
        return losses, [1e3 * (end - start) for start, end in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    events[0].record()
    for number, event in zip(numbers, events[1:], strict=True):
        losses.append(step(number))
        event.record()
    torch.cuda.synchronize()
    pairs = pairwise(events)
    return losses, [start.elapsed_time(end) for start, end in pairs]


def _products(precision: Precision) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in precision.ledger.rows():
        counts[product_of(entry)] += int(entry["count"])
    return dict(counts)


if __name__ == "__main__":
    sys.exit(serve(lambda given: asdict(run(Setup(**given))), sys.argv[1:]))
