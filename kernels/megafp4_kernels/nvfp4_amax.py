"""Pass one of NVFP4: Hadamard transform, and the largest magnitude of every block.

The tensor scale needs the largest of all, of which a slice knows only its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix, magnitude_bits
from megafp4_kernels.encode import store_codes
from megafp4_kernels.operators import define
from megafp4_kernels.philox import sign_words

BLOCK = 16
TILE = (32, 128)
"""Lines and elements of a line that a program works on."""


@triton.jit
def _butterfly(x, H: tl.constexpr, LINES: tl.constexpr, K: tl.constexpr):
    """Sums and differences of the pairs at distance H along K."""
    pairs = tl.reshape(x, (LINES * (K // (2 * H)), 2, H))
    low, high = tl.split(tl.trans(pairs, (0, 2, 1)))
    joined = tl.trans(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(joined, (LINES, K))


@triton.jit
def load_tile(
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
    value = load_tile(
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


def block_magnitudes(
    x: Tensor,
    axis: int = 1,
    *,
    tile: bool = False,
    position: Tensor | None = None,
    hadamard: int = 0,
    sign_stream: int = 0,
    sign_step: int = -1,
) -> Tensor:
    """First half of :func:`quantize_nvfp4`: largest magnitude of every block or tile.

    Args:
        x: As for :func:`quantize_nvfp4`, which finds these itself unless they are given to it; so
            are the others.
        axis: Contraction axis.
        tile: Whether scales are shared in tiles.
        position: Seed and step of the Hadamard transform's signs.
        hadamard: 16 or 0.
        sign_stream: Word 3 of the counter of the signs.
        sign_step: Step of the signs.

    Returns:
        FP32 [lines, K / 16], or [lines / 16, K / 16] for tiles.

    Raises:
        ValueError: As :func:`quantize_nvfp4`.
    """
    return torch.ops.megafp4.nvfp4_block_amax(
        x, position, axis, tile, hadamard, sign_stream, sign_step
    )


def common(axis: int, tile: bool, hadamard: int) -> dict[str, int | bool]:
    """What both passes are told."""
    return {
        "AXIS": axis,
        "HADAMARD": hadamard != 0,
        "HEIGHT": BLOCK if tile else 1,
        "LINES": TILE[0],
        "K": TILE[1],
        "num_warps": 4,
    }


def _block_amax(
    x: Tensor,
    position: Tensor | None,
    axis: int,
    tile: bool,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
) -> Tensor:
    out = _fake_block_amax(x, position, axis, tile, hadamard, sign_stream, sign_step)
    check_device(x)
    if x.numel() == 0:
        return out
    lines, length = x.shape if axis == 1 else x.shape[::-1]
    grid = (triton.cdiv(lines, TILE[0]) * triton.cdiv(length, TILE[1]),)
    _block_amax_kernel[grid](
        x, position, out, lines, length, sign_stream, sign_step, **common(axis, tile, hadamard)
    )
    return out


def _fake_block_amax(
    x: Tensor,
    position: Tensor | None,
    axis: int,
    tile: bool,
    hadamard: int,
    sign_stream: int,
    sign_step: int,
) -> Tensor:
    check_matrix(x)
    lines, length = check_lines(x, axis, tile, hadamard, position)
    return x.new_empty(lines // (BLOCK if tile else 1), length // BLOCK, dtype=torch.float32)


def check_lines(
    x: Tensor, axis: int, tile: bool, hadamard: int, position: Tensor | None
) -> tuple[int, int]:
    """Lines and their length; raise ValueError for those that blocks do not divide."""
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
        raise ValueError("the Hadamard transform draws signs: give position, int64 [4]")
    return lines, length


define(
    "nvfp4_block_amax",
    "(Tensor x, Tensor? position, int axis, bool tile, int hadamard, int sign_stream, "
    "int sign_step) -> Tensor",
    _block_amax,
    _fake_block_amax,
)
