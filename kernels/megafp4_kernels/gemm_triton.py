"""The GEMM of :mod:`megafp4_kernels.gemm` in plain Triton: second opinion, and kernel for sm_89.

Both operands K-major, tiles walked in groups that share operands in L2, loads by TMA where there is
one, FP32 or INT32 accumulation, everything else in the epilogue.

Hopper's FP8 tensor cores keep 14 bits or so of the products that they add to an FP32 sum, so that
its error grows with K. Here such a sum ends after 4096 products and is added to a true FP32 one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megafp4_kernels.amax import check_device
from megafp4_kernels.gemm_arguments import (
    FP8,
    SCHEMA,
    Operands,
    Slope,
    check_operands,
    check_result,
    gather,
)

_GROUP = 8  # tiles along M that are walked before the next along N
_CHUNK = 4096  # longest sum of FP8 products that the tensor core takes alone; whole tiles


@triton.jit
def _dge_slope(scaled, exponent, factor, cap):
    """Derivative of the DGE curve at E2M1-scaled weights [2501.17116, eq. 8]."""
    magnitude = tl.minimum(tl.abs(scaled), 6.0)
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    low = tl.minimum((magnitude / step).to(tl.int32).to(tl.float32) * step, 4.0)
    u = tl.abs(2.0 * (magnitude - low) / step - 1.0)
    # Zero, in the middle of an interval, has an infinite power: the cap bounds it.
    power = tl.exp2(exponent * tl.log2(tl.maximum(u, 1e-30))) * factor
    return tl.where(scaled == scaled, tl.minimum(power, cap), scaled)


@triton.jit
def _load_tile(
    operand,
    first_line,
    first_k,
    lines,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    LINES: tl.constexpr,
    K: tl.constexpr,
):
    """Load a tile [LINES, K] of a descriptor's matrix or of a plain one; zeros beyond its edges."""
    if TMA:
        return operand.load([first_line, first_k])
    else:
        line = first_line + tl.arange(0, LINES)
        k = first_k + tl.arange(0, K)
        mask = (line < lines)[:, None] & (k < DEPTH)[None, :]
        return tl.load(
            operand + line.to(tl.int64)[:, None] * DEPTH + k[None, :], mask=mask, other=0.0
        )


