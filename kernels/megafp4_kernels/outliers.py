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
from megafp4_kernels.casts import has_fp8_conversions
from megafp4_kernels.encode import encode_minifloat
from megafp4_kernels.select import at_most, float_of, search

MODES = ("signed", "magnitude")
RESIDUALS = ("exact", "folded", "none")
MAX_FEATURES = 65536
"""Longest token that the registers of a program hold."""

_PACKED_FEATURES = 32768  # counts in both halves of a word must stay below 2^15
_PROGRAMS = 2112  # 16 for each of an H100's SMs
_FEATURES_PER_WARP = 1024


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
def _ladder(value):
    """FP32 values that are not NaN -> their E2M1 values, ties up, saturating, still in FP32."""
    bits = value.to(tl.int32, bitcast=True)
    # One less for negative values: ties then fall below the threshold, which is toward zero.
    magnitude = (bits & 0x7FFFFFFF) - ((bits >> 31) & 1)
    # From 1 on there is one mantissa bit; half of its step is added, then the rest cut off.
    coarse = ((magnitude + 0x200000) & -0x400000).to(tl.float32, bitcast=True)
    coarse = tl.minimum(tl.maximum(coarse, 1.0), 6.0)
    fine = tl.where(magnitude >= 0x3E800000, 0.5, 0.0)  # below 0.75, from 0.25 on
    rounded = tl.where(magnitude >= 0x3F400000, coarse, fine)
    sign = bits & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(value):
    """FP32 values that are not NaN -> E4M3 bytes as int32, nearest-even, saturating."""
    return encode_minifloat(value, value, 4, 3, -6, 0x7E, "nearest-even")


@triton.jit
def decode_e4m3(byte):
    """E4M3 bytes that are not NaN, as int32 -> FP32 values."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _finish(x, low, high, reciprocal, scale, RESIDUAL: tl.constexpr):
    """Round features of one token.

    Returns:
        (values in units of the scale, outliers not yet rounded to E4M3; FP32 residual; largest
        magnitude, of the value or, if nothing is added to it, in units of the scale; number of
        saturated outliers).
    """
    saturated = tl.full((), 0, tl.int32)
    if RESIDUAL == "folded":
        scaled = x * reciprocal
        outlier = (x < low) | (x > high)
        value = tl.where(outlier, scaled, _ladder(scaled))
        saturated = tl.sum((outlier & (tl.abs(scaled) > 448.0)).to(tl.int32), axis=0)
        rest = x
    else:
        clamped = tl.where(x < low, low, tl.where(x > high, high, x))
        value = _ladder(clamped * reciprocal)
        rest = x - clamped
    if RESIDUAL == "exact":
        peak = tl.max(tl.abs(value * scale + rest), axis=0)
    else:
        peak = tl.max(tl.abs(value), axis=0)
    return value, rest, peak, saturated


@triton.jit
def _pair(even, odd, HARDWARE: tl.constexpr):
    """Two FP32 values -> their E4M3 bytes, the first one low, as int16."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
            "=h,r,r",
            [even, odd],
            dtype=tl.int16,
            is_pure=True,
            pack=1,
        )
    else:
        return (_e4m3(even) | (_e4m3(odd) << 8)).to(tl.int16)


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
    HARDWARE: tl.constexpr,
):
    """Encode and store the words of one token; those outside the mask are 0.

    Returns:
        (largest magnitude of the token's value, number of saturated outliers).
    """
    reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    if PAIRS:
        even = (word << 16).to(tl.float32, bitcast=True)
        odd = (word & -65536).to(tl.float32, bitcast=True)
        even, rest_even, peak, over = _finish(even, low, high, reciprocal, scale, RESIDUAL)
        odd, rest_odd, other, more = _finish(odd, low, high, reciprocal, scale, RESIDUAL)
        peak = tl.maximum(peak, other)
        over += more
        tl.store(data + offsets, _pair(even, odd, HARDWARE), mask=mask)
        if RESIDUAL == "exact":
            rest = _bf16_bits(rest_even) | (_bf16_bits(rest_odd) << 16)
            tl.store(residual + offsets, tl.where(usable, rest, 0x7FC07FC0), mask=mask)
    else:
        value = word.to(tl.float32, bitcast=True)
        value, rest, peak, over = _finish(value, low, high, reciprocal, scale, RESIDUAL)
        tl.store(data + offsets, _e4m3(value).to(tl.uint8), mask=mask)
        if RESIDUAL == "exact":
            half = tl.where(usable, _bf16_bits(rest), 0x7FC0).to(tl.int16)
            tl.store(residual + offsets, half, mask=mask)
    if RESIDUAL != "exact":
        peak = decode_e4m3(_e4m3(peak)) * scale
    return peak, over


