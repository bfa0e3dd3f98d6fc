"""Forward and backward of a micro-batch as a CUDA graph, so that launching costs nothing.

A step of a large model launches thousands of kernels, some of a few microseconds; Python takes
longer to launch them than the GPU to run them. A graph is recorded once and replayed with one call.
Kernels read the seed, the step and the first token from the device, so each replay draws its own
random bits, the same that an eager step would. Collectives of the pass are part of the graph.

A graph for the first micro-batch of a step, which quantizes the weights and writes the gradients,
one for the others, which share the weights and add, and one for the last, where that measures the
gradients or, under ZeRO, reduces them. They live in one memory pool, which is as large as an eager
step's memory; so a step that has to run eagerly (statistics are collected, the recipe has changed)
releases them, and the next one records them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megafp4.backends import HopperBackend, Ledger
from megafp4.errors import UnsupportedError
from megafp4.linear import Linear
from megafp4.models.decoder import Decoder
from megafp4.parallel.collectives import CommunicationLedger
from megafp4.parallel.gradients import GradientBuckets
from megafp4.precision import Precision


class Recording:
    """One graph, with the memory that it reads and writes."""

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        self.tokens, self.targets = tokens.clone(), targets.clone()
        self.share = torch.ones((), device=tokens.device)
        self.loss = torch.zeros((), device=tokens.device)
        self.ledger = Ledger()
        self.traffic = CommunicationLedger()
        self.graph = torch.cuda.CUDAGraph()

    def replay(self, tokens: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """Run it on a micro-batch and return its loss."""
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.share.copy_(share)
        self.graph.replay()
        return self.loss.clone()


class Recorder:
    """Replays a model's forward and backward passes, recording them when they are first asked for.

    Args:
        model: A model whose linears run on backend ``hopper``.
        precision: Shared by its linears.
        buckets: Where ZeRO collects gradients, if it does.
        traffic: Where collectives are recorded.

    Raises:
        UnsupportedError: A linear runs on another backend, whose random bits a graph would freeze,
            or holds its weight on a grid.
    """

    def __init__(
        self,
        model: Decoder,
        precision: Precision,
        buckets: GradientBuckets | None = None,
        traffic: CommunicationLedger | None = None,
    ) -> None:
        self._model, self._precision, self._buckets = model, precision, buckets
        self._traffic = CommunicationLedger() if traffic is None else traffic
        self._linears = [one for one in model.modules() if isinstance(one, Linear)]
        self._backends: list[HopperBackend] = []
        for linear in self._linears:
            backend = linear.op.backend
            if not isinstance(backend, HopperBackend):
                raise UnsupportedError(
                    f"train.cuda_graph needs backend 'hopper', and {linear.op.name!r} runs on "
                    f"{backend.name!r}: change --backend or leave train.cuda_graph off"
                )
            if linear.grid is not None:
                raise UnsupportedError(
                    f"train.cuda_graph cannot record {linear.op.name!r}, whose weight lives on a "
                    "grid that every step replaces: leave train.cuda_graph off"
                )
            if all(backend is not known for known in self._backends):
                self._backends.append(backend)
        # By (is the first of its step, measures or reduces the gradients).
        self._recordings: dict[tuple[bool, bool], Recording] = {}
        self._gradients: list[Tensor | None] = []
        self._squares: list[Tensor | None] = []
        self._measures = False
        self._pool: Any = None
        self._warm = False

    def accumulate(
        self,
        batches: Sequence[tuple[Tensor, Tensor, int]],
        shares: Tensor,
        step: int,
        *,
        measures: bool = False,
    ) -> Tensor | None:
        """Accumulate the gradients of a step.

        Args:
            batches: Tokens, targets and first token of its micro-batches, all of one shape.
            shares: FP32 [number of micro-batches]: weight of each in the loss.
            step: Index of the optimizer step.
            measures: Measure the gradients as the last micro-batch writes them, see
                :attr:`megafp4.precision.Precision.measures`.

        Returns:
            FP32 [number of micro-batches]: their losses times their shares; or None where the step
            must run eagerly.
        """
        if self._precision.probe is not None:
            self.release()
            return None
        if measures != self._measures:
            self.release()
            self._measures = measures
        if self._warm and not self._recordings:
            for linear in self._linears:
                linear.op.forget_weights()
            torch.cuda.empty_cache()
        # Linears are asked for tokens of this micro-batch, which begins where the pin says.
        self._precision.step, self._precision.first_token = step, 0
        losses = []
        for index, ((tokens, targets, first_token), share) in enumerate(
            zip(batches, shares, strict=True)
        ):
            for backend in self._backends:
                backend.pin_position(self._precision.seed, step, first_token, tokens.device)
            last = index == len(batches) - 1
            kind = index == 0, last and (measures or self._buckets is not None)
            self._precision.measures = measures and last
            losses.append(self._pass(tokens, targets, share, kind))
        for backend in self._backends:
            backend.unpin_position()
        if self._warm:
            self._hand_over()
        self._warm = True
        return torch.stack(losses)

    def _pass(
        self, tokens: Tensor, targets: Tensor, share: Tensor, kind: tuple[bool, bool]
    ) -> Tensor:
        """Forward and backward of one micro-batch; the loss times its share.

        The first step runs without graphs: compilation, windows, places and workspaces come into
        being.
        """
        if not self._warm:
            return self._run(tokens, targets, share, last=kind[1])
        if kind not in self._recordings:
            self._recordings[kind] = self._record(tokens, targets, last=kind[1])
        recording = self._recordings[kind]
        loss = recording.replay(tokens, targets, share)
        self._precision.ledger.merge(recording.ledger)
        self._traffic.merge(recording.traffic)
        return loss

    def _run(self, tokens: Tensor, targets: Tensor, share: Tensor, *, last: bool) -> Tensor:
        if self._buckets is not None:
            self._buckets.begin(last)
        loss = self._model(tokens, targets) * share
        loss.backward()
        if self._buckets is not None and last:
            self._buckets.finish()  # a graph must not end before the streams that it has forked
        found: Tensor = loss.detach()
        return found

    def restart(self) -> None:
        """Start over, as after a change of the recipe: the next step runs eagerly."""
        self.release()
        self._warm = False

    def release(self) -> None:
        """Forget the graphs and give their memory back."""
        if self._recordings:
            self._recordings, self._gradients, self._squares = {}, [], []
            self._pool = None
            self._precision.squares.clear()
            for linear in self._linears:
                linear.op.forget_weights()
            torch.cuda.empty_cache()

    def _record(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Recording:
        made = Recording(tokens, targets)
        ledger, self._precision.ledger = self._precision.ledger, made.ledger
        sent = self._traffic.copy()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Threads of the communication library go on meanwhile.
            with torch.cuda.graph(made.graph, pool=self._pool, capture_error_mode="thread_local"):
                made.loss = self._run(made.tokens, made.targets, made.share, last=last)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UnsupportedError(
                f"the pass cannot be recorded as a CUDA graph ({cause}): leave train.cuda_graph off"
            ) from error
        finally:
            self._precision.ledger = ledger
        made.traffic = self._traffic.since(sent)
        self._traffic.remove(made.traffic)
        self._gradients = [parameter.grad for parameter in self._model.parameters()]
        self._squares = [self._precision.squares.of(one) for one in self._model.parameters()]
        return made

    def _hand_over(self) -> None:
        """Give each parameter the gradient that the replays have written, and its measurement."""
        if self._buckets is not None:
            self._buckets.replayed()
            return
        kept = zip(self._model.parameters(), self._gradients, self._squares, strict=True)
        for parameter, gradient, squares in kept:
            parameter.grad = gradient
            if gradient is not None and squares is not None:
                self._precision.squares.record(parameter, gradient, squares)
