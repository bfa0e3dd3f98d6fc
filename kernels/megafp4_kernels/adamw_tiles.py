"""How a tile of a tensor takes its AdamW step: device functions of the kernel in ``adamw``.

A tile is [ROWS, 128], rows of the 128 elements that share scales. ``entry`` is its tensor's line of
the table: addresses of weight, moments and what else its form keeps, then the numbers below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megafp4_kernels import adamw_states as states

COUNT = tl.constexpr(5)
"""Elements of the tensor."""
FIRST = tl.constexpr(6)
"""Its first program."""
STREAM = tl.constexpr(7)
"""Word 3 of its Philox counter."""
LARGEST = tl.constexpr(8)
"""Its place among the largest magnitudes."""
PLACE = tl.constexpr(9)
"""Its first group of 128 within the whole parameter."""
COLUMNS = tl.constexpr(10)
"""Numbers of a line."""


@triton.jit
def _address(entry, column, TYPE: tl.constexpr):
    """Address in a table of a tensor that starts on a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(entry + column).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _load(start, offsets, inside, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(start + offsets)
    else:
        return tl.load(start + offsets, mask=inside, other=0)


@triton.jit
def _store(start, offsets, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(start + offsets, values)
    else:
        tl.store(start + offsets, values, mask=inside)


@triton.jit
def _decode(
    entry, row, count, offsets, inside, FORM: tl.constexpr, NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Weight and moments of a tile: FP32 [ROWS, 128] each."""
    if FORM == "fp32":
        weight = _load(_address(entry, 0, tl.float32), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.float32), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.float32), offsets, inside, WHOLE)
    elif FORM == "bf16-sr":
        weight = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.int16), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.int16), offsets, inside, WHOLE)
        weight = states.float_of(weight.to(tl.int32) << 16)
        m = states.float_of(m.to(tl.int32) << 16)
        v = states.float_of(v.to(tl.int32) << 16)
    elif FORM == "fp8lm":
        high = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
        low = _load(_address(entry, 3, tl.int8), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.uint8), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.float16), offsets, inside, WHOLE)
        # Two exponents of one byte, the first moment's first.
        both = tl.load(_address(entry, 4, tl.int16) + row, mask=row * 128 < count, other=0)
        weight = states.join_24_bits(high, low)
        of_m, of_v = both.to(tl.int8).to(tl.int32), (both >> 8).to(tl.int32)
        m = states.decode_e4m3(m, NATIVE) * states.power_of_two(of_m)[:, None]
        v = v.to(tl.float32) * states.power_of_two(of_v)[:, None]
    elif FORM == "eco":
        weight = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
        m = _load(_address(entry, 1, tl.int16), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.uint8), offsets, inside, WHOLE)
        weight = states.float_of(weight.to(tl.int32) << 16)
        m = states.float_of(m.to(tl.int32) << 16)
        start, known = _address(entry, 4, tl.int64), row * 128 < count
        of_v = tl.load(start + row, mask=known, other=states.UNITY)
        v = states.contract_pair(v, of_v, False, NATIVE)
    else:
        if FORM == "coat":
            weight = _load(_address(entry, 0, tl.float32), offsets, inside, WHOLE)
        else:
            high = _load(_address(entry, 0, tl.int16), offsets, inside, WHOLE)
            weight = states.float_of(high.to(tl.int32) << 16)
        m = _load(_address(entry, 1, tl.uint8), offsets, inside, WHOLE)
        v = _load(_address(entry, 2, tl.uint8), offsets, inside, WHOLE)
        # Four FP32 numbers, two at a time.
        start, known = _address(entry, 4, tl.int64), row * 128 < count
        of_m = tl.load(start + 2 * row, mask=known, other=states.UNITY)
        of_v = tl.load(start + 2 * row + 1, mask=known, other=states.UNITY)
        m = states.contract_pair(m, of_m, True, NATIVE)
        v = states.contract_pair(v, of_v, False, NATIVE)
    return weight, m, v


@triton.jit
def _encode_moments(
    entry, row, count, offsets, inside, m, v, FORM: tl.constexpr, NATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the moments of a tile in one of the forms that scale groups."""
    known = row * 128 < count
    if FORM == "fp8lm":
        of_m, of_v = states.e4m3_exponent(m), states.fp16_exponent(v)
        code = states.encode_e4m3(m * states.power_of_two(-of_m)[:, None], NATIVE)
        half = (v * states.power_of_two(-of_v)[:, None]).to(tl.float16)
        _store(_address(entry, 1, tl.uint8), offsets, code, inside, WHOLE)
        _store(_address(entry, 2, tl.float16), offsets, half, inside, WHOLE)
        both = ((of_v << 8) | (of_m & 0xFF)).to(tl.int16)
        tl.store(_address(entry, 4, tl.int16) + row, both, mask=known)
    elif FORM == "eco":
        _store(_address(entry, 1, tl.int16), offsets, states.nearest_bf16(m), inside, WHOLE)
        largest, power = states.expansion(v)
        code = states.expand(v, largest, power, False, NATIVE)
        _store(_address(entry, 2, tl.uint8), offsets, code, inside, WHOLE)
        tl.store(_address(entry, 4, tl.int64) + row, states.join_pair(largest, power), mask=known)
    else:
        largest, power = states.expansion(m)
        code = states.expand(m, largest, power, True, NATIVE)
        _store(_address(entry, 1, tl.uint8), offsets, code, inside, WHOLE)
        start = _address(entry, 4, tl.int64)
        tl.store(start + 2 * row, states.join_pair(largest, power), mask=known)
        largest, power = states.expansion(v)
        code = states.expand(v, largest, power, False, NATIVE)
        _store(_address(entry, 2, tl.uint8), offsets, code, inside, WHOLE)
        tl.store(start + 2 * row + 1, states.join_pair(largest, power), mask=known)


@triton.jit
def step_tile(
    entry, grad_address, first_row, count, scale, seed_low, seed_high, step,
    decay, move, inverse_root, beta2, rest1, rest2, eps, feedback,
    FORM: tl.constexpr, GRAD_BF16: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Move a tile; return the bits of its weights' magnitudes, as stored: int32 [ROWS, 128]."""
    row = first_row + tl.arange(0, ROWS)
    offsets = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = offsets < count
    if GRAD_BF16:
        start = tl.multiple_of(grad_address.to(tl.pointer_type(tl.int16)), 16)
        grad = states.float_of(_load(start, offsets, inside, WHOLE).to(tl.int32) << 16)
    else:
        start = tl.multiple_of(grad_address.to(tl.pointer_type(tl.float32)), 16)
        grad = _load(start, offsets, inside, WHOLE)
    weight, m, v = _decode(entry, row, count, offsets, inside, FORM, NATIVE, WHOLE)
    grad = grad * scale
    m = m + (grad - m) * rest1
    v = v * beta2 + (grad * rest2) * grad
    denominator = tl.sqrt_rn(v) * inverse_root + eps
    weight = weight * decay + tl.div_rn(m, denominator) * move
    if FORM == "fp32" or FORM == "coat":
        _store(_address(entry, 0, tl.float32), offsets, weight, inside, WHOLE)
        stored = weight.to(tl.int32, bitcast=True)
    elif FORM == "fp8lm":
        high, low = states.split_24_bits(weight)
        _store(_address(entry, 0, tl.int16), offsets, high, inside, WHOLE)
        _store(_address(entry, 3, tl.int8), offsets, low, inside, WHOLE)
        stored = high.to(tl.int32) << 16
    elif FORM == "eco":
        high = states.nearest_bf16(weight)
        _store(_address(entry, 0, tl.int16), offsets, high, inside, WHOLE)
        stored = high.to(tl.int32) << 16
        m = m + ((weight - states.float_of(stored)) * feedback) * denominator
    else:
        stream, place = tl.load(entry + STREAM), tl.load(entry + PLACE)
        random = states.random_words(seed_low, seed_high, step, stream, place + first_row, ROWS)
        high = states.round_to_bf16(weight, (random & 0xFFFF).to(tl.int32))
        _store(_address(entry, 0, tl.int16), offsets, high, inside, WHOLE)
        stored = high.to(tl.int32) << 16
        if FORM == "bf16-sr":
            _store(_address(entry, 1, tl.int16), offsets, states.nearest_bf16(m), inside, WHOLE)
            v_bits = states.round_to_bf16(v, (random >> 16).to(tl.int32))
            _store(_address(entry, 2, tl.int16), offsets, v_bits, inside, WHOLE)
    if FORM == "fp32":
        _store(_address(entry, 1, tl.float32), offsets, m, inside, WHOLE)
        _store(_address(entry, 2, tl.float32), offsets, v, inside, WHOLE)
    if FORM != "fp32" and FORM != "bf16-sr":
        _encode_moments(entry, row, count, offsets, inside, m, v, FORM, NATIVE, WHOLE)
    return stored & 0x7FFFFFFF
