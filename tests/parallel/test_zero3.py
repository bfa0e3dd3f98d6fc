"""ZeRO-3 through FSDP2 against a run on one rank."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.optim import build_optimizer
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.fsdp import share_of
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.reduce import FlatReducer
from tests.parallel.pool import Ranks
from tests.parallel.zero3_runs import (
    CONFIG,
    OPTIM,
    Outcome,
    linears,
    make,
    operands_left,
    run_on,
    serial,
    sharded,
    tokens,
    train,
    zero3,
    zero_runs,
)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in expected
    )


def check(results: list[Outcome], expected: Outcome) -> None:
    losses = {key: loss for result in results for key, loss in result.losses.items()}
    assert losses.keys() == expected.losses.keys()
    assert all(torch.equal(losses[key], loss) for key, loss in expected.losses.items())
    for result in results:
        assert result.norms == pytest.approx(expected.norms, rel=1e-12)
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
        assert result.notes["operands left"] == 0
    assert min(expected.norms) > OPTIM.clip_grad  # every step is clipped


def _sharded(rank: int, size: int, recipe: str, each: int, options: dict[str, Any]) -> Outcome:
    return sharded(rank, size, recipe, each, **options)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4", "dqt8", "nvfp4"])
def test_ten_steps_are_those_of_one_rank(two: Ranks, recipe: str) -> None:
    results = run_on(two, _sharded, recipe, 1, {"steps": 10})
    check(results, serial(recipe, 2, 10))


@pytest.mark.parametrize(
    ("recipe", "size", "options"),
    [
        ("mxfp4", "two", {"recompute": "full"}),
        ("mxfp4-fp8", "two", {"recompute": "selective"}),
        ("fp8-row", "two", {"operands": False}),
        ("fp4-direct", "four", {}),
    ],
)
def test_micro_batches_are_added_in_serial_order(
    request: pytest.FixtureRequest, recipe: str, size: str, options: dict[str, Any]
) -> None:
    ranks: Ranks = request.getfixturevalue(size)
    results = run_on(ranks, _sharded, recipe, 2, {"steps": 2, **options})
    check(results, serial(recipe, 2 * ranks.count, 2))


@pytest.mark.parametrize(
    ("recipe", "states"), [("mxfp4", "fp8lm"), ("mxfp4", "coat"), ("dqt8", "coat")]
)
def test_short_states_are_those_of_the_whole_parameters(
    two: Ranks, recipe: str, states: str
) -> None:
    results = run_on(two, _sharded, recipe, 1, {"states": states})
    check(results, serial(recipe, 2, 3, states))
    dtypes = {tensor.dtype for tensor in results[0].model.values()}
    assert (torch.bfloat16 in dtypes) == (states == "fp8lm")


def test_ranks_may_have_different_numbers_of_rows(two: Ranks) -> None:
    shape = {"vocab_size": 101}
    results = run_on(two, _sharded, "bf16", 1, {"shape": shape, "states": "fp32"})
    check(results, serial("bf16", 2, 3, **shape))


def test_between_steps_a_rank_keeps_its_share(two: Ranks) -> None:
    for recipe, least, most in (("bf16", 4, 4), ("dqt8", 1, 1.5)):
        for result in run_on(two, _sharded, recipe, 1, {"steps": 1}):
            share = result.notes["parameters"] / 2
            assert least * share <= result.notes["weight bytes"] <= most * share
            assert result.notes["state bytes"] == 8 * share


def _bytes_sent(rank: int, size: int, recipes: list[str]) -> list[float]:
    """Bytes that a weight of a linear takes when its block is gathered."""
    found = []
    for recipe in recipes:
        model, _ = make(recipe)
        inside = sum(param.numel() for param in model.blocks.parameters())
        matrices = sum(module.weight.numel() for module in linears(model))
        optimizer = zero3(model, rank, size)
        with torch.no_grad():
            model(*tokens(0, 0))
        ledger = optimizer.group.ledger
        sent = sum(ledger.total(what=f"weights of unit {i}") for i in range(CONFIG.layers))
        # One of two ranks sends half, biases and norms in FP32.
        found.append((2 * sent - 4 * (inside - matrices)) / matrices)
    return found


def test_weights_travel_as_the_recipe_multiplies_them(two: Ranks) -> None:
    expected = {
        "bf16": (2, 2),
        "fp8": (1, 1),
        "nvfp4": (1, 1.01),
        "fp4-direct": (1.5, 1.6),
        "dqt8": (1, 1.1),
        "dqt4": (0.5, 0.6),
        "fp4": (4, 4),
    }
    for found in run_on(two, _bytes_sent, list(expected)):
        for sent, (least, most) in zip(found, expected.values(), strict=True):
            assert least <= sent <= most


def test_fp8_gradients_train(two: Ranks) -> None:
    options = {"wire": "fp8", "steps": 4}
    results = run_on(two, _sharded, "bf16", 2, options)
    exact = serial("bf16", 4, 4)
    assert same(results[0].model, results[1].model)
    losses = {key: loss for result in results for key, loss in result.losses.items()}
    for step in range(4):
        found = sum(loss for (at, _), loss in losses.items() if at == step)
        expected = sum(loss for (at, _), loss in exact.losses.items() if at == step)
        assert float(found) == pytest.approx(float(expected), rel=0.02)
    assert not same(results[0].optimizer, exact.optimizer)
    full = run_on(two, _sharded, "bf16", 2, {"steps": 4})[0].notes["reduced"]
    assert results[0].notes["reduced"] < 0.26 * full


def _continue(rank: int, size: int, recipe: str, total: int, state: Any) -> Outcome:
    """Go on from a checkpoint for one step."""
    model, precision = make(recipe)
    optimizer = zero3(model, rank, size)
    optimizer.load_weights(state[0])
    optimizer.load_state_dict(state[1])
    return train(model, precision, optimizer, list(range(rank, total, size)), total, [2])


@pytest.mark.parametrize("recipe", ["bf16", "dqt8"])
def test_another_number_of_ranks_goes_on_bit_for_bit(two: Ranks, four: Ranks, recipe: str) -> None:
    expected = serial(recipe, 4, 3)
    half = run_on(two, _sharded, recipe, 2, {"steps": 2})[1]
    state = half.model, half.optimizer
    for result in run_on(four, _continue, recipe, 4, state):
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
    model, precision = make(recipe)
    alone = build_optimizer(model.named_parameters(), OPTIM, seed=1)
    model.load_state_dict(half.model)
    alone.load_state_dict(half.optimizer)
    assert same(zero_runs.run(model, precision, alone, [0, 1, 2, 3], 4, [2]).model, expected.model)


def _evaluated(rank: int, size: int, recipe: str) -> list[float]:
    """Losses without gradients: before a step, after it, and after the first weights came back."""
    model, precision = make(recipe)
    optimizer = zero3(model, rank, size)
    first = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    found = []

    def evaluate() -> None:
        with torch.no_grad():
            found.append(float(model(*tokens(9, 9))))

    evaluate()
    train(model, precision, optimizer, [rank], size, [0])
    evaluate()
    optimizer.load_weights(first)
    evaluate()
    assert operands_left(model) == 0
    return found


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "dqt8"])
def test_evaluation_sees_the_weights_of_the_moment(two: Ranks, recipe: str) -> None:
    model, _ = make(recipe)
    with torch.no_grad():
        expected = float(model(*tokens(9, 9)))
    for before, after, again in run_on(two, _evaluated, recipe):
        assert before == again == expected
        assert after != before


def _not_finite(rank: int, size: int) -> dict[str, Any]:
    model, _ = make("bf16")
    optimizer = zero3(model, rank, size, "fp8")
    before = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    optimizer.begin(last=True)
    (model(*tokens(0, rank)) * (math.inf if rank == 1 else 1.0)).backward()
    norm, scale = optimizer.clip(1.0)
    with pytest.raises(DivergenceError, match="NaN or Inf"):
        optimizer.step(0, 1e-2, scale)
    return {"norm": norm, "moved": not same(optimizer.weights(), before)}


def test_what_is_not_finite_on_one_rank_stops_all(two: Ranks) -> None:
    for result in run_on(two, _not_finite):
        assert not math.isfinite(result["norm"])
        assert not result["moved"]


def test_grid_statistics_are_those_of_the_whole_weight(two: Ranks) -> None:
    results = run_on(two, _sharded, "dqt8", 1, {"steps": 1})
    model, precision = make("dqt8")
    optimizer = build_optimizer(model.named_parameters(), OPTIM, seed=1)
    zero_runs.run(model, precision, optimizer, [0, 1], 2, [0])
    assert optimizer.grid_statistics
    for result in results:
        expected = {n: int(one.flips) for n, one in optimizer.grid_statistics.items()}
        assert result.notes["grids"] == expected


def _partial(rank: int, size: int) -> tuple[float, float, float]:
    """Norm, measured twice, where tp ranks hold addends of the norms' gradients; and expected."""
    mesh = Mesh(MeshSizes(dp=2, tp=2))
    model, _ = make("bf16")
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    partial = dict.fromkeys(norms, mesh.tp)
    reducer = FlatReducer(mesh.replicas, "fp32")
    optimizer = Zero3Optimizer(
        model,
        model.blocks,
        OPTIM,
        1,
        mesh.replicas,
        reducer,
        elsewhere=["embedding.weight"],
        partial=partial,
    )
    optimizer.begin(last=True)
    model(*tokens(0, mesh.dp.rank)).backward()
    found = float(optimizer.norm()), float(optimizer.norm())
    other, _ = make("bf16")
    for index in range(2):
        other(*tokens(0, index)).backward()
    squares = {n: float(p.grad.double().square().sum()) for n, p in other.named_parameters()}
    del squares["embedding.weight"]
    total = sum(square * (4 if name in norms else 1) for name, square in squares.items())
    return *found, math.sqrt(total)


