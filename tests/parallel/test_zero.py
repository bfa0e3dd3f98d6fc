"""ZeRO 1 and 2 against a run on one rank."""

import math
import os
import re
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.optim import build_optimizer, clip_grad_norm_on_device
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.bucket import plan_buckets
from megafp4.parallel.collectives import Group
from megafp4.parallel.reduce import FlatReducer
from tests.parallel import reduce_ranks
from tests.parallel.zero_runs import (
    OPTIM,
    Outcome,
    make,
    run,
    serial,
    sharded,
    tokens,
    zero,
)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("recipe", "stage", "size", "each"),
    [
        ("bf16", 1, 4, 1),
        ("bf16", 2, 2, 2),
        ("mxfp4", 2, 2, 2),
        ("fp4", 1, 2, 1),
        ("dqt8", 1, 3, 1),
        ("dqt8", 2, 2, 2),
    ],
)
def test_bitwise_equal_to_serial(recipe: str, stage: int, size: int, each: int) -> None:
    results = reduce_ranks.run_well(_sharded, size, recipe, each, {"stage": stage})
    expected = serial(recipe, size * each)
    losses = {key: loss for result in results for key, loss in result.losses.items()}
    assert losses.keys() == expected.losses.keys()
    assert all(torch.equal(losses[key], loss) for key, loss in expected.losses.items())
    for result in results:
        assert result.norms == pytest.approx(expected.norms, rel=1e-12)
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
    assert min(expected.norms) > OPTIM.clip_grad  # every step is clipped
    assert results[0].notes["buckets"] >= 4


def _sharded(rank: int, size: int, recipe: str, each: int, options: dict[str, Any]) -> Outcome:
    return sharded(rank, size, recipe, each, **options)


def test_local_accumulation_sums_in_another_order() -> None:
    """Stage 1 with two micro-batches on each rank adds pairs: close to serial, not equal."""
    found = reduce_ranks.run_well(_sharded, 2, "bf16", 2, {"stage": 1})[0]
    expected = serial("bf16", 4)
    assert not same(found.optimizer, expected.optimizer)
    assert found.norms == pytest.approx(expected.norms, rel=1e-3)


def test_stage_2_keeps_only_the_gradients_it_owns() -> None:
    first, second = (
        reduce_ranks.run_well(_sharded, 2, "bf16", 2, {"stage": stage, "steps": 1})[0].notes
        for stage in (1, 2)
    )
    # Between the micro-batches a shard and all buckets, against a shard.
    assert first["held"][0] == 3 * second["held"][0]
    assert first["held"][1] == second["held"][0] == second["held"][1]


def test_state_is_sharded() -> None:
    params = sum(p.numel() for p in make("bf16")[0].parameters())
    for result in reduce_ranks.run_well(_sharded, 4, "bf16", 1, {"steps": 1}):
        assert 0 < result.notes["state bytes"] < 8 * params / 2
    whole = sum(
        result.notes["state bytes"]
        for result in reduce_ranks.run_well(_sharded, 4, "bf16", 1, {"steps": 1})
    )
    assert whole == 8 * params


@pytest.mark.parametrize("stage", [1, 2])
def test_fp8_gradients_train(stage: int) -> None:
    options = {"stage": stage, "wire": "fp8", "steps": 4}
    results = reduce_ranks.run_well(_sharded, 2, "bf16", 2, options)
    exact = serial("bf16", 4, 4)
    assert same(results[0].model, results[1].model)
    losses = {key: loss for result in results for key, loss in result.losses.items()}
    for step in range(4):
        found = sum(loss for (at, _), loss in losses.items() if at == step)
        expected = sum(loss for (at, _), loss in exact.losses.items() if at == step)
        assert float(found) == pytest.approx(float(expected), rel=0.02)
    assert not same(results[0].optimizer, exact.optimizer)


