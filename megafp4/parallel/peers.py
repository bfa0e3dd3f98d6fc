"""FP8 gradients written straight into the memory of the ranks that own them, over NVLink.

Within a node every GPU can address the others' memory (PyTorch's symmetric memory): one kernel
reads gradients, casts them and stores each message where its owner keeps it; behind a barrier of
the GPUs the owner adds. Nothing is written twice and no library copies. No message has two readers,
so NVLink's multicast is of no use; PyTorch sets it up all the same unless the environment says
``TORCH_SYMM_MEM_DISABLE_MULTICAST=1``.

Messages and sums are those of :class:`~megafp4.parallel.reduce.FlatReducer` over FP8, bit for bit.
Only the reduction differs: where nodes have to be crossed, that class or :class:`~megafp4.parallel.
reduce.NodeReducer` is to be taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from megafp4.errors import UnsupportedError
from megafp4.parallel import blocks
from megafp4.parallel.collectives import Group, Traffic
from megafp4.parallel.reduce import check_shards

PATIENCE = timedelta(seconds=600)
"""How long a GPU waits for another; then its process fails."""


@dataclass(frozen=True)
class _Mailbox:
    """Memory to which all ranks write."""

    memory: Tensor
    """uint8, flat: this rank's; holds a message of every rank."""
    addresses: Tensor
    """int64 [ranks]: where each rank's memory is, as this GPU sees it."""
    handle: Any
    """Knows the other ranks."""


class PeerReducer:
    """FP8 sums over the GPUs of one node, without a communication library.

    Two mailboxes are used in turn: who passes a call's barrier has read what the call before
    brought, so that the next but one may overwrite it. They take twice the bytes of the longest
    bucket's messages, and grow with it.

    Args:
        group: The ranks, on one node, with CUDA devices.
        patience: How long to wait for another rank.

    Raises:
        UnsupportedError: The devices cannot address each other's memory.
    """

    def __init__(self, group: Group, patience: timedelta = PATIENCE) -> None:
        if group.handle is None or not torch.cuda.is_available():
            raise UnsupportedError(
                f"the {group.size} ranks of group {group.name!r} have no GPUs that address each "
                "other's memory: reduce with FlatReducer"
            )
        self.group, self._handle = group, group.handle
        self._patience_ms = int(patience.total_seconds() * 1000)
        self._boxes: list[_Mailbox] = []
        self._turn = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size

    def reduce_scatter(
        self, x: Tensor, out: Tensor, what: str, *, factor: float = 1.0, accumulate: bool = False
    ) -> None:
        """As :meth:`~megafp4.parallel.reduce.Reducer.reduce_scatter`; x is on this rank's GPU."""
        from megafp4_kernels import fp8_reduce  # needs triton, an optional package

        rows = check_shards(x, out, self.size, factor, accumulate)
        width = blocks.message_bytes(out.numel())
        box = self._next(width * self.size, x.device)
        sent = width * (self.size - 1)
        self.group.ledger.record(Traffic(self.group.name, "all_to_all", "uint8", what), sent)
        fp8_reduce.cast_blocks_to_peers(rows, box.addresses, self.group.rank)
        with self.group.in_words(what):
            box.handle.barrier(channel=0, timeout_ms=self._patience_ms)
        messages = box.memory[: width * self.size].view(self.size, width)
        blocks.sum_rows(messages, out, factor, accumulate)

    def _next(self, needed: int, device: torch.device) -> _Mailbox:
        """The mailbox whose turn it is, of at least so many bytes, alike on all ranks."""
        if not self._boxes or self._boxes[0].memory.numel() < needed:
            torch.cuda.synchronize(device)  # what is under way still uses the shorter ones
            self._boxes = [self._open(needed, device) for _ in range(2)]
        self._turn ^= 1
        return self._boxes[self._turn]

    def _open(self, count: int, device: torch.device) -> _Mailbox:
        try:
            memory = symmetric.empty(count, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(memory, self._handle)
        except RuntimeError as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(
                f"the GPUs of group {self.group.name!r} cannot address each other's memory "
                f"({cause}): reduce with FlatReducer"
            ) from error
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device)
        return _Mailbox(memory, addresses, handle)
