"""The norm from what wgrad has measured is the norm, and nothing outdated is taken for it."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4.backends.base import Measuring
from megafp4.backends.reference import ReferenceBackend
from megafp4.linear import Linear
from megafp4.optim import clip_grad_norm, clip_grad_norm_on_device
from megafp4.precision import Precision, Squares


class MeasuringBackend(ReferenceBackend):
    """The reference, and a square for each row of the result."""

    accumulates = True

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def measured_gemm(
        self, *operands: Any, slope: Any = None, accumulate_into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        out = self.gemm(*operands, slope=slope, accumulate_into=accumulate_into)
        return out, out.double().square().sum(1) * self.factor


def make(recipe: str = "mxfp4", **options: Any) -> Linear:
    torch.manual_seed(1)
    precision = Precision(seed=3, measures=True, **options)
    return Linear(64, 128, recipe=recipe, backend=MeasuringBackend(), precision=precision)


def backward(linear: Linear, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 64, generator=generator, requires_grad=True)
    linear(x.to(linear.weight.dtype)).backward(
        torch.randn(128, 128, generator=generator, dtype=linear.weight.dtype)
    )


def known(linear: Linear) -> Tensor | None:
    return linear.op.precision.squares.of(linear.weight)


def assert_norm(linear: Linear) -> None:
    expected = clip_grad_norm(linear.parameters(), 0.5)
    found = clip_grad_norm_on_device(linear.parameters(), 0.5, linear.op.precision.squares.of)
    assert tuple(map(float, found)) == pytest.approx(expected, rel=1e-9)


def test_only_a_backend_with_the_method_measures() -> None:
    assert isinstance(MeasuringBackend(), Measuring)
    assert not isinstance(ReferenceBackend(), Measuring)


@pytest.mark.parametrize("recipe", ["mxfp4", "fp4", "bf16"])
def test_what_was_measured_is_used(recipe: str) -> None:
    linear = make(recipe)
    backward(linear)
    assert known(linear) is not None
    assert_norm(linear)
    # The bias is measured anew: four times the square under the weight alone.
    weight, bias = (float(p.grad.double().square().sum()) for p in linear.parameters())
    linear.weight.grad = None
    linear.op.backend = MeasuringBackend(4.0)
    linear.bias.grad = None
    backward(linear)
    norm, _ = clip_grad_norm_on_device(linear.parameters(), 0.0, linear.op.precision.squares.of)
    assert float(norm) == pytest.approx(math.sqrt(4 * weight + bias), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30, math.inf, math.nan])
def test_any_magnitude(scale: float) -> None:
    linear = make("bf16")
    gradient = torch.ones(128, 64) * scale
    linear.weight.grad = gradient
    linear.op.precision.squares.record(linear.weight, gradient, gradient.double().square())
    norm, factor = clip_grad_norm_on_device([linear.weight], 1.0, linear.op.precision.squares.of)
    expected = clip_grad_norm([linear.weight], 1.0)
    assert (float(norm), float(factor)) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_accumulation_in_place_measures_the_sum() -> None:
    linear = make(accumulates=True)
    precision = linear.op.precision
    precision.measures = False
    backward(linear)
    backward(linear, 1)
    assert known(linear) is None
    precision.measures = True
    backward(linear, 2)
    assert known(linear) is not None
    assert_norm(linear)
    precision.measures = False
    backward(linear, 3)
    assert known(linear) is None
    assert_norm(linear)


def test_a_micro_batch_that_autograd_adds_ends_it() -> None:
    linear = make()
    backward(linear)
    backward(linear, 1)
    assert known(linear) is None
    assert_norm(linear)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.grad.mul_(2.0),
        lambda weight: torch._foreach_mul_([weight.grad], 0.5),
        lambda weight: weight.grad[3].zero_(),
        lambda weight: setattr(weight, "grad", weight.grad * 3),
        lambda weight: setattr(weight, "grad", weight.grad.clone()),
        lambda weight: setattr(weight, "grad", None),
    ],
)
def test_whoever_changes_the_gradient_ends_it(change: Any) -> None:
    linear = make()
    backward(linear)
    assert known(linear) is not None
    change(linear.weight)
    assert known(linear) is None
    assert_norm(linear)


def double(weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad.mul_(2)


def test_hooks_end_it() -> None:
    linear = make()
    handle = linear.weight.register_hook(lambda gradient: gradient * 2)
    backward(linear)
    assert known(linear) is None
    assert_norm(linear)
    handle.remove()
    linear.weight.grad = None
    linear.weight.register_post_accumulate_grad_hook(double)
    backward(linear)
    assert known(linear) is None
    assert_norm(linear)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_weight_that_two_layers_share(accumulates: bool) -> None:
    first = make(accumulates=accumulates)
    second = Linear(64, 128, recipe="mxfp4", backend=first.op.backend, precision=first.op.precision)
    second.weight = first.weight
    for turn in range(2):
        x = torch.randn(128, 64, requires_grad=True)
        (first(x).square().sum() + second(x * 2).square().sum()).backward()
        assert (known(first) is not None) == (accumulates and turn == 1)
        assert_norm(first)


def test_the_next_gradient_is_another() -> None:
    linear = make()
    backward(linear)
    linear.weight.grad = None
    linear.op.precision.measures = False
    backward(linear, 1)  # may well lie where the first one lay
    assert known(linear) is None
    assert_norm(linear)


def test_what_is_not_measured() -> None:
    linear = make()
    linear.op.backend = ReferenceBackend()
    backward(linear)
    assert known(linear) is None
    linear = make().bfloat16()
    backward(linear)
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.bfloat16
    assert known(linear) is None
    assert_norm(linear)


def test_measurements_are_not_copied() -> None:
    linear = make()
    backward(linear)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert known(other) is None
        backward(other)
        assert_norm(other)
    assert known(linear) is not None
    linear.op.precision.squares.clear()
    assert known(linear) is None
    assert isinstance(linear.op.precision.squares, Squares)
