"""AdamW in one pass: 28 bytes of memory traffic per FP32 parameter, 16 read and 12 written.

PyTorch's fused kernel, given a factor for the gradients, writes these back scaled: 32 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


class AdamWNumbers(NamedTuple):
    """What one step of one group of tensors multiplies by, computed in double precision."""

    decay: float
    """Factor of the weight: 1 - lr * weight decay."""
    move: float
    """-lr / (1 - beta1^t)."""
    root: float
    """Square root of 1 - beta2^t."""
    beta2: float
    """Factor of the second moment."""
    rest1: float
    """1 - beta1."""
    rest2: float
    """1 - beta2."""
    eps: float
    """Added to the root of the second moment."""


@triton.jit
def _adamw_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, scale_ptr, skip_ptr, count,
    decay, move, root, beta2, rest1, rest2, eps,
    block: tl.constexpr,
):  # fmt: skip
    if tl.load(skip_ptr) == 0.0:
        offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = offset < count
        param = tl.load(param_ptr + offset, mask=inside)
        grad = tl.load(grad_ptr + offset, mask=inside) * tl.load(scale_ptr)
        m = tl.load(m_ptr + offset, mask=inside)
        v = tl.load(v_ptr + offset, mask=inside)
        m = m + rest1 * (grad - m)
        v = v * beta2 + (rest2 * grad) * grad
        denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
        param = param * decay + move * tl.div_rn(m, denominator)
        tl.store(param_ptr + offset, param, mask=inside)
        tl.store(m_ptr + offset, m, mask=inside)
        tl.store(v_ptr + offset, v, mask=inside)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    numbers: AdamWNumbers,
    scale: Tensor,
    skip: Tensor,
) -> None:
    """Apply one AdamW step [1711.05101, Alg. 2] to each tensor, in place; gradients are only read.

    Args:
        params: FP32 weights, contiguous, on one device.
        grads: FP32 gradients of the same shapes, contiguous.
        m: FP32 first moments, contiguous.
        v: FP32 second moments, contiguous.
        numbers: Constants of the step.
        scale: FP32 [1] on the device; multiplies every gradient.
        skip: FP32 [1] on the device; unless it is 0 nothing changes.

    Raises:
        ValueError: A tensor is not FP32 or not contiguous.
    """
    for group in zip(params, grads, m, v, strict=True):
        for tensor in group:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"adamw got a {tensor.dtype} tensor of shape {list(tensor.shape)} and strides "
                    f"{list(tensor.stride())}: give contiguous FP32 tensors"
                )
        count = group[0].numel()
        grid = (triton.cdiv(count, BLOCK),)
        if count:
            with torch.cuda.device_of(group[0]):
                _adamw_kernel[grid](*group, scale, skip, count, *numbers, block=BLOCK)
