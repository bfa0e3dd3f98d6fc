"""How numbers are cut down to 8, 16 and 24 bits between optimizer steps.

Everything works on a matrix [groups, 128] of FP32 values, the last group filled up with zeros, and
on the bits of FP32 numbers: exponents are fields and powers of two are shifts, so that a kernel
that does the same gives the same bits. Scales belong to groups of 128 and are taken from the very
values they scale: one pass suffices, and no amax of an earlier step is guessed with.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megafp4.numerics.philox import Key, philox4x32

GROUP = 128
"""Elements that share a scale."""

E4M3_MAX = 448.0
_E4M3_MAX_BITS = 0x43E00000
_MAGNITUDE = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_STEPS_OF_POWER = 16
_POWERS = (0.125, 16.0)
_FP32_STEPS = 2.0**23
# What COAT's powers aim at: log2(448^2 / 2), here in sixteenths and in steps of FP32's bits.
_EXPANDED_SPAN = _STEPS_OF_POWER * math.log2(E4M3_MAX**2 / 2) * _FP32_STEPS


def group_count(count: int) -> int:
    """Groups of a tensor of ``count`` elements."""
    return -(-count // GROUP)


def grouped(x: Tensor) -> Tensor:
    """Copy a tensor's elements into FP32 [groups, 128], zeros behind the last."""
    out = torch.zeros(group_count(x.numel()) * GROUP, device=x.device)
    out[: x.numel()] = x.reshape(-1)
    return out.view(-1, GROUP)


def put(target: Tensor, groups: Tensor) -> None:
    """Write the elements of [groups, 128] over a contiguous tensor; the filling is left out."""
    target.view(-1).copy_(groups.reshape(-1)[: target.numel()])


def bits_of(x: Tensor) -> Tensor:
    """The int32 bits of FP32 values, each NaN in its standard form: the others could overflow."""
    return torch.where(x.isnan(), _NAN_BITS, x.view(torch.int32))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in FP32, for integers from -126 to 127."""
    return (exponent.int() + 127 << 23).view(torch.float32)


def encode_e4m3(x: Tensor) -> Tensor:
    """Round to E4M3, nearest-even and saturating; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def largest_magnitude(x: Tensor) -> Tensor:
    """The int32 bits of each group's largest magnitude, [groups, 1]; NaN in its standard form."""
    magnitude = x.view(torch.int32) & _MAGNITUDE
    return magnitude.amax(1, keepdim=True).clamp(max=_NAN_BITS)


def e4m3_exponent(x: Tensor) -> Tensor:
    """Exponent e of each group such that its largest magnitude is in (224, 448] * 2^e.

    Args:
        x: FP32 [groups, 128].

    Returns:
        int32 [groups, 1], from -126 to 126: both 2^e and 2^-e are normal numbers.
    """
    # A mantissa above 448's, 1.75, carries into the exponent.
    return ((largest_magnitude(x) + 0x1FFFFF >> 23) - 127 - 8).clamp(-126, 126)


def fp16_exponent(x: Tensor) -> Tensor:
    """Exponent e of each group such that its largest magnitude is in [2^14, 2^15) * 2^e.

    Half of FP16's range, which rounding up cannot leave; as :func:`e4m3_exponent` otherwise.
    """
    return ((largest_magnitude(x) >> 23) - 127 - 14).clamp(-126, 126)


