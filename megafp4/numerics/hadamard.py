"""Blockwise random Hadamard transform (RHT) [arXiv 2502.20586, section 3.2].

Both operands of a GEMM are cut into chunks of g along the contraction axis and each chunk is
multiplied by diag(s) H_g, H_g the Sylvester matrix of +-1. Since (A S H)(B S H)^T = g A B^T, the
product is unchanged once divided by g, while an outlier is spread over its chunk, which tames the
variance of stochastic rounding. The transform is left unnormalised: +-1 is exact in every format,
1/sqrt(g) is not for g = 32 or 128; the GEMM's scale carries 1/g.
"""

from __future__ import annotations

import torch

from megafp4.errors import ConfigError
from megafp4.numerics.philox import Key, philox4x32

# Elements transformed at once on a CPU: the rounds of the butterfly then stay in its L2 cache.
_CHUNK = 1 << 15


def hadamard_signs(key: Key, g: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random diagonal of the transform.

    Sign i is bit i mod 32 of word i // 32 of the Philox calls of ``key`` at line 0 (set bit: -1).

    Args:
        key: What the draw is for. Its operand is taken to be ``"signs"``: both operands of the
            GEMM share the draw, and it never coincides with a dither.
        g: Chunk size.
        device: Where to draw, so that nothing is copied there; the signs are the same everywhere.

    Returns:
        FP32 [g] of +-1 on ``device``.
    """
    key = key._replace(operand="signs")
    calls = torch.arange(-(-g // 128), device=device)
    words = torch.stack(philox4x32((calls, 0, key.step, key.stream), key.seed_words), dim=-1)
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    return 1.0 - 2.0 * bits.flatten()[:g].float()


def hadamard(
    x: torch.Tensor, g: int, axis: int = -1, signs: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply every chunk of g elements along ``axis`` by diag(signs) H_g, unnormalised.

    The sums are FP32 in butterfly order (pairs at distance 1, 2, 4, ...), the same for every
    element whatever else is in the tensor: part of the specification.

    Args:
        x: Floating-point tensor.
        g: Chunk size, a power of two that divides ``x.shape[axis]``.
        axis: Contraction axis.
        signs: FP32 [g] of +-1; None for the plain Hadamard transform.

    Returns:
        FP32 tensor of x's shape.

    Raises:
        ConfigError: g is not a power of two or does not divide the axis.
    """
    if g < 1 or g & (g - 1):
        raise ConfigError(f"Hadamard block is {g}: give a power of two")
    length = x.shape[axis]
    if length % g:
        raise ConfigError(
            f"contraction length {length} is not divisible by the Hadamard block {g}: "
            "choose a smaller block or pad the dimension"
        )
    axis %= x.dim()
    signs = None if signs is None else signs.to(x.device)
    chunks = x.detach().reshape(-1, g, x.shape[axis + 1 :].numel())
    out = torch.empty(chunks.shape, dtype=torch.float32, device=x.device)
    step = len(chunks) if x.is_cuda else max(1, _CHUNK // max(1, g * chunks.shape[2]))
    for start in range(0, len(chunks), max(1, step)):
        part = slice(start, start + step)
        # The butterfly runs over dim 0 of [g, rest], so that its vectors are long.
        work = chunks[part].float().movedim(1, 0)
        # Either way a copy: the butterfly overwrites what it is given.
        work = work.clone() if signs is None else work * signs[:, None, None]
        out[part] = _butterfly(work.reshape(g, -1)).view(work.shape).movedim(0, 1)
    return out.view(x.shape)


def _butterfly(work: torch.Tensor) -> torch.Tensor:
    """H_g times [g, n], by log2(g) rounds of sums and differences of pairs; overwrites ``work``."""
    g, n = work.shape
    spare = torch.empty_like(work)
    h = 1
    while h < g:
        low, high = work.view(g // (2 * h), 2, h, n).unbind(1)
        sums, differences = spare.view(g // (2 * h), 2, h, n).unbind(1)
        torch.add(low, high, out=sums)
        torch.sub(low, high, out=differences)
        work, spare = spare, work
        h *= 2
    return work
