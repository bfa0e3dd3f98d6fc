"""The global gradient norm, and the factor that brings it below a limit.

Nothing is scaled here: the factor goes to :meth:`megafp4.optim.Optimizer.step`, which multiplies
each gradient once, when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megafp4.errors import ConfigError


def global_norm(grads: Iterable[Tensor]) -> float:
    """L2 norm of all gradients taken as one vector.

    Squares are summed in FP64, tensor by tensor in the order given, so that the result neither
    overflows for finite FP32 gradients nor depends on how tensors are grouped.

    Args:
        grads: Gradients of any shape and floating dtype; may be empty.
    """
    norms = [torch.linalg.vector_norm(grad.detach(), dtype=torch.float64) for grad in grads]
    if not norms:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(norms)).item())


def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> tuple[float, float]:
    """Measure the global gradient norm and the factor that clips it.

    Args:
        params: Parameters; those without a gradient are left out.
        max_norm: Largest norm allowed; 0 switches clipping off, but the norm is still measured.

    Returns:
        ``(norm, scale)``, with ``scale = min(1, max_norm / norm)``. A norm that is not finite is
        returned as it is, with a scale of NaN that the optimizer refuses: an infinite gradient
        must not be turned into a small one.

    Raises:
        ConfigError: ``max_norm`` is negative or NaN.
    """
    _check(max_norm)
    norm = global_norm(param.grad for param in params if param.grad is not None)
    if not math.isfinite(norm):
        return norm, math.nan
    if max_norm == 0 or norm <= max_norm:
        return norm, 1.0
    return norm, max_norm / norm


@torch.no_grad()
def clip_grad_norm_on_device(
    params: Iterable[Tensor],
    max_norm: float,
    squares: Callable[[Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`clip_grad_norm` without waiting for the device: both results stay there.

    One fused pass over all gradients that were not measured when they were written, squares summed
    in FP64.

    Args:
        params: Parameters, at least one of which has a gradient; all on one device.
        max_norm: Largest norm allowed; 0 switches clipping off, but the norm is still measured.
        squares: Returns FP64 numbers that add up to the squared norm of a parameter's gradient, or
            None where they are not known: :meth:`megafp4.precision.Squares.of`.

    Returns:
        ``(norm, scale)``, FP64, 0-dim. The scale of a norm that is not finite is NaN.

    Raises:
        ConfigError: ``max_norm`` is negative or NaN.
    """
    _check(max_norm)
    grads, known = [], []
    for param in params:
        found = None if squares is None else squares(param)
        if found is not None:
            known.append(found.flatten())
        elif param.grad is not None:
            grads.append(param.grad)
    norms = list(torch._foreach_norm(grads, 2, dtype=torch.float64)) if grads else []
    if known:
        norms.append(torch.cat(known).sum().sqrt())
    norm = torch.linalg.vector_norm(torch.stack(norms))
    limited = max_norm / norm.clamp(min=max_norm) if max_norm else torch.ones_like(norm)
    return norm, torch.where(norm.isfinite(), limited, math.nan)


def _check(max_norm: float) -> None:
    if not max_norm >= 0:
        raise ConfigError(f"optim.clip_grad is {max_norm}: give 0 (off) or a positive norm")
