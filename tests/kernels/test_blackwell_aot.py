"""The MXFP4 GEMM compiles to Blackwell's block-scaled FP4 instruction, and multiplies right.

No such GPU is needed: Triton compiles ahead of time, and its interpreter runs the addressing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import megafp4  # noqa: E402
from megafp4.numerics import QTensor  # noqa: E402
from megafp4_kernels import gemm_blackwell  # noqa: E402
from megafp4_kernels.gemm_blackwell import gemm_mxfp4  # noqa: E402
from megafp4_kernels.swizzle import swizzle  # noqa: E402
from tests.tolerances import BF16_GEMM, FP32_SUM  # noqa: E402

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2) * np.repeat([1.0, -1.0], 8)


def compiled(capability: int, out: str, accumulate: bool) -> Any:
    """Compile the kernel for a GPU that need not be there."""
    tile = gemm_blackwell.TILE
    box = {name: f"tensordesc<u8[{tile[size]}, {tile['K'] // 2}]>" for name, size in
           (("a", "M"), ("b", "N"))}  # fmt: skip
    pointers = {"scales_a": "*u8", "scales_b": "*u8", "bias": "*bf16", "out": f"*{out}"}
    numbers = {"rows": "i32", "columns": "i32", "alpha": "fp32"}
    constants = {"DEPTH": 4096, "BIAS": True, "ACCUMULATE": accumulate, "GROUP": 8, **tile}
    source = triton.compiler.ASTSource(
        gemm_blackwell.mxfp4_kernel,
        {**box, **pointers, **numbers, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(2 + i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    options = {"num_warps": gemm_blackwell.WARPS, "num_stages": gemm_blackwell.STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("out", "accumulate"), [("bf16", False), ("fp32", True)])
def test_the_kernel_is_one_block_scaled_fp4_instruction(
    out: str, accumulate: bool, tmp_path: Path
) -> None:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        kernel = compiled(100, out, accumulate)
    ptx = kernel.asm["ptx"]
    assert ".target sm_100a" in ptx
    products = re.findall(r"tcgen05\.mma\.\S+", ptx)
    assert products
    # One E8M0 scale per 32 codes, 64 codes an instruction: .kind::mxf4, two scales.
    assert set(products) == {"tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X"}
    assert "tcgen05.cp." in ptx  # scales reach tensor memory without passing registers
    assert "cp.async.bulk.tensor.2d" in ptx  # codes are loaded by TMA
    assert len(kernel.asm["cubin"]) > 0  # ptxas accepts it
    assert kernel.metadata.shared <= 227 * 1024


def scaled_operand(lines: int, depth: int, seed: int) -> tuple[QTensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(lines, depth, generator=generator)
    q = megafp4.quantize(x * torch.logspace(-3, 3, lines)[:, None], "mxfp4")
    return q, q.pack(), swizzle(q.scales)


def create_dot_scaled(
    self: Any,
    a: Any,
    scale_a: Any,
    format_a: Any,
    b: Any,
    scale_b: Any,
    format_b: Any,
    fast: bool,
    pack_a: bool,
    pack_b: bool,
    total: Any,
) -> Any:
    """Do what the instruction does, which Triton's interpreter does not know."""
    assert pack_a
    assert pack_b

    def decode(codes: Any, scales: Any) -> Any:
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
        return E2M1[nibbles] * np.exp2(scales.astype(np.float64) - 127).repeat(32, 1)

    product = decode(a.data, scale_a.data) @ decode(b.data.T, scale_b.data).T
    data = (total.data + product).astype(np.float32)
    return interpreter.TensorHandle(data, total.dtype.scalar)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot_scaled", create_dot_scaled, raising=False)
    for name in ("cdiv", "zeros"):  # the library's own kernels, which ours calls
        function = interpreter.InterpretedFunction(getattr(tl, name).fn)
        monkeypatch.setattr(tl, name, function)
    kernel = interpreter.InterpretedFunction(gemm_blackwell.mxfp4_kernel.fn)
    monkeypatch.setattr(gemm_blackwell, "mxfp4_kernel", kernel)


