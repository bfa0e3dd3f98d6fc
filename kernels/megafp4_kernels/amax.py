"""Range statistics: the largest magnitude of a tensor or of its lines, and the scale it gives.

Magnitudes are compared as integers. That is exact, does not depend on the order, and lets NaN and
infinity through, whose bit patterns are the largest. Bit-equal to ``megafp4.numerics.amax`` and
``scales_from_amax`` for formats with FP32 scales. Nothing waits for the GPU.

Trip counts are compile-time constants, here and in the other kernels: Triton's interpreter, with
which they are tested on a CPU, cannot loop to a number that it loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.operators import define

MAX_VALUES = {
    "fp8-e4m3": 448.0,
    "fp8-e5m2": 57344.0,
    "fp4-vector": 6.0,
    "int8": 127.0,
    "ternary": 1.0,
}
"""Largest value of a code of the formats whose scales are FP32."""

MIN_SCALE = 2.0**-126
"""Smallest FP32 scale: its reciprocal is still finite."""

_TILE = 8192  # elements that one program holds at once
_PROGRAMS = 1056  # 8 for each of an H100's SMs
_MAX_PARTS = 8192  # results that one program joins
_SPLITS = 64  # parts into which long columns are cut


@triton.jit
def magnitude_bits(x):
    """|x| of BF16 or FP32 as the int32 bits of its FP32 value, ordered as the magnitudes are."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from_amax(amax, max_value, min_scale):
    """FP32 scale of a finite amax: amax / max_value, correctly rounded, bounded below; else NaN.

    Args:
        amax: FP32 tensor.
        max_value: FP32 scalar, the format's largest value.
        min_scale: FP32 scalar, the least scale.

    Returns:
        FP32 tensor.
    """
    quotient = tl.div_rn(amax, tl.zeros_like(amax) + max_value)
    infinity = float("inf")
    return tl.where(quotient < infinity, tl.maximum(quotient, min_scale), float("nan"))


@triton.jit
def _store(bits, out, offsets, mask, max_value, min_scale, SCALE: tl.constexpr):
    amax = bits.to(tl.float32, bitcast=True)
    if SCALE:
        amax = scale_from_amax(amax, max_value, min_scale)
    tl.store(out + offsets, amax, mask=mask)


