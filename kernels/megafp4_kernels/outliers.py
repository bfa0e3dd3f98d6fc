"""Outlier clamping of activations (OCC) with the E2M1 cast that follows it, in one kernel.

The limits of a token are order statistics of its features. They are found without a sort: bisection
on the order-preserving integers that the bits of floating-point numbers are, counting in each step
how many features lie at or below a probe. A whole token stays in registers. BF16 is compared two at
a time. A program works through several tokens and starts at the limits of the previous one, from
which a few steps in either direction usually suffice. Bit-equal to ``megafp4.numerics``:
``clamp_outliers``, ``quantize`` to ``fp4-vector`` with nearest-up, ``fold_outliers``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafp4_kernels.amax import check_device, check_matrix, scale_from_amax
from megafp4_kernels.encode import decode_e4m3, encode_minifloat, ladder
from megafp4_kernels.operators import define
from megafp4_kernels.pairs import clamp_pair, extremes, fold_pair
from megafp4_kernels.select import MAX_FEATURES, at_most, quantiles, spread
from megafp4_kernels.tails import ranks

MODES = ("signed", "magnitude")
RESIDUALS = ("exact", "folded", "none")
# Features of a warp: of pairs, and number by number, which takes more registers.
_PAIRED, _SINGLE = 4096, 1024


class Clamped(NamedTuple):
    """What fprop multiplies, and what wgrad needs to know about it."""

    data: Tensor
    """float8_e4m3fn [tokens, d]: E2M1 values; outliers as E4M3 ones if they are folded in."""
    scale: Tensor
    """FP32 [tokens]; NaN where the token is not finite."""
    limits: Tensor
    """FP32 [2, tokens]: what the token was clamped to, below and above."""
    peak: Tensor
    """FP32 [tokens]: largest magnitude of the token's value, residual included."""
    residual: Tensor | None
    """BF16 [tokens, d]: what was cut off; None unless it is exact."""
    saturated: Tensor
    """int32 [1]: how many folded outliers lie beyond 448 times their scale."""


@triton.jit
def _e4m3(value):
    """FP32 values that are not NaN -> E4M3 bytes as int32, nearest-even, saturating."""
    return encode_minifloat(value, value, 4, 3, -6, 0x7E, "nearest-even")


@triton.jit
def _round(x, low, high, reciprocal, RESIDUAL: tl.constexpr):
    """Round features of one token.

    Returns:
        (values in units of the scale, outliers not yet rounded to E4M3; FP32 residual).
    """
    if RESIDUAL == "folded":
        scaled = x * reciprocal
        value = tl.where((x < low) | (x > high), scaled, ladder(scaled))
        rest = tl.zeros_like(x)
    else:
        clamped = tl.where(x < low, low, tl.where(x > high, high, x))
        value = ladder(clamped * reciprocal)
        rest = x - clamped
    return value, rest


@triton.jit
def _size(value, rest, scale, RESIDUAL: tl.constexpr):
    """Magnitude of what is multiplied: itself if the residual is exact, else in scales."""
    return tl.abs(value * scale + rest) if RESIDUAL == "exact" else tl.abs(value)


@triton.jit
def _saturated(x, words, low, high, scale, PAIRS: tl.constexpr, WORDS: tl.constexpr):
    """How many outliers of the token at x saturate: int32. Reads it again, which is rare."""
    TILE: tl.constexpr = 256 if WORDS > 256 else WORDS
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    over = tl.zeros((TILE,), tl.int32)
    for first in range(0, WORDS, TILE):
        column = first + tl.arange(0, TILE)
        word = tl.load(x + column, mask=column < words, other=0)
        if PAIRS:
            for half in tl.static_range(2):
                bits = word << 16 if half == 0 else word & -65536
                value = bits.to(tl.float32, bitcast=True)
                outlier = (value < low) | (value > high)
                over += (outlier & (tl.abs(value * reciprocal) > 448.0)).to(tl.int32)
        else:
            value = word.to(tl.float32, bitcast=True)
            outlier = (value < low) | (value > high)
            over += (outlier & (tl.abs(value * reciprocal) > 448.0)).to(tl.int32)
    return tl.sum(over, axis=0)


