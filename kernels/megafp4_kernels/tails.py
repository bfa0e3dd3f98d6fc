"""Limits that OCC clamps a token at where several ranks hold its features.

Each rank sends its few smallest and largest features of every token, among which the order
statistics of the whole token are: ``tails`` picks them, ``limits`` finds the statistics among what
all ranks sent. Both search as :mod:`megafp4_kernels.outliers` does; the result is bit-equal to
``megafp4.numerics.clamp_outliers`` with peers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix
from megafp4_kernels.operators import define
from megafp4_kernels.select import MAX_FEATURES, at_most, quantiles, spread

_FEATURES = 1024  # of a warp, which holds their places as well


@triton.jit
def _side(value, low, high, inside, MAGNITUDE: tl.constexpr):
    """1 for features beyond the lower limit, 65536 beyond the upper one, else 0: int32."""
    if MAGNITUDE:
        return tl.where(inside & (tl.abs(value) > high), 65536, 0)
    below, above = inside & (value < low), inside & (value > high)
    return tl.where(below, 1, tl.where(above, 65536, 0))


@triton.jit
def _put(out, bits, side, before, smallest):
    """Store the features that have a side, behind as many of that side as come before."""
    place = tl.where(side == 1, before & 0xFFFF, smallest + ((before >> 16) & 0xFFFF))
    tl.store(out + place, bits, mask=side != 0)


@triton.jit
def _tails_kernel(
    x,
    out,
    tokens,
    words,
    smallest,
    largest,
    MAGNITUDE: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    STEPS: tl.constexpr,
    WORDS: tl.constexpr,
    FEW: tl.constexpr,
):
    """Several tokens: what lies beyond the limits, then limits until there are enough."""
    KEY_SHIFT: tl.constexpr = 0 if PAIRS else 16
    KEY: tl.constexpr = tl.int32 if PAIRS else tl.int64
    INFINITY: tl.constexpr = 0x7F80 if PAIRS else 0x7F800000
    ABSOLUTE: tl.constexpr = 0x7FFF7FFF if PAIRS else 0x7FFFFFFF
    PADDING: tl.constexpr = 0x7F807F80 if PAIRS else 0x7F800000
    TYPE: tl.constexpr = tl.int16 if PAIRS else tl.int32
    PER_WORD: tl.constexpr = 2 if PAIRS else 1
    column = tl.arange(0, WORDS)
    few = tl.arange(0, FEW)
    width = smallest + largest
    guess_high = tl.full((), 0x3F80 << KEY_SHIFT, KEY)  # 1.0
    guess_low = -guess_high
    stride = tl.full((), 64 << KEY_SHIFT, KEY)
    for step in range(STEPS):
        token = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        mask = (column < words) & (token < tokens)
        word = tl.load(x + token * words + column, mask=mask, other=PADDING)
        low, high, guess_low, guess_high = quantiles(
            word, guess_low, guess_high, stride, smallest - 1, words * PER_WORD - largest,
            MAGNITUDE, PAIRS, FAST, KEY,
        )  # fmt: skip
        stride = tl.full((), 4 << KEY_SHIFT, KEY)
        sound = at_most(word & ABSOLUTE, tl.full((), INFINITY, tl.int32), PAIRS, FAST)
        # A NaN makes all that is sent of the token NaN: nothing lies beyond a limit of NaN.
        nan = tl.where(sound == WORDS * PER_WORD, 0.0, float("nan"))
        low, high = low + nan, high + nan

        here = out + token * width
        if PAIRS:
            even = (word << 16).to(tl.float32, bitcast=True)
            odd = (word & -65536).to(tl.float32, bitcast=True)
            first = _side(even, low, high, mask, MAGNITUDE)
            second = _side(odd, low, high, mask, MAGNITUDE)
            found = first + second
            before = tl.cumsum(found, axis=0) - found
            _put(here, word.to(tl.int16), first, before, smallest)
            _put(here, (word >> 16).to(tl.int16), second, before + first, smallest)
        else:
            found = _side(word.to(tl.float32, bitcast=True), low, high, mask, MAGNITUDE)
            before = tl.cumsum(found, axis=0) - found
            _put(here, word, found, before, smallest)
        count = tl.sum(found, axis=0)
        low_bits = (low.to(tl.int32, bitcast=True) >> (16 - KEY_SHIFT)).to(TYPE)
        high_bits = (high.to(tl.int32, bitcast=True) >> (16 - KEY_SHIFT)).to(TYPE)
        missing = tl.where(
            few < smallest,
            few >= (count & 0xFFFF),
            (few >= smallest + ((count >> 16) & 0xFFFF)) & (few < width),
        )
        filler = tl.where(few < smallest, low_bits, high_bits)
        tl.store(here + few, filler, mask=missing & (token < tokens))


@triton.jit
def _limits_kernel(
    sent,
    out,
    tokens,
    width,
    smallest,
    largest,
    MAGNITUDE: tl.constexpr,
    FINITE: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Several tokens, number by number: there are few."""
    LAST: tl.constexpr = 0x7F7FFFFF if FINITE else 0x7F800000
    column = tl.arange(0, WIDTH)
    guess_high = tl.full((), 0x3F800000, tl.int64)
    guess_low = -guess_high
    stride = tl.full((), 64 << 16, tl.int64)
    for step in range(STEPS):
        token = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        mask = (column < width) & (token < tokens)
        value = tl.load(sent + token * width + column, mask=mask, other=float("inf"))
        word = value.to(tl.float32).to(tl.int32, bitcast=True)
        low, high, guess_low, guess_high = quantiles(
            word, guess_low, guess_high, stride, smallest - 1, width - largest,
            MAGNITUDE, False, False, tl.int64,
        )  # fmt: skip
        stride = tl.full((), 4 << 16, tl.int64)
        broken = tl.max(tl.where(mask, word & 0x7FFFFFFF, 0), axis=0) > LAST
        nan = tl.where(broken, float("nan"), 0.0)
        tl.store(out + token, low + nan, mask=token < tokens)
        tl.store(out + tokens + token, high + nan, mask=token < tokens)


