"""Order statistics of a line that lies in registers, without a sort: device functions.

The bits of floating-point numbers, as integers with the order of the numbers ("keys"), are searched
by counting how many elements lie at or below a probe. A word of the line is an FP32 number or two
BF16 ones, which are then compared two at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FEATURES = 65536
"""Longest line that the registers of a program hold."""

_PACKED_FEATURES = 32768  # counts in both halves of a word must stay below 2^15
_WARPS = 16 * 132  # as many as an H100's SMs hold at once


@triton.jit
def key_of(bits, TOP: tl.constexpr):
    """Bits of a float as a sign-extended int32 <-> an integer ordered as the floats are."""
    return tl.where(bits < 0, bits ^ TOP, bits)


@triton.jit
def at_most(x, probe, PAIRS: tl.constexpr, FAST: tl.constexpr):
    """How many features lie at or below the float whose key is ``probe``: int32."""
    if PAIRS and FAST:
        bits = key_of(probe, 0x7FFF) & 0xFFFF
        # 0xFFFF in either half where x <= probe: -1 and -65536 (mod 2^32), so the negated sum is
        # low + 65536 * (high - low), with both counts at most 2^14.
        mask = tl.inline_asm_elementwise(
            "set.le.u32.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [x, x * 0 + (bits | (bits << 16))],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        total = -tl.sum(mask, axis=0)
        low = total & 0xFFFF  # of the features at even positions
        return 2 * low + ((total - low) >> 16)
    elif PAIRS:
        low = key_of((x << 16) >> 16, 0x7FFF) <= probe
        high = key_of(x >> 16, 0x7FFF) <= probe
        return tl.sum(low.to(tl.int32) + high.to(tl.int32), axis=0)
    else:
        return tl.sum((key_of(x, 0x7FFFFFFF) <= probe).to(tl.int32), axis=0)


@triton.jit
def _narrow(count, rank, probe, low, high, stride, seen):
    """Take one step of the search for the least key with more than ``rank`` features at most it.

    The answer lies above ``low`` and at most at ``high``. Strides double until it has been passed
    on either side (``seen`` is then 3); from there on the interval is halved.

    Returns:
        (probe, low, high, stride, seen): scalars, all but ``seen`` of the type of the keys.
    """
    found = count > rank
    low = tl.where(found, low, probe)
    high = tl.where(found, probe, high)
    seen = seen | tl.where(found, 1, 2)
    ahead = tl.where(found, tl.maximum(high - stride, low + 1), tl.minimum(low + stride, high - 1))
    probe = tl.where(seen == 3, low + ((high - low) >> 1), ahead)
    return probe, low, high, stride * 2, seen


@triton.jit
def search(
    x,
    probe_a,
    probe_b,
    stride,
    rank_low,
    rank_high,
    INFINITY: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    KEY: tl.constexpr,
):
    """Keys of two order statistics, both searched at once; for magnitudes of the second alone."""
    bottom = tl.full((), -INFINITY - 2, KEY)
    top = tl.full((), INFINITY, KEY)
    none = tl.full((), 0, tl.int32)
    low_a, high_a, stride_a, seen_a = bottom, top, stride, none
    low_b, high_b, stride_b, seen_b = bottom, top, stride, none
    if MAGNITUDE:
        low_a = top - 1
    while (high_a - low_a > 1) | (high_b - low_b > 1):
        if not MAGNITUDE:
            count = at_most(x, probe_a.to(tl.int32), PAIRS, FAST)
            probe_a, low_a, high_a, stride_a, seen_a = _narrow(
                count, rank_low, probe_a, low_a, high_a, stride_a, seen_a
            )
        count = at_most(x, probe_b.to(tl.int32), PAIRS, FAST)
        probe_b, low_b, high_b, stride_b, seen_b = _narrow(
            count, rank_high, probe_b, low_b, high_b, stride_b, seen_b
        )
    return high_a, high_b


@triton.jit
def float_of(key, PAIRS: tl.constexpr):
    """Key -> FP32; a zero is +0."""
    bits = key_of(key.to(tl.int32), 0x7FFF if PAIRS else 0x7FFFFFFF) << (16 if PAIRS else 0)
    return bits.to(tl.float32, bitcast=True) + 0.0


@triton.jit
def quantiles(
    word,
    guess_low,
    guess_high,
    stride,
    rank_low,
    rank_high,
    MAGNITUDE: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    KEY: tl.constexpr,
):
    """Two order statistics of a line; by magnitude the second of those and its negative.

    Returns:
        (FP32 low, FP32 high, their keys).
    """
    INFINITY: tl.constexpr = 0x7F80 if PAIRS else 0x7F800000
    ABSOLUTE: tl.constexpr = 0x7FFF7FFF if PAIRS else 0x7FFFFFFF
    searched = word & ABSOLUTE if MAGNITUDE else word
    low_key, high_key = search(
        searched, guess_low, guess_high, stride, rank_low, rank_high,
        INFINITY, MAGNITUDE, PAIRS, FAST, KEY,
    )  # fmt: skip
    high = float_of(high_key, PAIRS)
    low = 0.0 - high if MAGNITUDE else float_of(low_key, PAIRS)
    return low, high, low_key, high_key


class Spread(NamedTuple):
    """How the tokens of a matrix are spread over programs, each of which holds one at a time."""

    programs: int
    steps: int
    """Tokens of a program."""
    warps: int
    tile: int
    """Features that a program holds, a power of two."""
    pairs: bool
    """Whether a word holds two BF16 numbers."""
    hardware: bool
    """Whether kernels may use instructions for two BF16 numbers: sm_90 and later, compiled."""

    @property
    def per_word(self) -> int:
        """Features in a word."""
        return 2 if self.pairs else 1

    @property
    def fast(self) -> bool:
        """Whether two numbers are compared at a time."""
        return self.hardware and self.pairs and self.tile <= _PACKED_FEATURES


def spread(x: Tensor, paired: int, single: int) -> Spread:
    """Spread tokens over programs, all of which run at once.

    Args:
        x: BF16 or FP32 [tokens, features], both above 0.
        paired: Features of a warp that takes them in pairs.
        single: Features of a warp that takes them one by one.
    """
    tokens, features = x.shape
    pairs, hardware = x.dtype == torch.bfloat16, _has_pairs(x.device)
    tile = triton.next_power_of_2(max(features, 64))
    warps = min(32, max(1, tile // (paired if pairs and hardware else single)))
    steps = triton.cdiv(tokens, max(1, _WARPS // warps))
    return Spread(triton.cdiv(tokens, steps), steps, warps, tile, pairs, hardware)


def _has_pairs(device: torch.device) -> bool:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