@triton.jit
def _bf16_bits(x):
    """FP32 values that are not NaN -> the bits of their BF16 rounding, low half of an int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _write(
    word,
    low,
    high,
    scale,
    usable,
    data,
    residual,
    offsets,
    mask,
    RESIDUAL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Encode and store the words of one token, number by number; those outside the mask are 0.

    Returns:
        Largest magnitude, see :func:`_size`.
    """
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    if PAIRS:
        even = (word << 16).to(tl.float32, bitcast=True)
        odd = (word & -65536).to(tl.float32, bitcast=True)
        even, rest_even = _round(even, low, high, reciprocal, RESIDUAL)
        odd, rest_odd = _round(odd, low, high, reciprocal, RESIDUAL)
        sizes = tl.maximum(
            _size(even, rest_even, scale, RESIDUAL), _size(odd, rest_odd, scale, RESIDUAL)
        )
        tl.store(data + offsets, (_e4m3(even) | (_e4m3(odd) << 8)).to(tl.int16), mask=mask)
        if RESIDUAL == "exact":
            rest = _bf16_bits(rest_even) | (_bf16_bits(rest_odd) << 16)
            tl.store(residual + offsets, tl.where(usable, rest, 0x7FC07FC0), mask=mask)
    else:
        value, rest = _round(word.to(tl.float32, bitcast=True), low, high, reciprocal, RESIDUAL)
        sizes = _size(value, rest, scale, RESIDUAL)
        tl.store(data + offsets, _e4m3(value).to(tl.uint8), mask=mask)
        if RESIDUAL == "exact":
            half = tl.where(usable, _bf16_bits(rest), 0x7FC0).to(tl.int16)
            tl.store(residual + offsets, half, mask=mask)
    return tl.max(sizes, axis=0)


@triton.jit
def _write_pairs(
    word,
    above,
    below,
    low,
    high,
    scale,
    usable,
    data,
    residual,
    offsets,
    mask,
    RESIDUAL: tl.constexpr,
):
    """Do as :func:`_write`, two BF16 numbers at a time.

    The larger a feature is, the larger is what is multiplied: only the outermost features, whose
    bits ``above`` and ``below`` are, and the limits can be the largest.
    """
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    first = low.to(tl.int32, bitcast=True)  # of BF16 precision, hence only the upper half
    last = high.to(tl.int32, bitcast=True)
    first = first | ((first >> 16) & 0xFFFF)
    last = last | ((last >> 16) & 0xFFFF)
    if RESIDUAL == "folded":
        tl.store(data + offsets, fold_pair(word, first, last, reciprocal), mask=mask)
    else:
        codes, rest = clamp_pair(word, first, last, reciprocal)
        tl.store(data + offsets, codes, mask=mask)
        if RESIDUAL == "exact":
            tl.store(residual + offsets, tl.where(usable, rest, 0x7FC07FC0), mask=mask)
    peak = tl.full((), 0.0, tl.float32)
    for bits in tl.static_range(2):
        feature = ((above if bits == 0 else below) << 16).to(tl.float32, bitcast=True)
        limit = high if bits == 0 else low
        value, rest = _round(feature, low, high, reciprocal, RESIDUAL)
        peak = tl.maximum(peak, _size(value, rest, scale, RESIDUAL))
        value, rest = _round(limit, low, high, reciprocal, RESIDUAL)
        peak = tl.maximum(peak, _size(value, rest, scale, RESIDUAL))
    return peak


