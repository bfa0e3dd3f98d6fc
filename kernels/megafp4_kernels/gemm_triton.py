"""The GEMM of :mod:`megafp4_kernels.gemm` in plain Triton: second opinion, and kernel for sm_89.

Both operands K-major, tiles walked in groups that share operands in L2, loads by TMA where there is
one, FP32 or INT32 accumulation, everything else in the epilogue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megafp4_kernels.amax import check_device
from megafp4_kernels.gemm import Slope

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float32, torch.bfloat16)
_GROUP = 8  # tiles along M that are walked before the next along N


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
):
    """One tile of the result. SCALE_A, SCALE_B: a scale a line; SLOPE: 1 a tensor, 2 a line."""
    tiles_m = tl.cdiv(rows, M)
    tiles_n = tl.cdiv(columns, N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    first_m = (group * GROUP + (tl.program_id(0) % (GROUP * tiles_n)) % height) * M
    first_n = (tl.program_id(0) % (GROUP * tiles_n) // height) * N
    total = tl.zeros((M, N), SUM)
    for first_k in range(0, DEPTH, K):
        tile_a = _load_tile(a, first_m, first_k, rows, TMA, DEPTH, M, K)
        tile_b = _load_tile(b, first_n, first_k, columns, TMA, DEPTH, N, K)
        total = tl.dot(tile_a, tile_b.T, total, out_dtype=SUM)
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
    if a.dtype not in _FP8 or b.dtype not in _FP8:
        raise ValueError(f"a is {a.dtype} and b {b.dtype}: give float8_e4m3fn or float8_e5m2")
    weight, weight_scale, k, cap = slope or (None, None, 1.0, 1.0)
    operands = (a, b, scale_a, scale_b, float(alpha), bias, weight, weight_scale, k, cap)
    if out is None:
        if accumulate:
            raise ValueError("accumulate adds to out, and no out was given: pass an FP32 tensor")
        return multiply(*operands, out_dtype)
    multiply_out(*operands, out, accumulate)
    return out


_SCHEMA = (
    "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, float alpha, Tensor? bias, "
    "Tensor? weight, Tensor? weight_scale, float k, float cap"
)


@torch.library.custom_op(
    "megafp4::matmul", mutates_args=(), schema=f"({_SCHEMA}, ScalarType out_dtype) -> Tensor"
)
def multiply(*arguments: Any) -> Tensor:
    """Multiply FP8 or INT8 operands into a new tensor, see :func:`gemm_triton`."""
    out = _fake_multiply(*arguments)
    _launch(*arguments[:-1], out, accumulate=False)
    return out


@multiply.register_fake
def _fake_multiply(*arguments: Any) -> Tensor:
    a, b = arguments[:2]
    out = a.new_empty(a.shape[0], b.shape[0], dtype=arguments[-1])
    _check(*arguments[:-1], out, accumulate=False)
    return out


@torch.library.custom_op(
    "megafp4::matmul_out",
    mutates_args=("out",),
    schema=f"({_SCHEMA}, Tensor(a!) out, bool accumulate) -> ()",
)
def multiply_out(*arguments: Any) -> None:
    """Multiply FP8 or INT8 operands into, or onto, a given tensor."""
    _check(*arguments)
    _launch(*arguments)


@multiply_out.register_fake
def _fake_multiply_out(*arguments: Any) -> None:
    _check(*arguments)


def _check(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float,
    bias: Tensor | None,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    k: float,
    cap: float,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Raise ValueError, in one sentence, for what the kernel cannot do."""
    if a.ndim != 2 or b.ndim != 2 or not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(
            f"a is {list(a.shape)} with strides {list(a.stride())} and b {list(b.shape)} with "
            f"{list(b.stride())}: give contiguous matrices"
        )
    (rows, depth), columns = a.shape, b.shape[0]
    if b.shape[1] != depth or depth % 16 or not depth:
        raise ValueError(
            f"K is {depth} in a and {b.shape[1]} in b: give one contraction length that is a "
            "positive multiple of 16"
        )
    vectors = [("scale_a", scale_a, (1, rows), _FLOATS[:1])]
    vectors.append(("scale_b", scale_b, (1, columns), _FLOATS[:1]))
    matrices = [("out", out, _FLOATS[:1] if accumulate else _FLOATS)]
    if bias is not None:
        vectors.append(("bias", bias, (columns,), _FLOATS))
    if weight is not None and weight_scale is not None:
        matrices.append(("the slope's weight", weight, _FLOATS))
        vectors.append(("the slope's scale", weight_scale, (1, rows), _FLOATS[:1]))
    for name, vector, lengths, dtypes in vectors:
        if vector.ndim != 1 or vector.shape[0] not in lengths or vector.dtype not in dtypes:
            raise ValueError(
                f"{name} is {vector.dtype} {list(vector.shape)}: give {_names(dtypes)} of length "
                f"{' or '.join(map(str, lengths))}"
            )
    for name, matrix, dtypes in matrices:
        if matrix.shape != (rows, columns) or matrix.dtype not in dtypes:
            raise ValueError(
                f"{name} is {matrix.dtype} {list(matrix.shape)}: give {_names(dtypes)} "
                f"[{rows}, {columns}]"
            )
    named = [(name, tensor) for name, tensor, *_ in (*vectors, *matrices)]
    for name, tensor in [("b", b), *named]:
        if tensor.device != a.device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is on {tensor.device} with strides {list(tensor.stride())}: give a "
                f"contiguous tensor on {a.device}"
            )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _launch(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    alpha: float,
    bias: Tensor | None,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    k: float,
    cap: float,
    out: Tensor,
    accumulate: bool,
) -> None:
    check_device(a)
    (rows, depth), columns = a.shape, b.shape[0]
    if out.numel() == 0:
        return
    tma = has_tma(a.device)
    m, n, warps = _tile(a.device, tma)
    tile_k = min(128, triton.next_power_of_2(depth))
    grid = (triton.cdiv(rows, m) * triton.cdiv(columns, n),)
    _matmul_kernel[grid](
        TensorDescriptor.from_tensor(a, [m, tile_k]) if tma else a,
        TensorDescriptor.from_tensor(b, [n, tile_k]) if tma else b,
        out,
        scale_a,
        scale_b,
        bias,
        weight,
        weight_scale,
        rows,
        columns,
        alpha,
        1.0 / k - 1.0,
        1.0 / k,
        cap,
        DEPTH=depth,
        SCALE_A=scale_a.shape[0] > 1,
        SCALE_B=scale_b.shape[0] > 1,
        BIAS=bias is not None,
        SLOPE=0 if weight_scale is None else 1 + (weight_scale.shape[0] > 1),
        ACCUMULATE=accumulate,
        SUM=tl.int32 if a.dtype == torch.int8 else tl.float32,
        TMA=tma,
        M=m,
        N=n,
        K=tile_k,
        GROUP=_GROUP,
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
