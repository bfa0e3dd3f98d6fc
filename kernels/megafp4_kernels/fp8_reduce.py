"""Gradients on the wire: cast to FP8 in blocks, and the sum of what several ranks sent.

A message is a run of E4M3 codes followed by one scale byte for every :data:`BLOCK` of them. A scale
is a power of two, so a decoded value is exact and a sum does not depend on how its multiplications
and additions are fused: all kernels are bit-equal to ``megafp4.parallel.blocks``, which says
what the bytes are. Each reads its input once; a block finds its own largest magnitude, so nothing
waits for a statistic of the whole tensor or of another rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, magnitude_bits
from megafp4_kernels.casts import has_fp8_conversions
from megafp4_kernels.encode import decode_e4m3, encode_minifloat

BLOCK = 128
"""Values that share a scale."""

GRANULE = 2048
"""Values of a message come in multiples of this: what one program handles, without masks."""

MIN_SCALE_BYTE = 10
"""Least scale, 2^-117: the smallest code times it is still a normal FP32 number."""

_BLOCKS = tl.constexpr(GRANULE // BLOCK)
_BLOCK = tl.constexpr(BLOCK)
_LEAST = tl.constexpr(MIN_SCALE_BYTE)


@triton.jit
def _encode(value, HARDWARE: tl.constexpr):
    """FP32 [blocks, BLOCK] -> (E4M3 codes as uint8, scale bytes as int32 [blocks])."""
    largest = tl.max(magnitude_bits(value), axis=1)
    # amax = 1.m * 2^e goes to at most 448 = 1.75 * 2^8.
    byte = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    byte = tl.where(largest >= 0x7F800000, 255, tl.maximum(byte, _LEAST))
    reciprocal = ((254 - tl.minimum(byte, 253)) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where((byte == 255)[:, None], 0.0, value * reciprocal[:, None])
    if HARDWARE:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = encode_minifloat(scaled, scaled, 4, 3, -6, 0x7E, "nearest-even").to(tl.uint8)
    return codes, byte


@triton.jit
def _decode(codes, byte, HARDWARE: tl.constexpr):
    """(uint8 codes [blocks, BLOCK], int32 scale bytes [blocks]) -> FP32; byte 255 gives NaN."""
    if HARDWARE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = decode_e4m3(codes.to(tl.int32))
    scale = (byte << 23).to(tl.float32, bitcast=True)
    return value * tl.where(byte == 255, float("nan"), scale)[:, None]


@triton.jit
def _cast_kernel(x, out, x_stride, out_stride, count, HARDWARE: tl.constexpr):
    """One granule of one rank's message."""
    rank = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * _BLOCKS + tl.arange(0, _BLOCKS)
    place = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    value = tl.load(x + rank * x_stride + place).to(tl.float32)
    codes, byte = _encode(value, HARDWARE)
    message = out + rank * out_stride
    tl.store(message + place, codes)
    tl.store(message + count + block, byte.to(tl.uint8))


