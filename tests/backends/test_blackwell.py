"""The Blackwell backend without a Blackwell GPU: what it hands over is decoded and multiplied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

pytest.importorskip("triton")

import megafp4
from megafp4.backends import ReferenceBackend, blackwell
from megafp4.backends.blackwell import BlackwellBackend, BlockScaled, pack, scaled_mm
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.linear import Linear
from megafp4.numerics import QTensor, get_format
from megafp4.numerics.qtensor import decode_scales, lookup, unpack
from megafp4.precision import Precision
from megafp4_kernels import gemm_blackwell
from megafp4_kernels.swizzle import unswizzle
from tests.tolerances import BF16_GEMM, FP32_SUM

REAL_SCALED_MM = F.scaled_mm
RECIPES = ["mxfp4", "mxfp4-sr", "mxfp4-rht", "mxfp4-rtn", "nvfp4"]
LAYOUTS = [("mxfp4", "block"), ("nvfp4", "block"), ("nvfp4", "tile")]


def decode(codes: torch.Tensor, scales: torch.Tensor, fmt: str) -> torch.Tensor:
    """Packed codes [lines, K / 2] and swizzled scales -> FP64 values without tensor scale."""
    spec = get_format(fmt)
    values = lookup(spec.table, unpack(codes.contiguous(), spec))
    plain = unswizzle(scales.view(torch.uint8), len(codes), values.shape[1] // spec.block)
    factors = decode_scales(plain, spec, torch.ones(()) if fmt == "nvfp4" else None)
    return values.double() * factors.double().repeat_interleave(spec.block, 1)


def twin(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scale_a: Any,
    recipe_a: Any,
    scale_b: Any,
    recipe_b: Any,
    swizzle_a: Any,
    swizzle_b: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Ask the real function whether it takes the call on CUDA, then do what it would."""
    listed = [x if isinstance(x, list) else [x] for x in (scale_a, scale_b)]
    fmt = "nvfp4" if len(listed[0]) == 2 else "mxfp4"
    with FakeTensorMode(allow_non_fake_inputs=True):

        def there(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        def matrix(x: torch.Tensor) -> torch.Tensor:
            if fmt == "nvfp4":
                return there(x)
            # Of MX formats the fake function counts the scales of one code a byte, as in FP8; the
            # CUDA one of two. An FP8 matrix of as many codes has as many scales in both.
            k = 1 if x.stride(1) == 1 else 0
            shape, stride = list(x.shape), list(x.stride())
            shape[k] *= 2
            stride[1 - k] *= 2
            return torch.empty_strided(shape, stride, dtype=torch.float8_e4m3fn, device="cuda")

        recipes = ([there(x) for x in listed[0]], recipe_a, [there(x) for x in listed[1]], recipe_b)
        shape = REAL_SCALED_MM(
            matrix(mat_a), matrix(mat_b), *recipes, swizzle_a, swizzle_b, **kwargs
        ).shape
    # What the CUDA implementation asks for beyond the checks of the fake one.
    assert mat_a.dtype == mat_b.dtype == torch.float4_e2m1fn_x2
    assert mat_a.stride() == (mat_a.shape[1], 1)
    assert mat_b.stride() == (1, mat_b.shape[0])
    assert mat_a.shape[1] % 16 == mat_b.shape[1] % 16 == 0
    if fmt == "mxfp4":
        assert kwargs["output_dtype"] == torch.bfloat16
    a = decode(mat_a.view(torch.uint8), listed[0][0], fmt)
    b = decode(mat_b.t().view(torch.uint8), listed[1][0], fmt)
    out = a @ b.t()
    if fmt == "nvfp4":
        out *= listed[0][1].double() * listed[1][1].double()
    assert out.shape == shape
    return out.to(kwargs["output_dtype"])


def kernel_twin(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    alpha: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        operands = [mode.from_tensor(x) for x in (a, b, scales_a, scales_b)]
        torch.ops.megafp4.gemm_mxfp4(*operands, alpha, None, out_dtype)
    product = decode(a, scales_a, "mxfp4") @ decode(b, scales_b, "mxfp4").t()
    return (product * alpha).to(out_dtype)


@pytest.fixture(autouse=True)
def software(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", twin)
    monkeypatch.setattr(gemm_blackwell, "gemm_mxfp4", kernel_twin)
    monkeypatch.setattr(blackwell, "device_capability", lambda: (10, 0))


def operand(name: str, scaling: str, axis: int, lines: int, depth: int, seed: int) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(lines, depth, generator=generator) * torch.logspace(-2, 2, lines)[:, None]
    x = x if axis == 1 else x.t()
    return megafp4.quantize(x, name, axis, scaling=scaling)  # type: ignore[arg-type]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("axes", [(1, 1), (1, 0), (0, 0)], ids=["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize(("name", "scaling"), LAYOUTS)
@pytest.mark.parametrize("mxfp4", ["triton", "scaled_mm"])
def test_every_layout_equals_the_reference(
    mxfp4: Any, name: str, scaling: str, axes: tuple[int, int]
) -> None:
    a = operand(name, scaling, axes[0], 144, 160, 1)
    b = operand(name, scaling, axes[1], 272, 160, 2)
    backend = BlackwellBackend(mxfp4)
    expected = ReferenceBackend().gemm(a, b, axes, 16 / 9)
    found = backend.gemm(a, b, axes, 16 / 9)
    assert found.dtype == torch.float32
    rounded_early = name == "mxfp4" and mxfp4 == "scaled_mm"
    assert relative(found, expected) < (BF16_GEMM if rounded_early else FP32_SUM)
    assert backend.ran_as(a, b) == "blackwell"
    half = backend.gemm(a, b, axes, 16 / 9, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < BF16_GEMM


@pytest.mark.parametrize(("lines", "depth"), [(16, 16), (48, 112)])
def test_odd_shapes_are_padded(lines: int, depth: int) -> None:
    """Blocks of NVFP4 allow K = 16 and lines of any number; scaled_mm wants 32 and 16."""
    a = operand("nvfp4", "block", 1, lines, depth, 1)
    b = operand("nvfp4", "block", 1, 21, depth, 2)
    found = BlackwellBackend().gemm(a, b, (1, 1))
    assert found.shape == (lines, 21)
    assert relative(found, ReferenceBackend().gemm(a, b, (1, 1))) < FP32_SUM


def test_a_tile_serves_both_axes() -> None:
    """Tiles of 16 x 16 are quantized once for fprop and dgrad."""
    weight = operand("nvfp4", "tile", 1, 64, 96, 1)
    x, dy = (operand("nvfp4", "block", 1, 32, depth, 2) for depth in (96, 64))
    for a, axes in ((x, (1, 1)), (dy, (1, 0))):
        found = BlackwellBackend().gemm(a, weight, axes)
        assert relative(found, ReferenceBackend().gemm(a, weight, axes)) < FP32_SUM


def test_packed_operands_are_reused() -> None:
    a, b = (operand("mxfp4", "block", 0, 48, 64, seed) for seed in (1, 2))
    packed = pack(a, 0)
    assert (packed.codes.shape, packed.scales.shape) == ((48, 32), (512,))
    found = BlackwellBackend().gemm(packed, pack(b, 0), (0, 0))
    assert torch.equal(found, BlackwellBackend().gemm(a, b, (0, 0)))
    with pytest.raises(ConfigError, match="a packed operand was paired as mxfp4 x bf16: pack both"):
        BlackwellBackend().gemm(packed, torch.ones(48, 64, dtype=torch.bfloat16), (1, 1))


def test_bias_and_accumulation_are_added_before_rounding() -> None:
    a, b = (operand("mxfp4", "block", 1, 32, 64, seed) for seed in (1, 2))
    backend, bias = BlackwellBackend(), torch.linspace(-1, 1, 32)
    product = backend.gemm(a, b, (1, 1))
    found = backend.gemm(a, b, (1, 1), out_dtype=torch.bfloat16, bias=bias)
    assert torch.equal(found, (product + bias).bfloat16())
    grad = torch.ones(32, 32)
    assert backend.gemm(a, b, (1, 1), accumulate_into=grad) is grad
    assert torch.equal(grad, product + 1)


def test_alpha_does_not_cost_nvfp4_a_rounding() -> None:
    a, b = (operand("nvfp4", "block", 1, 32, 64, seed) for seed in (1, 2))
    found = BlackwellBackend().gemm(a, b, (1, 1), 1 / 3, torch.bfloat16)
    exact = ReferenceBackend().gemm(a, b, (1, 1), 1 / 3)
    # A second rounding would move a quarter of them.
    assert (found == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_trains_as_with_the_reference(name: str) -> None:
    found = {}
    for backend in ("reference", BlackwellBackend()):
        torch.manual_seed(5)
        precision = Precision(seed=3, step=7)
        layer = Linear(128, 192, recipe=name, backend=backend, precision=precision)
        layer.bfloat16()
        x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
        layer(x).backward(torch.randn(64, 192).bfloat16())
        grads = (x.grad, layer.weight.grad)
        assert all(grad is not None for grad in grads)
        found[str(backend)[:9]] = [x.detach(), *grads]
    reference, ours = found.values()
    assert torch.equal(reference[0], ours[0])
    for expected, actual in zip(reference[1:], ours[1:], strict=True):
        assert relative(actual, expected) < BF16_GEMM


def test_other_pairs_run_in_bf16_and_say_so() -> None:
    backend = BlackwellBackend()
    a, b = operand("mxfp4", "block", 1, 32, 64, 1), operand("nvfp4", "block", 1, 32, 64, 2)
    fp8 = megafp4.quantize(torch.randn(32, 64), "fp8-e4m3")
    for pair in ((a, b), (fp8, fp8), (a, torch.ones(32, 64, dtype=torch.bfloat16))):
        assert backend.ran_as(*pair) == "blackwell/bf16"
        expected = ReferenceBackend().gemm(*pair, (1, 1))
        assert relative(backend.gemm(*pair, (1, 1)), expected) < FP32_SUM


def test_nan_and_empty_products() -> None:
    x = torch.randn(16, 64)
    x[3, 5] = torch.inf
    for name in ("mxfp4", "nvfp4"):
        q, one = megafp4.quantize(x, name), megafp4.quantize(torch.ones(16, 64), name)
        out = BlackwellBackend().gemm(q, one, (1, 1))
        assert out[3].isnan().all()
    empty = megafp4.quantize(torch.empty(4, 0), "mxfp4")
    assert torch.equal(BlackwellBackend().gemm(empty, empty, (1, 1)), torch.zeros(4, 4))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BlackwellBackend()
    backend.check("mxfp4", "mxfp4")
    with pytest.raises(UnsupportedError, match="cannot multiply fp32 x bf16: choose backend"):
        backend.check("fp32", "bf16")
    for capability, words in (((9, 0), "one of 9.0"), ((12, 0), "one of 12.0"), (None, "no CUDA")):
        monkeypatch.setattr(blackwell, "device_capability", lambda found=capability: found)
        with pytest.raises(UnsupportedError, match=f"capability 10.x and this machine has {words}"):
            backend.check("mxfp4", "mxfp4")
    with pytest.raises(ConfigError, match="unknown MXFP4 kernel 'cutlass'"):
        BlackwellBackend("cutlass")  # type: ignore[arg-type]
    q = operand("mxfp4", "block", 1, 32, 64, 1)
    with pytest.raises(UnsupportedError, match="lie along axis 1 and the GEMM contracts axis 0"):
        pack(q, 0)
    with pytest.raises(UnsupportedError, match="fp8-e4m3 has no FP4 tensor cores: give mxfp4"):
        pack(megafp4.quantize(torch.randn(32, 64), "fp8-e4m3"), 1)


def test_the_twin_would_refuse_unswizzled_scales() -> None:
    """The checks above are PyTorch's own: a call that is wrong does not pass them."""
    packed = pack(operand("nvfp4", "block", 1, 32, 64, 1), 1)
    wrong: BlockScaled = replace(packed, scales=packed.scales[:128])
    with pytest.raises(RuntimeError, match="for NV scaling scale_a must have 512"):
        scaled_mm(wrong, packed, 1.0, torch.float32)
