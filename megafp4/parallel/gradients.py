"""Gradients on their way from backward to the ranks that own them.

A hook takes every gradient as soon as backward has completed it, copies it to its bucket and drops
it; a full bucket is reduced while backward goes on. Buckets are reduced in one order on all ranks,
whatever the order in which they fill.

* Stage 1 adds up the micro-batches in the bucket, in FP32, and reduces once a step: gradients are
  cast once. A rank keeps all gradients of its micro-batches until then.
* Stage 2 reduces after every micro-batch, on top of the FP32 sum so far, and frees the bucket: a
  rank keeps only the gradients it owns, and communicates as often as there are micro-batches.

Wgrad can write its gradient where the bucket keeps it (:meth:`GradientBuckets.destination`), which
saves the hook a copy. Gradients that are partial sums, those of norms whose tokens are cut over
other ranks say, lie in buckets of their own and are added over those ranks once they are complete.

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
from megafp4.parallel.collectives import Group
from megafp4.parallel.reduce import Reducer

Stage: TypeAlias = Literal[1, 2]


@dataclass
class _Filling:
    """A bucket that gradients are being copied to."""

    buffer: Tensor
    """FP32, all of the bucket."""
    written: set[str]
    """Parameters whose gradients it holds; elsewhere it is not initialised."""
    promised: set[str]
    """Parameters whose gradients are being written to it, before their hooks have run."""


class GradientBuckets:
    """Takes gradients from backward and sums them over the ranks.

    Args:
        params: Parameters by name; each is in one bucket.
        buckets: Their layout, in the order in which backward completes it.
        reducer: Sums over the ranks.
        stage: See the module's description.
        partial: Parameters whose gradients are still to be summed over another group; those of a
            bucket share theirs.

    Raises:
        ConfigError: ``stage`` is unknown or the buckets are for another number of ranks.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        buckets: Sequence[Bucket],
        reducer: Reducer,
        stage: Stage,
        partial: Mapping[str, Group] | None = None,
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
        self._others = [(partial or {}).get(bucket.names[0]) for bucket in buckets]
        self._gaps = [bucket.gaps.to(device) for bucket in buckets]
        self._home = {name: i for i, bucket in enumerate(buckets) for name in bucket.names}
        self._pieces = {name: buckets[home].pieces_of(name) for name, home in self._home.items()}
        self._names = {id(param): name for name, param in self.params.items()}
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
        self._finished = False
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
        if self._finished:
            return
        self._finished = True
        while self._launched < len(self.buckets):
            self._launch()
        # Micro-batches that were not announced have filled buckets anew.
        for home in sorted(self._fillings):
            self._reduce(home)
        with torch.cuda.stream(self._stream):  # no-op for None
            sums = [
                group.start_all_reduce(shard, f"partial gradients of {bucket.name}")
                for bucket, shard, group in zip(
                    self.buckets, self.shards, self._others, strict=True
                )
                if group is not None
            ]
            for pending in sums:
                pending.wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def replayed(self) -> None:
        """Take note that a CUDA graph has done what the step's last backward pass and finish do."""
        self._seen.update(self.params)
        self._fillings.clear()
        self._finished = True

    def clear(self) -> None:
        """Forget the step's gradients."""
        for param in self.params.values():
            param.grad = None
        self._fillings.clear()
        self._forget_step()

    def destination(self, param: Tensor) -> tuple[Tensor, bool] | None:
        """Say where to write the gradient of a parameter that backward is about to compute.

        Whoever asks must write there, and return the tensor as the gradient, so that autograd adds
        what else there is and calls the hook. Until then the parameter's other gradients, if it is
        used more than once, are told no place.

        Returns:
            FP32 in the parameter's shape, and whether to overwrite what it holds, which is added to
            otherwise. None where the gradient is not ours, not FP32, or not in one piece.
        """
        name = self._names.get(id(param))
        if name is None or len(self._pieces[name]) != 1:
            return None
        if (param.grad_dtype or param.dtype) != torch.float32:
            return None
        filling = self._filling(self._home[name])
        if name in filling.promised:
            return None
        filling.promised.add(name)
        place = self._pieces[name][0].of(filling.buffer).view(param.shape)
        return place, name not in filling.written

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
        filling = self._filling(home)
        if name not in filling.promised:
            self._add(name, grad, filling, fresh=name not in filling.written)
        elif grad.data_ptr() != self._pieces[name][0].of(filling.buffer).data_ptr():
            # Autograd has added to what was written in place, or copied it.
            self._add(name, grad, filling, fresh=True)
        filling.promised.discard(name)
        filling.written.add(name)
        self._seen.add(name)
        self._missing[home].discard(name)
        if self._reducing:
            while self._launched < len(self.buckets) and not self._missing[self._launched]:
                self._launch()

    def _add(self, name: str, grad: Tensor, filling: _Filling, fresh: bool) -> None:
        flat = grad.reshape(-1)
        for piece in self._pieces[name]:
            place, values = piece.of(filling.buffer), flat[piece.start : piece.stop]
            if fresh:
                place.copy_(values)
            else:
                place.add_(values)

    def _filling(self, home: int) -> _Filling:
        if home not in self._fillings:
            self._fillings[home] = self._open(home)
        return self._fillings[home]

    def _open(self, home: int) -> _Filling:
        """Return a bucket to fill, with zeros where no parameter lies."""
        buffer = torch.empty(self.buckets[home].numel, device=self.shards[home].device)
        return _Filling(buffer.index_fill_(0, self._gaps[home], 0.0), set(), set())

    def _launch(self) -> None:
        """Reduce the next bucket."""
        self._launched += 1
        self._reduce(self._launched - 1)

    def _reduce(self, home: int) -> None:
        """Reduce a bucket, behind the work that has filled it, and free it."""
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