@triton.jit
def _sum_products(
    a,
    b,
    first_m,
    first_n,
    first_k,
    rows,
    columns,
    SUM: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Sum CHUNK products, or what is left of them, for a tile of the result."""
    total = tl.zeros((M, N), SUM)
    for k in range(first_k, first_k + CHUNK, K):
        tile_a = _load_tile(a, first_m, k, rows, TMA, DEPTH, M, K)
        tile_b = _load_tile(b, first_n, k, columns, TMA, DEPTH, N, K)
        total = tl.dot(tile_a, tile_b.T, total, out_dtype=SUM)
    return total


@triton.jit
def _matmul_kernel(
    a,
    b,
    out,
    scale_a,
    scale_b,
    bias,
    weight,
    weight_scale,
    rows,
    columns,
    alpha,
    exponent,
    factor,
    cap,
    DEPTH: tl.constexpr,
    SCALE_A: tl.constexpr,
    SCALE_B: tl.constexpr,
    BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SUM: tl.constexpr,
    TMA: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of the result. SCALE_A, SCALE_B: a scale a line; SLOPE: 1 a tensor, 2 a line."""
    tiles_m = tl.cdiv(rows, M)
    tiles_n = tl.cdiv(columns, N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    first_m = (group * GROUP + (tl.program_id(0) % (GROUP * tiles_n)) % height) * M
    first_n = (tl.program_id(0) % (GROUP * tiles_n) // height) * N
    if CHUNK < DEPTH:
        total = tl.zeros((M, N), SUM)
        for first_k in range(0, DEPTH, CHUNK):
            total += _sum_products(
                a, b, first_m, first_n, first_k, rows, columns, SUM, TMA, DEPTH, CHUNK, M, N, K
            )
    else:
        total = _sum_products(
            a, b, first_m, first_n, 0, rows, columns, SUM, TMA, DEPTH, DEPTH, M, N, K
        )
    m = first_m + tl.arange(0, M)
    n = first_n + tl.arange(0, N)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    result = total.to(tl.float32)
    if SCALE_A:
        result *= tl.load(scale_a + m, mask=m < rows, other=0.0)[:, None]
    else:
        result *= tl.load(scale_a)
    if SCALE_B:
        result *= (alpha * tl.load(scale_b + n, mask=n < columns, other=0.0))[None, :]
    else:
        result *= alpha * tl.load(scale_b)
    if BIAS:
        result += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * columns + n[None, :]
    if SLOPE:
        shared = (
            tl.load(weight_scale + m, mask=m < rows, other=1.0)
            if SLOPE == 2
            else tl.load(weight_scale + tl.zeros((M,), tl.int32))
        )
        reciprocal = tl.div_rn(tl.full((M,), 1.0, tl.float32), shared)
        loaded = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
        result *= _dge_slope(loaded * reciprocal[:, None], exponent, factor, cap)
    if ACCUMULATE:
        result += tl.load(out + offsets, mask=mask, other=0.0)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


def gemm_triton(
    a: Tensor,
    b: Tensor,
    *,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    accumulate: bool = False,
    slope: Slope | None = None,
) -> Tensor:
    """Compute (alpha * scale_a * scale_b * (a b^T) + bias) * slope in FP32, rounded once.

    Args:
        a: [M, K], float8_e4m3fn or float8_e5m2, contiguous; K is a multiple of 16.
        b: [N, K], likewise; the pairing is free.
        scale_a: FP32 [1] or [M].
        scale_b: FP32 [1] or [N].
        alpha: Factor of the product.
        bias: FP32 or BF16 [N].
        out_dtype: bfloat16 or float32, where ``out`` is not given.
        out: Contiguous [M, N] to write to.
        accumulate: Add to ``out``, which must be FP32.
        slope: The DGE derivative to multiply by, at M x N weights.

    Returns:
        [M, N]: ``out``, or a new tensor.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit together.
    """
    operands = gather(a, b, scale_a, scale_b, alpha, bias, slope)
    check_operands(operands, FP8)
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out, and no out was given: pass an FP32 tensor")
        return multiply(*operands, out_dtype)
    multiply_out(*operands, out, accumulate)
    return out


@torch.library.custom_op(
    "megafp4::matmul", mutates_args=(), schema=f"({SCHEMA}, ScalarType out_dtype) -> Tensor"
)
def multiply(*arguments: Any) -> Tensor:
    """Multiply FP8 or INT8 operands into a new tensor, see :func:`gemm_triton`."""
    out = _fake_multiply(*arguments)
    _launch(Operands(*arguments[:-1]), out, accumulate=False)
    return out


@multiply.register_fake
def _fake_multiply(*arguments: Any) -> Tensor:
    o = Operands(*arguments[:-1])
    check_operands(o, (*FP8, torch.int8))
    out = o.a.new_empty(o.shape, dtype=arguments[-1])
    check_result(o, out)
    return out


@torch.library.custom_op(
    "megafp4::matmul_out",
    mutates_args=("out",),
    schema=f"({SCHEMA}, Tensor(a!) out, bool accumulate) -> ()",
)
def multiply_out(*arguments: Any) -> None:
    """Multiply FP8 or INT8 operands into, or onto, a given tensor."""
    _fake_multiply_out(*arguments)
    *operands, out, accumulate = arguments
    _launch(Operands(*operands), out, accumulate)


@multiply_out.register_fake
def _fake_multiply_out(*arguments: Any) -> None:
    *operands, out, accumulate = arguments
    o = Operands(*operands)
    check_operands(o, (*FP8, torch.int8))
    check_result(o, out, accumulate)


def _launch(o: Operands, out: Tensor, accumulate: bool) -> None:
    check_device(o.a)
    (rows, columns), depth = o.shape, o.a.shape[1]
    if out.numel() == 0:
        return
    tma = has_tma(o.a.device)
    exact = o.a.dtype == torch.int8
    chunk = depth
    if depth > _CHUNK and not exact:
        pieces = triton.cdiv(depth, _CHUNK)
        chunk = triton.cdiv(depth, pieces * 128) * 128
    m, n, warps = _tile(o.a.device, tma)
    tile_k = min(128, triton.next_power_of_2(depth))
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n),)
    _matmul_kernel[grid](
        TensorDescriptor.from_tensor(o.a, [m, tile_k]) if tma else o.a,
        TensorDescriptor.from_tensor(o.b, [n, tile_k]) if tma else o.b,
        out,
        o.scale_a,
        o.scale_b,
        o.bias,
        o.weight,
        o.weight_scale,
        rows,
        columns,
        o.alpha,
        1.0 / o.k - 1.0,
        1.0 / o.k,
        o.cap,
        DEPTH=depth,
        SCALE_A=o.scale_a.shape[0] > 1,
        SCALE_B=o.scale_b.shape[0] > 1,
        BIAS=o.bias is not None,
        SLOPE=0 if o.weight_scale is None else 1 + (o.weight_scale.shape[0] > 1),
        ACCUMULATE=accumulate,
        SUM=tl.int32 if exact else tl.float32,
        TMA=tma,
        M=m,
        N=n,
        K=tile_k,
        GROUP=_GROUP,
        CHUNK=chunk,
        num_warps=warps,
        num_stages=3,
    )


def has_tma(device: torch.device) -> bool:
    """Whether operands are loaded through tensor descriptors: by sm_90 and the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _tile(device: torch.device, tma: bool) -> tuple[int, int, int]:
    """Choose rows, columns and warps of a tile: the largest that the device can hold."""
    if device.type != "cuda":
        return 32, 64, 4
    return (128, 256, 8) if tma else (128, 128, 8)
