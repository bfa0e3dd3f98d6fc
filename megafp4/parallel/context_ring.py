"""Ring attention: keys and values travel from rank to rank while queries stay.

[Liu et al., arXiv 2310.01889]. In each round a rank attends to the part that it has while the next
one is on its way; partial outputs are put together in FP32 by their sums of exponentials. Backward
sends the parts round once more, each with the sum of the gradients that the ranks found for it.

Shape letters, for this file: B batch, N query heads, G key/value heads, L tokens of a rank, D head
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafp4.parallel.collectives import Group, Traffic
from megafp4.parallel.context_kernels import kernel_for, merge


def ring_attention(q_BNLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, group: Group) -> Tensor:
    """Causal attention of this rank's queries, keys and values coming by.

    Args:
        q_BNLD: Queries of chunks r and 2 cp - 1 - r of the sequence.
        k_BGLD: Keys of the same tokens.
        v_BGLD: Values.
        group: The context-parallel ranks.

    Returns:
        [B, N, L, D].

    Raises:
        UnsupportedError: No kernel takes these operands.
    """
    out: Tensor = _Ring.apply(q_BNLD, k_BGLD, v_BGLD, group)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
        chunk, ctx.group, ctx.kernel = q.shape[2] // 2, group, kernel_for(q, k, v)
        out = log_sum = q.new_empty(0)
        visiting = torch.stack((k, v))
        for turn in range(group.size):
            coming = _Passing(visiting, group) if turn < group.size - 1 else None
            queries, keys = _meet(turn, chunk, group)
            own, met = q[:, :, queries], visiting[:, :, :, keys]
            one, one_sum = ctx.kernel.forward(own, *met, turn == 0)
            if turn == 0:
                out, log_sum = one.float(), one_sum
            else:
                merge(out[:, :, queries], log_sum[:, :, queries], one, one_sum)
            if coming is not None:
                visiting = coming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        chunk, group = q.shape[2] // 2, ctx.group
        dq = torch.zeros_like(q, dtype=torch.float32)
        visiting = torch.stack((k, v))
        sums = torch.zeros_like(visiting, dtype=torch.float32)
        returning = None
        for turn in range(group.size):
            coming = _Passing(visiting, group) if turn < group.size - 1 else None
            queries, keys = _meet(turn, chunk, group)
            dout_i, q_i, *own = (x[:, :, queries] for x in (dout, q, out, log_sum))
            met = visiting[:, :, :, keys]
            dq_i, *rest = ctx.kernel.backward(dout_i, q_i, *met, *own, turn == 0)
            dq[:, :, queries] += dq_i
            # What the others found for this part arrives while this rank is at it.
            sums = sums if returning is None else returning.wait()
            for total, one in zip(sums[:, :, :, keys], rest, strict=True):
                total += one
            returning = _Passing(sums, group)
            visiting = visiting if coming is None else coming.wait()
        assert returning is not None
        dk, dv = returning.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _meet(turn: int, chunk: int, group: Group) -> tuple[slice, slice]:
    """Which of a rank's queries see which keys of the part that visits.

    At first that is its own part, with the causal mask. Parts of lower ranks begin before all of
    this rank's queries and end behind them; those of higher ranks lie between its two chunks.
    """
    everything, first, second = slice(None), slice(None, chunk), slice(chunk, None)
    if turn == 0:
        return everything, everything
    return (everything, first) if turn <= group.rank else (second, everything)


class _Passing:
    """A tensor on its way to the next rank, and the previous one's on its way here."""

    def __init__(self, sent: Tensor, group: Group) -> None:
        assert group.handle is not None
        self._group, self._sent = group, sent.contiguous()
        self._received = torch.empty_like(self._sent)
        to, origin = (
            dist.get_global_rank(group.handle, (group.rank + step) % group.size) for step in (1, -1)
        )
        dtype = str(sent.dtype).removeprefix("torch.")
        group.ledger.record(Traffic(group.name, "send", dtype, "attention"), sent.nbytes)
        with group.in_words("attention"):
            self._works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, self._sent, to, group.handle),
                    dist.P2POp(dist.irecv, self._received, origin, group.handle),
                ]
            )

    def wait(self) -> Tensor:
        """What has arrived; the sent tensor is free again."""
        with self._group.in_words("attention"):
            for work in self._works:
                work.wait()
        return self._received
