"""Activations that are clamped on their way to Hopper's operands, also where ranks cut tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megafp4.backends.base import Prepared
from megafp4.recipes import OCC
from megafp4.recipes.cast import CastRequest

if TYPE_CHECKING:
    from megafp4_kernels.outliers import Clamped


@dataclass(frozen=True)
class Clipped(Prepared):
    """What is left of clamped tokens, and what it takes to recast them."""

    limits: torch.Tensor
    """FP32 [2, tokens]: what was clamped to, below and above."""
    peak: torch.Tensor
    """FP32 [tokens]: see :class:`megafp4_kernels.outliers.Clamped`."""


def clip(x: torch.Tensor, request: CastRequest) -> Clamped:
    """Clamp tokens as a request says and cast what is left to E2M1.

    Args:
        x: FP32 or BF16 [tokens, features], contiguous.
        request: Has a clamp; its ``part`` says whether other ranks hold features of the tokens.
    """
    from megafp4_kernels.outliers import occ

    clamp = request.operand.clamp
    assert clamp is not None
    limits = _limits(x, clamp, request)
    return occ(x, clamp.alpha, mode=clamp.mode, residual=clamp.residual, limits=limits)


def _limits(x: torch.Tensor, clamp: OCC, request: CastRequest) -> torch.Tensor | None:
    """Limits of the whole tokens, from all ranks' outermost features; None where x has them all."""
    from megafp4_kernels.tails import limits, ranks, tails

    holders = [] if request.part is None else request.part.peers_along((1,))
    if not holders:
        return None
    (peers,) = holders
    wanted = ranks(x.shape[1] * peers.size, clamp.alpha, clamp.mode)
    sent = peers.side_by_side(tails(x, *wanted))
    return limits(sent, *wanted, finite=clamp.residual == "folded")
