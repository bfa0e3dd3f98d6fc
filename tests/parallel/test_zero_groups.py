"""ZeRO inside a larger mesh: partial gradients, gradients written in place, largest magnitudes."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.optim import build_optimizer
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.bucket import plan_buckets
from megafp4.parallel.collectives import Group
from megafp4.parallel.gradients import GradientBuckets, Stage
from megafp4.parallel.reduce import FlatReducer
from tests.parallel import reduce_ranks
from tests.parallel.zero_runs import OPTIM, make, run, zero


def small(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(*shape, generator=generator))
        for name, shape in shapes.items()
    }


def groups_of_four(rank: int) -> tuple[Group, Group]:
    """Ranks 2 * model + data: those of data parallelism, and those that share the model."""
    data, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    model, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    return Group("dp", rank % 2, 2, data), Group("ends", rank // 2, 2, model)


STAGES: tuple[dict[str, tuple[int, ...]], ...] = (
    {"embedding": (50, 24), "first": (24, 24)},
    {"last": (70, 24), "norm": (24,), "embedding": (50, 24)},
)
"""Two stages whose other parameters differ, so that buckets could come to differ too."""


def gradient(name: str, shape: torch.Size, stage: int, data: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * stage + 10 * data + len(name))
    return torch.randn(shape, generator=generator)


def _tied(rank: int, size: int, stage: Stage) -> dict[str, Any]:
    """Two steps of a model whose embedding lies on the first and the last of two stages."""
    group, ends = groups_of_four(rank)
    place, data = rank // 2, rank % 2
    params = small(7, {"embedding": (50, 24)}) | small(
        8 + place, {n: shape for n, shape in STAGES[place].items() if n != "embedding"}
    )
    ordered = {name: params[name] for name in STAGES[place]}
    optimizer = ZeroOptimizer(
        ordered,
        OPTIM,
        1,
        group,
        FlatReducer(group, "fp32"),
        stage=stage,
        model=ends,
        elsewhere=("embedding",) if place else (),
        partial={"embedding": ends},
        weight_amax=True,
    )
    norms = []
    for step in range(2):
        optimizer.begin(last=True)
        losses = [(p * gradient(n, p.shape, place, data)).sum() for n, p in ordered.items()]
        torch.stack(losses).sum().backward()
        norms.append(float(optimizer.norm()))
        assert norms[-1] == float(optimizer.norm())  # asking twice sums once
        _, scale = optimizer.clip(OPTIM.clip_grad)
        optimizer.step(step, 1e-2, scale)
        optimizer.zero_grad()
    return {
        "norms": norms,
        "weights": {name: param.detach() for name, param in ordered.items()},
        "amax": {name: amax.clone() for name, amax in optimizer.weight_amax.items()},
        "homes": [bucket.names for bucket in optimizer.buckets],
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_tied_weights_stay_equal_and_count_once(stage: Stage) -> None:
    results = reduce_ranks.run_well(_tied, 4, stage)
    whole = small(7, {"embedding": (50, 24)})
    for place in (0, 1):
        shapes = {n: s for n, s in STAGES[place].items() if n != "embedding"}
        whole |= small(8 + place, shapes)
    optimizer = build_optimizer(whole.items(), OPTIM, seed=1)
    norms = []
    for step in range(2):
        grads = {name: torch.zeros_like(param) for name, param in whole.items()}
        for place, shapes in enumerate(STAGES):
            for name in shapes:
                for data in (0, 1):
                    grads[name] += gradient(name, whole[name].shape, place, data)
        for name, param in whole.items():
            param.grad = grads[name]
        square = math.fsum(float(grad.double().square().sum()) for grad in grads.values())
        norms.append(math.sqrt(square))
        optimizer.step(step, 1e-2, min(1.0, OPTIM.clip_grad / norms[-1]))
    assert torch.equal(results[0]["weights"]["embedding"], results[2]["weights"]["embedding"])
    for rank, result in enumerate(results):
        assert result["norms"] == pytest.approx(norms, rel=1e-6)
        assert set(result["weights"]) == set(STAGES[rank // 2])
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, whole[name].detach(), rtol=1e-5, atol=1e-5)
            assert result["amax"][name] == weight.abs().amax()
        assert ("embedding",) in result["homes"]


def test_a_partial_gradient_must_be_a_parameters() -> None:
    group = Group("dp")
    params = small(1, {"w": (4, 4)})
    with pytest.raises(ConfigError, match="'v' is to be summed over group 'tp'"):
        ZeroOptimizer(params, OPTIM, 1, group, FlatReducer(group), partial={"v": Group("tp")})


def _amax(rank: int, size: int, states: Any) -> list[tuple[Tensor, Tensor]]:
    """Largest magnitudes that the optimizer keeps and true ones: at first, after steps, loaded."""
    model, precision = make("bf16")
    optimizer = zero(model, rank, size, states=states, weight_amax=True)
    params = dict(model.named_parameters())
    addresses = {name: amax.data_ptr() for name, amax in optimizer.weight_amax.items()}

    def both() -> tuple[Tensor, Tensor]:
        assert optimizer.weight_amax.keys() == params.keys()
        kept = torch.cat(list(optimizer.weight_amax.values()))
        return kept, torch.stack([p.detach().abs().amax().float() for p in params.values()])

    found = [both()]
    run(model, precision, optimizer, [rank], size, [0, 1])
    found.append(both())
    state = optimizer.state_dict()
    with torch.no_grad():
        for param in params.values():
            param.mul_(-3.0)
    optimizer.load_state_dict(state)
    found.append(both())
    assert addresses == {name: amax.data_ptr() for name, amax in optimizer.weight_amax.items()}
    return found


@pytest.mark.parametrize("states", ["fp32", "fp8lm"])
def test_the_largest_magnitudes_of_whole_weights_are_known(states: str) -> None:
    for found in reduce_ranks.run_well(_amax, 3, states):
        for kept, true in found:
            assert kept.dtype == torch.float32
            assert torch.equal(kept, true)
        assert not torch.equal(found[0][0], found[1][0])


class _InPlace(torch.autograd.Function):
    """x * w, whose backward writes w's gradient where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, buckets: GradientBuckets) -> Tensor:
        ctx.x, ctx.weight, ctx.buckets = x, weight, buckets
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        grad, told = dy * ctx.x, ctx.buckets.destination(ctx.weight)
        if told is None:
            return None, grad, None
        place, overwrite = told
        return None, place.copy_(grad) if overwrite else place.add_(grad), None


