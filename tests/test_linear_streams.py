"""Randomness of the linears: unbiased, keyed by meaning, and nobody else's generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megafp4
from megafp4.precision import Position, Precision
from megafp4.recipes import Recipe, get_recipe, recipe_names

Codes = dict[tuple[str, str], Tensor]


def watched(
    recipe: str | Recipe, seed: int = 1, step: int = 0, layer: int = 0
) -> tuple[megafp4.Linear, Codes]:
    """A 64 x 64 linear and the codes of its operands as they come up."""
    codes: Codes = {}
    precision = Precision(seed, step)
    precision.probe = lambda name, gemm, side, x, q: codes.update({(gemm, side): q.codes})
    linear = megafp4.Linear(64, 64, False, recipe, precision=precision, layer=layer)
    return linear, codes


def train(linear: megafp4.Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dW of one forward and backward pass."""
    linear.weight.grad = None
    x = x.clone().requires_grad_()
    linear(x).backward(dy)
    assert x.grad is not None
    assert linear.weight.grad is not None
    return x.grad, linear.weight.grad


def estimates(recipe: str, a: Tensor, b: Tensor, draws: int, step: int) -> Tensor:
    """Independent estimates [draws] of a . b: dgrad of repeated rows; each line draws its bits."""
    linear = megafp4.Linear(draws, len(a), False, recipe, "reference", Precision(7, step))
    weight = b[:, None].expand(-1, draws)
    return linear.op.dgrad(a.expand(draws, -1), weight, Position(step, 0)).diagonal()


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-sr"])
def test_mean_of_stochastic_gemms_converges_as_one_over_sqrt_n(
    recipe: str, generator: torch.Generator
) -> None:
    """K = 256, N = 2000; with or without the Hadamard transform the expectation is the product."""
    groups, shrunk = [], []
    for step in range(4):
        a, b = torch.randn(2, 256, generator=generator)
        b += 0.5 * a
        exact = float(a.double() @ b.double())
        error = estimates(recipe, a, b, 2000, step).double() - exact
        sigma = float(error.std())
        assert abs(float(error.mean())) < 4 * sigma / 2000**0.5
        # Means of 20 estimates must have a variance 20 times smaller.
        shrunk.append(float(error.view(100, 20).mean(1).var()) / sigma**2 * 20)
        groups.append(float(error.mean()) / sigma * 2000**0.5)
    assert sum(shrunk) / 4 == pytest.approx(1, abs=0.25)
    assert sum(g * g for g in groups) / 4 < 3.3  # chi-square of 4 degrees of freedom, 99 %


@pytest.mark.parametrize("recipe", ["mxfp4-rtn", "mxfp4-rht"])
def test_nearest_rounding_does_not_converge(recipe: str, generator: torch.Generator) -> None:
    """The control: every draw is the same, and off."""
    a = torch.randn(256, generator=generator)
    found = estimates(recipe, a, a, 64, 0)
    assert found.std() < 1e-4 * found.mean()
    assert float(found.mean() / (a @ a)) < 0.99


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-sr"])
def test_no_two_streams_are_alike(recipe: str) -> None:
    """Equal matrices everywhere: the codes differ by stream alone."""
    value = torch.full((64, 64), 0.7)
    seen: list[Tensor] = []
    for seed, step, layer in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        linear, codes = watched(recipe, seed, step, layer)
        with torch.no_grad():
            linear.weight.fill_(0.7)
        train(linear, value, value)
        seen += codes.values()
    assert len(seen) == 16
    for one, other in combinations(seen, 2):
        assert (one != other).float().mean() > 0.1


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-sr", "nvfp4"])
def test_micro_batches_draw_what_the_batch_draws(recipe: str, generator: torch.Generator) -> None:
    x, dy = torch.randn(2, 256, 64, generator=generator)
    # NVFP4's second scale belongs to the micro-batch: keep it equal in both halves (which is
    # possible before a Hadamard transform only, so not for its wgrad).
    x[::128, 0], dy[::128, 0] = 9.0, 9.0
    whole, codes = watched(recipe)
    train(whole, x, dy)
    linear, parts = watched(recipe)
    linear.load_state_dict(whole.state_dict())
    halves: list[Codes] = []
    for first in (0, 128):
        linear.op.precision.first_token = first
        train(linear, x[first : first + 128], dy[first : first + 128])
        halves.append(dict(parts))
    assert len(codes) == len(halves[0])
    for (gemm, side), expected in codes.items():
        if (recipe, gemm) == ("nvfp4", "wgrad"):
            continue
        left, right = (half[gemm, side] for half in halves)
        if side == "b" and gemm != "wgrad":
            assert torch.equal(left, expected)
            assert torch.equal(right, expected)
        else:
            assert torch.equal(torch.cat([left, right]), expected)


