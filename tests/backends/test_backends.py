"""Backends multiply what they are given, exactly, or refuse."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

import megafp4
from megafp4.backends import (
    BF16Backend,
    ReferenceBackend,
    backend_names,
    operand_format,
    resolve_backend,
)
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.numerics import QTensor, get_format
from tests.tolerances import BF16_GEMM, FP32_SUM

SCALINGS = [(name, scaling) for name in megafp4.formats() for scaling in get_format(name).scalings]
AXES = [(1, 1), (1, 0), (0, 0), (0, 1)]


def operand(name: str, scaling: str, axis: int, rows: int, generator: torch.Generator) -> QTensor:
    shape = (rows, 64) if axis == 1 else (64, rows)
    x = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None]
    return megafp4.quantize(x, name, axis, scaling=scaling)  # type: ignore[arg-type]


def exact(a: QTensor, b: QTensor, axes: tuple[int, int]) -> torch.Tensor:
    return torch.tensordot(
        a.dequantize().double(), b.dequantize().double(), dims=([axes[0]], [axes[1]])
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("name", "scaling"), SCALINGS)
@pytest.mark.parametrize("backend", [ReferenceBackend(), BF16Backend()], ids=lambda b: b.name)
def test_every_format_and_layout_equals_float64(
    backend: ReferenceBackend | BF16Backend,
    name: str,
    scaling: str,
    axes: tuple[int, int],
    generator: torch.Generator,
) -> None:
    """Decoding to BF16 loses nothing when scales lie off the contraction axis."""
    a = operand(name, scaling, axes[0], 32, generator)
    b = operand(name, scaling, axes[1], 48, generator)
    out = backend.gemm(a, b, axes, alpha=16 / 9)
    assert out.dtype == torch.float32
    assert out.shape == (32, 48)
    assert relative(out, exact(a, b, axes) * (16 / 9)) < FP32_SUM


@pytest.mark.parametrize("name", ["int8", "ternary", "fp8-e4m3", "fp4-vector"])
def test_scale_on_the_contraction_axis_costs_one_bf16_rounding(
    name: str, generator: torch.Generator
) -> None:
    """Rows of a grid weight in dgrad: the oracle is exact, BF16 rounds the decoded operand."""
    a = operand("int8", "vector", 1, 32, generator)
    b = megafp4.quantize(torch.randn(64, 48, generator=generator), name, 1, scaling="vector")
    expected = exact(a, b, (1, 0))
    assert relative(ReferenceBackend().gemm(a, b, (1, 0)), expected) < FP32_SUM
    error = relative(BF16Backend().gemm(a, b, (1, 0)), expected)
    assert FP32_SUM < error < BF16_GEMM


@pytest.mark.parametrize("byte", [0, 1, 126, 127, 252])
def test_extreme_e8m0_scales(byte: int) -> None:
    """2^-127 to 2^125: subnormal in FP32 and BF16, and still exact."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16)[None].expand(2, 32).contiguous()
    scales = torch.full((2, 1), byte, dtype=torch.uint8)
    a = QTensor(codes, scales, None, get_format("mxfp4"), 1, "block")
    one = torch.eye(32)
    for backend, unit in ((ReferenceBackend(), one), (BF16Backend(), one.bfloat16())):
        out = backend.gemm(a, unit, (1, 1))
        assert torch.equal(out, a.dequantize() + 0.0)


def test_high_precision_operands(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 16, 16, generator=generator)
    assert torch.equal(ReferenceBackend().gemm(a, b, (1, 1)), a @ b.T)
    out = ReferenceBackend().gemm(a.bfloat16(), b.bfloat16(), (0, 0), out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert relative(out, a.bfloat16().double().T @ b.bfloat16().double()) < BF16_GEMM
    assert operand_format(a) == "fp32"
    assert operand_format(a.bfloat16()) == "bf16"


def test_nan_scale_stays_in_its_lines(generator: torch.Generator) -> None:
    x = torch.randn(8, 64, generator=generator)
    x[2, 40] = torch.inf
    for name, backend in product(("mxfp4", "int8"), (ReferenceBackend(), BF16Backend())):
        a, b = megafp4.quantize(x, name), megafp4.quantize(torch.ones(4, 64), name)
        out = backend.gemm(a, b, (1, 1))
        assert out[2].isnan().all()
        assert out[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("backend", [ReferenceBackend(), BF16Backend()], ids=lambda b: b.name)
def test_empty_contraction_is_zero(backend: ReferenceBackend | BF16Backend) -> None:
    a = megafp4.quantize(torch.empty(0, 4), "mxfp4", 0)
    assert torch.equal(backend.gemm(a, a, (0, 0)), torch.zeros(4, 4))


def test_result_is_rounded_once() -> None:
    """alpha multiplies the FP32 accumulator, before the result becomes BF16."""
    ones = torch.ones(1, 3, dtype=torch.bfloat16)
    for backend in (ReferenceBackend(), BF16Backend()):
        out = backend.gemm(ones, ones, (1, 1), alpha=1 + 2**-9 + 2**-12, out_dtype=torch.bfloat16)
        assert out.item() == torch.tensor(3 * (1 + 2**-9 + 2**-12)).bfloat16().item()


def test_autocast_has_no_say(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 16, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ReferenceBackend().gemm(a, b, (1, 1)), a @ b.T.float()) is False
        inside = ReferenceBackend().gemm(a, b, (1, 1))
    assert torch.equal(inside, a @ b.T)


@pytest.fixture
def lower_precision() -> Iterator[None]:
    """Allow FP32 products to be rounded, as users do to speed up the rest of a model."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("lower_precision")
def test_the_oracle_is_exact_whatever_torch_may_round(generator: torch.Generator) -> None:
    """Equal to the FP64 product rounded once: no FP32 kernel is, let alone a BF16 one."""
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = (a.double() @ b.double().T).float()
    assert torch.equal(ReferenceBackend().gemm(a, b, (1, 1)), exact)


def test_refusals() -> None:
    with pytest.raises(
        UnsupportedError, match="backend 'bf16' cannot multiply fp32 x bf16: choose"
    ):
        BF16Backend().check("fp32", "bf16")
    with pytest.raises(UnsupportedError, match="cannot multiply fp32 x fp32"):
        BF16Backend().gemm(torch.ones(2, 2), torch.ones(2, 2), (1, 1))
    for backend in (ReferenceBackend(), BF16Backend()):
        half = torch.ones(2, 2, dtype=torch.float16)
        with pytest.raises(UnsupportedError, match=r"operand is torch\.float16: give BF16, FP32"):
            backend.gemm(half, half, (1, 1))


def test_resolve() -> None:
    assert {resolve_backend(name).name for name in backend_names()} == {
        "reference",
        "bf16",
        "hopper",
        "blackwell",
    }
    own = BF16Backend()
    assert resolve_backend(own) is own
    with pytest.raises(
        ConfigError, match=r"unknown backend 'refrence': did you mean 'reference'\?"
    ):
        resolve_backend("refrence")
    with pytest.raises(ConfigError, match=r"unknown backend 'volta': .*choose one of bf16, blackw"):
        resolve_backend("volta")
