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
def fp8_bytes(value, FORMAT: tl.constexpr):
    """FP32 values that are not NaN -> FP8 bytes, nearest-even, saturating: uint8, on sm_89 and up.

    Four at a time and as one word, because ptxas 12.8 loses bytes of a conversion of two values
    (Triton's own) that is stored by itself and also becomes half of a word: when it merges the two
    conversions of that word it leaves the 16-bit result undefined.

    Args:
        value: FP32.
        FORMAT: ``fp8-e4m3`` or ``fp8-e5m2``.
    """
    CONVERT: tl.constexpr = "e4m3x2" if FORMAT == "fp8-e4m3" else "e5m2x2"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high;"
        "cvt.rn.satfinite." + CONVERT + ".f32 low, $2, $1;"
        "cvt.rn.satfinite." + CONVERT + ".f32 high, $4, $3;"
        "mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r",
        [value],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


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
def ladder(value):
    """FP32 values that are not NaN -> their E2M1 values, ties up, saturating: FP32."""
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
def decode_e4m3(byte):
    """E4M3 bytes that are not NaN, as int32 -> FP32 values."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


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