def test_partial_gradients_are_summed_once(four: Ranks) -> None:
    for first, second, expected in run_on(four, _partial):
        assert first == second == pytest.approx(expected, rel=1e-6)


def _refusals(rank: int, size: int) -> list[str]:
    """What is said to wrong requests."""
    said: list[str] = []

    def attempt(function: Any, *args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except (ConfigError, CheckpointError) as error:
            said.append(str(error))

    attempt(zero3, make("bf16", vocab_size=101)[0], rank, size, states="coat")
    attempt(zero3, make("bf16")[0].half(), rank, size)
    model, _ = make("fp8")
    optimizer = zero3(model, rank, size)
    attempt(optimizer.clip, -1)
    attempt(optimizer.clip, 1)
    state, weights = optimizer.state_dict(), optimizer.weights()
    name = next(iter(state))
    attempt(optimizer.load_state_dict, {k: v for k, v in state.items() if k != name})
    attempt(optimizer.load_state_dict, state | {name: state[name].half()})
    attempt(optimizer.load_weights, {})
    for linear in linears(model):
        linear.set_recipe("bf16")
    attempt(model, *tokens(0, 0))
    assert weights.keys() == dict(make("fp8")[0].named_parameters()).keys()
    return said


def test_refusals(two: Ranks) -> None:
    expected = [
        "2 ranks cut 'embedding.weight' [101, 64] within one: choose a width",
        "give torch.float32 parameters",
        "clip_grad is -1",
        "got no gradient in a step",
        "lacks",
        "of the saved optimizer is torch.float16",
        "of the saved model is missing",
        "changed its recipe",
    ]
    for said in run_on(two, _refusals):
        assert [part in sentence for part, sentence in zip(expected, said, strict=True)] == [
            True
        ] * len(expected)


def _unused(rank: int, size: int) -> str:
    model, _ = make("bf16")
    model.final_norm.extra = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = zero3(model, rank, size)
    optimizer.begin(last=True)
    try:
        model(*tokens(0, 0)).backward()
    except ConfigError as error:
        return f"said: {error}"
    return "silent"


def test_unused_parameters_are_refused(two: Ranks) -> None:
    for said in run_on(two, _unused):
        assert "some parameters got no gradient in the gradients of the rest" in said


def test_one_rank_is_refused() -> None:
    model, _ = make("bf16")
    group = Group("dp")
    with pytest.raises(ConfigError, match=r"set parallel\.zero to 1"):
        Zero3Optimizer(model, model.blocks, OPTIM, 1, group, FlatReducer(group))


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 2), (5, 4), (1, 3)])
def test_rows_are_shared_as_torch_chunks_them(rows: int, ranks: int) -> None:
    chunks = torch.arange(rows * 3).view(rows, 3).chunk(ranks)
    for rank in range(ranks):
        share = share_of(torch.Size((rows, 3)), rank, ranks)
        assert share.numel == (chunks[rank].numel() if rank < len(chunks) else 0)
        if share.numel:
            assert share.first == chunks[rank][0, 0] // 3