def buckets_of(params: dict[str, nn.Parameter], stage: Stage) -> GradientBuckets:
    group = Group("dp")
    shapes = {name: param.shape for name, param in params.items()}
    layout = plan_buckets(shapes, dict.fromkeys(shapes, "a"), 1)
    return GradientBuckets(params, layout, FlatReducer(group), stage)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("uses", ["once", "twice", "also elsewhere"])
def test_gradients_are_written_in_place(stage: Stage, uses: str) -> None:
    params = small(3, {"w": (6, 5), "v": (6, 5)})
    buckets = buckets_of(params, stage)
    home, piece = 0, next(p for p in buckets.buckets[0].pieces if p.name == "w")
    arrived: list[bool] = []

    def watch(param: Tensor) -> None:
        assert param.grad is not None
        filling = buckets._fillings[home]
        arrived.append(param.grad.data_ptr() == piece.of(filling.buffer).data_ptr())

    # Before the buckets' own hook, which takes the gradient away.
    hooks = params["w"]._post_accumulate_grad_hooks
    taking = dict(hooks)
    hooks.clear()
    params["w"].register_post_accumulate_grad_hook(watch)
    hooks.update({key + 10_000: hook for key, hook in taking.items()})
    expected = torch.zeros(6, 5)
    for index in range(3):
        x = torch.randn(6, 5)
        buckets.begin(last=index == 2)
        y = _InPlace.apply(x, params["w"], buckets)
        factor = 1.0
        if uses == "twice":
            y, factor = y + _InPlace.apply(x, params["w"], buckets), 2.0
        elif uses == "also elsewhere":
            y, factor = y + 2 * x * params["w"], 3.0
        (y + params["v"]).sum().backward()
        expected += factor * x
    buckets.finish()
    torch.testing.assert_close(piece.of(buckets.shards[0]).view(6, 5), expected)
    assert arrived == [uses == "once"] * 3