@triton.jit
def _cast_to_peers_kernel(
    x, peers, slot, x_stride, width, count, RANKS: tl.constexpr, HARDWARE: tl.constexpr
):
    """One granule of one rank's message, written where that rank keeps what slot's sender sends."""
    # Neighbouring programs write to different ranks, and at one time ranks write to different ones.
    rank = (tl.program_id(0) + slot) % RANKS
    block = (tl.program_id(0) // RANKS) * _BLOCKS + tl.arange(0, _BLOCKS)
    place = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    value = tl.load(x + rank.to(tl.int64) * x_stride + place).to(tl.float32)
    codes, byte = _encode(value, HARDWARE)
    memory = tl.load(peers + rank).to(tl.pointer_type(tl.uint8))
    message = tl.multiple_of(memory, 16) + tl.cast(slot, tl.int64) * width
    tl.store(message + place, codes)
    tl.store(message + count + block, byte.to(tl.uint8))


@triton.jit
def _row(message, count, block, place, CODED: tl.constexpr, HARDWARE: tl.constexpr):
    """One granule of what one rank sent, as FP32."""
    if CODED:
        codes = tl.load(message + place)
        byte = tl.load(message + count + block).to(tl.int32)
        return _decode(codes, byte, HARDWARE)
    else:
        return tl.load(message + place).to(tl.float32)


@triton.jit
def _decode_kernel(x, out, x_stride, out_stride, count, HARDWARE: tl.constexpr):
    """One granule of one rank's message, back to numbers."""
    rank = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * _BLOCKS + tl.arange(0, _BLOCKS)
    place = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    value = _row(x + rank * x_stride, count, block, place, True, HARDWARE)
    tl.store(out + rank * out_stride + place, value.to(out.dtype.element_ty))


@triton.jit
def _sum_kernel(
    x,
    out,
    stride,
    count,
    factor,
    RANKS: tl.constexpr,
    CODED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    RECODE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One granule of the sum over ranks, in their order, starting at ``out`` to accumulate."""
    block = tl.program_id(0) * _BLOCKS + tl.arange(0, _BLOCKS)
    place = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    message = x
    if ACCUMULATE:
        total = tl.load(out + place)
    else:
        # Not zero plus the first rank's: that would turn -0 into 0.
        total = _row(message, count, block, place, CODED, HARDWARE)
        message += stride
    for _ in tl.static_range(RANKS if ACCUMULATE else RANKS - 1):
        total += _row(message, count, block, place, CODED, HARDWARE)
        message += stride
    total *= factor
    if RECODE:
        codes, byte = _encode(total, HARDWARE)
        tl.store(out + place, codes)
        tl.store(out + count + block, byte.to(tl.uint8))
    else:
        tl.store(out + place, total)


@triton.jit
def _cast_shared_kernel(x, factor, out, HARDWARE: tl.constexpr, TILE: tl.constexpr):
    """One granule of a tensor times a factor."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + place).to(tl.float32) * tl.load(factor)
    value = tl.where((value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000, 0.0, value)
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    if HARDWARE:
        codes = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = encode_minifloat(value, value, 4, 3, -6, 0x7E, "nearest-even").to(tl.uint8)
    tl.store(out + place, codes)


@triton.jit
def _decode_shared_kernel(
    codes, factor, out, saturated, ACCUMULATE: tl.constexpr, HARDWARE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One granule of codes times a factor, and how many of them are the largest."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = tl.load(codes + place)
    tl.store(saturated + tl.program_id(0), tl.sum(((code & 0x7F) == 0x7E).to(tl.int32), axis=0))
    if HARDWARE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = decode_e4m3(code.to(tl.int32))
    value *= tl.load(factor)
    if ACCUMULATE:
        value = tl.load(out + place) + value
    tl.store(out + place, value)


def cast_shared(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Cast a tensor times a factor to E4M3; beyond 448 it saturates, and NaN becomes 0.

    Args:
        x: BF16 or FP32 [count], contiguous; count is a multiple of :data:`GRANULE`.
        factor: FP32, one number on the device.
        out: uint8 [count]; overwritten with codes.

    Raises:
        ValueError: Arguments are not as above.
    """
    count = x.numel()
    message_bytes(count)
    _check(x[None], (torch.bfloat16, torch.float32), count)
    _check(out[None], (torch.uint8,), count)
    if count:
        _cast_shared_kernel[(count // GRANULE,)](
            x, factor, out, HARDWARE=has_fp8_conversions(x.device), TILE=GRANULE
        )


def decode_shared(codes: Tensor, factor: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    """Decode E4M3 times a factor.

    Args:
        codes: uint8 [count]; count is a multiple of :data:`GRANULE`.
        factor: FP32, one number on the device.
        out: FP32 [count]; overwritten, or added to.
        accumulate: Add to ``out``.

    Returns:
        Number of codes of magnitude 448, int64 0-dim on the device.

    Raises:
        ValueError: Arguments are not as above.
    """
    count = codes.numel()
    message_bytes(count)
    _check(codes[None], (torch.uint8,), count)
    _check(out[None], (torch.float32,), count)
    saturated = torch.zeros(max(count // GRANULE, 1), dtype=torch.int32, device=out.device)
    if count:
        _decode_shared_kernel[(count // GRANULE,)](
            codes,
            factor,
            out,
            saturated,
            ACCUMULATE=accumulate,
            HARDWARE=has_fp8_conversions(out.device),
            TILE=GRANULE,
        )
    return saturated.sum()


def cast_blocks(x: Tensor, out: Tensor) -> None:
    """Cast each row of x to a message.

    Args:
        x: BF16 or FP32 [ranks, count], rows contiguous; count is a multiple of :data:`GRANULE`.
        out: uint8 [ranks, count + count / BLOCK], rows contiguous; overwritten.

    Raises:
        ValueError: Arguments are not as above.
    """
    ranks, count = _check_pair(x, out)
    if count:
        _cast_kernel[(count // GRANULE, ranks)](
            x, out, x.stride(0), out.stride(0), count, HARDWARE=has_fp8_conversions(x.device)
        )


def cast_blocks_to_peers(x: Tensor, peers: Tensor, slot: int) -> None:
    """Cast each row of x to a message, and write it to the memory of the rank that it is for.

    Returns at once; a message has arrived when the writer's kernel has ended.

    Args:
        x: BF16 or FP32 [ranks, count], rows contiguous; count is a multiple of :data:`GRANULE`.
        peers: int64 [ranks] on the device: where each rank keeps messages, uint8 [ranks, width],
            at an address that is a multiple of 16 and that this device can write to.
        slot: Row of that memory, at every rank: the number of this rank.

    Raises:
        ValueError: Arguments are not as above.
    """
    ranks, count = x.shape if x.dim() == 2 else (0, -1)
    _check(x, (torch.bfloat16, torch.float32), count)
    width = message_bytes(count)
    if peers.dtype != torch.int64 or peers.shape != (ranks,) or not 0 <= slot < ranks:
        raise ValueError(
            f"{peers.dtype} {list(peers.shape)} addresses and slot {slot} for {ranks} rows: give "
            "one int64 address and one slot for each row"
        )
    if count:
        _cast_to_peers_kernel[(count // GRANULE * ranks,)](
            x,
            peers,
            slot,
            x.stride(0),
            width,
            count,
            RANKS=ranks,
            HARDWARE=has_fp8_conversions(x.device),
        )


def decode_blocks(messages: Tensor, out: Tensor) -> None:
    """Decode each message to a row of ``out``.

    Args:
        messages: uint8 [ranks, count + count / BLOCK] as :func:`cast_blocks` writes them.
        out: BF16 or FP32 [ranks, count], rows contiguous; overwritten.

    Raises:
        ValueError: Arguments are not as above.
    """
    ranks, count = _check_pair(out, messages)
    if count:
        _decode_kernel[(count // GRANULE, ranks)](
            messages,
            out,
            messages.stride(0),
            out.stride(0),
            count,
            HARDWARE=has_fp8_conversions(out.device),
        )


def sum_rows(rows: Tensor, out: Tensor, factor: float = 1.0, accumulate: bool = False) -> None:
    """Sum what the ranks sent, in rank order and FP32, then multiply.

    Args:
        rows: Messages, uint8 [ranks, count + count / BLOCK], or values, BF16 or FP32
            [ranks, count]; rows contiguous.
        out: FP32 [count], or uint8 [count + count / BLOCK]: the sum as a message.
        factor: Multiplies the sum.
        accumulate: Start from what is in ``out``, which must be FP32.

    Raises:
        ValueError: Arguments are not as above.
    """
    coded, recode = rows.dtype == torch.uint8, out.dtype == torch.uint8
    count = out.numel() * BLOCK // (BLOCK + 1) if recode else out.numel()
    width = message_bytes(count) if coded else count
    _check(rows, (torch.uint8, torch.bfloat16, torch.float32), width)
    _check(out[None], (torch.uint8, torch.float32), message_bytes(count) if recode else count)
    if accumulate and recode:
        raise ValueError("a sum cannot accumulate into a message: give an FP32 out")
    if count:
        _sum_kernel[(count // GRANULE,)](
            rows,
            out,
            rows.stride(0),
            count,
            factor,
            RANKS=rows.shape[0],
            CODED=coded,
            ACCUMULATE=accumulate,
            RECODE=recode,
            HARDWARE=has_fp8_conversions(out.device),
        )


def message_bytes(count: int) -> int:
    """Bytes of a message of ``count`` values.

    Raises:
        ValueError: ``count`` is not a multiple of :data:`GRANULE`.
    """
    if count % GRANULE:
        raise ValueError(f"a message of {count} values: give a multiple of {GRANULE}")
    return count + count // BLOCK


def _check_pair(values: Tensor, messages: Tensor) -> tuple[int, int]:
    """Shape of the values; raises ValueError unless the messages fit them."""
    ranks, count = values.shape if values.dim() == 2 else (0, -1)
    _check(values, (torch.bfloat16, torch.float32), count)
    _check(messages, (torch.uint8,), message_bytes(count))
    if messages.shape[0] != ranks:
        raise ValueError(f"{messages.shape[0]} messages for {ranks} rows: give one for each row")
    return ranks, count


def _check(x: Tensor, dtypes: tuple[torch.dtype, ...], width: int) -> None:
    """Raise ValueError unless x is [any, width] of one of the dtypes with contiguous rows."""
    if x.dtype not in dtypes or x.dim() != 2 or x.shape[1] != width or x.stride(1) != 1:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"got {x.dtype} {list(x.shape)} with strides {list(x.stride())}: give {names} with "
            f"contiguous rows of {width}"
        )
    check_device(x)
