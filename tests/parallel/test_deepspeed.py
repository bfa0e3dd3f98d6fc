"""DeepSpeed steps the same models on the same batches to the same weights, to rounding.

Skipped without the package: it compiles an operator of its own when it first runs on a CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.optim.deepspeed import DeepSpeedOptimizer
from tests.parallel.pool import Ranks
from tests.parallel.zero_runs import CONFIG, OPTIM, make, serial, tokens

EACH, STEPS = 2, 4


@pytest.fixture
def fresh() -> Iterator[Ranks]:
    """Two processes of a test's own: DeepSpeed keeps its groups for as long as a process lives."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def engine_run(
    recipe: str, stage: Any, offload: bool, steps: range, before: tuple[Any, Any] | None
) -> tuple[dict[tuple[int, int], float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Train on one rank of a DeepSpeed job: losses, norms, weights and states."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    model, precision = make(recipe)
    optimizer = DeepSpeedOptimizer(model, replace(OPTIM, offload=offload), EACH, 1, stage)
    if before is not None:
        optimizer.load_weights(before[0])
        optimizer.load_state_dict(before[1], steps.start)
    mine = list(range(rank, size * EACH, size))
    losses, norms = {}, []
    for step in steps:
        precision.step = step
        for index in mine:
            precision.first_token = index * CONFIG.seq_len
            loss = optimizer.engine(*tokens(step, index)) / (size * EACH)
            losses[step, index] = float(loss.detach())
            optimizer.backward(loss, last=index == mine[-1])
        norms.append(optimizer.step(OPTIM.lr))
    return losses, norms, optimizer.weights(), optimizer.state_dict()


def three_runs(stage: Any) -> tuple[Any, Any, Any]:
    """All steps, the first two, and the others from where these end; in one process each."""
    early = engine_run("bf16", stage, False, range(2), None)
    resumed = engine_run("bf16", stage, False, range(2, STEPS), early[2:])
    return engine_run("bf16", stage, False, range(STEPS), None), early, resumed


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-30))


@needs_deepspeed
@pytest.mark.parametrize(
    ("recipe", "stage", "offload", "bound"),
    [("bf16", 1, False, 1e-4), ("mxfp4", 2, False, 0.02), ("bf16", 3, False, 1e-4),
     ("mxfp4", 3, False, 0.02), ("bf16", 2, True, 1e-4)],
)  # fmt: skip
def test_it_trains_as_the_serial_optimizer(
    fresh: Ranks, recipe: str, stage: int, offload: bool, bound: float
) -> None:
    expected = serial(recipe, 2 * EACH, STEPS)
    found = fresh.run(engine_run, recipe, stage, offload, range(STEPS), None)
    losses = found[0][0] | found[1][0]
    assert losses.keys() == expected.losses.keys()
    for place, loss in expected.losses.items():
        # The first losses are of the same weights: bit for bit.
        limit = bound if place[0] else 0.0
        assert abs(losses[place] - float(loss)) <= limit * float(loss), place
    # The first gradient is that of the same weights; Adam's other rounding parts the later ones.
    for step, (norm, exact) in enumerate(zip(found[0][1], expected.norms, strict=True)):
        assert norm == pytest.approx(exact, rel=3 * bound if step else 1e-6)
    for name, weight in expected.model.items():
        if name in found[0][2]:
            assert recipe != "bf16" or off(found[0][2][name], weight) < 5e-3, name
            assert torch.equal(found[0][2][name], found[1][2][name]), name
    assert found[0][2].keys() == expected.model.keys()


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_it_goes_on_from_weights_and_states(fresh: Ranks, stage: int) -> None:
    expected, early, resumed = fresh.run(three_runs, stage)[0]
    assert early[3].keys() == serial("bf16", 2, 1).optimizer.keys()
    weights, states = expected[2:]
    for name, weight in weights.items():
        assert torch.equal(resumed[2][name], weight), name
    for name, value in states.items():
        assert torch.equal(resumed[3][name], value), name


def test_what_it_cannot_step_is_refused() -> None:
    model, _ = make("dqt8")
    with pytest.raises(ConfigError, match="lives on a grid, which DeepSpeed cannot step"):
        DeepSpeedOptimizer(model, OPTIM, 1, 1)
    model, _ = make("bf16")
    with pytest.raises(ConfigError, match=r"optim.states 'fp8lm' is not DeepSpeed's"):
        DeepSpeedOptimizer(model, replace(OPTIM, states="fp8lm"), 1, 1)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is installed")
def test_without_the_package_one_sentence_says_what_to_install() -> None:
    model, _ = make("bf16")
    with pytest.raises(UnsupportedError, match=r"pip install 'megafp4\[deepspeed\]'"):
        DeepSpeedOptimizer(model, OptimConfig(), 1, 1)
