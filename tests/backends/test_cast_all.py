"""Backends that cast by the specification make nothing twice, and no bit shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafp4.backends import ReferenceBackend
from megafp4.backends.base import PackedOperand
from megafp4.linear import Linear
from megafp4.numerics import Key, QTensor
from megafp4.precision import Precision
from megafp4.recipes import GemmSpec, OperandSpec, get_recipe
from megafp4.recipes import cast as casts
from megafp4.recipes.cast import CastRequest, cast_from, split_outliers

E4M3 = OperandSpec("fp8-e4m3")


def request(spec: OperandSpec, axis: int, gemm: str = "wgrad", **more: object) -> CastRequest:
    hadamard = more.pop("hadamard", None)
    of = GemmSpec(spec, spec, hadamard)  # type: ignore[arg-type]
    return CastRequest(of, "a", axis, Key(1, 2, 3, gemm, "a"), **more)  # type: ignore[arg-type]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats of all quantizations, in order."""
    found: list[str] = []
    real = casts.quantize

    def counted(x: torch.Tensor, fmt: str, *args: object, **options: object) -> QTensor:
        found.append(fmt)
        return real(x, fmt, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(casts, "quantize", counted)
    return found


@pytest.mark.parametrize(
    ("recipe", "formats"),
    [
        # Forward: the activation, the weight, and what backward multiplies of either; then dy.
        ("fp4", ["fp4-vector"] * 2 + ["fp8-e4m3"] * 2 + ["fp8-e5m2"]),
        ("fp4-direct", ["fp4-vector"] * 2 + ["fp8-e4m3"] * 2 + ["fp8-e5m2"]),
        ("mxfp4-fp8", ["fp8-e4m3"] * 2 + ["mxfp4"] * 4),
    ],
)
def test_a_step_quantizes_nothing_twice(
    recipe: str, formats: list[str], quantized: list[str]
) -> None:
    linear = Linear(64, 128, recipe=recipe, precision=Precision())
    linear(torch.randn(64, 64, requires_grad=True)).sum().backward()
    assert sorted(quantized) == sorted(formats)


def test_operands_of_one_tensor_scale_share_their_codes(quantized: list[str]) -> None:
    x = torch.randn(32, 64)
    wanted = [request(E4M3, 1, "dgrad"), request(replace(E4M3, saved_as="packed"), 0, packed=True)]
    row, col = ReferenceBackend().cast(x, wanted)
    assert quantized == ["fp8-e4m3"]
    assert isinstance(row, QTensor)
    assert isinstance(col, PackedOperand)
    assert (row.axis, col.axis) == (1, 0)
    expected, _ = cast_from(x, wanted[1])
    assert isinstance(expected, QTensor)
    assert torch.equal(col.unpacked().dequantize(), expected.dequantize())


@pytest.mark.parametrize(
    "other",
    [
        request(OperandSpec("fp8-e5m2"), 0),
        request(replace(E4M3, prescale=0.5), 0),
        request(replace(E4M3, rounding="stochastic"), 0),
        request(E4M3, 0, hadamard=32),
        request(E4M3, 0, through=request(OperandSpec("int8"), 1)),
        request(E4M3, 0, segments=(16, 16)),
    ],
)
def test_operands_that_differ_are_made_apart(other: CastRequest, quantized: list[str]) -> None:
    x = torch.randn(32, 64)
    _, made = ReferenceBackend().cast(x, [request(E4M3, 1), other])
    assert len(quantized) > 1
    expected, _ = cast_from(x, other)
    assert isinstance(made, QTensor)
    assert isinstance(expected, QTensor)
    assert torch.equal(made.codes, expected.codes)
    assert torch.equal(made.scales, expected.scales)


@pytest.mark.parametrize("scaling", ["vector", "tensor"])
def test_two_stochastic_operands_draw_for_themselves(scaling: str) -> None:
    spec = OperandSpec("int8", scaling=scaling, rounding="stochastic")  # type: ignore[arg-type]
    x = torch.randn(32, 64)
    row, col = ReferenceBackend().cast(x, [request(spec, 1, "dgrad"), request(spec, 0, "wgrad")])
    assert isinstance(row, QTensor)
    assert isinstance(col, QTensor)
    assert not torch.equal(row.codes, col.codes)


@pytest.mark.parametrize("recipe", ["fp4", "fp4-folded", "fp4-direct", "mxfp4-fp8"])
def test_what_fprop_used_changes_no_bit(recipe: str, quantized: list[str]) -> None:
    spec = get_recipe(recipe)
    x = torch.randn(64, 64).bfloat16()
    first = CastRequest(spec.fprop, "a", 1, Key(1, 2, 3, "fprop", "a"))
    second = CastRequest(spec.wgrad, "b", 0, Key(1, 2, 3, "wgrad", "b"), through=first)
    backend = ReferenceBackend()
    inner, outliers = split_outliers(x, spec.fprop.a)
    (used,) = backend.cast(inner, [first])
    kept = used.dequantize() if isinstance(used, QTensor) else used.clone()
    before = len(quantized)
    (made,) = backend.cast(x, [second], (used, outliers))
    assert len(quantized) == before + 1
    (alone,) = backend.cast(x, [second])
    assert isinstance(made, QTensor)
    assert isinstance(alone, QTensor)
    assert torch.equal(made.codes, alone.codes)
    assert torch.equal(made.scales, alone.scales)
    assert isinstance(used, QTensor)
    assert torch.equal(used.dequantize(), kept)
