"""Gradients on the wire, bit for bit: FP8 codes with a power-of-two scale for every 128 of them.

A *message* of ``count`` values is ``count`` E4M3 codes and then ``count / 128`` scale bytes, all
uint8, since neither gloo nor (before sm_90) NCCL moves FP8. The scale of a block with the largest
magnitude ``1.m * 2^e`` is the least power of two that brings it to at most 448; its byte is the
exponent plus 127, at least 10, so that every decoded value is zero or a normal FP32 number, and 255
for a block that holds NaN or infinity, all of which decodes to NaN: what is not finite on one rank
is not finite in the sum.

Power-of-two scales make every decoded value exact, so the sum over ranks has one FP32 rounding per
addition and no other. Local scales cost 0.8 % of the bytes and need no amax from another rank.

On a GPU these are kernels of ``megafp4_kernels``, bit-equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Values that share a scale."""

GRANULE = 2048
"""A message's values come in multiples of this: the kernels work without masks."""

MIN_SCALE_BYTE = 10
"""Byte of the least scale, 2^-117."""

E4M3_MAX = 448.0
"""Largest E4M3 value; values are clamped to it before the cast, which may not saturate."""


def message_bytes(count: int) -> int:
    """Bytes of a message of ``count`` values, a multiple of :data:`GRANULE`."""
    assert count % GRANULE == 0, count
    return count + count // BLOCK


def scale_bytes(amax: Tensor) -> Tensor:
    """Scale bytes (int32) of largest magnitudes (FP32, same shape)."""
    bits = amax.view(torch.int32)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    return torch.where(amax.isfinite(), byte.clamp(min=MIN_SCALE_BYTE), 255)


def scales_of(byte: Tensor) -> Tensor:
    """FP32 scales of scale bytes (int32); 255 is NaN."""
    return torch.where(byte == 255, torch.nan, (byte << 23).view(torch.float32))


def cast_blocks(x: Tensor, out: Tensor) -> None:
    """Cast each row to a message.

    Args:
        x: BF16 or FP32 [ranks, count] with contiguous rows; count is a multiple of
            :data:`GRANULE`.
        out: uint8 [ranks, count + count / 128]; overwritten.
    """
    if x.is_cuda:
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        fp8_reduce.cast_blocks(x, out)
        return
    ranks, count = x.shape
    values = x.float().reshape(ranks, count // BLOCK, BLOCK)
    byte = scale_bytes(values.abs().amax(2))
    reciprocal = ((254 - byte.clamp(max=253)) << 23).view(torch.float32)
    scaled = torch.where((byte == 255)[..., None], 0.0, values * reciprocal[..., None])
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    out[:, :count] = codes.view(torch.uint8).view(ranks, count)
    out[:, count:] = byte.to(torch.uint8)


def decode_blocks(messages: Tensor, out: Tensor) -> None:
    """Decode each message to a row.

    Args:
        messages: uint8 [ranks, count + count / 128].
        out: BF16 or FP32 [ranks, count] with contiguous rows; overwritten.
    """
    if out.is_cuda:
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        fp8_reduce.decode_blocks(messages, out)
        return
    count = out.shape[1]
    for message, row in zip(messages, out, strict=True):
        row.copy_(_decoded(message, count))


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest magnitude of a tensor, FP32 [1]; NaN if there is one."""
    if x.is_cuda:
        from megafp4_kernels import amax  # needs triton, an optional package

        return amax.amax(x.view(-1, GRANULE), None).view(1)
    return x.abs().amax().float().view(1)


def cast_shared(x: Tensor, factor: Tensor) -> Tensor:
    """E4M3 of a tensor times a factor, saturated; NaN becomes 0.

    Args:
        x: BF16 or FP32 [count], contiguous; count is a multiple of :data:`GRANULE`.
        factor: FP32 [1].

    Returns:
        float8_e4m3fn [count].
    """
    if x.is_cuda:
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        fp8_reduce.cast_shared(x, factor, codes)
        return codes.view(torch.float8_e4m3fn)
    scaled = (x.float() * factor).nan_to_num_(0.0)
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_shared(codes: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """Decode a tensor whose values share a factor.

    Args:
        codes: float8_e4m3fn [count]; count is a multiple of :data:`GRANULE`.
        factor: FP32 [1].
        out: FP32 [count]; overwritten, or added to.
        accumulate: Add to ``out``.

    Returns:
        How many codes are of the largest magnitude, int64 0-dim.
    """
    if out.is_cuda:
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        return fp8_reduce.decode_shared(codes.view(torch.uint8), factor, out, accumulate)
    values = codes.float()
    saturated = (values.abs() == E4M3_MAX).sum()
    values *= factor
    out.copy_(out + values if accumulate else values)
    return saturated


def sum_rows(rows: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False) -> None:
    """Sum what the ranks sent, in rank order and FP32, then multiply.

    Args:
        rows: Messages, uint8 [ranks, count + count / 128], or values, BF16 or FP32
            [ranks, count].
        out: FP32 [count], or uint8 [count + count / 128] for the sum as a message.
        factor: Multiplies the sum.
        accumulate: Start from what is in ``out``, which is FP32 then.
    """
    if out.is_cuda:
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        fp8_reduce.sum_rows(rows, out, factor, accumulate)
        return
    recode = out.dtype == torch.uint8
    count = out.numel() * BLOCK // (BLOCK + 1) if recode else out.numel()
    coded = rows.dtype == torch.uint8
    total = out if accumulate else None
    for row in rows:
        values = _decoded(row, count) if coded else row.float()
        total = values.clone() if total is None else total.add_(values)
    assert total is not None, "there is at least one rank"
    total.mul_(factor)
    if recode:
        cast_blocks(total[None], out[None])
    elif not accumulate:
        out.copy_(total)


def _decoded(message: Tensor, count: int) -> Tensor:
    """FP32 values [count] of one message."""
    codes = message[:count].view(torch.float8_e4m3fn).float().view(-1, BLOCK)
    return (codes * scales_of(message[count:].int())[:, None]).view(-1)
