"""Rounding and encoding, and the store of codes: device functions that the quantizers share.

Integer arithmetic on the bits of FP32 numbers, bit-equal to ``megafp4.numerics`` on every device
and under Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_steps(steps, negative, noise, ROUNDING: tl.constexpr):
    """Round magnitudes, in units of their step, to whole steps.

    Args:
        steps: FP32, from 0 to below 2^31.
        negative: Whether the value is below zero, same shape; for "nearest-up".
        noise: FP32 dither in (0, 1), same shape; for "stochastic".
        ROUNDING: As ``megafp4.numerics.Rounding``.

    Returns:
        int32.
    """
    whole = steps.to(tl.int32)
    remainder = steps - whole.to(tl.float32)
    if ROUNDING == "nearest-even":
        up = (remainder > 0.5) | ((remainder == 0.5) & ((whole & 1) == 1))
    elif ROUNDING == "nearest-away":
        up = remainder >= 0.5
    elif ROUNDING == "nearest-up":
        up = (remainder > 0.5) | ((remainder == 0.5) & (negative == 0))
    else:
        up = remainder >= 1.0 - noise
    return whole + up.to(tl.int32)


@triton.jit
def encode_minifloat(
    value,
    noise,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MAX_CODE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Encode FP32 values that are not NaN: sign, exponent, mantissa; saturating.

    Args:
        value: FP32.
        noise: FP32 dither, same shape; for "stochastic".
        EXPONENT_BITS: Width of the exponent.
        MANTISSA_BITS: Width of the mantissa.
        MIN_EXPONENT: Exponent of the smallest normal.
        MAX_CODE: Magnitude code of the largest value.
        ROUNDING: As ``megafp4.numerics.Rounding``.

    Returns:
        int32 codes.
    """
    bits = value.to(tl.int32, bitcast=True)
    # Bounded, so that infinity saturates like every other large value.
    magnitude_bits = tl.minimum(bits & 0x7FFFFFFF, (127 + 100) << 23)
    exponent = tl.maximum(magnitude_bits >> 23, MIN_EXPONENT + 127)
    # 2^(mantissa_bits - exponent) by its bits: the product is exact.
    per_step = ((MANTISSA_BITS + 254 - exponent) << 23).to(tl.float32, bitcast=True)
    steps = magnitude_bits.to(tl.float32, bitcast=True) * per_step
    whole = round_steps(steps, value < 0.0, noise, ROUNDING)
    code = ((exponent - (MIN_EXPONENT + 127)) << MANTISSA_BITS) + whole
    sign = (bits >> 31) & (1 << (EXPONENT_BITS + MANTISSA_BITS))
    return tl.minimum(code, MAX_CODE) | sign


@triton.jit
def encode_e2m1(value, noise, ROUNDING: tl.constexpr):
    """Encode FP32 values that are not NaN as E2M1: int32 codes from 0 to 15."""
    return encode_minifloat(value, noise, 2, 1, 0, 7, ROUNDING)


@triton.jit
def e2m1_as_e4m3(code):
    """E4M3 codes of the values of E2M1 codes, int32 to int32: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    magnitude = code & 7
    # From 1 on, E2M1's bits are E4M3's with a smaller bias; 0.5 is normal in E4M3 alone.
    byte = tl.where(magnitude > 1, 0x30 + (magnitude << 2), magnitude * 0x30)
    return byte | ((code & 8) << 4)


@triton.jit
def encode_integer(value, noise, LOW: tl.constexpr, HIGH: tl.constexpr, ROUNDING: tl.constexpr):
    """Encode FP32 values that are not NaN as integers from LOW to HIGH, saturating: int32."""
    negative = value.to(tl.int32, bitcast=True) < 0
    magnitude = tl.minimum(tl.abs(value), 1.0 - LOW)
    whole = round_steps(magnitude, value < 0.0, noise, ROUNDING)
    return tl.minimum(tl.maximum(tl.where(negative, -whole, whole), LOW), HIGH)


@triton.jit
def store_codes(
    codes,
    out,
    first_line,
    first_k,
    lines,
    length,
    PACKED: tl.constexpr,
    LINES: tl.constexpr,
    K: tl.constexpr,
):
    """Write a tile of one-byte codes, or of two 4-bit codes a byte, to an operand.

    Args:
        codes: uint8 [LINES, K].
        out: uint8 [lines, length], or [lines, length / 2] if packed: even index in the low nibble.
        first_line: First line of the tile.
        first_k: First element of its lines.
        lines: Lines of the operand.
        length: Elements of a line.
        PACKED: Whether two codes share a byte.
        LINES: Lines of the tile.
        K: Elements of a line of the tile.
    """
    if PACKED:
        low, high = tl.split(tl.reshape(codes, (LINES, K // 2, 2)))
        store_codes(
            low | (high << 4),
            out,
            first_line,
            first_k // 2,
            lines,
            length // 2,
            False,
            LINES,
            K // 2,
        )
    else:
        line = tl.arange(0, LINES)
        k = tl.arange(0, K)
        mask = (first_line + line < lines)[:, None] & (first_k + k < length)[None, :]
        start = out + first_line.to(tl.int64) * length + first_k
        tl.store(start + line[:, None] * length + k[None, :], codes, mask=mask)