@triton.jit
def _tensor_kernel(x, partial, count, STEPS: tl.constexpr, TILE: tl.constexpr):
    """Largest magnitude of every stripe of a flat tensor, as bits."""
    largest = tl.zeros((TILE,), tl.int32)
    for step in range(STEPS):
        first = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * TILE
        offsets = first + tl.arange(0, TILE)
        largest = tl.maximum(
            largest, magnitude_bits(tl.load(x + offsets, mask=offsets < count, other=0.0))
        )
    tl.store(partial + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _row_kernel(
    x,
    out,
    rows,
    cols,
    max_value,
    min_scale,
    SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Largest magnitude, or scale, of every row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = x + row.to(tl.int64)[:, None] * cols
    largest = tl.zeros((ROWS, TILE), tl.int32)
    for step in range(STEPS):
        col = step * TILE + tl.arange(0, TILE)[None, :]
        mask = (row[:, None] < rows) & (col < cols)
        largest = tl.maximum(largest, magnitude_bits(tl.load(start + col, mask=mask, other=0.0)))
    _store(tl.max(largest, axis=1), out, row, row < rows, max_value, min_scale, SCALE)


@triton.jit
def _column_kernel(
    x, partial, rows, cols, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Largest magnitude of every column over one of several ranges of rows, as bits."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    largest = tl.zeros((ROWS, COLS), tl.int32)
    for step in range(STEPS):
        first = (step * tl.num_programs(1) + tl.program_id(1)) * ROWS
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (col[None, :] < cols)
        loaded = tl.load(x + row.to(tl.int64) * cols + col[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(loaded))
    offsets = tl.program_id(1).to(tl.int64) * cols + col
    tl.store(partial + offsets, tl.max(largest, axis=0), mask=col < cols)


@triton.jit
def _finish_kernel(
    partial,
    out,
    parts,
    lines,
    max_value,
    min_scale,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
):
    """Join partial results [parts, lines]."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    part = tl.arange(0, PARTS)[:, None]
    mask = (part < parts) & (line[None, :] < lines)
    bits = tl.load(partial + part.to(tl.int64) * lines + line[None, :], mask=mask, other=0)
    _store(tl.max(bits, axis=0), out, line, line < lines, max_value, min_scale, SCALE)


def amax(x: Tensor, axis: int | None) -> Tensor:
    """Largest magnitude of a matrix or of each of its lines.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous.
        axis: Contraction axis, over which lines are reduced: 1 gives one value a row, 0 one a
            column, None one for the tensor.

    Returns:
        FP32 [1], [rows] or [cols]; NaN or infinity where the group holds one, 0 if it is empty.

    Raises:
        ValueError: x or axis is not as above.
    """
    return torch.ops.megafp4.line_statistic(x, -1 if axis is None else axis, 0.0)


def scale(x: Tensor, fmt: str, axis: int | None) -> Tensor:
    """FP32 scale of a matrix or of each of its lines: amax / the format's largest value.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous.
        fmt: ``fp8-e4m3``, ``fp8-e5m2``, ``fp4-vector``, ``int8`` or ``ternary``.
        axis: Contraction axis as in :func:`amax`.

    Returns:
        FP32 [1], [rows] or [cols], at least 2^-126; NaN where the group is not finite.

    Raises:
        ValueError: x, fmt or axis is not as above.
    """
    if fmt not in MAX_VALUES:
        raise ValueError(f"format is {fmt!r}: choose one of {', '.join(MAX_VALUES)}")
    return torch.ops.megafp4.line_statistic(x, -1 if axis is None else axis, MAX_VALUES[fmt])


def scale_of(largest: Tensor, fmt: str) -> Tensor:
    """:func:`scale` of a matrix whose largest magnitudes are known.

    Args:
        largest: FP32 [n], contiguous, n > 0: of n parts of the matrix; not negative.
        fmt: As for :func:`scale`.

    Returns:
        FP32 [1].

    Raises:
        ValueError: largest or fmt is not as above.
    """
    if fmt not in MAX_VALUES:
        raise ValueError(f"format is {fmt!r}: choose one of {', '.join(MAX_VALUES)}")
    return torch.ops.megafp4.scale_of(largest, MAX_VALUES[fmt])


def check_matrix(x: Tensor) -> None:
    """Raise ValueError unless x is a contiguous BF16 or FP32 matrix where kernels can read it."""
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {list(x.stride())}: give a contiguous "
            "bfloat16 or float32 matrix"
        )
    check_device(x)


def check_device(x: Tensor) -> None:
    """Raise ValueError unless Triton can work on x's device: CUDA, or any while interpreting."""
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"x is on {x.device}: move it to a CUDA device")


def _statistic(x: Tensor, axis: int, max_value: float) -> Tensor:
    """Amax (``max_value`` 0) or scale; axis -1 is the whole tensor."""
    out = _fake_statistic(x, axis, max_value)
    rows, cols = x.shape
    if x.numel() == 0:
        return out.fill_(MIN_SCALE if max_value else 0.0)
    common = {"max_value": max_value, "min_scale": MIN_SCALE, "SCALE": max_value != 0.0}
    if axis == 1:
        tile = min(triton.next_power_of_2(max(cols, 16)), _TILE // 2)
        height = max(1, _TILE // 2 // tile)
        grid = (triton.cdiv(rows, height),)
        steps = triton.cdiv(cols, tile)
        _row_kernel[grid](
            x, out, rows, cols, STEPS=steps, ROWS=height, TILE=tile, num_warps=4, **common
        )
    elif axis == 0:
        parts = max(1, min(_SPLITS, triton.cdiv(rows, 32)))
        partial = torch.empty(parts, cols, dtype=torch.int32, device=x.device)
        grid = (triton.cdiv(cols, 128), parts)
        steps = triton.cdiv(rows, 32 * parts)
        _column_kernel[grid](x, partial, rows, cols, STEPS=steps, ROWS=32, COLS=128, num_warps=4)
        _finish(partial, out, common)
    else:
        reduce_tensor(x, out, **common)
    return out


def reduce_tensor(x: Tensor, out: Tensor, **common: float) -> None:
    """Write to ``out`` [1] the amax of all of x, or the scale that ``common`` asks for.

    Args:
        x: BF16 or FP32, contiguous, not empty.
        out: FP32 [1].
        common: ``max_value``, ``min_scale`` and ``SCALE`` as the kernels take them.
    """
    parts = min(_PROGRAMS, triton.cdiv(x.numel(), _TILE))
    partial = torch.empty(parts, 1, dtype=torch.int32, device=x.device)
    steps = triton.cdiv(x.numel(), _TILE * parts)
    _tensor_kernel[(parts,)](x, partial, x.numel(), STEPS=steps, TILE=_TILE, num_warps=8)
    _finish(partial, out, common)


def _finish(partial: Tensor, out: Tensor, common: dict[str, float]) -> None:
    parts, lines = partial.shape
    width = 1 if lines == 1 else 64
    _finish_kernel[(triton.cdiv(lines, width),)](
        partial,
        out,
        parts,
        lines,
        PARTS=triton.next_power_of_2(parts),
        LINES=width,
        num_warps=4,
        **common,
    )


def _scale_of(largest: Tensor, max_value: float) -> Tensor:
    out = _fake_scale_of(largest, max_value)
    check_device(largest)
    if largest.numel() > _MAX_PARTS:
        largest = largest.amax(0, keepdim=True)
    bits = largest.view(torch.int32).view(-1, 1)
    _finish(bits, out, {"max_value": max_value, "min_scale": MIN_SCALE, "SCALE": True})
    return out


def _fake_scale_of(largest: Tensor, max_value: float) -> Tensor:
    if largest.dtype != torch.float32 or largest.ndim != 1 or not largest.numel():
        raise ValueError(
            f"largest magnitudes are {largest.dtype} {list(largest.shape)}: give float32 [n], n > 0"
        )
    return largest.new_empty(1)


def _fake_statistic(x: Tensor, axis: int, max_value: float) -> Tensor:
    check_matrix(x)
    if axis not in (-1, 0, 1):
        raise ValueError(f"axis is {axis}: choose 0, 1 or None")
    lines = 1 if axis == -1 else x.shape[1 - axis]
    return x.new_empty(lines, dtype=torch.float32)


define(
    "line_statistic", "(Tensor x, int axis, float max_value) -> Tensor", _statistic, _fake_statistic
)
define("scale_of", "(Tensor largest, float max_value) -> Tensor", _scale_of, _fake_scale_of)
