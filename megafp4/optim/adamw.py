"""One AdamW step as a function of its arguments alone.

No parameter groups, no step counter: the caller owns the moments and says which step it is. The
operations and their order are those of ``torch.optim.AdamW(foreach=False)``, so results agree bit
for bit with PyTorch's; ``tests/optim/test_adamw.py`` holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamHyper:
    """Adam's constants for one step of one tensor."""

    lr: float
    """Learning rate of this step."""
    betas: tuple[float, float]
    """Decay rates of the first and second moment."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Decoupled decay; 0 for tensors that are not decayed."""


def update_moments(grad: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float]) -> None:
    """Move both moments towards this gradient, in place.

    Args:
        grad: FP32 gradient.
        m: FP32 first moment, same shape; overwritten.
        v: FP32 second moment, same shape; overwritten.
        betas: Decay rates.
    """
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


@torch.no_grad()
def adamw_step(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: AdamHyper, step: int
) -> None:
    """Apply one AdamW step [1711.05101, Alg. 2] in place: decay first, then the Adam move.

    Args:
        param: FP32 weights; overwritten.
        grad: FP32 gradient, same shape.
        m: FP32 first moment; overwritten.
        v: FP32 second moment; overwritten.
        hyper: Constants of this step.
        step: Index of this step, counted from 0; the bias correction uses ``step + 1``.
    """
    param.mul_(1 - hyper.lr * hyper.weight_decay)
    update_moments(grad, m, v, hyper.betas)
    correction1 = 1 - hyper.betas[0] ** (step + 1)
    correction2 = 1 - hyper.betas[1] ** (step + 1)
    denominator = (v.sqrt() / correction2**0.5).add_(hyper.eps)
    param.addcdiv_(m, denominator, value=-hyper.lr / correction1)
