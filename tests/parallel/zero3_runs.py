"""Small runs under ZeRO-3, on the micro-batches of tests.parallel.zero_runs."""

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megafp4.linear import Linear
from megafp4.models import QuantizedFactory
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.optim import build_optimizer
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.parallel.reduce import FlatReducer
from megafp4.precision import Precision
from tests.models.small import build
from tests.parallel import zero_runs
from tests.parallel.pool import Ranks
from tests.parallel.reduce_ranks import world
from tests.parallel.zero_runs import OPTIM, Outcome, tokens

CONFIG = replace(zero_runs.CONFIG, vocab_size=104)
"""Two ranks cut no group of 128; `tokens` uses 101 of the words."""


def run_on(ranks: Ranks, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, size, *args)`` on every rank."""
    answers = ranks.run(_call, function, *args)
    return [torch.load(io.BytesIO(answer), weights_only=False) for answer in answers]


def _call(function: Callable[..., Any], *args: Any) -> bytes:
    answer = io.BytesIO()  # a plain pickle knows no FP8
    torch.save(function(dist.get_rank(), dist.get_world_size(), *args), answer)
    return answer.getvalue()


def make(recipe: str, vocab_size: int = CONFIG.vocab_size) -> tuple[Decoder, Precision]:
    """Build the model of a run."""
    config, precision = replace(CONFIG, vocab_size=vocab_size), Precision(seed=1)
    model = build(config, QuantizedFactory(recipe, "reference", precision, config.layers))
    for module in linears(model):
        if module.recipe.grid is not None:
            module.to_grid()
    return model, precision


def zero3(
    model: Any,
    rank: int,
    size: int,
    wire: Any = "fp32",
    states: Any = "fp32",
    offload: bool = False,
    **options: Any,
) -> Zero3Optimizer:
    """Cut a model and make the optimizer of one rank."""
    group = world(rank, size)
    config = replace(OPTIM, states=states, offload=offload)
    reducer = FlatReducer(group, wire, 2)
    return Zero3Optimizer(model, model.blocks, config, 1, group, reducer, **options)


def train(
    model: Decoder,
    precision: Precision,
    optimizer: Zero3Optimizer,
    mine: list[int],
    total: int,
    steps: Iterable[int],
) -> Outcome:
    """Train as :func:`tests.parallel.zero_runs.run` does."""
    outcome = Outcome()
    for step in steps:
        precision.step = step
        for index in mine:
            precision.first_token = index * CONFIG.seq_len
            optimizer.begin(last=index == mine[-1])
            loss = model(*tokens(step, index)) / total
            loss.backward()
            outcome.losses[step, index] = loss.detach()
        norm, scale = optimizer.clip(OPTIM.clip_grad)
        outcome.norms.append(norm)
        optimizer.step(step, OPTIM.lr, scale)
        optimizer.zero_grad()
    outcome.model = optimizer.weights()
    outcome.optimizer = optimizer.state_dict()
    return outcome


def serial(recipe: str, total: int, steps: int, states: Any = "fp32", **shape: int) -> Outcome:
    """Train on one rank."""
    model, precision = make(recipe, **shape)
    config = replace(OPTIM, states=states)
    optimizer = build_optimizer(model.named_parameters(), config, seed=1)
    return zero_runs.run(model, precision, optimizer, list(range(total)), total, range(steps))


def sharded(
    rank: int,
    size: int,
    recipe: str,
    each: int,
    steps: int = 3,
    recompute: Any = "none",
    shape: dict[str, int] | None = None,
    **options: Any,
) -> Outcome:
    """Train on one rank of several, which take micro-batches in turn."""
    model, precision = make(recipe, **shape or {})
    model.execute(Execution(recompute=recompute))
    parameters = sum(param.numel() for param in model.parameters())
    optimizer = zero3(model, rank, size, **options)
    mine = list(range(rank, size * each, size))
    outcome = train(model, precision, optimizer, mine, size * each, range(steps))
    outcome.notes = {
        "parameters": parameters,
        "weight bytes": optimizer.weight_bytes(),
        "state bytes": optimizer.state_bytes(),
        "operands left": operands_left(model),
        "grids": {name: int(one.flips) for name, one in optimizer.grid_statistics.items()},
        "reduced": optimizer.group.ledger.total(operation="all_to_all"),
    }
    return outcome


def linears(model: nn.Module) -> list[Linear]:
    """The quantized linears."""
    return [module for module in model.modules() if isinstance(module, Linear)]


def operands_left(model: nn.Module) -> int:
    """Operands of weights that the linears hold now."""
    caches = [module.op._cache for module in linears(model)]
    return sum(len(one._kept) + len(getattr(one, "arrived", {})) for one in caches)
