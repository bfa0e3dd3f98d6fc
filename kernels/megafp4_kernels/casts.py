"""Cast a matrix to 8-bit codes at a given FP32 scale, along its rows, its columns or both.

Code = round(x * (1 / scale) * prescale), bit-equal to ``megafp4.numerics.encode``: FP32 products, a
correctly rounded reciprocal, NaN to 0, saturation. One pass over x serves both outputs. FP8 to the
nearest even uses the conversion instruction of sm_89 and later; all else is integer arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix
from megafp4_kernels.encode import (
    e2m1_as_e4m3,
    encode_e2m1,
    encode_integer,
    encode_minifloat,
    fp8_bytes,
    ladder,
    store_codes,
)
from megafp4_kernels.operators import define
from megafp4_kernels.philox import dither

DTYPES = {
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
    "fp4-vector": torch.float8_e4m3fn,
    "int8": torch.int8,
    "ternary": torch.int8,
}
"""What the codes of a format are stored as; those of ``fp4-vector`` as their E2M1 values."""
ROUNDINGS = ("nearest-even", "nearest-away", "nearest-up", "stochastic")

_TILE = (64, 128)  # rows and columns: both outputs are written in runs of at least 64 bytes
_WARPS = 4


@triton.jit
def encode(value, noise, FORMAT: tl.constexpr, ROUNDING: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 values in units of the scale -> the bytes of their codes, as uint8."""
    value = tl.where(value == value, value, 0.0)
    if HARDWARE and FORMAT == "fp4-vector":
        return fp8_bytes(ladder(value), "fp8-e4m3")
    elif HARDWARE:
        return fp8_bytes(value, FORMAT)
    elif FORMAT == "fp8-e4m3":
        return encode_minifloat(value, noise, 4, 3, -6, 0x7E, ROUNDING).to(tl.uint8)
    elif FORMAT == "fp8-e5m2":
        return encode_minifloat(value, noise, 5, 2, -14, 0x7B, ROUNDING).to(tl.uint8)
    elif FORMAT == "int8":
        return encode_integer(value, noise, -128, 127, ROUNDING).to(tl.uint8)
    elif FORMAT == "ternary":
        return encode_integer(value, noise, -1, 1, ROUNDING).to(tl.uint8)
    elif FORMAT == "fp4-packed":
        return encode_e2m1(value, noise, ROUNDING).to(tl.uint8)
    else:
        return e2m1_as_e4m3(encode_e2m1(value, noise, ROUNDING)).to(tl.uint8)


