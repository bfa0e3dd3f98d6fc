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

from megafp4_kernels.amax import check_device, check_matrix, magnitude_bits, reduce_tensor
from megafp4_kernels.casts import check_rounding
from megafp4_kernels.encode import encode_e2m1, encode_minifloat, store_codes
from megafp4_kernels.operators import define
from megafp4_kernels.philox import dither, sign_words

BLOCK = 16
_TILE = (32, 128)  # lines and elements of a line
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
def _butterfly(x, H: tl.constexpr, LINES: tl.constexpr, K: tl.constexpr):
    """Sums and differences of the pairs at distance H along K."""
    pairs = tl.reshape(x, (LINES * (K // (2 * H)), 2, H))
    low, high = tl.split(tl.trans(pairs, (0, 2, 1)))
    joined = tl.trans(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(joined, (LINES, K))


@triton.jit
def _load(
    x,
    position,
    sign_stream,
    sign_step,
    first_line,
    first_k,
    lines,
    length,
    AXIS: tl.constexpr,
    HADAMARD: tl.constexpr,
    LINES: tl.constexpr,
    K: tl.constexpr,
):
    """Load a tile of the operand, transposed and transformed as asked: FP32 [LINES, K]."""
    line = (first_line + tl.arange(0, LINES)).to(tl.int64)
    k = (first_k + tl.arange(0, K)).to(tl.int64)
    if AXIS == 1:
        mask = (line < lines)[:, None] & (k < length)[None, :]
        tile = tl.load(x + line[:, None] * length + k[None, :], mask=mask, other=0.0)
    else:
        mask = (k < length)[:, None] & (line < lines)[None, :]
        tile = tl.trans(tl.load(x + k[:, None] * lines + line[None, :], mask=mask, other=0.0))
    value = tile.to(tl.float32)
    if HADAMARD:
        word, _, _, _ = sign_words(position, sign_stream, sign_step)
        index = (tl.arange(0, K) % 16).to(tl.uint32)
        sign = ((word >> index) & 1).to(tl.int32) << 31
        signed = value.to(tl.int32, bitcast=True) ^ sign[None, :]
        value = signed.to(tl.float32, bitcast=True)
        for i in tl.static_range(4):
            value = _butterfly(value, 1 << i, LINES, K)
    return value


@triton.jit(do_not_specialize=["sign_stream", "sign_step"])
def _block_amax_kernel(
    x,
    position,
    out,
    lines,
    length,
    sign_stream,
    sign_step,
    AXIS: tl.constexpr,
    HADAMARD: tl.constexpr,
    HEIGHT: tl.constexpr,
    LINES: tl.constexpr,
    K: tl.constexpr,
):
    """Largest magnitude of every block of HEIGHT lines x 16 elements."""
    tiles = tl.cdiv(length, K)
    first_line = (tl.program_id(0) // tiles) * LINES
    first_k = (tl.program_id(0) % tiles) * K
    value = _load(
        x, position, sign_stream, sign_step, first_line, first_k, lines, length,
        AXIS, HADAMARD, LINES, K,
    )  # fmt: skip
    bits = tl.max(tl.reshape(magnitude_bits(value), (LINES, K // 16, 16)), axis=2)
    if HEIGHT > 1:
        bits = tl.max(tl.reshape(bits, (LINES // HEIGHT, HEIGHT, K // 16)), axis=1)
    store_codes(
        bits.to(tl.float32, bitcast=True),
        out,
        first_line // HEIGHT,
        first_k // 16,
        lines // HEIGHT,
        length // 16,
        False,
        LINES // HEIGHT,
        K // 16,
    )


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
    OFFSET: tl.constexpr,
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
    value = _load(
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
        noise = dither(position, stream, first_line, first_k, LINES, K, OFFSET)
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
    stream: int = 0,
    offset: str = "none",
    hadamard: int = 0,
    sign_stream: int = 0,
    sign_step: int = -1,
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
        position: int64 [3] (seed as signed 64 bits, step, first token); for stochastic rounding
            and the Hadamard transform.
        stream: Word 3 of the Philox counter: layer * 256 + GEMM * 16 + operand.
        offset: Coordinate that the first token is added to: ``line``, ``k`` (then it must be a
            multiple of 16) or ``none``.
        hadamard: 16 for the random Hadamard transform of every 16 elements along K, unnormalised
            (the GEMM's alpha carries 1/16); 0 for none.
        sign_stream: Word 3 of the counter of the transform's signs.
        sign_step: Step of the signs; -1 takes that of ``position``.
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
        x, axis, tile, rounding, float(prescale), position, stream, offset, hadamard, sign_stream,
        sign_step, codes, values,
    )  # fmt: skip
    return NVFP4(packed if codes else None, scales, tensor_scale, decoded if values else None)


def _quantize(
    x: Tensor,
    axis: int,
    tile: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    stream: int,
    offset: str,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
    codes: bool,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, scales, tensor scale and values; what is not wanted is empty."""
    outputs = _fake_quantize(
        x, axis, tile, rounding, prescale, position, stream, offset, hadamard, sign_stream,
        sign_step, codes, values,
    )  # fmt: skip
    check_device(x)
    packed, scales, tensor_scale, decoded = outputs
    lines, length = x.shape if axis == 1 else x.shape[::-1]
    if x.numel() == 0:
        tensor_scale.fill_(_MIN_TENSOR_SCALE)
        return outputs
    block_amax = torch.empty(scales.shape, dtype=torch.float32, device=x.device)
    common = {
        "AXIS": axis,
        "HADAMARD": hadamard != 0,
        "HEIGHT": BLOCK if tile else 1,
        "LINES": _TILE[0],
        "K": _TILE[1],
        "num_warps": 4,
    }
    grid = (triton.cdiv(lines, _TILE[0]) * triton.cdiv(length, _TILE[1]),)
    _block_amax_kernel[grid](
        x, position, block_amax, lines, length, sign_stream, sign_step, **common
    )
    reduce_tensor(
        block_amax, tensor_scale, max_value=448.0 * 6.0, min_scale=_MIN_TENSOR_SCALE, SCALE=True
    )
    _encode_kernel[grid](
        x, position, block_amax, tensor_scale, packed, scales, decoded, lines, length, prescale,
        stream, sign_stream, sign_step, ROUNDING=rounding, OFFSET=offset, PRESCALE=prescale != 1.0,
        CODES=codes, VALUES=values, **common,
    )  # fmt: skip
    return outputs


def _fake_quantize(
    x: Tensor,
    axis: int,
    tile: bool,
    rounding: str,
    prescale: float,
    position: Tensor | None,
    stream: int,
    offset: str,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
    codes: bool,
    values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_matrix(x)
    check_rounding(x, rounding, position, offset)
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}: choose 0 or 1")
    lines, length = x.shape if axis == 1 else (x.shape[1], x.shape[0])
    if length % BLOCK or (tile and lines % BLOCK):
        raise ValueError(
            f"the operand has {lines} lines of {length} elements: pad it so that K, and for tiles "
            f"the number of lines too, is a multiple of {BLOCK}"
        )
    if hadamard not in (0, BLOCK):
        raise ValueError(f"hadamard is {hadamard}: NVFP4 has {BLOCK}, or 0 for none")
    if hadamard and position is None:
        raise ValueError("the Hadamard transform draws signs: give position, int64 [3]")
    height = BLOCK if tile else 1
    return (
        x.new_empty((lines, length // 2) if codes else (0,), dtype=torch.uint8),
        x.new_empty(lines // height, length // BLOCK, dtype=torch.uint8),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty((lines, length) if values else (0,), dtype=torch.bfloat16),
    )


define(
    "quantize_nvfp4",
    "(Tensor x, int axis, bool tile, str rounding, float prescale, Tensor? position, int stream, "
    "str offset, int hadamard, int sign_stream, int sign_step, bool codes, bool values) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _fake_quantize,
)