@pytest.mark.parametrize(
    ("recipe", "states"),
    [
        *(("mxfp4", states) for states in ("fp8lm", "coat", "bf16-sr", "coat-sr", "eco")),
        ("dqt8", "coat"),
        ("dqt4", "coat-sr"),
    ],
)
def test_short_states_are_those_of_the_whole_parameters(recipe: str, states: str) -> None:
    """Groups that share scales are not cut; BF16 weights are gathered as the owners keep them."""
    options = {"stage": 2, "states": states}
    results = reduce_ranks.run_well(_sharded, 2, recipe, 2, options)
    expected = serial(recipe, 4, states=states)
    for result in results:
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
    dtypes = {tensor.dtype for tensor in results[0].model.values()}
    assert (torch.bfloat16 in dtypes) == (states != "coat")


def _continue(
    rank: int, size: int, recipe: str, total: int, state: Any, states: str = "fp32"
) -> Outcome:
    """Go on from a checkpoint for one step."""
    model, precision = make(recipe)
    optimizer = zero(model, rank, size, stage=2, states=states)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return run(model, precision, optimizer, list(range(rank, total, size)), total, [2])


@pytest.mark.parametrize("recipe", ["bf16", "dqt8"])
def test_another_number_of_ranks_goes_on_bit_for_bit(recipe: str) -> None:
    expected = serial(recipe, 4)
    options = {"stage": 2, "steps": 2}
    half = reduce_ranks.run_well(_sharded, 2, recipe, 2, options)[1]
    state = half.model, half.optimizer
    for result in reduce_ranks.run_well(_continue, 4, recipe, 4, state):
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
    # The same state suits an optimizer without ZeRO.
    model, precision = make(recipe)
    optimizer = build_optimizer(model.named_parameters(), OPTIM, seed=1)
    model.load_state_dict(half.model)
    optimizer.load_state_dict(half.optimizer)
    alone = run(model, precision, optimizer, [0, 1, 2, 3], 4, [2])
    assert same(alone.model, expected.model)


def test_8_bit_moments_of_a_grid_go_from_one_rank_to_two_and_back() -> None:
    expected = serial("dqt8", 2, states="coat")
    first = serial("dqt8", 2, steps=2, states="coat")
    state = first.model, first.optimizer
    for result in reduce_ranks.run_well(_continue, 2, "dqt8", 2, state, "coat"):
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
    half = reduce_ranks.run_well(_sharded, 2, "dqt8", 1, {"steps": 2, "states": "coat"})[1]
    model, precision = make("dqt8")
    optimizer = build_optimizer(model.named_parameters(), replace(OPTIM, states="coat"), seed=1)
    model.load_state_dict(half.model)
    optimizer.load_state_dict(half.optimizer)
    alone = run(model, precision, optimizer, [0, 1], 2, [2])
    assert same(alone.model, expected.model)
    assert same(alone.optimizer, expected.optimizer)


def _cut_within_a_group(rank: int, size: int) -> list[str]:
    param = nn.Parameter(torch.empty(()).expand(6, 65))
    param.grid = GridWeight.from_dense(torch.ones(6, 65), 8)  # type: ignore[attr-defined]
    group = reduce_ranks.world(rank, size)
    config = replace(OPTIM, states="coat-sr")
    try:
        ZeroOptimizer({"w": param}, config, 1, group, FlatReducer(group))
    except ConfigError as error:
        return [str(error)]
    return []


def test_ranks_do_not_share_a_group_of_8_bit_moments() -> None:
    """Every rank says so, also one whose own rows begin at a group."""
    for (said,) in reduce_ranks.run_well(_cut_within_a_group, 2):
        assert "optim.states coat-sr" in said
        assert "2 ranks cut 'w' [6, 65] within one: choose a width" in said


