"""One AdamW step on FP32 values, as arithmetic that every device rounds alike.

Each product, sum, quotient and root below is one IEEE operation, in the order written, and none of
them is fused. So the fused kernels of ``megafp4_kernels``, which follow the same order, give the
same bits as this specification; ``torch.optim.AdamW``, whose order differs with the device and with
the place of an element in its tensor, agrees to a few units in the last place of each move.

How weight and moments are kept between steps is not decided here but by a codec of
:mod:`megafp4.optim.states`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class StepNumbers(NamedTuple):
    """What one step multiplies and adds, computed in double precision and used in single."""

    decay: float
    """Factor of the weight: 1 - lr * weight decay."""
    move: float
    """-lr / (1 - beta1^t)."""
    inverse_root: float
    """1 / sqrt(1 - beta2^t)."""
    beta2: float
    """Factor of the second moment."""
    rest1: float
    """1 - beta1."""
    rest2: float
    """1 - beta2."""
    eps: float
    """Added to the corrected root of the second moment."""
    feedback: float
    """(1 / beta1 - 1) / move: what ``eco`` adds to the first moment for what rounding lost."""

    @classmethod
    def of(cls, hyper: AdamHyper, step: int) -> StepNumbers:
        """Numbers of a step.

        Args:
            hyper: Constants of the step.
            step: Its index, counted from 0; the bias correction uses ``step + 1``.
        """
        beta1, beta2 = hyper.betas
        move = -hyper.lr / (1 - beta1 ** (step + 1))
        return cls(
            decay=1 - hyper.lr * hyper.weight_decay,
            move=move,
            inverse_root=(1 - beta2 ** (step + 1)) ** -0.5,
            beta2=beta2,
            rest1=1 - beta1,
            rest2=1 - beta2,
            eps=hyper.eps,
            # Without a learning rate nothing moves, and without a beta1 nothing is remembered.
            feedback=(1 / beta1 - 1) / move if move and beta1 else 0.0,
        )


@torch.no_grad()
def adamw_update(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, numbers: StepNumbers) -> None:
    """Apply one AdamW step [1711.05101, Alg. 2] in place.

    Args:
        weight: FP32; overwritten.
        grad: FP32 gradient, same shape.
        m: FP32 first moment; overwritten.
        v: FP32 second moment; overwritten.
        numbers: Constants of the step.
    """
    # No lerp_, addcmul_ or add_(alpha=...): some of them fuse, some of the time.
    m.add_((grad - m).mul_(numbers.rest1))
    v.mul_(numbers.beta2).add_((grad * numbers.rest2).mul_(grad))
    weight.mul_(numbers.decay).add_((m / denominator_of(v, numbers)).mul_(numbers.move))


def denominator_of(v: Tensor, numbers: StepNumbers) -> Tensor:
    """What AdamW divides the first moment by: FP32, of the second moment's shape."""
    # PyTorch's FP32 root is an ulp off at times; through FP64 it is the correctly rounded one.
    return v.double().sqrt().float().mul_(numbers.inverse_root).add_(numbers.eps)
