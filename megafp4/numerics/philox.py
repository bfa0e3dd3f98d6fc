"""Counter-based randomness, keyed by meaning.

Philox4x32-10 [Salmon et al., SC'11] turns (counter, key) into 128 random bits with no state. Here
every field *means* something, so two draws with different meanings can never coincide and the same
draw is found again by any rank, micro-batch, recomputation or resumed run:

====================  =========================================================
key (2 x 32 bits)     the run's 64-bit seed
counter word 0        group of elements along the contraction axis
counter word 1        line: index over all other dims
counter word 2        optimizer step
counter word 3        layer * 256 + GEMM * 16 + operand
====================  =========================================================

One call yields 16 bytes, hence the dithers of 16 consecutive elements of a line (8 bits each),
lowest byte of word 0 first; with 16 or 32 bits each, 8 or 4 elements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch

from megafp4.errors import ConfigError, unknown_name
from megafp4.numerics.shards import Origin, Runs

GEMM_IDS = {"fprop": 0, "dgrad": 1, "wgrad": 2, "update": 3}
OPERAND_IDS = {"a": 0, "b": 1, "signs": 2}

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Philox calls worked on at once: small enough to stay in the L2 cache of one core.
_CHUNK = 1 << 13


class Key(NamedTuple):
    """What a random draw is for."""

    seed: int
    """64-bit seed of the run."""
    step: int
    """Optimizer step, below 2^32."""
    layer: int
    """Global index of the layer (independent of pipeline stage), below 2^24."""
    gemm: int | str
    """``fprop``, ``dgrad``, ``wgrad``, ``update`` or an id below 16."""
    operand: int | str
    """``a``, ``b``, ``signs`` or an id below 16."""

    @property
    def seed_words(self) -> tuple[int, int]:
        """The seed as two 32-bit words, low first."""
        return self.seed & _MASK, self.seed >> 32 & _MASK

    @property
    def stream(self) -> int:
        """Counter word 3.

        Raises:
            ConfigError: A field is unknown or too large, so that streams could collide.
        """
        gemm = _id("gemm", self.gemm, GEMM_IDS)
        operand = _id("operand", self.operand, OPERAND_IDS)
        if not 0 <= self.layer < 1 << 24 or not 0 <= self.step < 1 << 32:
            raise ConfigError(
                f"random key has layer {self.layer} and step {self.step}: "
                "give a layer below 2^24 and a step below 2^32"
            )
        return self.layer << 8 | gemm << 4 | operand


KeyLike: TypeAlias = tuple[int, int, int, int | str, int | str]
"""A :class:`Key`, or its fields as a plain tuple."""


def _id(kind: str, value: int | str, ids: dict[str, int]) -> int:
    if isinstance(value, str):
        if value not in ids:
            raise unknown_name(f"random key {kind}", value, ids)
        return ids[value]
    if not 0 <= value < 16:
        raise ConfigError(f"random key {kind} id is {value}: give a name or an integer below 16")
    return value


def philox4x32(
    counter: tuple[torch.Tensor | int, ...], key: tuple[int, int], rounds: int = 10
) -> tuple[torch.Tensor, ...]:
    """Philox4x32 block function.

    Args:
        counter: Four words, each an int or an int64 tensor holding 32-bit values; broadcast.
        key: Two 32-bit words.
        rounds: 10 for the published generator.

    Returns:
        Four int64 tensors of the broadcast shape holding 32-bit values.
    """
    # Numbers stay on the CPU, whence operators take them as scalars: nothing is copied to a GPU.
    c0, c1, c2, c3 = (
        c.long()
        if isinstance(c, torch.Tensor)
        else torch.tensor(c, dtype=torch.int64, device="cpu")
        for c in counter
    )
    k0, k1 = key
    for _ in range(rounds):
        # A signed 64-bit product wraps, but its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = p0 >> 32 & _MASK, p1 >> 32 & _MASK
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), p1 & _MASK, high0 ^ (c3 ^ k1), p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def dither(
    key: Key,
    outer: int,
    length: int,
    inner: int = 1,
    bits: int = 8,
    origin: Origin = (0, 0),
    device: torch.device | None = None,
) -> torch.Tensor:
    """Uniform dither of a tensor viewed as [outer, length, inner], contracted over ``length``.

    The value of an element depends on the key and on its global position alone. It is centred,
    u = (i + 1/2) / 2^k: uncentred 8-bit dither would bias the rounding by -2^-9 of a step.

    Args:
        key: What the draw is for.
        outer: Size of the dims before the contraction axis.
        length: Elements along the contraction axis.
        inner: Size of the dims after the contraction axis. The line of an element is
            ``outer_index * inner + inner_index``.
        bits: Random bits per element: 8, 16 or 32 (of which 23 are used, so that u is exact).
        origin: Global (line, k) of the first element, for slices of a larger tensor; for slices
            that are not contiguous there, the runs of global indices that they consist of.
        device: Where to draw; the bits are the same everywhere.

    Returns:
        FP32 [outer, length, inner], each in (0, 1).

    Raises:
        ConfigError: ``bits`` is not 8, 16 or 32; runs that do not add up to the slice.
    """
    if bits not in (8, 16, 32):
        raise ConfigError(f"dither_bits is {bits}: choose 8, 16 or 32")
    lines, k = origin
    if not isinstance(k, int):
        _check_runs(k, length)
        each = [dither(key, outer, n, inner, bits, (lines, start), device) for start, n in k]
        return torch.cat(each, 1)
    per_call = 128 // bits
    first = k // per_call
    calls = -(-(k + length) // per_call) - first
    line = _global_lines(lines, outer * inner, device).view(outer, 1, inner)
    group = (first + torch.arange(calls, device=device)).view(calls, 1)
    out = torch.empty(outer, calls, per_call, inner, device=device)
    for rows, cols in _cache_sized(outer, calls, inner, on_cpu=line.device.type == "cpu"):
        words = philox4x32((group[cols], line[rows], key.step, key.stream), key.seed_words)
        _split_words(torch.stack(words, dim=-1), bits, out[rows, cols])
    used = min(bits, 23)
    out = out.view(outer, calls * per_call, inner).add_(0.5).mul_(2.0**-used)
    skip = k - first * per_call
    return out[:, skip : skip + length]


def _global_lines(lines: int | Runs, count: int, device: torch.device | None) -> torch.Tensor:
    runs: Runs = ((lines, count),) if isinstance(lines, int) else lines
    _check_runs(runs, count)
    return torch.cat([torch.arange(first, first + n, device=device) for first, n in runs])


def _check_runs(runs: Runs, count: int) -> None:
    if sum(n for _, n in runs) != count:
        raise ConfigError(
            f"the runs {list(runs)} of a slice hold {sum(n for _, n in runs)} indices and the "
            f"slice has {count}: give runs that add up to it"
        )


def _cache_sized(
    outer: int, calls: int, inner: int, *, on_cpu: bool
) -> Iterator[tuple[slice, slice]]:
    """Pieces of the (outer, calls) plane that stay in cache on a CPU; all at once elsewhere."""
    rows, cols = outer, calls
    if on_cpu:
        rows = _CHUNK // max(1, calls * inner)
        cols = calls if rows else _CHUNK // inner
    for r in range(0, outer, max(1, rows)):
        for c in range(0, calls, max(1, cols)):
            yield slice(r, r + max(1, rows)), slice(c, c + max(1, cols))


def _split_words(words: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Cut Philox words into integers of ``bits`` bits (the upper 23 of 32), lowest first.

    Args:
        words: int64 [outer, calls, inner, 4] holding 32-bit values.
        bits: 8, 16 or 32.
        out: FP32 [outer, calls, 128 / bits, inner], written.
    """
    if bits == 8 and sys.byteorder == "little":
        # The bytes lie in memory in the order wanted; half of each int64 is empty.
        halves = words.view(torch.uint8).unflatten(-1, (4, 8))[..., :4]
        out.copy_(halves.flatten(-2).movedim(-1, 2))
        return
    used, per_word = min(bits, 23), 32 // bits
    parts = out.unflatten(2, (4, per_word))
    for j in range(per_word):
        part = words >> (j * bits + bits - used) & (1 << used) - 1
        parts[:, :, :, j] = part.movedim(-1, 2)