def _not_finite(rank: int, size: int, wire: str) -> dict[str, Any]:
    model, _ = make("bf16")
    optimizer = zero(model, rank, size, wire)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.begin(last=True)
    loss = model(*tokens(0, rank))
    (loss * (math.inf if rank == 1 else 1.0)).backward()
    norm, scale = optimizer.clip(1.0)
    try:
        optimizer.step(0, 1e-2, scale)
        raised = ""
    except DivergenceError as error:
        raised = str(error)
    moved = not same(dict(model.named_parameters()), before)
    return {"norm": norm, "raised": raised, "moved": moved}


@pytest.mark.parametrize("wire", ["fp8", "fp32"])
def test_what_is_not_finite_on_one_rank_stops_all(wire: str) -> None:
    for result in reduce_ranks.run_well(_not_finite, 3, wire):
        assert not math.isfinite(result["norm"])
        assert "NaN or Inf" in result["raised"]
        assert not result["moved"]


def _cut_model(rank: int, size: int) -> tuple[float, float]:
    """Norm of a model of which each rank holds a part, and the norms replicated."""
    model, _ = make("bf16")
    group = Group("dp")
    params = dict(model.named_parameters())
    norms = [name for name in params if "norm" in name]
    optimizer = ZeroOptimizer(
        params,
        OPTIM,
        1,
        group,
        FlatReducer(group),
        model=reduce_ranks.world(rank, size),
        elsewhere=norms if rank else (),
    )
    optimizer.begin(last=True)
    model(*tokens(0, 0)).backward()
    found = float(optimizer.norm())
    other, _ = make("bf16")
    other(*tokens(0, 0)).backward()
    squares = {n: float(p.grad.double().square().sum()) for n, p in other.named_parameters()}
    cut = sum(square for name, square in squares.items() if name not in norms)
    return found, math.sqrt(size * cut + sum(squares[name] for name in norms))


def test_replicated_parameters_count_once() -> None:
    for found, expected in reduce_ranks.run_well(_cut_model, 2):
        assert found == pytest.approx(expected, rel=1e-9)


def test_grid_statistics_are_those_of_the_whole_weight() -> None:
    results = reduce_ranks.run_well(_sharded, 3, "dqt8", 1, {"steps": 1})
    model, precision = make("dqt8")
    optimizer = build_optimizer(model.named_parameters(), OPTIM, seed=1)
    run(model, precision, optimizer, [0, 1, 2], 3, [0])
    expected: dict[str, StoreStatistics] = optimizer.grid_statistics
    assert expected
    for result in results:
        assert result.notes["grids"] == {n: int(one.flips) for n, one in expected.items()}


def _die(rank: int, size: int, how: int) -> None:
    """Train until rank 1 is killed, or stopped, in the middle of a backward pass."""
    model, precision = make("bf16")
    optimizer = zero(model, rank, size)

    def strike(grad: Tensor) -> None:
        if precision.step == 1 and rank == 1:
            os.kill(os.getpid(), how)

    next(model.parameters()).register_hook(strike)
    run(model, precision, optimizer, [rank], size, range(1000))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_all_others_in_words(how: signal.Signals) -> None:
    """Killed: connections break at once. Stuck: the others' patience, 6 s here, runs out."""
    start = time.monotonic()
    results = reduce_ranks.run(_die, 3, how, patience_s=6, expect_lost=1)
    assert time.monotonic() - start < 60
    for rank in (0, 2):
        assert isinstance(results[rank], str)
        words = r"CommunicationError: rank \d of 3 in group 'dp' lost the others during"
        assert re.match(words, results[rank])
    assert results[1] is None


def test_unused_parameters_are_named() -> None:
    model, _ = make("bf16")
    params = dict(model.named_parameters()) | {"idle": torch.nn.Parameter(torch.zeros(3, 3))}
    group = Group("dp")
    optimizer = ZeroOptimizer(params, OPTIM, 1, group, FlatReducer(group))
    optimizer.begin(last=True)
    model(*tokens(0, 0)).backward()
    with pytest.raises(ConfigError, match="'idle' and 0 other parameters got no gradient"):
        optimizer.clip(1.0)