@triton.jit
def _occ_kernel(
    x,
    given,
    data,
    residual,
    scales,
    limits,
    peaks,
    saturated,
    tokens,
    words,
    rank_low,
    rank_high,
    MAGNITUDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    HARDWARE: tl.constexpr,
    STEPS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Several tokens; a word is an FP32 number or two BF16 ones. See :class:`Clamped`."""
    KEY_SHIFT: tl.constexpr = 0 if PAIRS else 16
    KEY: tl.constexpr = tl.int32 if PAIRS else tl.int64  # probes may lie beyond the keys of FP32
    INFINITY: tl.constexpr = 0x7F80 if PAIRS else 0x7F800000
    ABSOLUTE: tl.constexpr = 0x7FFF7FFF if PAIRS else 0x7FFFFFFF
    PADDING: tl.constexpr = 0x7F807F80 if PAIRS else 0x7F800000  # infinities come last in any order
    column = tl.arange(0, WORDS)
    guess_high = tl.full((), 0x3F80 << KEY_SHIFT, KEY)  # 1.0
    guess_low = -guess_high
    stride = tl.full((), 64 << KEY_SHIFT, KEY)
    for step in range(STEPS):
        token = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        mask = (column < words) & (token < tokens)
        word = tl.load(x + token * words + column, mask=mask, other=PADDING)
        if given is None:
            low, high, guess_low, guess_high = quantiles(
                word, guess_low, guess_high, stride, rank_low, rank_high,
                MAGNITUDE, PAIRS, FAST, KEY,
            )  # fmt: skip
            stride = tl.full((), 4 << KEY_SHIFT, KEY)
        else:
            low = tl.load(given + token, mask=token < tokens, other=0.0)
            high = tl.load(given + tokens + token, mask=token < tokens, other=0.0)

        LAST: tl.constexpr = INFINITY - 1 if RESIDUAL == "folded" else INFINITY
        word = tl.where(mask, word, 0)  # infinite padding is not the token's
        if PAIRS and HARDWARE:
            above, below = extremes(word)
            whole = ((above & 0x7FFF) <= LAST) & ((below & 0x7FFF) <= LAST)
        else:
            sound = at_most(word & ABSOLUTE, tl.full((), LAST, tl.int32), PAIRS, False)
            whole = sound == (WORDS * 2 if PAIRS else WORDS)
        scale = scale_from_amax(tl.maximum(tl.abs(low), tl.abs(high)), 6.0, 1.1754943508222875e-38)
        nan = tl.where(whole, 0.0, float("nan"))
        scale, low, high = scale + nan, low + nan, high + nan
        usable = scale < float("inf")
        word = tl.where(usable, word, 0)
        base = token * words + column
        safe = tl.where(usable, scale, 1.0)
        if PAIRS and HARDWARE:
            peak = _write_pairs(
                word, above, below, low, high, safe, usable, data, residual, base, mask, RESIDUAL
            )
        else:
            peak = _write(
                word, low, high, safe, usable, data, residual, base, mask, RESIDUAL, PAIRS
            )
        largest = peak
        if RESIDUAL != "exact":
            peak = decode_e4m3(_e4m3(peak)) * safe
        inside = token < tokens
        tl.store(scales + token, scale, mask=inside)
        tl.store(limits + token, low, mask=inside)
        tl.store(limits + tokens + token, high, mask=inside)
        tl.store(peaks + token, tl.where(usable, peak, float("nan")), mask=inside)
        if RESIDUAL == "folded":  # noqa: SIM102  else the rest would be compiled as well
            if inside & usable & (largest > 448.0):
                over = _saturated(x + token * words, words, low, high, safe, PAIRS, WORDS)
                tl.atomic_add(saturated, over)


def occ(
    x: Tensor,
    alpha: float,
    *,
    mode: str = "signed",
    residual: str = "exact",
    limits: Tensor | None = None,
) -> Clamped:
    """Clamp every token at its quantiles and cast it to E2M1 [2501.17116, section 3.2].

    Args:
        x: BF16 or FP32 [tokens, d], contiguous; d even for BF16, at most ``MAX_FEATURES``.
        alpha: Quantile, in (0.5, 1).
        mode: ``signed`` or ``magnitude``.
        residual: ``exact`` returns what was cut off, ``folded`` puts it back into the codes, as
            E4M3 to the nearest even, ``none`` drops it.
        limits: FP32 [2, tokens]: what to clamp at, where x is a slice of the tokens' features; as
            :func:`megafp4_kernels.tails.limits` returns them. Neither alpha nor mode has a say
            then, and ``peak`` may be that of a limit which another rank holds.

    Returns:
        See :class:`Clamped`. A token that holds NaN (or, folded, Inf) has codes 0 and NaN
        elsewhere.

    Raises:
        ValueError: Arguments are not as above.
    """
    data, scale, found, peak, rest, saturated = torch.ops.megafp4.occ(
        x, alpha, mode, residual, limits
    )
    return Clamped(data, scale, found, peak, rest if residual == "exact" else None, saturated)


def _occ(
    x: Tensor, alpha: float, mode: str, residual: str, given: Tensor | None
) -> tuple[Tensor, ...]:
    outputs = _fake_occ(x, alpha, mode, residual, given)
    check_device(x)
    data, scale, limits, peak, rest, saturated = outputs
    saturated.zero_()
    tokens, features = x.shape
    if x.numel() == 0:
        for each in (scale, limits, peak):
            each.zero_()
        return outputs
    how = spread(x, _PAIRED, _SINGLE)
    smallest, largest = ranks(features, alpha, mode)
    _occ_kernel[(how.programs,)](
        x.view(torch.int32),
        given,
        data.view(torch.int16 if how.pairs else torch.uint8),
        rest.view(torch.int32 if how.pairs else torch.int16),
        scale,
        limits,
        peak,
        saturated,
        tokens,
        features // how.per_word,
        smallest - 1,
        features - largest,
        MAGNITUDE=mode == "magnitude",
        RESIDUAL=residual,
        PAIRS=how.pairs,
        FAST=how.fast,
        HARDWARE=how.hardware,
        STEPS=how.steps,
        WORDS=how.tile // how.per_word,
        num_warps=how.warps,
        enable_fp_fusion=False,  # every product and sum is rounded, as in the specification
    )
    return outputs


def _fake_occ(
    x: Tensor, alpha: float, mode: str, residual: str, given: Tensor | None = None
) -> tuple[Tensor, ...]:
    check_matrix(x)
    tokens, features = x.shape
    if not 0.5 < alpha < 1.0 or mode not in MODES or residual not in RESIDUALS:
        raise ValueError(
            f"alpha is {alpha}, mode {mode!r} and residual {residual!r}: give an alpha between 0.5 "
            f"and 1, a mode of {', '.join(MODES)} and a residual of {', '.join(RESIDUALS)}"
        )
    if features > MAX_FEATURES or (x.dtype == torch.bfloat16 and features % 2):
        raise ValueError(
            f"x has {features} features of {x.dtype}: give at most {MAX_FEATURES}, and an even "
            "number in bfloat16"
        )
    if given is not None and (given.shape != (2, tokens) or given.dtype != torch.float32):
        raise ValueError(
            f"limits are {given.dtype} {list(given.shape)}: give float32 {[2, tokens]}"
        )
    lines = [x.new_empty(shape, dtype=torch.float32) for shape in ((tokens,), (2, tokens))]
    rest = x.new_empty(x.shape if residual == "exact" else (0,), dtype=torch.bfloat16)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    count = x.new_empty(1, dtype=torch.int32)
    return data, *lines, x.new_empty(tokens, dtype=torch.float32), rest, count


define(
    "occ",
    "(Tensor x, float alpha, str mode, str residual, Tensor? limits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _occ,
    _fake_occ,
)
