"""Block scales in the order that Blackwell's tensor cores read them.

tcgen05 copies scales into tensor memory as tiles of 128 lines by 4 blocks, 512 bytes each, in which
line l and block k of a tile lie at byte ``(l % 32) * 16 + (l // 32) * 4 + k``; tiles follow each
other along the contraction axis first. cuBLAS and PyTorch (SWIZZLE_32_4_4) take the same order
[cuBLAS, "1D Block Scaling Factors Layout"; PTX ISA, "Scale Factor A ID / layout" of tcgen05.mma].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_LINES = 128
TILE_BLOCKS = 4
_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn)
_TILES = 4  # tiles that one program moves


def swizzled_length(lines: int, blocks: int) -> int:
    """Bytes that the scales of a [lines, blocks] matrix of blocks take, padding included."""
    return -(-lines // TILE_LINES) * TILE_LINES * -(-blocks // TILE_BLOCKS) * TILE_BLOCKS


def swizzle_reference(scales: Tensor) -> Tensor:
    """Reorder with PyTorch: what :func:`swizzle` is held to."""
    lines, blocks = scales.shape
    high, wide = -(-lines // TILE_LINES), -(-blocks // TILE_BLOCKS)
    padded = torch.zeros(
        high * TILE_LINES, wide * TILE_BLOCKS, dtype=torch.uint8, device=scales.device
    )
    padded[:lines, :blocks] = scales.view(torch.uint8)
    tiles = padded.view(high, 4, 32, wide, TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.flatten().view(scales.dtype)


def unswizzle(swizzled: Tensor, lines: int, blocks: int) -> Tensor:
    """Undo :func:`swizzle`.

    Args:
        swizzled: [swizzled_length(lines, blocks)], one byte each.
        lines: Lines of the matrix, without padding.
        blocks: Blocks a line, without padding.

    Returns:
        [lines, blocks] of the same dtype.

    Raises:
        ValueError: The length is not that of such a matrix.
    """
    if swizzled.numel() != swizzled_length(lines, blocks):
        raise ValueError(
            f"{swizzled.numel()} swizzled scales do not make {lines} lines of {blocks} blocks: "
            f"give {swizzled_length(lines, blocks)}"
        )
    high, wide = -(-lines // TILE_LINES), -(-blocks // TILE_BLOCKS)
    tiles = swizzled.view(torch.uint8).view(high, wide, 32, 4, TILE_BLOCKS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(high * TILE_LINES, wide * TILE_BLOCKS)
    return padded[:lines, :blocks].contiguous().view(swizzled.dtype)


@triton.jit
def _swizzle_kernel(
    scales, out, lines, blocks, wide, stride_line, stride_block, TILES: tl.constexpr
):
    """Write TILES tiles of one row of tiles, in the order of the result."""
    index = tl.arange(0, 512)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    line = tl.program_id(0) * 128 + (index // 4 % 4) * 32 + index // 16
    block = tile[:, None] * 4 + (index % 4)[None, :]
    found = tl.load(
        scales + line.to(tl.int64)[None, :] * stride_line + block.to(tl.int64) * stride_block,
        mask=(line < lines)[None, :] & (block < blocks),
        other=0,
    )
    base = tl.program_id(0).to(tl.int64) * wide
    tl.store(
        out + (base + tile)[:, None] * 512 + index[None, :], found, mask=(tile < wide)[:, None]
    )


@torch.library.custom_op("megafp4::swizzle", mutates_args=())
def _swizzle(scales: Tensor) -> Tensor:
    if not scales.is_cuda:
        return swizzle_reference(scales)
    out = _fake_swizzle(scales)
    launch_swizzle(scales, out)
    return out


@_swizzle.register_fake
def _fake_swizzle(scales: Tensor) -> Tensor:
    return scales.new_empty(swizzled_length(*scales.shape))


def launch_swizzle(scales: Tensor, out: Tensor) -> None:
    """Run the kernel; ``out`` is flat, of :func:`swizzled_length`."""
    lines, blocks = scales.shape
    if out.numel() == 0:
        return
    wide = triton.cdiv(blocks, TILE_BLOCKS)
    _swizzle_kernel[(triton.cdiv(lines, TILE_LINES), triton.cdiv(wide, _TILES))](
        scales.view(torch.uint8),
        out.view(torch.uint8),
        lines,
        blocks,
        wide,
        scales.stride(0),
        scales.stride(1),
        TILES=_TILES,
        num_warps=4,
    )


def swizzle(scales: Tensor) -> Tensor:
    """Reorder block scales into tiles of 128 lines by 4 blocks, padded with zero bytes.

    A Triton kernel on CUDA, :func:`swizzle_reference` elsewhere: the same bytes.

    Args:
        scales: [lines, blocks], one byte each (uint8, float8_e8m0fnu, float8_e4m3fn), any strides.

    Returns:
        Flat, of the same dtype: [ceil(lines / 128) * 128 * ceil(blocks / 4) * 4].

    Raises:
        ValueError: Not a matrix of bytes.
    """
    if scales.dim() != 2 or scales.dtype not in _DTYPES:
        raise ValueError(
            f"scales are {scales.dtype} {list(scales.shape)}: give a matrix of uint8, "
            "float8_e8m0fnu or float8_e4m3fn"
        )
    return _swizzle(scales)