def test_refusals() -> None:
    model, _ = make("bf16")
    params, group = dict(model.named_parameters()), Group("dp")
    with pytest.raises(ConfigError, match="stage 3: choose 1 or 2"):
        ZeroOptimizer(params, OPTIM, 1, group, FlatReducer(group), stage=3)  # type: ignore[arg-type]
    half = {"w": torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))}
    with pytest.raises(ConfigError, match=r"torch.float32 parameters"):
        ZeroOptimizer(half, OPTIM, 1, group, FlatReducer(group))
    optimizer = ZeroOptimizer(params, OPTIM, 1, group, FlatReducer(group))
    with pytest.raises(ConfigError, match="clip_grad is -1"):
        optimizer.clip(-1)
    state = optimizer.state_dict()
    name = next(iter(state))
    with pytest.raises(CheckpointError, match="lacks"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(CheckpointError, match="unknown 'more'"):
        optimizer.load_state_dict(state | {"more": state[name]})
    with pytest.raises(CheckpointError, match=f"'{name}' of the saved optimizer is torch.float16"):
        optimizer.load_state_dict(state | {name: state[name].half()})


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("by_rows", [[], ["b"]])
def test_every_element_is_owned_once(ranks: int, by_rows: list[str]) -> None:
    shapes = {f"p{i}": torch.Size((3 + 5 * i, 7 * i + 1)) for i in range(30)}
    kinds = {name: "ab"[i % 3 == 0] for i, name in enumerate(shapes)}
    buckets = plan_buckets(shapes, kinds, ranks, by_rows=by_rows, bucket_elements=40_000)
    assert len(buckets) > 3
    assert {name for b in buckets for name in b.names} == shapes.keys()
    owned: dict[str, Tensor] = {
        n: torch.zeros(s.numel(), dtype=torch.int) for n, s in shapes.items()
    }
    for bucket in buckets:
        used = torch.zeros(bucket.numel, dtype=torch.int)
        used[bucket.gaps] += 1
        for rank in range(ranks):
            pieces = bucket.owned(rank)
            assert len({piece.name for piece in pieces}) == len(pieces)
            for piece in pieces:
                assert kinds[piece.name] == bucket.kind
                assert 0 <= piece.offset < piece.offset + piece.numel <= bucket.shard
                owned[piece.name][piece.start : piece.stop] += 1
                first = rank * bucket.shard + piece.offset
                used[first : first + piece.numel] += 1
                if bucket.kind in by_rows:
                    assert piece.start % shapes[piece.name][1] == 0
                else:
                    assert piece.start % 128 == 0
        assert (used == 1).all()
    assert all((count == 1).all() for count in owned.values())


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_one_gpu_agrees_with_the_plain_optimizer(stage: Any) -> None:
    """Streams, fused steps and flat weights on a GPU; nothing is sent."""
    weights = []
    for sharding in (False, True):
        model, _ = make("bf16")
        model.to("cuda")
        params = dict(model.named_parameters())
        optimizer: Any = build_optimizer(params.items(), OPTIM, seed=1, fused=True)
        if sharding:
            group = Group("dp")
            optimizer = ZeroOptimizer(
                params, OPTIM, 1, group, FlatReducer(group), stage=stage, fused=True
            )
        for step in range(3):
            for index in range(2):
                if sharding:
                    optimizer.begin(last=index == 1)
                pair = [one.to("cuda") for one in tokens(step, index)]
                (model(*pair) / 2).backward()
            if sharding:
                _, scale = optimizer.clip_on_device(OPTIM.clip_grad)
            else:
                _, scale = clip_grad_norm_on_device(model.parameters(), OPTIM.clip_grad)
            optimizer.step(step, OPTIM.lr, scale)
            optimizer.zero_grad()
        weights.append({name: param.detach().cpu() for name, param in params.items()})
    for name, found in weights[1].items():
        torch.testing.assert_close(found, weights[0][name], rtol=1e-3, atol=1e-3)