def split_24_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 24 bits and cut them into a BF16 number and 8 bits that correct it.

    Args:
        x: FP32.

    Returns:
        The nearest BF16 number (ties away from zero) and int8 ``low``, of x's shape. The 24 bits
        are those of the BF16 number followed by 8 zeros, plus ``low``.
    """
    bits = bits_of(x)
    bits = bits + 0x7F + (bits >> 8 & 1) >> 8
    high = bits + 0x80 >> 8
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 8)).to(torch.int8)


def join_24_bits(high: Tensor, low: Tensor) -> Tensor:
    """Undo :func:`split_24_bits`: FP32 of the same shape."""
    return ((high.view(torch.int16).int() << 8) + low.int() << 8).view(torch.float32)


def expansion(x: Tensor) -> tuple[Tensor, Tensor]:
    """What COAT's dynamic range expansion [2410.19313, sec. 4] needs to know of each group.

    The power is the largest multiple of 1/16 that maps the group's magnitudes, zero left out, into
    the 2 * 8.3 octaves of E4M3; between 1/8 and 16. Octaves are counted on the bits of FP32, which
    are the logarithm to base 2 with its mantissas drawn straight; see :func:`expand`.

    Args:
        x: FP32 [groups, 128].

    Returns:
        FP32 [groups, 1] each: the largest magnitude and the power.
    """
    largest = largest_magnitude(x)
    magnitude = x.view(torch.int32) & _MAGNITUDE
    smallest = torch.where(magnitude == 0, _INFINITY_BITS, magnitude).amin(1, keepdim=True)
    span = (largest - smallest).clamp(min=1).float()
    steps = torch.div(torch.full_like(span, _EXPANDED_SPAN), span)
    steps = steps.clamp(*(_STEPS_OF_POWER * power for power in _POWERS)).trunc()
    return largest.view(torch.float32), steps / _STEPS_OF_POWER


def expand(x: Tensor, largest: Tensor, power: Tensor) -> Tensor:
    """E4M3 codes of 448 * sign(x) * (|x| / largest)^power.

    COAT's power with one liberty: log2 and its inverse are read off the bits of FP32, which is
    exact at powers of two and straight in between. Quantization errors are as large (rms 1.5 % of
    Gaussian moments either way), :func:`contract` inverts it exactly, every device gives the same
    bits, and a kernel needs a handful of instructions where a logarithm and an exponential would
    take longer than the memory.

    Args:
        x: FP32 [groups, 128].
        largest: FP32 [groups, 1], of :func:`expansion`.
        power: FP32 [groups, 1].

    Returns:
        E4M3 [groups, 128].
    """
    bits = x.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    below = (magnitude - largest.view(torch.int32)).float()
    moved = (below * power).clamp(min=-float(_E4M3_MAX_BITS)).int() + _E4M3_MAX_BITS
    # Zero has no logarithm: its bits lie a finite number of octaves below the others.
    moved = torch.where(magnitude == 0, 0, moved)
    return encode_e4m3((moved | bits ^ magnitude).view(torch.float32))


def contract(codes: Tensor, largest: Tensor, power: Tensor) -> Tensor:
    """Undo :func:`expand` but for its rounding: FP32 [groups, 128]."""
    bits = codes.float().view(torch.int32)
    magnitude = bits & _MAGNITUDE
    moved = ((magnitude - _E4M3_MAX_BITS).float() * (1.0 / power)).int()
    found = torch.where(magnitude == 0, 0, (moved + largest.view(torch.int32)).clamp(min=0))
    return (found | bits ^ magnitude).view(torch.float32)


class Draw(NamedTuple):
    """Which random bits a run of a parameter's elements rounds with."""

    key: Key
    """What the draw is for."""
    start: int = 0
    """Place of the run's first element in the whole parameter, a multiple of 128."""


def random_words(draw: Draw, count: int, device: torch.device) -> Tensor:
    """Draw 32 random bits for each of ``count`` elements of a flat tensor.

    Counter words as in :mod:`megafp4.numerics.philox`, with the whole parameter as one line of
    groups of 4.

    Args:
        draw: Which bits.
        count: Elements.
        device: Where to draw.

    Returns:
        int64 [groups, 128], each from 0 to 2^32 - 1.
    """
    key, first = draw.key, draw.start // 4
    calls = torch.arange(first, first + group_count(count) * (GROUP // 4), device=device)
    words = philox4x32((calls, 0, key.step, key.stream), key.seed_words)
    return torch.stack(words, dim=-1).view(-1, GROUP)


def round_to_bf16(x: Tensor, random: Tensor) -> Tensor:
    """Round stochastically: up with the probability of the remainder, from 16 random bits.

    Args:
        x: FP32; infinities and NaN stay what they are.
        random: Integers from 0 to 2^16 - 1, same shape.

    Returns:
        BF16.
    """
    bits = bits_of(x)
    noisy = torch.where(x.isfinite(), bits + random.int(), bits)
    return (noisy >> 16).to(torch.int16).view(torch.bfloat16)
