"""Folding MXFP4 into FP8: the operands of Hopper's tensor cores, which have no FP4.

E2M1 times 2^(e - base), e the exponent of the block's E8M0 scale, is exact in E5M2 for 29 octaves,
-15 <= e - base <= 13. So the block scales go into the elements, one FP32 scale 2^base is left for
the whole tensor, and the GEMM multiplies exactly the numbers that MXFP4 stands for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megafp4.errors import ConfigError, UnsupportedError
from megafp4.numerics.qtensor import QTensor

LOWEST, HIGHEST = -15, 13
"""Range of e - base in which E2M1 * 2^(e - base) is exact in E5M2."""

HEADROOM = 10
"""A base that is not given is the largest exponent minus this: three octaves are left above it."""

_MIN_BASE = -126  # 2^base stays a normal FP32 number


class Folded(NamedTuple):
    """FP8 data with one scale; the value of an element is data * scale."""

    data: torch.Tensor
    """float8_e5m2 [lines, K]."""
    scale: torch.Tensor
    """FP32 [1]: 2^base."""
    raised: int
    """Blocks below the range. Their values are rounded to E5M2, to nearest even; a kernel that sees
    the unquantized tensor encodes them with the exponent base - 15 instead. 0: all is exact."""


def fold(q: QTensor, base: int | None = None) -> Folded:
    """Fold an MXFP4 tensor into E5M2.

    Args:
        q: mxfp4, contracted over its last axis; the other dims are lines.
        base: Exponent of the tensor's scale, -126 to 127; None: the largest exponent of a block
            with a finite scale and a nonzero element, minus 10 (0 where there is none).

    Returns:
        Folded data; NaN in every element of a block whose scale is NaN.

    Raises:
        UnsupportedError: Another format or axis.
        ConfigError: ``base`` is out of range, or so low that a block lies above E5M2's range.
    """
    if q.format.name != "mxfp4" or q.axis != q.codes.dim() - 1:
        raise UnsupportedError(
            f"cannot fold {q.format.name} along axis {q.axis} of {q.codes.dim()} dims into FP8: "
            "give mxfp4 along the last axis"
        )
    length = q.shape[-1]
    values = q.values().view(-1, length // q.format.block, q.format.block)
    scales = q.scales.view(values.shape[:2]).int()
    finite = scales != 255
    counts = finite & values.any(dim=-1)
    exponents = scales - 127
    top = int(exponents[counts].max()) if counts.any() else None
    if base is None:
        base = 0 if top is None else max(top - HEADROOM, _MIN_BASE)
    if not _MIN_BASE <= base <= 127 or (top is not None and top - base > HIGHEST):
        largest = "none" if top is None else top
        raise ConfigError(
            f"base is {base} and the largest block exponent is {largest}: give a base from "
            f"{_MIN_BASE} to 127 and at least the largest exponent - {HIGHEST}"
        )
    raised = int((counts & (exponents - base < LOWEST)).sum())
    shift = torch.where(counts, exponents - base, 0)
    folded = torch.ldexp(values, shift[..., None]).masked_fill_(~finite[..., None], torch.nan)
    scale = torch.tensor([2.0**base], device=folded.device)
    return Folded(folded.view(-1, length).to(torch.float8_e5m2), scale, raised)
