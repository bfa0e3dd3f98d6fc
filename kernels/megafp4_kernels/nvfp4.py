"""NVFP4: E2M1 in blocks of 16 or tiles of 16 x 16, E4M3 block scales, one FP32 tensor scale.

arXiv 2509.25149, appendix B; bit-equal to ``megafp4.numerics`` with format ``nvfp4``. The tensor
scale needs the largest magnitude of all, hence two passes over x, with the Hadamard transform (in
the specification's order, so that it too is bit-equal) in both. Packed codes and scales are what
Blackwell multiplies; on Hopper a BF16 GEMM takes the values, which are exact in BF16 without the
tensor scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix, reduce_tensor
from megafp4_kernels.casts import check_rounding
from megafp4_kernels.encode import encode_e2m1, encode_minifloat, store_codes
from megafp4_kernels.nvfp4_amax import BLOCK, TILE, block_magnitudes, check_lines, common, load_tile
from megafp4_kernels.operators import define
from megafp4_kernels.philox import dither

# The block scale's least value, 2^-9, times this is normal: see megafp4.numerics.quantize.
_MIN_TENSOR_SCALE = 2.0**-117


class NVFP4(NamedTuple):
    """An NVFP4 operand, lines x K.

    Attributes:
        codes: uint8 [lines, K / 2], even index in the low nibble; None if not asked for.
        scales: uint8 (E4M3 bytes) [lines, K / 16], or [lines / 16, K / 16] for tiles.
        tensor_scale: FP32 [1].
        values: BF16 [lines, K], code value times block scale, exact; None if not asked for.
    """

    codes: Tensor | None
    scales: Tensor
    tensor_scale: Tensor
    values: Tensor | None


@triton.jit
def _e4m3_value(code):
    """Value of non-negative E4M3 codes, int32 to FP32."""
    normal = ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(code < 8, code.to(tl.float32) * (1.0 / 512), normal)
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def _e2m1_value(code):
    """Value of E2M1 codes, int32 to FP32."""
    magnitude = code & 7
    bits = (magnitude + (126 << 1)) << 22
    bits = tl.where(magnitude == 1, 0x3F000000, tl.where(magnitude == 0, 0, bits))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _spread(blocks, HEIGHT: tl.constexpr, LINES: tl.constexpr, K: tl.constexpr):
    """Repeat [LINES / HEIGHT, K / 16] over the elements of its blocks: [LINES, K]."""
    wide = tl.broadcast_to(blocks[:, None, :, None], (LINES // HEIGHT, HEIGHT, K // 16, 16))
    return tl.reshape(wide, (LINES, K))


@triton.jit(do_not_specialize=["sign_stream", "sign_step", "stream"])
def _encode_kernel(
    x,
    position,
    block_amax,
    tensor_scale,
    row_runs,
    col_runs,
    codes_out,
    scales_out,
    values_out,
    lines,
    length,
    prescale,
    stream,
    sign_stream,
    sign_step,
    AXIS: tl.constexpr,
    HADAMARD: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROUNDING: tl.constexpr,
    PRESCALE: tl.constexpr,
    CODES: tl.constexpr,
    VALUES: tl.constexpr,
    LINES: tl.constexpr,
    K: tl.constexpr,
):
    """Block scales and codes of a tile."""
    BLOCKS: tl.constexpr = LINES // HEIGHT
    tiles = tl.cdiv(length, K)
    first_line = (tl.program_id(0) // tiles) * LINES
    first_k = (tl.program_id(0) % tiles) * K
    value = load_tile(
        x, position, sign_stream, sign_step, first_line, first_k, lines, length,
        AXIS, HADAMARD, LINES, K,
    )  # fmt: skip
    line = first_line // HEIGHT + tl.arange(0, BLOCKS)
    block = first_k // 16 + tl.arange(0, K // 16)
    mask = (line < lines // HEIGHT)[:, None] & (block < length // 16)[None, :]
    offsets = line.to(tl.int64)[:, None] * (length // 16) + block[None, :]
    largest = tl.load(block_amax + offsets, mask=mask, other=0.0)
    whole = tl.zeros((BLOCKS, K // 16), tl.float32) + tl.load(tensor_scale)
    ratio = tl.div_rn(tl.div_rn(largest, tl.full((BLOCKS, K // 16), 6.0, tl.float32)), whole)
    finite = ratio < float("inf")
    ratio = tl.where(finite, ratio, 0.0)
    code = encode_minifloat(ratio, ratio, 4, 3, -6, 0x7E, "nearest-even")
    code = tl.where(finite, code, 0x7F)
    tl.store(scales_out + offsets, code.to(tl.uint8), mask=mask)
    block_scale = _e4m3_value(code)
    scale = block_scale * whole
    reciprocal = tl.div_rn(tl.full((BLOCKS, K // 16), 1.0, tl.float32), scale)
    reciprocal = tl.where(scale == 0.0, 0.0, reciprocal)
    value *= _spread(reciprocal, HEIGHT, LINES, K)
    if PRESCALE:
        value *= prescale
    value = tl.where(value == value, value, 0.0)
    noise = value
    if ROUNDING == "stochastic":
        noise = dither(position, row_runs, col_runs, stream, first_line, first_k, LINES, K, AXIS)
    codes = encode_e2m1(value, noise, ROUNDING)
    if CODES:
        store_codes(
            codes.to(tl.uint8), codes_out, first_line, first_k, lines, length, True, LINES, K
        )
    if VALUES:
        decoded = _e2m1_value(codes) * _spread(block_scale, HEIGHT, LINES, K)
        store_codes(
            decoded.to(tl.bfloat16), values_out, first_line, first_k, lines, length, False, LINES, K
        )


def quantize_nvfp4(
    x: Tensor,
    axis: int = 1,
    *,
    tile: bool = False,
    rounding: str = "nearest-even",
    prescale: float = 1.0,
    position: Tensor | None = None,
    row_runs: Tensor | None = None,
    col_runs: Tensor | None = None,
    stream: int = 0,
    hadamard: int = 0,
    sign_stream: int = 0,
    sign_step: int = -1,
    block_amax: Tensor | None = None,
    largest: Tensor | None = None,
    codes: bool = True,
    values: bool = True,
) -> NVFP4:
    """Quantize a matrix to an NVFP4 operand, lines x K with K contiguous.

    Args:
        x: BF16 or FP32 [rows, cols], contiguous.
        axis: Contraction axis: 1 makes lines of rows, 0 of columns (the transposed matrix).
        tile: Share a scale in 16 x 16 tiles instead of blocks of 16 along K.
        rounding: ``nearest-even``, ``nearest-away``, ``nearest-up`` or ``stochastic``.
        prescale: FP32 factor applied after the scale.
        position: int64 [4] (seed as signed 64 bits, step, first row, first column), of which the
            one that is contracted is a multiple of 16; for stochastic rounding and the Hadamard
            transform.
        row_runs: Where the rows lie in the whole, see :mod:`megafp4_kernels.philox`.
        col_runs: Where the columns lie.
        stream: Word 3 of the Philox counter: layer * 256 + GEMM * 16 + operand.
        hadamard: 16 for the random Hadamard transform of every 16 elements along K, unnormalised
            (the GEMM's alpha carries 1/16); 0 for none.
        sign_stream: Word 3 of the counter of the transform's signs.
        sign_step: Step of the signs; -1 takes that of ``position``.
        block_amax: What :func:`block_magnitudes` gave for these arguments; None finds it.
        largest: FP32 [n], n > 0: magnitudes the largest of which the tensor scale is taken from,
            for a slice of a larger matrix; None takes it from ``block_amax``.
        codes: Whether to return packed codes.
        values: Whether to return BF16 values.

    Returns:
        Codes, scales and values. NaN or infinity anywhere makes the tensor scale, and so all
        scales and values, NaN.

    Raises:
        ValueError: Arguments are not as above; K (or, for tiles, the number of lines) is not a
            multiple of 16.
    """
    packed, scales, tensor_scale, decoded = torch.ops.megafp4.quantize_nvfp4(
        x, axis, tile, rounding, float(prescale), position, row_runs, col_runs, stream, hadamard,
        sign_stream, sign_step, block_amax, largest, codes, values,
    )  # fmt: skip
    return NVFP4(packed if codes else None, scales, tensor_scale, decoded if values else None)


def _quantize(
    x: Tensor,
    axis: int,
    tile: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    row_runs: Tensor | None,
    col_runs: Tensor | None,
    stream: int,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
    block_amax: Tensor | None,
    largest: Tensor | None,
    codes: bool,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, tensor scale and values; what is not wanted is empty."""
    outputs = _fake_quantize(
        x, axis, tile, rounding, prescale, position, row_runs, col_runs, stream, hadamard,
        sign_stream, sign_step, block_amax, largest, codes, values,
    )  # fmt: skip
    check_device(x)
    packed, scales, tensor_scale, decoded = outputs
    lines, length = x.shape if axis == 1 else x.shape[::-1]
    if x.numel() == 0:
        tensor_scale.fill_(_MIN_TENSOR_SCALE)
        return outputs
    if block_amax is None:
        block_amax = block_magnitudes(
            x,
            axis,
            tile=tile,
            position=position,
            hadamard=hadamard,
            sign_stream=sign_stream,
            sign_step=sign_step,
        )
    least = {"min_scale": _MIN_TENSOR_SCALE, "SCALE": True}
    reduce_tensor(
        block_amax if largest is None else largest, tensor_scale, max_value=448.0 * 6.0, **least
    )
    grid = (triton.cdiv(lines, TILE[0]) * triton.cdiv(length, TILE[1]),)
    _encode_kernel[grid](
        x, position, block_amax, tensor_scale, row_runs, col_runs, packed, scales, decoded, lines,
        length, prescale, stream, sign_stream, sign_step, ROUNDING=rounding,
        PRESCALE=prescale != 1.0, CODES=codes, VALUES=values, **common(axis, tile, hadamard),
    )  # fmt: skip
    return outputs


def _fake_quantize(
    x: Tensor,
    axis: int,
    tile: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    row_runs: Tensor | None,
    col_runs: Tensor | None,
    stream: int,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
    block_amax: Tensor | None,
    largest: Tensor | None,
    codes: bool,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_matrix(x)
    check_rounding(x, rounding, position, row_runs, col_runs)
    lines, length = check_lines(x, axis, tile, hadamard, position)
    height = BLOCK if tile else 1
    shape = (lines // height, length // BLOCK)
    if block_amax is not None and (block_amax.dtype != torch.float32 or block_amax.shape != shape):
        raise ValueError(
            f"block_amax is {block_amax.dtype} {list(block_amax.shape)}: give float32 {list(shape)}"
        )
    if largest is not None and (largest.dtype != torch.float32 or largest.ndim != 1):
        raise ValueError(f"largest is {largest.dtype} {list(largest.shape)}: give float32 [n]")
    return (
        x.new_empty((lines, length // 2) if codes else (0,), dtype=torch.uint8),
        x.new_empty(shape, dtype=torch.uint8),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty((lines, length) if values else (0,), dtype=torch.bfloat16),
    )


define(
    "quantize_nvfp4",
    "(Tensor x, int axis, bool tile, str rounding, float prescale, Tensor? position, "
    "Tensor? row_runs, Tensor? col_runs, int stream, int hadamard, int sign_stream, "
    "int sign_step, Tensor? block_amax, Tensor? largest, bool codes, bool values) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _fake_quantize,
)