@triton.jit(do_not_specialize=["stream"])
def _cast_kernel(
    x,
    scale,
    position,
    row_runs,
    col_runs,
    row_out,
    col_out,
    rows,
    cols,
    prescale,
    stream,
    SCALE_AXIS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROUNDING: tl.constexpr,
    PRESCALE: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROW: tl.constexpr,
    COL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile of x, read once. SCALE_AXIS: 0 for a scale a row, 1 a column, -1 the tensor."""
    tiles = tl.cdiv(cols, COLS)
    # From the end, which the kernel that found the scale has left in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_row = (program // tiles) * ROWS
    first_col = (program % tiles) * COLS
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    row_mask = first_row + r < rows
    col_mask = first_col + c < cols
    start = x + first_row.to(tl.int64) * cols + first_col
    mask = row_mask[:, None] & col_mask[None, :]
    value = tl.load(start + r[:, None] * cols + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALE_AXIS == 0:
        line_scale = tl.load(scale + first_row + r, mask=row_mask, other=1.0)
        value *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), line_scale)[:, None]
    elif SCALE_AXIS == 1:
        line_scale = tl.load(scale + first_col + c, mask=col_mask, other=1.0)
        value *= tl.div_rn(tl.full((COLS,), 1.0, tl.float32), line_scale)[None, :]
    else:
        value *= tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(scale))
    if PRESCALE:
        value *= prescale
    PACKED: tl.constexpr = FORMAT == "fp4-packed"
    if ROUNDING == "stochastic":
        # The draw belongs to (line, k), so a tile is turned before it is rounded.
        if ROW:
            noise = dither(
                position, row_runs, col_runs, stream, first_row, first_col, ROWS, COLS, 1
            )
            codes = encode(value, noise, FORMAT, ROUNDING, HARDWARE)
            store_codes(codes, row_out, first_row, first_col, rows, cols, PACKED, ROWS, COLS)
        else:
            noise = dither(
                position, row_runs, col_runs, stream, first_col, first_row, COLS, ROWS, 0
            )
            codes = encode(tl.trans(value), noise, FORMAT, ROUNDING, HARDWARE)
            store_codes(codes, col_out, first_col, first_row, cols, rows, PACKED, COLS, ROWS)
    else:
        codes = encode(value, value, FORMAT, ROUNDING, HARDWARE)
        if ROW:
            store_codes(codes, row_out, first_row, first_col, rows, cols, PACKED, ROWS, COLS)
        if COL:
            turned = tl.trans(codes)
            store_codes(turned, col_out, first_col, first_row, cols, rows, PACKED, COLS, ROWS)


def cast(
    x: Tensor,
    fmt: str,
    scale: Tensor,
    *,
    row: bool = True,
    col: bool = False,
    rounding: str = "nearest-even",
    prescale: float = 1.0,
    position: Tensor | None = None,
    row_runs: Tensor | None = None,
    col_runs: Tensor | None = None,
    stream: int = 0,
    scale_axis: int | None = None,
    packed: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Cast a matrix to operands of a GEMM, lines x K with K contiguous.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous.
        fmt: ``fp8-e4m3``, ``fp8-e5m2``, ``int8``, ``ternary`` or ``fp4-vector``.
        scale: FP32 [1], or one scale a row [rows] or a column [cols] of x.
        row: Whether to return the operand whose lines are rows.
        col: Whether to return the operand whose lines are columns: the transposed matrix.
        rounding: ``nearest-even``, ``nearest-away``, ``nearest-up`` or ``stochastic``; the last
            draws by line and k, hence for one output a call.
        prescale: FP32 factor applied after the scale.
        position: int64 [4] (seed as signed 64 bits, step, first row, first column), of which the
            one that is contracted is a multiple of 16; for stochastic rounding.
        row_runs: Where the rows lie in the whole, see :mod:`megafp4_kernels.philox`.
        col_runs: Where the columns lie.
        stream: Word 3 of the Philox counter: layer * 256 + GEMM * 16 + operand.
        scale_axis: What ``scale`` has one of: 0 for rows, 1 for columns, None for the tensor.
        packed: For ``fp4-vector``: 4-bit codes, two a byte, even index in the low nibble.

    Returns:
        ([rows, cols] or None, [cols, rows] or None): float8 of the format's kind, int8, or
        float8_e4m3fn with the E2M1 values of ``fp4-vector``; packed, uint8 with K halved.

    Raises:
        ValueError: Arguments are not as above or do not fit together.
    """
    axis = -1 if scale_axis is None else scale_axis
    outputs = torch.ops.megafp4.cast(
        x, fmt, scale, row, col, rounding, float(prescale), position, row_runs, col_runs, stream,
        axis, packed,
    )  # fmt: skip
    return outputs[0] if row else None, outputs[-1] if col else None


def _cast(
    x: Tensor,
    fmt: str,
    scale: Tensor,
    row: bool,
    col: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    row_runs: Tensor | None,
    col_runs: Tensor | None,
    stream: int,
    axis: int,
    packed: bool,
) -> list[Tensor]:
    """Return the outputs that were asked for, that of the rows first."""
    outputs = _fake_cast(
        x, fmt, scale, row, col, rounding, prescale, position, row_runs, col_runs, stream, axis,
        packed,
    )  # fmt: skip
    check_device(x)
    rows, cols = x.shape
    if x.numel() == 0:
        return outputs
    grid = (triton.cdiv(rows, _TILE[0]) * triton.cdiv(cols, _TILE[1]),)
    _cast_kernel[grid](
        x,
        scale,
        position,
        row_runs,
        col_runs,
        outputs[0].view(torch.uint8),
        outputs[-1].view(torch.uint8),
        rows,
        cols,
        prescale,
        stream,
        SCALE_AXIS=axis,
        FORMAT="fp4-packed" if packed else fmt,
        ROUNDING=rounding,
        PRESCALE=prescale != 1.0,
        HARDWARE=not packed and has_instructions(fmt, rounding, x.device),
        ROW=row,
        COL=col,
        ROWS=_TILE[0],
        COLS=_TILE[1],
        num_warps=_WARPS,
    )
    return outputs


def has_fp8_conversions(device: torch.device) -> bool:
    """Whether kernels may use FP8 conversion instructions: sm_89 and later, not interpreted."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def has_instructions(fmt: str, rounding: str, device: torch.device) -> bool:
    """Whether :func:`encode` may use FP8 conversion instructions for a format and a rounding."""
    fits = rounding == ("nearest-up" if fmt == "fp4-vector" else "nearest-even")
    return fits and DTYPES[fmt] != torch.int8 and has_fp8_conversions(device)


def _fake_cast(
    x: Tensor,
    fmt: str,
    scale: Tensor,
    row: bool,
    col: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    row_runs: Tensor | None,
    col_runs: Tensor | None,
    stream: int,
    axis: int,
    packed: bool,
) -> list[Tensor]:
    check_matrix(x)
    if fmt not in DTYPES:
        raise ValueError(f"format is {fmt!r}: choose one of {', '.join(DTYPES)}")
    if not (row or col) or (row and col and rounding == "stochastic"):
        raise ValueError(
            f"row is {row} and col is {col} with {rounding} rounding: ask for at least one output, "
            "and for a stochastic one alone, because its draw depends on the lines"
        )
    check_rounding(x, rounding, position, row_runs, col_runs)
    if axis not in (-1, 0, 1):
        raise ValueError(f"scale_axis is {axis}: choose 0 for rows, 1 for columns or None")
    count = 1 if axis == -1 else x.shape[axis]
    if scale.dtype != torch.float32 or scale.shape != (count,) or scale.device != x.device:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)} on {scale.device}: give float32 [{count}] "
            f"on {x.device}"
        )
    if not scale.is_contiguous():
        raise ValueError("scale is not contiguous: call contiguous() on it")
    shapes = [shape for shape, wanted in (((0, 1), row), ((1, 0), col)) if wanted]
    if packed and (fmt != "fp4-vector" or any(x.shape[k] % 2 for _, k in shapes)):
        raise ValueError(
            f"cannot pack {fmt} codes of a matrix {list(x.shape)}: pack fp4-vector along an even K"
        )
    dtype, per_byte = (torch.uint8, 2) if packed else (DTYPES[fmt], 1)
    return [x.new_empty(x.shape[i], x.shape[k] // per_byte, dtype=dtype) for i, k in shapes]


def check_rounding(
    x: Tensor,
    rounding: str,
    position: Tensor | None,
    row_runs: Tensor | None,
    col_runs: Tensor | None,
) -> None:
    """Raise ValueError unless the rounding exists and has the random position that it needs."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    if rounding == "stochastic" and position is None:
        raise ValueError("stochastic rounding has no position: give int64 [4] on x's device")
    rows, cols = (8 * triton.cdiv(count, 128) for count in x.shape)
    for name, given, dtype, length in (
        ("position", position, torch.int64, 4),
        ("row_runs", row_runs, torch.int32, rows),
        ("col_runs", col_runs, torch.int32, cols),
    ):
        if given is not None and (
            given.dtype != dtype or given.shape != (length,) or given.device != x.device
        ):
            raise ValueError(
                f"{name} is {given.dtype} {list(given.shape)} on {given.device}: give {dtype} "
                f"[{length}] on {x.device}"
            )


define(
    "cast",
    "(Tensor x, str fmt, Tensor scale, bool row, bool col, str rounding, float prescale, "
    "Tensor? position, Tensor? row_runs, Tensor? col_runs, int stream, int axis, bool packed) "
    "-> Tensor[]",
    _cast,
    _fake_cast,
)
