"""Gradients on their way from backward to the ranks that own them.

A hook takes every gradient as soon as backward has completed it, copies it to its bucket and drops
it; a full bucket is reduced while backward goes on. Buckets are reduced in one order on all ranks,
whatever the order in which they fill.

* Stage 1 adds up the micro-batches in the bucket, in FP32, and reduces once a step: gradients are
  cast once. A rank keeps all gradients of its micro-batches until then.
* Stage 2 reduces after every micro-batch, on top of the FP32 sum so far, and frees the bucket: a
  rank keeps only the gradients it owns, and communicates as often as there are micro-batches.

The FP32 sum has the bits of a serial accumulation over micro-batches 0, 1, 2, ... if the wire is
FP32 and

* in stage 2, micro-batch i of rank r is number ``i * ranks + r``; or
* in stage 1, no rank but the first has more than one micro-batch, and the first has the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from megafp4.errors import ConfigError
from megafp4.parallel.bucket import Bucket
from megafp4.parallel.reduce import Reducer

Stage: TypeAlias = Literal[1, 2]


@dataclass
class _Filling:
    """A bucket that gradients are being copied to."""

    buffer: Tensor
    """FP32, all of the bucket."""
    written: set[str]
    """Parameters whose gradients it holds; elsewhere it is not initialised."""


class GradientBuckets:
    """Takes gradients from backward and sums them over the ranks.

    Args:
        params: Parameters by name; each is in one bucket.
        buckets: Their layout, in the order in which backward completes it.
        reducer: Sums over the ranks.
        stage: See the module's description.

    Raises:
        ConfigError: ``stage`` is unknown or the buckets are for another number of ranks.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        buckets: Sequence[Bucket],
        reducer: Reducer,
        stage: Stage,
    ) -> None:
        if stage not in (1, 2):
            raise ConfigError(f"ZeRO stage {stage}: choose 1 or 2")
        if any(bucket.ranks != reducer.size for bucket in buckets):
            raise ConfigError(
                f"buckets for {buckets[0].ranks} ranks are reduced over {reducer.size}: lay them "
                "out for the ranks of data parallelism"
            )
        self.params = dict(params)
        self.buckets = list(buckets)
        self.reducer = reducer
        self.stage = stage
        device = next(iter(self.params.values())).device
        self.shards = [torch.zeros(bucket.shard, device=device) for bucket in buckets]
        """FP32 sum over the ranks of what this rank owns, by bucket; complete after finish()."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._gaps = [bucket.gaps.to(device) for bucket in buckets]
        self._home = {name: i for i, bucket in enumerate(buckets) for name in bucket.names}
        self._pieces = {name: buckets[home].pieces_of(name) for name, home in self._home.items()}
        self._fillings: dict[int, _Filling] = {}
        self._seen: set[str] = set()
        self._forget_step()
        for name, param in self.params.items():
            param.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))

    def begin(self, last: bool) -> None:
        """Announce the backward pass of one micro-batch.

        Args:
            last: Whether it is the step's last one, whose gradients complete the sums. If the
                micro-batches of a pipeline interleave, none is: :meth:`finish` then reduces.
        """
        self._reducing = last or self.stage == 2
        self._missing = [set(bucket.names) for bucket in self.buckets]
        self._launched = 0

    def finish(self) -> None:
        """Complete the sums of the micro-batch announced last; on a GPU the host does not wait.

        Raises:
            ConfigError: A parameter had no gradient in any micro-batch of the step.
            CommunicationError: Another rank is gone.
        """
        unused = [name for name in self.params if name not in self._seen]
        if unused:
            raise ConfigError(
                f"{unused[0]!r} and {len(unused) - 1} other parameters got no gradient in a step: "
                "use every parameter in the loss, or set requires_grad to False"
            )
        while self._launched < len(self.buckets):
            self._launch()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def clear(self) -> None:
        """Forget the step's gradients."""
        for param in self.params.values():
            param.grad = None
        self._fillings.clear()
        self._forget_step()

    @property
    def held_bytes(self) -> int:
        """Bytes of gradients kept now, the owned shards included."""
        buffers = [filling.buffer for filling in self._fillings.values()]
        return sum(tensor.nbytes for tensor in [*self.shards, *buffers])

    def _forget_step(self) -> None:
        self._seen.clear()
        self._summed = [False] * len(self.buckets)
        self.begin(last=False)

    def _take(self, name: str, param: Tensor) -> None:
        """Move a gradient to its bucket; reduce what is complete."""
        grad = param.grad
        assert grad is not None, "the hook runs after the gradient has been accumulated"
        param.grad = None
        home = self._home[name]
        filling = self._fillings.get(home)
        if filling is None:
            filling = self._fillings[home] = self._open(home)
        flat = grad.reshape(-1)
        for piece in self._pieces[name]:
            place, values = piece.of(filling.buffer), flat[piece.start : piece.stop]
            if name in filling.written:
                place.add_(values)
            else:
                place.copy_(values)
        filling.written.add(name)
        self._seen.add(name)
        self._missing[home].discard(name)
        if self._reducing:
            while self._launched < len(self.buckets) and not self._missing[self._launched]:
                self._launch()

    def _open(self, home: int) -> _Filling:
        """Return a bucket to fill, with zeros where no parameter lies."""
        buffer = torch.empty(self.buckets[home].numel, device=self.shards[home].device)
        return _Filling(buffer.index_fill_(0, self._gaps[home], 0.0), set())

    def _launch(self) -> None:
        """Reduce the next bucket, behind the work that has filled it, and free it."""
        home = self._launched
        self._launched += 1
        bucket = self.buckets[home]
        filling = self._fillings.pop(home, None) or self._open(home)
        for name in set(bucket.names) - filling.written:
            for piece in self._pieces[name]:
                piece.of(filling.buffer).zero_()
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            filling.buffer.record_stream(stream)
        with torch.cuda.stream(stream):  # no-op for None
            self.reducer.reduce_scatter(
                filling.buffer,
                self.shards[home],
                f"gradients of {bucket.name}",
                accumulate=self._summed[home],
            )
        self._summed[home] = True
