"""Recast what fprop multiplied to tensor-wise E4M3, as the backward pass of fp4 multiplies it.

The value of an element is code * line scale (+ the outlier that OCC cut off, which is computed
again from the activation). Its E4M3 codes are bit-equal to those that ``megafp4.numerics.quantize``
gives for that value; one pass writes them along the rows, the columns or both. Programs start at
the end of the matrix, which the kernel before has left in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix
from megafp4_kernels.amax import scale as scale_of
from megafp4_kernels.casts import has_fp8_conversions
from megafp4_kernels.encode import decode_e4m3, encode_minifloat, fp8_bytes, store_codes
from megafp4_kernels.operators import define

_TILE, _WARPS = (64, 128), 4
_TURN_TILE, _TURN_WARPS = (128, 128), 4


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
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_row = (program // tiles) * ROWS
    first_col = (program % tiles) * COLS
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
        codes = fp8_bytes(value, "fp8-e4m3")
    else:
        codes = encode_minifloat(value, value, 4, 3, -6, 0x7E, "nearest-even").to(tl.uint8)
    if ROW:
        store_codes(codes, row_out, first_row, first_col, rows, cols, False, ROWS, COLS)
    if COL:
        turned = tl.trans(codes)
        store_codes(turned, col_out, first_col, first_row, cols, rows, False, COLS, ROWS)


@triton.jit
def _recode(even, odd, even_scale, odd_scale, reciprocal, keep):
    """E4M3 bytes of two rows -> those of byte * scale * reciprocal, the first row's in low bytes.

    Args:
        even: uint8 of one row, not NaN.
        odd: uint8 of the next row.
        even_scale: FP32 scale of the row.
        odd_scale: FP32 scale of the next row.
        reciprocal: FP32 factor of both.
        keep: int32, -1; 0 returns zeros.

    Returns:
        int16.
    """
    # Products of codes, which FP16 holds exactly, in FP32: four of one row, then of the other.
    return tl.inline_asm_elementwise(
        """{
            .reg .b16 a, b;
            .reg .f16 h0, h1, h2, h3;
            .reg .b32 p, q, even, odd;
            .reg .f32 f0, f1, f2, f3;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 p, a;
            cvt.rn.f16x2.e4m3x2 q, b;
            mov.b32 {h0, h1}, p;
            mov.b32 {h2, h3}, q;
            cvt.f32.f16 f0, h0;
            cvt.f32.f16 f1, h1;
            cvt.f32.f16 f2, h2;
            cvt.f32.f16 f3, h3;
            mul.rn.f32 f0, f0, $4;
            mul.rn.f32 f1, f1, $5;
            mul.rn.f32 f2, f2, $6;
            mul.rn.f32 f3, f3, $7;
            mul.rn.f32 f0, f0, $12;
            mul.rn.f32 f1, f1, $13;
            mul.rn.f32 f2, f2, $14;
            mul.rn.f32 f3, f3, $15;
            cvt.rn.satfinite.e4m3x2.f32 a, f1, f0;
            cvt.rn.satfinite.e4m3x2.f32 b, f3, f2;
            mov.b32 even, {a, b};
            mov.b32 {a, b}, $3;
            cvt.rn.f16x2.e4m3x2 p, a;
            cvt.rn.f16x2.e4m3x2 q, b;
            mov.b32 {h0, h1}, p;
            mov.b32 {h2, h3}, q;
            cvt.f32.f16 f0, h0;
            cvt.f32.f16 f1, h1;
            cvt.f32.f16 f2, h2;
            cvt.f32.f16 f3, h3;
            mul.rn.f32 f0, f0, $8;
            mul.rn.f32 f1, f1, $9;
            mul.rn.f32 f2, f2, $10;
            mul.rn.f32 f3, f3, $11;
            mul.rn.f32 f0, f0, $12;
            mul.rn.f32 f1, f1, $13;
            mul.rn.f32 f2, f2, $14;
            mul.rn.f32 f3, f3, $15;
            cvt.rn.satfinite.e4m3x2.f32 a, f1, f0;
            cvt.rn.satfinite.e4m3x2.f32 b, f3, f2;
            mov.b32 odd, {a, b};
            and.b32 even, even, $16;
            and.b32 odd, odd, $16;
            prmt.b32 $0, even, odd, 0x5140;
            prmt.b32 $1, even, odd, 0x7362;
        }""",
        "=&r,=&r" + ",r" * 18,
        [even, odd, even_scale, odd_scale, reciprocal, keep],
        dtype=tl.int16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _turn_kernel(data, scales, target, out, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Recast along the columns alone, without outliers, where the number of rows is even.

    Two rows share 16 bits, which are turned in half as many moves as bytes would be.

    Args:
        out: int16 [cols, rows / 2].
    """
    tiles = tl.cdiv(cols, COLS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_row = (program // tiles) * ROWS
    first_col = (program % tiles) * COLS
    local = 2 * tl.arange(0, ROWS // 2)
    c = tl.arange(0, COLS)
    inside = first_row + local < rows
    mask = inside[:, None] & (first_col + c < cols)[None, :]
    start = data + first_row.to(tl.int64) * cols + first_col
    upper = start + local[:, None] * cols + c[None, :]
    even = tl.load(upper, mask=mask, other=0)
    odd = tl.load(upper + cols, mask=mask, other=0)
    even_scale = tl.load(scales + first_row + local, mask=inside, other=0.0)
    odd_scale = tl.load(scales + first_row + local + 1, mask=inside, other=0.0)
    # A row whose scale is NaN has codes 0, which any number leaves as they are.
    even_scale = tl.where(even_scale == even_scale, even_scale, 0.0)
    odd_scale = tl.where(odd_scale == odd_scale, odd_scale, 0.0)
    whole = tl.load(target)
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), whole)
    keep = tl.where(whole == whole, -1, 0)
    codes = _recode(even, odd, even_scale[:, None], odd_scale[:, None], reciprocal, keep)
    store_codes(
        tl.trans(codes), out, first_col, first_row // 2, cols, rows // 2, False, COLS, ROWS // 2
    )


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
        peak: FP32 [n], n > 0: largest magnitudes of n parts, such as rows, of the values that share
            a scale; None reads ``data`` for those of its rows.
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
        peak = line_peaks(data, scale)
    outputs = torch.ops.megafp4.recast(data, scale, peak, x, limits, row, col)
    return outputs[0] if row else None, outputs[-2] if col else None, outputs[-1]


def line_peaks(data: Tensor, scale: Tensor) -> Tensor:
    """Largest magnitude of the values of every row: FP32 [rows]; arguments as in :func:`recast`."""
    return torch.ops.megafp4.line_peak(data, scale)


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


def _fake_peak(data: Tensor, scale: Tensor) -> Tensor:
    _check(data, scale)
    return torch.empty_like(scale)


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
    hardware = has_fp8_conversions(data.device)
    if hardware and not row and x is None and rows % 2 == 0:
        height, width = _TURN_TILE
        _turn_kernel[(triton.cdiv(rows, height) * triton.cdiv(cols, width),)](
            data.view(torch.uint8),
            scale,
            target,
            outputs[0].view(torch.int16),
            rows,
            cols,
            ROWS=height,
            COLS=width,
            num_warps=_TURN_WARPS,
        )
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
        HARDWARE=hardware,
        ROW=row,
        COL=col,
        ROWS=_TILE[0],
        COLS=_TILE[1],
        num_warps=_WARPS,
        enable_fp_fusion=False,  # value and outlier are each rounded, as in the specification
    )
    return [*outputs, target]


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
    if peak.ndim != 1 or peak.dtype != torch.float32 or (data.numel() and not peak.numel()):
        raise ValueError(f"peak is {peak.dtype} {list(peak.shape)}: give float32 [n], n > 0")
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


define("line_peak", "(Tensor data, Tensor scale) -> Tensor", _peak, _fake_peak)
define(
    "recast",
    "(Tensor data, Tensor scale, Tensor peak, Tensor? x, Tensor? limits, bool row, bool col) "
    "-> Tensor[]",
    _recast,
    _fake_recast,
)
