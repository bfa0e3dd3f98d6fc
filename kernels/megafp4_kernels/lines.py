"""Scale and cast the rows of a matrix while they are read once.

A row lies in the registers of one program: its largest magnitude gives the scale, then its codes
are made. Bit-equal to :func:`megafp4_kernels.amax.scale` followed by
:func:`megafp4_kernels.casts.cast`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import (
    MAX_VALUES,
    MIN_SCALE,
    check_device,
    check_matrix,
    magnitude_bits,
    scale_from_amax,
)
from megafp4_kernels.casts import DTYPES, ROUNDINGS, encode, has_instructions
from megafp4_kernels.encode import decode_e4m3
from megafp4_kernels.operators import define

MAX_COLS = 32768
"""Longest row that the registers of a program hold."""

_TILE = 4096  # elements of a program, or one row
_ELEMENTS_PER_WARP = 1024


class Lines(NamedTuple):
    """An operand with one scale a row."""

    data: Tensor
    """[rows, cols] of the type that :data:`megafp4_kernels.casts.DTYPES` gives for the format."""
    scale: Tensor
    """FP32 [rows]; NaN where the row is not finite."""
    peak: Tensor | None
    """FP32 [rows]: largest magnitude of code times scale; None unless it was asked for."""


@triton.jit
def _lines_kernel(
    x,
    data,
    scales,
    peaks,
    rows,
    cols,
    prescale,
    max_value,
    min_scale,
    FORMAT: tl.constexpr,
    ROUNDING: tl.constexpr,
    PRESCALE: tl.constexpr,
    HARDWARE: tl.constexpr,
    PEAK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    offsets = row.to(tl.int64)[:, None] * cols + col[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(magnitude_bits(value), axis=1).to(tl.float32, bitcast=True)
    scale = scale_from_amax(amax, max_value, min_scale)
    tl.store(scales + row, scale, mask=row < rows)
    value *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    if PRESCALE:
        value *= prescale
    codes = encode(value, value, FORMAT, ROUNDING, HARDWARE)
    tl.store(data + offsets, codes, mask=mask)
    if PEAK:
        largest = tl.max((codes & 0x7F).to(tl.int32), axis=1)
        tl.store(peaks + row, decode_e4m3(largest) * scale, mask=row < rows)


def cast_lines(
    x: Tensor,
    fmt: str,
    *,
    rounding: str = "nearest-even",
    prescale: float = 1.0,
    peak: bool = False,
) -> Lines:
    """Quantize a matrix with one scale a row.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous, at most ``MAX_COLS`` columns.
        fmt: ``fp8-e4m3``, ``fp8-e5m2``, ``fp4-vector``, ``int8`` or ``ternary``.
        rounding: ``nearest-even``, ``nearest-away`` or ``nearest-up``.
        prescale: FP32 factor applied after the scale.
        peak: Whether to return the largest magnitudes; for ``fp4-vector`` and ``fp8-e4m3``.

    Returns:
        See :class:`Lines`.

    Raises:
        ValueError: Arguments are not as above.
    """
    data, scale, peaks = torch.ops.megafp4.cast_lines(x, fmt, rounding, float(prescale), peak)
    return Lines(data, scale, peaks if peak else None)


def _cast_lines(
    x: Tensor, fmt: str, rounding: str, prescale: float, peak: bool
) -> tuple[Tensor, Tensor, Tensor]:
    data, scale, peaks = _fake_cast_lines(x, fmt, rounding, prescale, peak)
    check_device(x)
    rows, cols = x.shape
    if x.numel() == 0:
        return data, scale.fill_(MIN_SCALE), peaks.zero_()
    tile = triton.next_power_of_2(max(cols, 64))
    height = max(1, _TILE // tile)
    _lines_kernel[(triton.cdiv(rows, height),)](
        x,
        data.view(torch.uint8),
        scale,
        peaks,
        rows,
        cols,
        prescale,
        MAX_VALUES[fmt],
        MIN_SCALE,
        FORMAT=fmt,
        ROUNDING=rounding,
        PRESCALE=prescale != 1.0,
        HARDWARE=has_instructions(fmt, rounding, x.device),
        PEAK=peak,
        ROWS=height,
        COLS=tile,
        num_warps=max(1, height * tile // _ELEMENTS_PER_WARP),
    )
    return data, scale, peaks


def _fake_cast_lines(
    x: Tensor, fmt: str, rounding: str, prescale: float, peak: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_matrix(x)
    rows, cols = x.shape
    if fmt not in MAX_VALUES:
        raise ValueError(f"format is {fmt!r}: choose one of {', '.join(MAX_VALUES)}")
    if rounding not in ROUNDINGS or rounding == "stochastic":
        raise ValueError(
            f"rounding is {rounding!r}: choose one to the nearest of {', '.join(ROUNDINGS)}"
        )
    if cols > MAX_COLS:
        raise ValueError(f"x has {cols} columns: give at most {MAX_COLS}")
    if peak and DTYPES[fmt] != torch.float8_e4m3fn:
        raise ValueError(f"peaks of {fmt!r} were asked for: only those of E4M3 bytes are found")
    scale = x.new_empty(rows, dtype=torch.float32)
    peaks = x.new_empty(rows if peak else 0, dtype=torch.float32)
    return x.new_empty(rows, cols, dtype=DTYPES[fmt]), scale, peaks


define(
    "cast_lines",
    "(Tensor x, str fmt, str rounding, float prescale, bool peak) -> (Tensor, Tensor, Tensor)",
    _cast_lines,
    _fake_cast_lines,
)
