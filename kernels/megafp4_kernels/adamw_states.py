"""How numbers are cut down between optimizer steps: device functions of the AdamW kernel.

Tiles are [ROWS, 128] in FP32, a row being a group of elements that share a scale. Integer
arithmetic on the bits of FP32 numbers, bit-equal to ``megafp4.optim.quantizers``, which explains
each of these functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafp4_kernels.encode import encode_minifloat, fp8_bytes
from megafp4_kernels.philox import philox4x32

UNITY = tl.constexpr(0x3F80000000000000)
"""A largest magnitude of zero and a power of one, as :func:`join_pair` joins them."""


@triton.jit
def bits_of(x):
    """The int32 bits of FP32 values, each NaN in its standard form."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))


@triton.jit
def float_of(bits):
    """FP32 values of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2^exponent in FP32, for int32 from -126 to 127."""
    return float_of((exponent + 127) << 23)


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """E4M3 codes of FP32 values, nearest-even and saturating, NaN as 0x7F: uint8.

    Args:
        x: FP32.
        NATIVE: Whether the device has the instruction.
    """
    if NATIVE:
        return fp8_bytes(x, "fp8-e4m3")
    else:
        code = encode_minifloat(x, x, 4, 3, -6, 0x7E, "nearest-even")
        return tl.where(x != x, 0x7F, code).to(tl.uint8)


@triton.jit
def decode_e4m3(code, NATIVE: tl.constexpr):
    """FP32 values of E4M3 codes.

    Args:
        code: uint8.
        NATIVE: Whether the device has the instruction.
    """
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.int32)
        magnitude = bits & 0x7F
        # The fields in FP32's places, and the difference of the biases as a factor: exact for
        # subnormals too.
        value = float_of(magnitude << 20) * 1.329227995784916e36
        value = tl.where(magnitude == 0x7F, float("nan"), value)
        return tl.where(bits > 0x7F, -value, value)


@triton.jit
def largest_magnitude(x):
    """Bits of each row's largest magnitude, NaN in its standard form: int32 [ROWS]."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(tl.max(magnitude, axis=1), 0x7FC00000)


@triton.jit
def e4m3_exponent(x):
    """Exponent [ROWS] that brings each row's largest magnitude into (224, 448]."""
    exponent = ((largest_magnitude(x) + 0x1FFFFF) >> 23) - 135
    return tl.minimum(tl.maximum(exponent, -126), 126)


@triton.jit
def fp16_exponent(x):
    """Exponent [ROWS] that brings each row's largest magnitude into [2^14, 2^15)."""
    return tl.minimum(tl.maximum((largest_magnitude(x) >> 23) - 141, -126), 126)


@triton.jit
def split_24_bits(x):
    """BF16 bits and the 8 bits below, of FP32 values rounded to 24 bits: int16, int8."""
    bits = bits_of(x)
    bits = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    high = (bits + 0x80) >> 8
    return high.to(tl.int16), (bits - (high << 8)).to(tl.int8)


@triton.jit
def join_24_bits(high, low):
    """FP32 values of int16 BF16 bits and int8 bits below."""
    return float_of(((high.to(tl.int32) << 8) + low.to(tl.int32)) << 8)


@triton.jit
def nearest_bf16(x):
    """BF16 bits of FP32 values, nearest-even: int16."""
    bits = bits_of(x)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def round_to_bf16(x, random):
    """BF16 bits of FP32 values, rounded stochastically: int16.

    Args:
        x: FP32.
        random: int32 from 0 to 2^16 - 1, same shape.
    """
    bits = bits_of(x)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (tl.where(finite, bits + random, bits) >> 16).to(tl.int16)


@triton.jit
def random_words(seed_low, seed_high, step, stream, first_row, ROWS: tl.constexpr):
    """32 random bits for each element of a tile: uint32 [ROWS, 128].

    Args:
        seed_low: Low word of the seed.
        seed_high: High word.
        step: Optimizer step.
        stream: Word 3 of the counter.
        first_row: First group of the tile within its tensor.
        ROWS: Groups of the tile.
    """
    row = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
    calls = (row * 32)[:, None] + tl.arange(0, 32).to(tl.uint32)[None, :]
    zero = tl.zeros_like(calls)
    w0, w1, w2, w3 = philox4x32(
        calls,
        zero,
        zero + step.to(tl.uint32),
        zero + stream.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )
    # The last index of a join runs fastest: (w0, w1, w2, w3) in memory order.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 128))


@triton.jit
def expansion(x):
    """Largest magnitude, as bits, and power of each row: int32 [ROWS], FP32 [ROWS]."""
    largest = largest_magnitude(x)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # One less and without a sign, zero is the largest number there is.
    smallest = tl.min((magnitude - 1).to(tl.uint32, bitcast=True), axis=1) + 1
    span = tl.maximum(largest - smallest.to(tl.int32, bitcast=True), 1).to(tl.float32)
    # 16 * log2(448^2 / 2) * 2^23
    steps = tl.div_rn(tl.zeros_like(span) + 2229988606.6563773, span)
    steps = tl.minimum(tl.maximum(steps, 2.0), 256.0).to(tl.int32)
    return largest, steps.to(tl.float32) * 0.0625


@triton.jit
def expand(x, largest, power, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """E4M3 codes of a tile under COAT's expansion: uint8 [ROWS, 128].

    Args:
        x: FP32 [ROWS, 128].
        largest: int32 [ROWS], bits of the largest magnitude.
        power: FP32 [ROWS].
        SIGNED: Whether any is below zero.
        NATIVE: Whether the device has the instruction that rounds to E4M3.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    below = (magnitude - largest[:, None]).to(tl.float32)
    moved = tl.maximum(below * power[:, None], -1138753536.0).to(tl.int32) + 0x43E00000
    moved = tl.where(magnitude == 0, 0, moved)
    if SIGNED:
        moved = moved | (bits ^ magnitude)
    return encode_e4m3(float_of(moved), NATIVE)


@triton.jit
def contract(code, largest, power, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """FP32 values of COAT's codes.

    Args:
        code: uint8 [ROWS, 128].
        largest: int32 [ROWS], bits of the largest magnitude.
        power: FP32 [ROWS], at least 1/8.
        SIGNED: Whether any is below zero.
        NATIVE: Whether the device has the instruction that decodes E4M3.
    """
    bits = decode_e4m3(code, NATIVE).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    inverse = tl.div_rn(tl.zeros_like(power) + 1.0, power)
    moved = ((magnitude - 0x43E00000).to(tl.float32) * inverse[:, None]).to(tl.int32)
    found = tl.where(magnitude == 0, 0, tl.maximum(moved + largest[:, None], 0))
    if SIGNED:
        found = found | (bits ^ magnitude)
    return float_of(found)


@triton.jit
def join_pair(largest, power):
    """Largest magnitudes, by their bits, and powers as they lie in memory: int64 [ROWS]."""
    high = power.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return high | (largest.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def contract_pair(code, pair, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """FP32 values of COAT's codes, given what :func:`join_pair` joined for each row."""
    power = float_of((pair >> 32).to(tl.int32))
    return contract(code, pair.to(tl.int32), power, SIGNED, NATIVE)
