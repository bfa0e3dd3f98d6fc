"""Attention of some queries to some keys by fused kernels, in pieces that can be put together.

A piece also gives the logarithm of each query's sum of exponentials, by which pieces are weighted;
backward takes output and logarithm of the whole row and gives the summands that belong to one piece
[FlashAttention-2, arXiv 2307.08691, section 3.1].

Shape letters, for this file: B batch, N query heads, G key/value heads, L queries, S keys, D head
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from megafp4.errors import UnsupportedError

_ATEN = torch.ops.aten

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


class Kernel(NamedTuple):
    """One way to compute pieces. A key/value head serves N / G consecutive query heads."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    """Of q [B, N, L, D], k and v [B, G, S, D]: output [B, N, L, D] in their type, and FP32
    [B, N, L], the logarithm of the sum of exponentials. If the last argument is true, the queries
    are the last L of the S tokens and see what is not after them."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Gradients]
    """Of the gradient of the whole's output, q, k, v, the whole's output and logarithm, and causal:
    summands of dq, dk and dv in the type of q."""


def merge(out: Tensor, log_sum: Tensor, one: Tensor, one_sum: Tensor) -> None:
    """Put a piece to what other keys gave, in place.

    Args:
        out: FP32 [B, N, L, D].
        log_sum: FP32 [B, N, L].
        one: The piece's output.
        one_sum: FP32, its logarithm.
    """
    share = torch.sigmoid(one_sum - log_sum)[..., None]
    out.lerp_(one.float(), share)
    log_sum.copy_(torch.logaddexp(log_sum, one_sum))


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    k, v = _repeat(k, q), _repeat(v, q)
    out, log_sum = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=_mask(q, k) if causal else None
    )
    return out, log_sum.float()


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> Gradients:
    heads = k.shape[1]
    k, v = _repeat(k, q), _repeat(v, q)
    mask = _mask(q, k) if causal else None
    dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, log_sum, 0.0, False, attn_mask=mask
    )
    dk, dv = (d.unflatten(1, (heads, -1)).float().sum(2).to(d.dtype) for d in (dk, dv))
    return dq, dk, dv


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Give consecutive query heads their key/value head."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


def _mask(q: Tensor, k: Tensor) -> Tensor:
    """What the last L of S tokens do not see, [L, S]: 0 or minus infinity."""
    queries, keys = q.shape[2], k.shape[2]
    hidden = torch.full((queries, keys), -torch.inf, dtype=q.dtype, device=q.device)
    return hidden.triu(1 + keys - queries)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, log_sum


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> Gradients:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: never read
    lengths = None, None, q.shape[2], k.shape[2]
    dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, log_sum.contiguous(), *lengths, 0.0, causal, seed, seed
    )
    return dq, dk, dv


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    before = k.shape[2] - q.shape[2]
    if causal and before:  # its mask begins at the first key
        out, log_sum = _cudnn(q, k[:, :, before:], v[:, :, before:], True)
        whole, log_sum = out.float(), log_sum.contiguous()
        merge(whole, log_sum, *_cudnn(q, k[:, :, :before], v[:, :, :before], False))
        return whole.to(q.dtype), log_sum
    out, log_sum, *_ = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    return out, log_sum.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool
) -> Gradients:
    before = k.shape[2] - q.shape[2]
    if causal and before:
        whole = out, log_sum
        dq, *own = _cudnn_backward(dout, q, k[:, :, before:], v[:, :, before:], *whole, True)
        more, *earlier = _cudnn_backward(dout, q, k[:, :, :before], v[:, :, :before], *whole, False)
        dk, dv = (torch.cat(parts, 2) for parts in zip(earlier, own, strict=True))
        return (dq.float() + more).to(dq.dtype), dk, dv
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout: never read
    lengths = None, None, q.shape[2], k.shape[2]
    dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, log_sum.contiguous()[..., None], seed, seed, None, *lengths, 0.0, causal
    )
    return dq, dk, dv


CPU = Kernel(_cpu, _cpu_backward)
"""Takes the same steps as the kernel of one rank."""
FLASH = Kernel(_flash, _flash_backward)
"""Takes all keys before and in a chunk at once."""
CUDNN = Kernel(_cudnn, _cudnn_backward)
"""The fastest on Hopper."""


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The fastest kernel that takes queries [B, N, L, D], keys and values [B, G, S, D].

    Raises:
        UnsupportedError: None does.
    """
    if not q.is_cuda:
        return CPU
    asked = SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    if can_use_cudnn_attention(asked):
        return CUDNN
    if can_use_flash_attention(asked):
        return FLASH
    raise UnsupportedError(
        f"attention over context-parallel ranks got {q.dtype} heads of {q.shape[-1]}, for which "
        "there is no fused kernel on this GPU: choose train.dtype bf16, heads of 64 or 128, or cp 1"
    )