def test_equal_micro_batches_draw_differently() -> None:
    linear, codes = watched("mxfp4-sr")
    half = torch.full((64, 64), 0.7)
    train(linear, half, half)
    first = dict(codes)
    linear.op.precision.first_token = 64
    train(linear, half, half)
    assert not torch.equal(first["dgrad", "a"], codes["dgrad", "a"])
    assert not torch.equal(first["wgrad", "b"], codes["wgrad", "b"])


@pytest.mark.parametrize("recipe", recipe_names())
def test_recomputation_gives_the_same_gradients(recipe: str, generator: torch.Generator) -> None:
    x, dy = torch.randn(2, 64, 64, generator=generator)

    def gradients(run: Callable[[megafp4.Linear, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        linear, _ = watched(recipe)
        if linear.recipe.grid:
            linear.to_grid()
        inputs = x.clone().requires_grad_()
        run(linear, inputs).backward(dy)
        assert inputs.grad is not None
        assert linear.weight.grad is not None
        return [inputs.grad, linear.weight.grad]

    plain = gradients(lambda linear, inputs: linear(inputs))
    for reentrant in (False, True):
        again = gradients(lambda linear, i: checkpoint(linear, i, use_reentrant=reentrant))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


ALL_STOCHASTIC = Recipe(
    "noise",
    fprop=get_recipe("mxfp4").dgrad,
    dgrad=get_recipe("mxfp4").dgrad,
    wgrad=get_recipe("mxfp4").wgrad,
)


def own(layer: int = 0) -> megafp4.Linear:
    torch.manual_seed(3)
    return megafp4.Linear(64, 64, False, ALL_STOCHASTIC, layer=layer)


def test_a_lone_linear_draws_anew_in_every_training_step(generator: torch.Generator) -> None:
    x, dy = torch.randn(2, 64, 64, generator=generator)
    linear = own()
    first, second = train(linear, x, dy), train(linear, x, dy)
    assert linear.op.precision.step == 2
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    linear.set_recipe("mxfp4")
    third, fourth = train(linear, x, dy), train(linear, x, dy)
    assert not torch.equal(third[1], fourth[1])
    again = own()
    assert torch.equal(train(again, x, dy)[1], first[1])
    again.eval()
    assert torch.equal(again(x), again(x))
    assert again.op.precision.step == 1


def test_a_precision_that_was_given_stays_where_it_is(generator: torch.Generator) -> None:
    x, dy = torch.randn(2, 64, 64, generator=generator)
    linear, _ = watched(ALL_STOCHASTIC)
    first, second = train(linear, x, dy), train(linear, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lone = own()
    lone.op.precision = Precision(seed=4)
    train(lone, x, dy)
    assert lone.op.precision.step == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_lone_linear_recomputes_what_it_drew(reentrant: bool, generator: torch.Generator) -> None:
    """Two layers, so that wrong bits of the first would show in the wgrad of the second."""
    x, dy = torch.randn(2, 64, 64, generator=generator)

    def gradients(recompute: bool) -> list[Tensor]:
        model = torch.nn.Sequential(own(0), own(1))
        found = []
        for _ in range(3):
            inputs = x.clone().requires_grad_()
            y = checkpoint(model, inputs, use_reentrant=reentrant) if recompute else model(inputs)
            y.backward(dy)
            found += [inputs.grad, *(linear.weight.grad.clone() for linear in model)]
        assert [linear.op.precision.step for linear in model] == [3, 3]
        return found

    pairs = list(zip(gradients(False), gradients(True), strict=True))
    assert all(torch.equal(plain, again) for plain, again in pairs)
    assert not torch.equal(pairs[0][0], pairs[3][0])


def test_backward_belongs_to_its_forward(generator: torch.Generator) -> None:
    """A pipeline runs other micro-batches in between: position is kept from forward."""
    x, dy = torch.randn(2, 64, 64, generator=generator)
    linear, _ = watched("mxfp4")
    expected = train(linear, x, dy)
    inputs = x.clone().requires_grad_()
    y = linear(inputs)
    linear.op.precision.first_token, linear.op.precision.step = 640, 5
    linear.weight.grad = None
    y.backward(dy)
    assert torch.equal(inputs.grad, expected[0])
    assert torch.equal(linear.weight.grad, expected[1])


def test_dropout_does_not_notice_the_recipe() -> None:
    masks, states = [], []
    for recipe in ("bf16", "mxfp4", "nvfp4", "fp4"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5))
        megafp4.convert(model, recipe)
        torch.manual_seed(1)
        model(torch.ones(64, 64)).sum().backward()
        masks.append(model(torch.ones(64, 64)) == 0)
        states.append(torch.get_rng_state())
    assert all(torch.equal(masks[0], mask) for mask in masks)
    assert all(torch.equal(states[0], state) for state in states)


def test_fixed_signs_do_not_move(generator: torch.Generator) -> None:
    """NVFP4 rotates every layer and step alike; codes of nearest operands show it."""
    x, dy = torch.randn(2, 64, 64, generator=generator)
    seen = []
    for step, layer in ((0, 0), (4, 2)):
        linear, codes = watched("nvfp4", step=step, layer=layer)
        train(linear, x, dy)
        seen.append(dict(codes))
    assert torch.equal(seen[0]["wgrad", "b"], seen[1]["wgrad", "b"])
    assert not torch.equal(seen[0]["wgrad", "a"], seen[1]["wgrad", "a"])


def test_weight_is_quantized_once_per_step(generator: torch.Generator) -> None:
    x, dy = torch.randn(2, 64, 64, generator=generator)
    linear, _ = watched("mxfp4")
    count = []
    linear.op.precision.probe = lambda name, gemm, side, x, q: count.append((gemm, side))
    for _ in range(3):
        train(linear, x, dy)
    assert count.count(("dgrad", "b")) == 1
    assert count.count(("dgrad", "a")) == 3
    linear.op.precision.step += 1
    train(linear, x, dy)
    assert count.count(("dgrad", "b")) == 2
    with torch.no_grad():
        linear.weight.mul_(2)
    train(linear, x, dy)
    assert count.count(("dgrad", "b")) == 3
    linear.weight.data = linear.weight.data.clone()
    train(linear, x, dy)
    assert count.count(("dgrad", "b")) == 4


@pytest.mark.parametrize("recipe", ["fp4", "nvfp4", "bitnet", "int8"])
def test_evaluation_sees_weights_written_through_data(
    recipe: str, generator: torch.Generator
) -> None:
    """As averaged weights usually are: such a write moves no version counter."""
    old, new = torch.randn(2, 64, 64, generator=generator)
    x = torch.randn(4, 64, generator=generator)
    linear, _ = watched(recipe)
    with torch.no_grad():
        linear.weight.copy_(new)
        expected = linear(x)
        linear.weight.copy_(old)
        assert not torch.equal(linear(x), expected)
        linear.weight.data.copy_(new)
        assert torch.equal(linear(x), expected)


def test_a_weight_that_comes_and_goes_is_not_confused(generator: torch.Generator) -> None:
    """Temporary weights may lie at the same address one after the other."""
    linear, _ = watched("int8")
    x = torch.randn(4, 64, generator=generator)
    for _ in range(4):
        weight = torch.randn(64, 64, generator=generator)
        expected = megafp4.quantize(weight, "int8", scaling="tensor").dequantize()
        y = torch.func.functional_call(linear, {"weight": weight}, (x,))
        xq = megafp4.quantize(x, "int8", scaling="vector").dequantize()
        torch.testing.assert_close(y, xq @ expected.T)
        del weight


def test_dither_bits_and_prescale_reach_the_quantizer() -> None:
    base = get_recipe("mxfp4-sr")
    spec = replace(base.dgrad.a, dither_bits=16, prescale=0.5)
    recipe = replace(base, dgrad=replace(base.dgrad, a=spec))
    dy = torch.full((64, 64), 0.7)
    linear, codes = watched(recipe)
    train(linear, dy, dy)
    key = (1, 0, 0, "dgrad", "a")
    expected = megafp4.quantize(
        dy, "mxfp4", 1, "stochastic", key, prescale=0.5, dither_bits=16
    ).codes
    assert torch.equal(codes["dgrad", "a"], expected)
    assert recipe.dgrad.alpha == pytest.approx(1 / 0.5 / 0.75)