def ranks(features: int, alpha: float, mode: str) -> tuple[int, int]:
    """Which order statistics of a whole token are its limits.

    Args:
        features: Of the whole token.
        alpha: Quantile, in (0.5, 1).
        mode: ``signed`` or ``magnitude``.

    Returns:
        (m, n): the m-th smallest and the n-th largest feature, counted from 1; by magnitude 0 and
        the n-th largest magnitude.
    """
    if mode == "magnitude":
        return 0, max(1, features - int((2.0 * alpha - 1.0) * features))
    return int((1.0 - alpha) * features) + 1, max(1, features - int(alpha * features))


def tails(x: Tensor, smallest: int, largest: int) -> Tensor:
    """Pick the features among which a whole token's limits may be, of a slice of its features.

    Args:
        x: BF16 or FP32 [tokens, d], contiguous; d even for BF16, at most ``MAX_FEATURES``.
        smallest: How many of the smallest to pick; 0 picks by magnitude.
        largest: How many of the largest to pick.

    Returns:
        x's dtype [tokens, smallest + largest], in no order; x itself if it has no more features.
        All NaN where a token holds NaN.

    Raises:
        ValueError: Arguments are not as above.
    """
    if smallest + largest >= x.shape[-1]:
        return x
    found: Tensor = torch.ops.megafp4.tails(x, smallest, largest)
    return found


def limits(sent: Tensor, smallest: int, largest: int, *, finite: bool = False) -> Tensor:
    """Find the limits of whole tokens among what :func:`tails` picked on all ranks.

    Args:
        sent: BF16 or FP32 [tokens, n], contiguous, at most ``MAX_FEATURES``: the ranks' picks side
            by side.
        smallest: As for :func:`tails`.
        largest: As for :func:`tails`.
        finite: Whether infinity breaks a token, as it does where outliers are folded in.

    Returns:
        FP32 [2, tokens]: below and above; NaN where the token is broken, by NaN always.

    Raises:
        ValueError: Arguments are not as above.
    """
    found: Tensor = torch.ops.megafp4.limits(sent, smallest, largest, finite)
    return found


def _tails(x: Tensor, smallest: int, largest: int) -> Tensor:
    out = _fake_tails(x, smallest, largest)
    check_device(x)
    if x.numel() == 0:
        return out
    tokens, features = x.shape
    how = spread(x, _FEATURES, _FEATURES)
    _tails_kernel[(how.programs,)](
        x.view(torch.int32),
        out.view(torch.int16 if how.pairs else torch.int32),
        tokens,
        features // how.per_word,
        smallest,
        largest,
        MAGNITUDE=smallest == 0,
        PAIRS=how.pairs,
        FAST=how.fast,
        STEPS=how.steps,
        WORDS=how.tile // how.per_word,
        FEW=triton.next_power_of_2(smallest + largest),
        num_warps=how.warps,
        maxnreg=min(128, 2048 // how.warps),  # 16 warps an SM; left alone, it takes 220
    )
    return out


def _fake_tails(x: Tensor, smallest: int, largest: int) -> Tensor:
    check_matrix(x)
    features = x.shape[1]
    if smallest < 0 or largest < 1 or smallest + largest >= features:
        raise ValueError(
            f"the {smallest} smallest and {largest} largest of {features} features are wanted: "
            "give at least 1 largest, and fewer than all of them"
        )
    if features > MAX_FEATURES or (x.dtype == torch.bfloat16 and features % 2):
        raise ValueError(
            f"x has {features} features of {x.dtype}: give at most {MAX_FEATURES}, and an even "
            "number in bfloat16"
        )
    return x.new_empty(x.shape[0], smallest + largest)


def _limits(sent: Tensor, smallest: int, largest: int, finite: bool) -> Tensor:
    out = _fake_limits(sent, smallest, largest, finite)
    check_device(sent)
    if sent.numel() == 0:
        return out
    tokens, width = sent.shape
    how = spread(sent, _FEATURES, _FEATURES)
    _limits_kernel[(how.programs,)](
        sent,
        out,
        tokens,
        width,
        smallest,
        largest,
        MAGNITUDE=smallest == 0,
        FINITE=finite,
        STEPS=how.steps,
        WIDTH=how.tile,
        num_warps=how.warps,
    )
    return out


def _fake_limits(sent: Tensor, smallest: int, largest: int, finite: bool) -> Tensor:
    check_matrix(sent)
    width = sent.shape[1]
    if width > MAX_FEATURES or smallest < 0 or not 1 <= largest <= width or smallest > width:
        raise ValueError(
            f"the {smallest} smallest and {largest} largest of {width} numbers are wanted: give "
            f"at least as many numbers, at most {MAX_FEATURES}, and at least 1 largest"
        )
    return sent.new_empty(2, sent.shape[0], dtype=torch.float32)


define("tails", "(Tensor x, int smallest, int largest) -> Tensor", _tails, _fake_tails)
define(
    "limits",
    "(Tensor sent, int smallest, int largest, bool finite) -> Tensor",
    _limits,
    _fake_limits,
)