def test_what_lies_in_pieces_has_no_destination() -> None:
    params = small(3, {"w": (6, 5)})
    layout = plan_buckets({"w": params["w"].shape}, {"w": "grid"}, 2, by_rows=["grid"])
    buckets = GradientBuckets(params, layout, FlatReducer(Group("dp", 0, 2)), 1)
    assert buckets.destination(params["w"]) is None
    assert buckets.destination(nn.Parameter(torch.zeros(2, 2))) is None


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_that_interleave_are_reduced_in_the_end(stage: Stage) -> None:
    """A pipeline announces its micro-batches once: nothing is lost, whatever the order."""
    params = small(5, {"w": (30, 5), "v": (60, 5)})
    buckets = buckets_of(params, stage)
    buckets.begin(last=False)
    for factor in (1.0, 10.0, 100.0):
        (factor * params["w"]).sum().backward()
    (3.0 * params["v"]).sum().backward()
    buckets.finish()
    for name, value in (("w", 111.0), ("v", 3.0)):
        piece = next(p for p in buckets.buckets[0].pieces if p.name == name)
        assert (piece.of(buckets.shards[0]) == value).all()


def test_the_optimizer_of_bf16_weights_takes_fp32_gradients_in_place() -> None:
    model, _ = make("bf16")
    optimizer = zero(model, 0, 1, states="fp8lm")
    name, param = next((n, p) for n, p in model.named_parameters() if p.dtype == torch.bfloat16)
    told = optimizer.gradients.destination(param)
    assert told is not None, name
    assert told[0].dtype == torch.float32
    assert told[1]


def _in_place(rank: int, size: int, recipe: str, stage: Stage, direct: bool) -> Any:
    """Two steps; the places that linears were told, and those of the gradients that hooks saw."""
    model, precision = make(recipe)
    optimizer = zero(model, rank, size, stage=stage)
    buckets = optimizer.gradients
    told: list[int | None] = []
    arrived: list[int] = []

    def destination(param: Tensor) -> tuple[Tensor, bool] | None:
        place = buckets.destination(param)
        told.append(None if place is None else place[0].data_ptr())
        return place

    for module in model.modules():
        if direct and isinstance(module, Linear):
            module.op.backend.accumulates = True
            hooks = module.weight._post_accumulate_grad_hooks
            taking = dict(hooks)
            hooks.clear()
            module.weight.register_post_accumulate_grad_hook(
                lambda p: arrived.append(p.grad.data_ptr())
            )
            hooks.update({key + 10_000: hook for key, hook in taking.items()})
    precision.destination = destination if direct else None
    mine = list(range(rank, 2 * size, size))
    return run(model, precision, optimizer, mine, 2 * size, [0, 1]), told, arrived


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4"])
@pytest.mark.parametrize("stage", [1, 2])
def test_linears_write_gradients_into_the_buckets(recipe: str, stage: Stage) -> None:
    """No bit depends on it, and autograd hands over the very memory that was written."""
    plain = reduce_ranks.run_well(_in_place, 2, recipe, stage, False)
    direct = reduce_ranks.run_well(_in_place, 2, recipe, stage, True)
    for (found, told, arrived), (expected, asked, _) in zip(direct, plain, strict=True):
        assert not asked
        assert len(told) >= 8
        assert told == arrived
        assert found.norms == expected.norms
        for have, want in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
            assert have.keys() == want.keys()
            assert all(torch.equal(have[name], want[name]) for name in want)
