"""BF16 numbers two at a time, as the words that hold them: device functions for sm_90 and later.

Bit-equal to what :mod:`megafp4_kernels.outliers` does number by number, in half the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

_REGISTERS = tl.constexpr("""{
    .reg .b32 x, r, e, o, h, m, c, f, s, y;
    .reg .b16 p, q;
""")
# Word x, FP32 factor r -> FP32 products e (of the low half) and o; zero is added to make -0 +0.
_PRODUCTS = tl.constexpr("""
    shl.b32 e, x, 16;
    and.b32 o, x, 0xffff0000;
    fma.rn.f32 e, e, r, 0f00000000;
    fma.rn.f32 o, o, r, 0f00000000;
""")
# Products -> q, the E4M3 bytes of their E2M1 values, ties up. A negative product loses its last
# bit, so that a tie falls below its threshold, which is toward zero; truncation to FP16 moves
# nothing across a threshold. From 0.75 on, half of the step is added and what lies below the one
# mantissa bit cut off; from 0.25 to 0.75 there is only 0.5. The sign is that of x, also for zero.
_LADDER = tl.constexpr("""
    shr.s32 s, e, 31;
    add.s32 e, e, s;
    shr.s32 s, o, 31;
    add.s32 o, o, s;
    cvt.rz.f16x2.f32 h, o, e;
    and.b32 m, h, 0x7fff7fff;
    add.u32 c, m, 0x01000100;
    and.b32 c, c, 0xfe00fe00;
    mov.b32 s, 0x3c003c00;
    max.f16x2 c, c, s;
    mov.b32 s, 0x34003400;
    set.ge.u32.f16x2 f, m, s;
    and.b32 f, f, 0x38003800;
    mov.b32 s, 0x3a003a00;
    set.ge.u32.f16x2 s, m, s;
    lop3.b32 y, c, f, s, 0xe4;
    lop3.b32 y, y, x, 0x80008000, 0xf8;
    cvt.rn.satfinite.e4m3x2.f16x2 q, y;
""")


@triton.jit
def fold_pair(word, low, high, reciprocal):
    """Round to E2M1, ties up, but what lies beyond the limits to E4M3.

    Args:
        word: Two BF16 numbers, int32; neither NaN nor infinite.
        low: Two BF16 numbers, int32: the lower limit, twice.
        high: The upper limit.
        reciprocal: FP32, what is multiplied by before rounding.

    Returns:
        int16: two E4M3 bytes.
    """
    return tl.inline_asm_elementwise(
        _REGISTERS
        + "mov.b32 x, $1; mov.b32 r, $4;"
        + _PRODUCTS
        + "cvt.rn.satfinite.e4m3x2.f32 p, o, e;"
        + _LADDER
        + """
            set.lt.u32.bf16x2 s, x, $2;
            set.gt.u32.bf16x2 f, x, $3;
            or.b32 s, s, f;
            prmt.b32 s, s, 0, 0x0020;
            cvt.u32.u16 y, q;
            cvt.u32.u16 c, p;
            lop3.b32 y, c, y, s, 0xe4;
            cvt.u16.u32 $0, y;
        }""",
        "=h,r,r,r,r",
        [word, low, high, reciprocal],
        dtype=tl.int16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def clamp_pair(word, low, high, reciprocal):
    """Clamp, then round to E2M1, ties up.

    Args:
        word: Two BF16 numbers, int32; not NaN.
        low: Two BF16 numbers, int32: the lower limit, twice; finite.
        high: The upper limit; finite.
        reciprocal: FP32, what is multiplied by before rounding.

    Returns:
        (int16: two E4M3 bytes; int32: what was cut off, two BF16 numbers).
    """
    return tl.inline_asm_elementwise(
        _REGISTERS
        + """
            mov.b32 y, $2;
            mov.b32 r, $5;
            set.lt.u32.bf16x2 s, y, $3;
            set.gt.u32.bf16x2 f, y, $4;
            lop3.b32 x, $3, y, s, 0xe4;
            lop3.b32 x, $4, x, f, 0xe4;
            sub.rn.bf16x2 $1, y, x;
        """
        + _PRODUCTS
        + _LADDER
        + "mov.b16 $0, q; }",
        "=h,=&r,r,r,r,r",
        [word, low, high, reciprocal],
        dtype=(tl.int16, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _larger(a, b):
    return tl.inline_asm_elementwise(
        "max.s16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger_unsigned(a, b):
    return tl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def extremes(word):
    """Bits of the BF16 numbers of the largest magnitude that are positive and that are negative.

    A NaN is larger than infinity. Where there is no number of that sign, of another one.

    Returns:
        Two int32, each from 0 to 65535.
    """
    first = tl.reduce(word, 0, _larger)
    above = tl.maximum(first >> 16, (first << 16) >> 16) & 0xFFFF
    second = tl.reduce(word, 0, _larger_unsigned)
    below = tl.maximum((second >> 16) & 0xFFFF, second & 0xFFFF)
    return above, below
