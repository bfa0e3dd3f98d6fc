"""The output layer and its loss as one operation, so that the logits never exist as a whole.

Logits of 8,192 tokens over 50,304 words are 1.6 GB in FP32, their softmax and gradient as much
again. Here tokens go through the head in chunks: forward computes a chunk's logits, its loss and at
once its gradients, of which only those of the hidden states and of the weight are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_TARGET = -1
"""Targets with this value do not enter the loss."""

CHUNK_ELEMENTS = 2**27
"""Most logits at a time: 268 MB in BF16. A batch that has fewer is scored in the plain way."""

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, score: Score) -> Tensor:
    """Mean cross-entropy of ``x weight^T``, in chunks if it would take more than one.

    Args:
        x: [T, H], FP32 or BF16.
        weight: FP32 or BF16 [V, H]; multiplied in the type of ``x``.
        targets: int64 [T]; -1 is ignored. The mean of no targets is NaN.
        score: :func:`score_chunk`, perhaps compiled.

    Returns:
        FP32, 0-dim.
    """
    if targets.numel() * weight.shape[0] <= CHUNK_ELEMENTS:
        return cross_entropy(F.linear(x, weight.to(x.dtype)), targets)
    return linear_cross_entropy(x, weight, targets, score)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not -1.

    Args:
        logits: [..., V], any float type; the softmax is taken in FP32.
        targets: int64 [...].
    """
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TARGET
    )


def score_chunk(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of a chunk, and its gradient with respect to the logits.

    Args:
        logits: [T, V], any float type; the softmax is taken in FP32.
        targets: int64 [T]; -1 is ignored.
        weight: FP32, 0-dim: weight of a token in the mean.

    Returns:
        FP32 sum of the losses, unweighted, and the weighted gradient [T, V] in the logits' type.
    """
    wide = logits.float()
    kept = targets != IGNORED_TARGET
    column = targets.clamp(min=0)[:, None]
    log_sum = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(kept, (log_sum - wide.gather(-1, column))[:, 0], 0.0).sum()
    hit = torch.arange(wide.shape[-1], device=wide.device) == column
    slope = (wide - log_sum).exp() - hit.float()
    return loss, (slope * torch.where(kept, weight, 0.0)[:, None]).to(logits.dtype)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, score: Score) -> Tensor:
    """:func:`head_loss` in chunks of at most :data:`CHUNK_ELEMENTS` logits.

    Equal to :func:`cross_entropy` of the whole, but for two things: the weight's gradient is
    accumulated in FP32 over the chunks, and the factor by which backward scales the loss multiplies
    the gradients after they were rounded to the type of ``x``.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, score, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, score: Score, grad: bool
    ) -> Tensor:
        used = weight.to(x.dtype)
        share = (targets != IGNORED_TARGET).sum().float().reciprocal()
        dx = torch.empty_like(x) if grad and ctx.needs_input_grad[0] else None
        wants_dw = grad and ctx.needs_input_grad[1]
        dw = torch.zeros_like(weight, dtype=torch.float32) if wants_dw else None
        losses = []
        for rows in _chunks(x.shape[0], weight.shape[0]):
            loss, slope = score(x[rows] @ used.t(), targets[rows], share)
            losses.append(loss)
            if dx is not None:
                torch.mm(slope, used, out=dx[rows])
            if dw is not None:
                _add_product(dw, slope.t(), x[rows])
        ctx.save_for_backward(dx, dw)
        return torch.stack(losses).sum() * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the weight's gradient is large, and a loss is differentiated once.
        dx, dw = (None if one is None else one.mul_(dloss) for one in ctx.saved_tensors)
        return dx, dw, None, None, None


def _chunks(tokens: int, vocab: int) -> list[slice]:
    """Cut the tokens into equal runs, so that compiled code meets as few shapes as possible."""
    count = max(1, -(-tokens * vocab // CHUNK_ELEMENTS))
    size = max(1, -(-tokens // count))
    return [slice(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to an FP32 matrix without rounding the product."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # CPU kernels would round the product of BF16 matrices to BF16
        total.addmm_(a.float(), b.float())
