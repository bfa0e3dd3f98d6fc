"""What the optimizer knows of a weight spares the backend a pass over it, as long as it is true."""

import copy
import dataclasses

import pytest
import torch

from megafp4.backends.base import Operand
from megafp4.backends.reference import ReferenceBackend
from megafp4.linear import Linear
from megafp4.precision import Precision
from megafp4.recipes.cast import CastRequest


class Watching(ReferenceBackend):
    """Notes what it is told of each matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, torch.Tensor | None]] = []

    def cast(self, x: torch.Tensor, wanted: list[CastRequest], used=None) -> list[Operand]:  # type: ignore[no-untyped-def, override]
        self.told += [(f"{one.key.gemm}.{one.side}", one.amax) for one in wanted]
        return super().cast(x, wanted, used)


@pytest.fixture
def linear() -> Linear:
    return Linear(64, 64, recipe="mxfp4-fp8", backend=Watching(), precision=Precision())


def told(linear: Linear) -> dict[str, torch.Tensor | None]:
    """Run forward and backward and say which operand came with which magnitude."""
    linear.op.backend.told.clear()  # type: ignore[attr-defined]
    linear.op.forget_weights()
    x = torch.randn(64, 64, requires_grad=True)
    linear(x).sum().backward()
    linear.weight.grad = None
    return dict(linear.op.backend.told)  # type: ignore[attr-defined]


def test_only_weights_come_with_a_magnitude_and_only_if_it_is_known(linear: Linear) -> None:
    assert set(told(linear).values()) == {None}
    amax = linear.weight.detach().abs().amax().view(1)
    linear.op.precision.magnitudes.record(linear.weight, amax)
    known = {name for name, found in told(linear).items() if found is amax}
    assert known == {"fprop.b", "dgrad.b"}


def test_a_changed_weight_is_measured_again(linear: Linear) -> None:
    magnitudes = linear.op.precision.magnitudes
    magnitudes.record(linear.weight, torch.ones(1))
    with torch.no_grad():
        linear.weight.mul_(2)
    assert magnitudes.of(linear.weight) is None
    assert set(told(linear).values()) == {None}


def test_copies_and_inference_tensors_know_nothing(linear: Linear) -> None:
    magnitudes = linear.op.precision.magnitudes
    magnitudes.record(linear.weight, torch.ones(1))
    assert copy.deepcopy(magnitudes).of(linear.weight) is None
    with torch.inference_mode():
        assert magnitudes.of(torch.ones(2)) is None


def test_requests_are_the_same_whatever_is_known_of_the_matrix(linear: Linear) -> None:
    request = linear.op._request("fprop", "b", linear.op.precision.position, linear.weight)
    assert dataclasses.replace(request, amax=torch.ones(1)) == request
