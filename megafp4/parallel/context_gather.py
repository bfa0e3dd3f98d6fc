"""Attention to keys and values that are gathered from all ranks [arXiv 2407.21783, section 3.3.2].

Shape letters, for this file: B batch, N query heads, G key/value heads, L tokens of a rank, S
tokens of the sequence, D head width, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafp4.parallel.collectives import Group
from megafp4.parallel.context_kernels import kernel_for


def gathered_attention(q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, group: Group) -> Tensor:
    """Causal attention of this rank's queries to the gathered keys and values.

    Keys come in the order of the sequence, so a query meets them as on one rank. Backward gathers
    them again, which costs less than keeping S tokens of every block, and sums their gradients over
    the ranks in FP32.

    Args:
        q_BNLD: Queries of chunks r and 2 R - 1 - r of the sequence.
        k_BGLD: Keys of the same tokens.
        v_BGLD: Values.
        group: The context-parallel ranks.

    Returns:
        [B, N, L, D].

    Raises:
        UnsupportedError: No kernel takes these operands.
    """
    out: Tensor = _Gathered.apply(q_BNLD, k_BGLD, v_BGLD, group)
    return out


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.kernel = group, kernel_for(q, k, v)
        keys, values = _gather(k, v, group)
        found = [
            ctx.kernel.forward(own, keys[:, :, :seen], values[:, :, :seen], True)
            for own, seen in zip(q.chunk(2, 2), _seen(q, group), strict=True)
        ]
        outs, log_sums = zip(*found, strict=True)
        out = torch.cat(outs, 2)
        ctx.save_for_backward(q, k, v, out, torch.cat(log_sums, 2))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        keys, values = _gather(k, v, ctx.group)
        sums = torch.zeros(2, *keys.shape, dtype=torch.float32, device=keys.device)
        dq = []
        chunks = zip(*(x.chunk(2, 2) for x in (dout, q, out, log_sum)), strict=True)
        for (dout_i, q_i, out_i, log_sum_i), seen in zip(chunks, _seen(q, ctx.group), strict=True):
            known = keys[:, :, :seen], values[:, :, :seen]
            dq_i, *rest = ctx.kernel.backward(dout_i, q_i, *known, out_i, log_sum_i, True)
            dq.append(dq_i)
            for total, one in zip(sums, rest, strict=True):
                total[:, :, :seen] += one
        dk, dv = ctx.group.reduce_scatter(_by_rank(sums, ctx.group), "attention gradients")[0]
        return torch.cat(dq, 2), dk.to(k.dtype), dv.to(v.dtype), None


def _seen(q: Tensor, group: Group) -> tuple[int, int]:
    """How many keys the queries of each of the two chunks see."""
    chunk = q.shape[2] // 2
    return (group.rank + 1) * chunk, (2 * group.size - group.rank) * chunk


def _gather(k: Tensor, v: Tensor, group: Group) -> Tensor:
    """Keys and values of the whole sequence [2, B, G, S, D], from each rank's [B, G, L, D]."""
    by_rank = group.all_gather(torch.stack((k, v))[None], "attention")
    first, second = by_rank.chunk(2, -2)
    chunks = torch.cat((first, second.flip(0)))
    return chunks.movedim(0, -3).flatten(-3, -2)


def _by_rank(whole: Tensor, group: Group) -> Tensor:
    """Undo the order of :func:`_gather`: [2, B, G, S, D] to [R, 2, B, G, L, D]."""
    first, second = whole.unflatten(-2, (2 * group.size, -1)).movedim(-3, 0).chunk(2)
    return torch.cat((first, second.flip(0)), -2)
