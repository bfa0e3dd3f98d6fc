"""Small runs under ZeRO and without it, on the same micro-batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megafp4.config import OptimConfig
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory
from megafp4.models.decoder import Decoder
from megafp4.optim import Optimizer, build_optimizer, clip_grad_norm
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.reduce import FlatReducer
from megafp4.precision import Precision
from tests.models.small import build, small_config
from tests.parallel.reduce_ranks import world

CONFIG = small_config(seq_len=64)
OPTIM = OptimConfig(lr=1e-2, clip_grad=0.5)
BUCKET = 20_000
"""Elements of a bucket: the model fills several."""


def make(recipe: str) -> tuple[Decoder, Precision]:
    """Build the model of a run."""
    precision = Precision(seed=1)
    model = build(CONFIG, QuantizedFactory(recipe, "reference", precision, CONFIG.layers))
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    return model, precision


def tokens(step: int, index: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of micro-batch ``index`` of a step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    text = torch.randint(CONFIG.vocab_size, (1, CONFIG.seq_len + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


@dataclass
class Outcome:
    """What a run leaves."""

    losses: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By step and micro-batch."""
    norms: list[float] = field(default_factory=list)
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def run(
    model: Decoder,
    precision: Precision,
    optimizer: Optimizer | ZeroOptimizer,
    mine: list[int],
    total: int,
    steps: Iterable[int],
    watch: Callable[[int, int], None] = lambda step, index: None,
) -> Outcome:
    """Train; ``watch`` is called after the backward pass of each micro-batch.

    Args:
        model: What is trained.
        precision: Of the same model.
        optimizer: Of the same model.
        mine: Indices of this rank's micro-batches.
        total: Micro-batches of a step on all ranks.
        steps: Indices of the steps.
        watch: Called with step and micro-batch.
    """
    outcome = Outcome()
    for step in steps:
        precision.step = step
        for index in mine:
            precision.first_token = index * CONFIG.seq_len
            if isinstance(optimizer, ZeroOptimizer):
                optimizer.begin(last=index == mine[-1])
            loss = model(*tokens(step, index)) / total
            loss.backward()
            outcome.losses[step, index] = loss.detach()
            watch(step, index)
        if isinstance(optimizer, ZeroOptimizer):
            norm, scale = optimizer.clip(OPTIM.clip_grad)
        else:
            norm, scale = clip_grad_norm(model.parameters(), OPTIM.clip_grad)
        outcome.norms.append(norm)
        optimizer.step(step, OPTIM.lr, scale)
        optimizer.zero_grad()
    outcome.model = model.state_dict()
    outcome.optimizer = optimizer.state_dict()
    return outcome


def serial(recipe: str, total: int, steps: int = 3, states: Any = "fp32") -> Outcome:
    """Train on one rank."""
    model, precision = make(recipe)
    optimizer = build_optimizer(model.named_parameters(), replace(OPTIM, states=states), seed=1)
    return run(model, precision, optimizer, list(range(total)), total, range(steps))


def zero(
    model: Decoder,
    rank: int,
    size: int,
    wire: Any = "fp32",
    states: Any = "fp32",
    offload: bool = False,
    **options: Any,
) -> ZeroOptimizer:
    """Make the optimizer of one rank."""
    group = world(rank, size)
    params = dict(model.named_parameters())
    reducer = FlatReducer(group, wire, 2)
    config = replace(OPTIM, states=states, offload=offload)
    return ZeroOptimizer(params, config, 1, group, reducer, bucket_elements=BUCKET, **options)


def sharded(
    rank: int, size: int, recipe: str, each: int, steps: int = 3, **options: Any
) -> Outcome:
    """Train on one rank of several, which take micro-batches in turn."""
    model, precision = make(recipe)
    optimizer = zero(model, rank, size, **options)
    mine = list(range(rank, size * each, size))
    held: list[int] = []
    outcome = run(
        model,
        precision,
        optimizer,
        mine,
        size * each,
        range(steps),
        lambda step, index: held.append(optimizer.gradients.held_bytes),
    )
    outcome.notes = {
        "held": held,
        "state bytes": optimizer.state_bytes(),
        "buckets": len(optimizer.buckets),
        "grids": {name: one.flips.item() for name, one in optimizer.grid_statistics.items()},
    }
    return outcome