@triton.jit
def _occ_kernel(
    x,
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
    INFINITY: tl.constexpr = 0x7F80 if PAIRS else 0x7F800000
    ABSOLUTE: tl.constexpr = 0x7FFF7FFF if PAIRS else 0x7FFFFFFF
    PADDING: tl.constexpr = 0x7F807F80 if PAIRS else 0x7F800000  # infinities come last in any order
    column = tl.arange(0, WORDS)
    guess_high = tl.full((), 0x3F80 << KEY_SHIFT, tl.int64)  # 1.0
    guess_low = -guess_high
    stride = tl.full((), 64 << KEY_SHIFT, tl.int64)
    for step in range(STEPS):
        token = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        mask = (column < words) & (token < tokens)
        word = tl.load(x + token * words + column, mask=mask, other=PADDING)
        magnitude = word & ABSOLUTE
        searched = magnitude if MAGNITUDE else word
        low_key, high_key = search(
            searched,
            guess_low,
            guess_high,
            stride,
            rank_low,
            rank_high,
            INFINITY,
            MAGNITUDE,
            PAIRS,
            FAST,
        )
        high = float_of(high_key, PAIRS)
        low = -high if MAGNITUDE else float_of(low_key, PAIRS)
        if MAGNITUDE:
            low += 0.0
        else:
            guess_low = low_key
        guess_high = high_key
        stride = tl.full((), 4 << KEY_SHIFT, tl.int64)

        # Infinite padding counts as finite here: it is not the token's.
        LAST: tl.constexpr = INFINITY - 1 if RESIDUAL == "folded" else INFINITY
        sound = tl.where(mask, magnitude, 0)
        every: tl.constexpr = WORDS * 2 if PAIRS else WORDS
        whole = at_most(sound, tl.full((), LAST, tl.int32), PAIRS, FAST) == every
        scale = scale_from_amax(tl.maximum(tl.abs(low), tl.abs(high)), 6.0, 1.1754943508222875e-38)
        nan = float("nan")
        scale = tl.where(whole, scale, nan)
        low = tl.where(whole, low, nan)
        high = tl.where(whole, high, nan)
        usable = scale < float("inf")
        word = tl.where(usable, tl.where(mask, word, 0), 0)
        base = token * words + column
        safe = tl.where(usable, scale, 1.0)
        peak, over = _write(
            word, low, high, safe, usable, data, residual, base, mask, RESIDUAL, PAIRS, HARDWARE
        )
        inside = token < tokens
        tl.store(scales + token, scale, mask=inside)
        tl.store(limits + token, low, mask=inside)
        tl.store(limits + tokens + token, high, mask=inside)
        tl.store(peaks + token, tl.where(usable, peak, nan), mask=inside)
        if RESIDUAL == "folded":
            tl.atomic_add(saturated, over, mask=inside & (over > 0))


def occ(x: Tensor, alpha: float, *, mode: str = "signed", residual: str = "exact") -> Clamped:
    """Clamp every token at its quantiles and cast it to E2M1 [2501.17116, section 3.2].

    Args:
        x: BF16 or FP32 [tokens, d], contiguous; d even for BF16, at most ``MAX_FEATURES``.
        alpha: Quantile, in (0.5, 1).
        mode: ``signed`` or ``magnitude``.
        residual: ``exact`` returns what was cut off, ``folded`` puts it back into the codes, as
            E4M3 to the nearest even, ``none`` drops it.

    Returns:
        See :class:`Clamped`. A token that holds NaN (or, folded, Inf) has codes 0 and NaN
        elsewhere.

    Raises:
        ValueError: Arguments are not as above.
    """
    data, scale, limits, peak, rest, saturated = _occ(x, alpha, mode, residual)
    return Clamped(data, scale, limits, peak, rest if residual == "exact" else None, saturated)


@torch.library.custom_op("megafp4::occ", mutates_args=())
def _occ(x: Tensor, alpha: float, mode: str, residual: str) -> list[Tensor]:
    outputs = _fake_occ(x, alpha, mode, residual)
    check_device(x)
    data, scale, limits, peak, rest, saturated = outputs
    saturated.zero_()
    tokens, features = x.shape
    if x.numel() == 0:
        for each in (scale, limits, peak):
            each.zero_()
        return outputs
    pairs = x.dtype == torch.bfloat16
    per_word = 2 if pairs else 1
    tile = triton.next_power_of_2(max(features, 64))
    rank_low = int((1.0 - alpha) * features)
    share = alpha if mode == "signed" else 2.0 * alpha - 1.0
    programs = min(tokens, _PROGRAMS)
    hardware = has_fp8_conversions(x.device)
    _occ_kernel[(programs,)](
        x.view(torch.int32),
        data.view(torch.int16 if pairs else torch.uint8),
        rest.view(torch.int32 if pairs else torch.int16),
        scale,
        limits,
        peak,
        saturated,
        tokens,
        features // per_word,
        rank_low,
        features - max(1, features - int(share * features)),
        MAGNITUDE=mode == "magnitude",
        RESIDUAL=residual,
        PAIRS=pairs,
        FAST=hardware and tile <= _PACKED_FEATURES,
        HARDWARE=hardware,
        STEPS=triton.cdiv(tokens, programs),
        WORDS=tile // per_word,
        num_warps=min(32, max(1, tile // _FEATURES_PER_WARP)),
        enable_fp_fusion=False,  # every product and sum is rounded, as in the specification
    )
    return outputs


@_occ.register_fake
def _fake_occ(x: Tensor, alpha: float, mode: str, residual: str) -> list[Tensor]:
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
    lines = [x.new_empty(shape, dtype=torch.float32) for shape in ((tokens,), (2, tokens))]
    rest = x.new_empty(x.shape if residual == "exact" else (0,), dtype=torch.bfloat16)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    count = x.new_empty(1, dtype=torch.int32)
    return [data, *lines, x.new_empty(tokens, dtype=torch.float32), rest, count]
