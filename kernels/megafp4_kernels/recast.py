"""Recast what fprop multiplied to tensor-wise E4M3, as the backward pass of fp4 multiplies it.

The value of an element is code * line scale (+ the outlier that OCC cut off, which is computed
again from the activation). Its E4M3 codes are bit-equal to those that ``megafp4.numerics.quantize``
gives for that value; one pass writes them along the rows, the columns or both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix
from megafp4_kernels.amax import scale as scale_of
from megafp4_kernels.casts import has_fp8_conversions
from megafp4_kernels.encode import encode_minifloat, store_codes
from megafp4_kernels.outliers import decode_e4m3

_TILE = (64, 128)


@triton.jit
def _peak_kernel(data, scales, peaks, rows, cols, STEPS: tl.constexpr, TILE: tl.constexpr):
    """Largest magnitude of the values of one row."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((TILE,), tl.int32)
    for step in range(STEPS):
        column = step * TILE + tl.arange(0, TILE)
        byte = tl.load(data + row * cols + column, mask=column < cols, other=0).to(tl.int32)
        largest = tl.maximum(largest, byte & 0x7F)
    tl.store(peaks + row, decode_e4m3(tl.max(largest, axis=0)) * tl.load(scales + row))


@triton.jit
def _recast_kernel(
    data,
    scales,
    x,
    limits,
    target,
    row_out,
    col_out,
    rows,
    cols,
    OUTLIERS: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile: value, its product with the reciprocal of the tensor's scale, E4M3 codes."""
    tiles = tl.cdiv(cols, COLS)
    first_row = (tl.program_id(0) // tiles) * ROWS
    first_col = (tl.program_id(0) % tiles) * COLS
    r = first_row + tl.arange(0, ROWS)
    c = first_col + tl.arange(0, COLS)
    mask = (r < rows)[:, None] & (c < cols)[None, :]
    offsets = r.to(tl.int64)[:, None] * cols + c[None, :]
    value = decode_e4m3(tl.load(data + offsets, mask=mask, other=0).to(tl.int32))
    value *= tl.load(scales + r, mask=r < rows, other=0.0)[:, None]
    if OUTLIERS:
        low = tl.load(limits + r, mask=r < rows, other=0.0)[:, None]
        high = tl.load(limits + rows + r, mask=r < rows, other=0.0)[:, None]
        whole = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        value += whole - tl.where(whole < low, low, tl.where(whole > high, high, whole))
    value *= tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(target))
    value = tl.where(value == value, value, 0.0)
    if HARDWARE:
        codes = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = encode_minifloat(value, value, 4, 3, -6, 0x7E, "nearest-even").to(tl.uint8)
    if ROW:
        store_codes(codes, row_out, first_row, first_col, rows, cols, False, ROWS, COLS)
    if COL:
        turned = tl.trans(codes)
        store_codes(turned, col_out, first_col, first_row, cols, rows, False, COLS, ROWS)


def recast(
    data: Tensor,
    scale: Tensor,
    *,
    peak: Tensor | None = None,
    x: Tensor | None = None,
    limits: Tensor | None = None,
    row: bool = False,
    col: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Recast an operand with line scales to E4M3 with one scale.

    Args:
        data: float8_e4m3fn [rows, cols], contiguous, without NaN codes.
        scale: FP32 [rows].
        peak: FP32 [rows], largest magnitude of each row's values; None reads ``data`` for it.
        x: BF16 or FP32 [rows, cols]: the activation, if what it has beyond ``limits`` is to be
            added; needs ``peak`` and ``limits`` as :func:`megafp4_kernels.outliers.occ` returns
            them.
        limits: FP32 [2, rows].
        row: Whether to return the operand whose lines are rows.
        col: Whether to return the operand whose lines are columns: the transposed matrix.

    Returns:
        (float8_e4m3fn [rows, cols] or None, [cols, rows] or None, FP32 [1] scale).

    Raises:
        ValueError: Arguments are not as above.
    """
    if peak is None:
        peak = _peak(data, scale)
    outputs = _recast(data, scale, peak, x, limits, row, col)
    return outputs[0] if row else None, outputs[-2] if col else None, outputs[-1]


@torch.library.custom_op("megafp4::line_peak", mutates_args=())
def _peak(data: Tensor, scale: Tensor) -> Tensor:
    """Largest magnitude of every row's values."""
    peak = _fake_peak(data, scale)
    check_device(data)
    rows, cols = data.shape
    if data.numel() == 0:
        return peak.zero_()
    tile = min(4096, triton.next_power_of_2(cols))
    steps = triton.cdiv(cols, tile)
    _peak_kernel[(rows,)](
        data.view(torch.uint8), scale, peak, rows, cols, STEPS=steps, TILE=tile, num_warps=4
    )
    return peak


@_peak.register_fake
def _fake_peak(data: Tensor, scale: Tensor) -> Tensor:
    _check(data, scale)
    return torch.empty_like(scale)


@torch.library.custom_op("megafp4::recast", mutates_args=())
def _recast(
    data: Tensor,
    scale: Tensor,
    peak: Tensor,
    x: Tensor | None,
    limits: Tensor | None,
    row: bool,
    col: bool,
) -> list[Tensor]:
    """Return the outputs that were asked for, that of the rows first, and the scale."""
    *outputs, target = _fake_recast(data, scale, peak, x, limits, row, col)
    check_device(data)
    rows, cols = data.shape
    target = scale_of(peak.view(1, -1), "fp8-e4m3", None)
    if data.numel() == 0:
        return [*outputs, target]
    grid = (triton.cdiv(rows, _TILE[0]) * triton.cdiv(cols, _TILE[1]),)
    _recast_kernel[grid](
        data.view(torch.uint8),
        scale,
        x,
        limits,
        target,
        outputs[0].view(torch.uint8),
        outputs[-1].view(torch.uint8),
        rows,
        cols,
        OUTLIERS=x is not None,
        HARDWARE=has_fp8_conversions(data.device),
        ROW=row,
        COL=col,
        ROWS=_TILE[0],
        COLS=_TILE[1],
        num_warps=4,
        enable_fp_fusion=False,  # value and outlier are each rounded, as in the specification
    )
    return [*outputs, target]


@_recast.register_fake
def _fake_recast(
    data: Tensor,
    scale: Tensor,
    peak: Tensor,
    x: Tensor | None,
    limits: Tensor | None,
    row: bool,
    col: bool,
) -> list[Tensor]:
    _check(data, scale)
    rows, cols = data.shape
    if not (row or col):
        raise ValueError("row and col are both False: ask for at least one output")
    if (x is None) != (limits is None):
        raise ValueError("x and limits belong together: give both or neither")
    if x is not None and limits is not None:
        check_matrix(x)
        if x.shape != data.shape or limits.shape != (2, rows):
            raise ValueError(
                f"x is {list(x.shape)} and limits {list(limits.shape)}: give {[rows, cols]} and "
                f"{[2, rows]}"
            )
    if peak.shape != (rows,) or peak.dtype != torch.float32:
        raise ValueError(f"peak is {peak.dtype} {list(peak.shape)}: give float32 [{rows}]")
    outputs = [data.new_empty(rows, cols)] if row else []
    outputs += [data.new_empty(cols, rows)] if col else []
    return [*outputs, scale.new_empty(1)]


def _check(data: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless data and scale are an operand with line scales."""
    if data.ndim != 2 or data.dtype != torch.float8_e4m3fn or not data.is_contiguous():
        raise ValueError(
            f"data is {data.dtype} {list(data.shape)}: give a contiguous float8_e4m3fn matrix"
        )
    if scale.dtype != torch.float32 or scale.shape != data.shape[:1]:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}: give float32 [{data.shape[0]}]"
        )
