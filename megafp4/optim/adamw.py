"""One AdamW step as a function of its arguments alone.

No parameter groups, no step counter: the caller owns the moments and says which step it is. The
operations and their order are those of ``torch.optim.AdamW(foreach=False)``, so results agree bit
for bit with PyTorch's; ``tests/optim/test_adamw.py`` holds the two against each other.
:func:`fused_adamw_step` is the same step for many tensors at the speed of memory; there only the
order of operations within an element differs.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@torch.no_grad()
def fused_adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    hyper: AdamHyper,
    step: int,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Apply :func:`adamw_step` to many tensors, each in one pass over its memory.

    On a GPU this is a kernel of ``megafp4_kernels``, on a CPU PyTorch's fused one. Both round the
    same formula in another order: a weight differs from :func:`adamw_step`'s by a few units in the
    last place of its move.

    Args:
        params: FP32 weights on one device; overwritten.
        grads: FP32 gradients; unspecified afterwards.
        moments: FP32 first and second moments; overwritten.
        hyper: Constants of this step, shared by all tensors.
        step: Index of this step, counted from 0.
        scale: FP32 [1] on the device; multiplies every gradient.
        skip: FP32 [1] on the device: 1 leaves weights and moments as they are, 0 takes the step.
            The host need not know which.
    """
    if not params:
        return
    if params[0].is_cuda:
        _step_on_gpu(params, grads, moments, hyper, step, scale, skip)
        return
    # Read and not written, so that all tensors can share one.
    count = torch.full((1,), float(step + 1))
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(moments[0]),
        list(moments[1]),
        [],
        [count] * len(params),
        lr=hyper.lr,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if scale is None else scale.reciprocal(),
        found_inf=skip,
    )


def _step_on_gpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    hyper: AdamHyper,
    step: int,
    scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    from megafp4_kernels.adamw import AdamWNumbers, adamw  # needs triton, an optional package

    device = params[0].device
    numbers = AdamWNumbers(
        decay=1 - hyper.lr * hyper.weight_decay,
        move=-hyper.lr / (1 - hyper.betas[0] ** (step + 1)),
        root=(1 - hyper.betas[1] ** (step + 1)) ** 0.5,
        beta2=hyper.betas[1],
        rest1=1 - hyper.betas[0],
        rest2=1 - hyper.betas[1],
        eps=hyper.eps,
    )
    scale = torch.ones(1, device=device) if scale is None else scale
    skip = torch.zeros(1, device=device) if skip is None else skip
    adamw(params, grads, *moments, numbers, scale, skip)
    # The kernel writes behind autograd's back, whose version counters tell operands made from a
    # weight that it has changed.
    for param in params:
        torch.autograd.graph.increment_version(param)
