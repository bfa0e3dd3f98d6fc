"""Collectives over one group of ranks: recorded in bytes, awaited when needed, failing in words.

A :class:`Group` is all that the layers see of ``torch.distributed``. Every call is counted in a
:class:`CommunicationLedger`; a failure names the collective, the group and the rank, because the
rank that reports a broken connection is rarely the one that broke it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megafp4.errors import CommunicationError

Reduction = Literal["sum", "max"]

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
# Renamed in torch 2.13, where the old names warn.
_gather_into: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_scatter_into: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class Traffic(NamedTuple):
    """What one collective was."""

    group: str
    """Name of the group: ``tp``, ``dp``, ..."""
    operation: str
    """``all_reduce``, ``all_gather`` or ``reduce_scatter``."""
    dtype: str
    """Type of what was sent."""
    what: str
    """What it was for."""


class CommunicationLedger:
    """Calls and bytes by (group, operation, dtype, purpose).

    Bytes are those that one rank sends in a ring: (n - 1) / n of the gathered or scattered tensor,
    twice that for an all-reduce.
    """

    def __init__(self) -> None:
        self._calls: Counter[Traffic] = Counter()
        self._bytes: Counter[Traffic] = Counter()

    def record(self, traffic: Traffic, sent: int) -> None:
        """Count one call that sent that many bytes."""
        self._calls[traffic] += 1
        self._bytes[traffic] += sent

    def since(self, before: CommunicationLedger) -> CommunicationLedger:
        """What was recorded since ``before``, a copy of this ledger."""
        found = CommunicationLedger()
        found._calls, found._bytes = self._calls - before._calls, self._bytes - before._bytes
        return found

    def copy(self) -> CommunicationLedger:
        """The ledger as it is now."""
        return self.since(CommunicationLedger())

    def merge(self, other: CommunicationLedger) -> None:
        """Add what another ledger holds."""
        self._calls.update(other._calls)
        self._bytes.update(other._bytes)

    def remove(self, other: CommunicationLedger) -> None:
        """Take away what another ledger holds."""
        self._calls, self._bytes = self._calls - other._calls, self._bytes - other._bytes

    def rows(self) -> list[dict[str, str | int]]:
        """One dict per kind of call: group, operation, dtype, what, calls, bytes."""
        return [
            {**traffic._asdict(), "calls": calls, "bytes": self._bytes[traffic]}
            for traffic, calls in self._calls.items()
        ]

    def total(self, **fields: str) -> int:
        """Bytes sent, of the calls whose fields have these values."""
        return sum(
            sent
            for traffic, sent in self._bytes.items()
            if all(getattr(traffic, name) == value for name, value in fields.items())
        )


class Pending:
    """A collective under way; :meth:`wait` returns its result."""

    def __init__(self, group: Group, what: str, result: Tensor, work: Any = None) -> None:
        self._group, self._what, self._result, self._work = group, what, result, work

    def wait(self) -> Tensor:
        """The result: on a GPU, later work of this stream waits for it, the host does not."""
        if self._work is not None:
            with self._group.in_words(self._what):
                self._work.wait()
            self._work = None
        return self._result


class Group:
    """One axis of the mesh as this rank sees it; also the :class:`~megafp4.numerics.Peers`.

    All ranks of the group must make the same calls in the same order. A group of one rank talks to
    nobody: every collective returns what it was given.

    Args:
        name: Name in the ledger and in errors.
        rank: This rank's place in the group.
        size: Number of ranks.
        handle: The process group; None only for a group of one.
        ledger: Where traffic is recorded.
    """

    def __init__(
        self,
        name: str,
        rank: int = 0,
        size: int = 1,
        handle: dist.ProcessGroup | None = None,
        ledger: CommunicationLedger | None = None,
    ) -> None:
        self.name, self.rank, self._size, self.handle = name, rank, size, handle
        self.ledger = CommunicationLedger() if ledger is None else ledger

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    def start_all_reduce(self, x: Tensor, what: str, reduction: Reduction = "sum") -> Pending:
        """Reduce x over the ranks, in place if it is contiguous."""
        if self._size == 1:
            return Pending(self, what, x)
        x = x.contiguous()
        self._record("all_reduce", x, what, 2 * self._share(x))
        with self.in_words(what):
            work = dist.all_reduce(x, _OPERATIONS[reduction], group=self.handle, async_op=True)
        return Pending(self, what, x, work)

    def all_reduce(self, x: Tensor, what: str, reduction: Reduction = "sum") -> Tensor:
        """Reduce x over the ranks, in place if it is contiguous, and wait."""
        return self.start_all_reduce(x, what, reduction).wait()

    def start_all_gather(self, x: Tensor, what: str) -> Pending:
        """Stack the ranks' tensors [n, ...] to [size * n, ...] in rank order."""
        if self._size == 1:
            return Pending(self, what, x)
        sent = _bytes_view(x.contiguous())
        out = x.new_empty(self._size * x.shape[0], *x.shape[1:])
        self._record("all_gather", x, what, self._share(out))
        with self.in_words(what):
            work = _gather_into(_bytes_view(out), sent, group=self.handle, async_op=True)
        return Pending(self, what, out, work)

    def all_gather(self, x: Tensor, what: str) -> Tensor:
        """Stack the ranks' tensors [n, ...] to [size * n, ...] in rank order, and wait."""
        return self.start_all_gather(x, what).wait()

    def start_reduce_scatter(self, x: Tensor, what: str) -> Pending:
        """Sum x [size * n, ...] over the ranks and keep this rank's [n, ...]."""
        if self._size == 1:
            return Pending(self, what, x)
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self._size, *x.shape[1:])
        self._record("reduce_scatter", x, what, self._share(x))
        with self.in_words(what):
            work = _scatter_into(out, x, group=self.handle, async_op=True)
        return Pending(self, what, out, work)

    def reduce_scatter(self, x: Tensor, what: str) -> Tensor:
        """Sum x [size * n, ...] over the ranks, keep this rank's [n, ...], and wait."""
        return self.start_reduce_scatter(x, what).wait()

    def own(self, x: Tensor) -> Tensor:
        """This rank's [n, ...] of [size * n, ...], a view."""
        count = x.shape[0] // self._size
        return x.narrow(0, self.rank * count, count)

    def largest(self, x: Tensor) -> Tensor:
        """Elementwise maximum of non-negative FP32 numbers; NaN is the largest."""
        # Their order is that of their bits, where NaN comes last on every device.
        bits = x.float().view(torch.int32) & 0x7FFFFFFF
        return self.all_reduce(bits, "amax", "max").view(torch.float32)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum."""
        return self.all_reduce(x.clone(), "statistic")

    def side_by_side(self, x: Tensor) -> Tensor:
        """The ranks' tensors joined along the last dim."""
        if self._size == 1:
            return x
        stacked = self.all_gather(x[None], "features")
        return stacked.movedim(0, -2).flatten(-2)

    @contextlib.contextmanager
    def in_words(self, what: str) -> Iterator[None]:
        """Turn what a collective raises into a sentence.

        Raises:
            CommunicationError: The collective failed: another rank ended, or never came.
        """
        try:
            yield
        except RuntimeError as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CommunicationError(
                f"rank {self.rank} of {self._size} in group {self.name!r} lost the others during "
                f"{what!r} ({cause}): look for the first error in the other ranks' logs and start "
                "the job again from its last checkpoint"
            ) from error

    def _share(self, x: Tensor) -> int:
        return x.nbytes * (self._size - 1) // self._size

    def _record(self, operation: str, x: Tensor, what: str, sent: int) -> None:
        dtype = str(x.dtype).removeprefix("torch.")
        self.ledger.record(Traffic(self.name, operation, dtype, what), sent)


def _bytes_view(x: Tensor) -> Tensor:
    """FP8 as bytes: gloo moves no FP8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.is_floating_point() else x