def check_product(m: int, n: int, k: int, device: str, tolerance: float) -> None:
    a, codes_a, scales_a = scaled_operand(m, k, 1)
    b, codes_b, scales_b = scaled_operand(n, k, 2)
    moved = [t.to(device) for t in (codes_a, codes_b)]
    scales = {"scales_a": scales_a.to(device), "scales_b": scales_b.to(device)}
    exact = a.dequantize().double() @ b.dequantize().double().t() * (16 / 9)
    bias = torch.linspace(-2, 2, n)
    # Lines have magnitudes of their own: measure each against its own.
    unit = exact.abs().amax(0)

    def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float(((found.cpu().double() - expected) / unit).abs().max())

    full = gemm_mxfp4(*moved, **scales, alpha=16 / 9, out_dtype=torch.float32)
    assert worst(full, exact) < tolerance
    half = gemm_mxfp4(*moved, **scales, alpha=16 / 9, bias=bias.to(device))
    assert half.dtype == torch.bfloat16
    # Triton's interpreter truncates where a GPU rounds, which is twice as far off.
    assert torch.allclose(half.cpu().double(), exact + bias, rtol=2 * BF16_GEMM, atol=1e-4)
    out = torch.ones(m, n, device=device)
    given = gemm_mxfp4(*moved, **scales, alpha=16 / 9, out=out, accumulate=True)
    assert given is out
    assert worst(out - 1, exact) < tolerance + 1e-6 / float(unit.min())


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 128), (160, 272, 288), (16, 48, 32)])
@pytest.mark.usefixtures("interpreted")
def test_products_equal_the_decoded_ones(m: int, n: int, k: int) -> None:
    check_product(m, n, k, "cpu", 4 * FP32_SUM)


@pytest.mark.usefixtures("interpreted")
def test_a_full_tile_reads_the_scales_of_all_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile for Blackwell has two rows of scale tiles in b and two along K."""
    monkeypatch.setattr(gemm_blackwell, "_SMALL_TILE", gemm_blackwell.TILE)
    check_product(144, 272, 416, "cpu", 4 * FP32_SUM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 1024), (160, 272, 288), (16, 48, 32)])
def test_products_on_a_gpu(m: int, n: int, k: int) -> None:
    """Where there are no FP4 tensor cores Triton decodes to BF16, which holds the values."""
    check_product(m, n, k, "cuda", 1e-5)


def test_refusals() -> None:
    _, codes, scales = scaled_operand(16, 64, 3)
    with pytest.raises(ValueError, match=r"a is torch.uint8 \[16, 24\]: give uint8"):
        gemm_mxfp4(codes[:, :24], codes, scales_a=scales, scales_b=scales)
    with pytest.raises(ValueError, match=r"K is 32 in a and 64 in b: give one positive length"):
        gemm_mxfp4(codes[:, :16], codes, scales_a=scales, scales_b=scales)
    with pytest.raises(ValueError, match=r"scales_b has shape \[100\]: give the \[512\] bytes"):
        gemm_mxfp4(codes, codes, scales_a=scales, scales_b=scales[:100])
    with pytest.raises(ValueError, match="accumulate adds to out, and no out was given"):
        gemm_mxfp4(codes, codes, scales_a=scales, scales_b=scales, accumulate=True)
    out = torch.zeros(16, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"out is torch.bfloat16 \[16, 16\]: give torch.float32"):
        gemm_mxfp4(codes, codes, scales_a=scales, scales_b=scales, out=out, accumulate=True)
    bias = torch.zeros(16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bias is torch.float64 \[16\]: give float32"):
        gemm_mxfp4(codes, codes, scales_a=scales, scales_b=scales, bias=bias)
