"""Pipeline parallelism: stages of a model on different ranks, micro-batches passing through them.

The schedules are those of ``torch.distributed.pipelining``:

* ``gpipe``: all forward passes, then all backward passes [arXiv 1811.06965];
* ``1f1b``: one forward, one backward; keeps at most as many micro-batches as there are stages left;
* ``interleaved``: 1F1B over several stages a rank, a smaller bubble [arXiv 2104.04473];
* ``zero-bubble``: wgrad waits until the pipeline would idle, ZB-H1 [arXiv 2401.10241].

Numbers are those of one rank, bit for bit: every stage sees the micro-batches in order 0, 1, 2, ...
forward and backward, so gradients add up in that order, and random bits depend on positions that
travel with the micro-batch. Only a tied embedding's gradient adds up in another order, that of the
head over all micro-batches to that of the table.

For zero-bubble, backward casts dy once, runs dgrad and leaves wgrad in ``Precision.deferred``, from
where the schedule takes it. Everything else takes its gradient in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from megafp4.errors import ConfigError, unknown_name
from megafp4.models.decoder import Decoder
from megafp4.numerics import Runs
from megafp4.parallel.collectives import Group, Traffic
from megafp4.parallel.mesh import TIMEOUT, Mesh
from megafp4.parallel.stages import Feed, MicroBatch, Stage, Stages
from megafp4.precision import Precision

Item = TypeVar("Item")
ScheduleName: TypeAlias = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]

_SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}
_ONE_STAGE = ("gpipe", "1f1b")
"""Schedules of one stage a rank: on a rank, backward passes come one after the other."""


class Pipeline:
    """Runs forward and backward of a step's micro-batches over the stages of a model.

    All ranks of the mesh must make the same calls.

    Args:
        model: This rank's part, from :func:`~megafp4.parallel.stages.build_part`.
        stages: How the model is cut.
        mesh: The ranks; ``mesh.pp`` is this pipeline.
        schedule: In what order.
        micro_batches: Micro-batches of a step on each rank of data parallelism.
        micro_batch: Sequences of a micro-batch.
        precision: Shared by the linears of ``model``.
        device: Where ``model`` is.

    Raises:
        ConfigError: As :func:`check_schedule`.
    """

    def __init__(
        self,
        model: Decoder,
        stages: Stages,
        mesh: Mesh,
        *,
        schedule: ScheduleName = "1f1b",
        micro_batches: int,
        micro_batch: int,
        precision: Precision,
        device: torch.device | str = "cpu",
    ) -> None:
        check_schedule(schedule, stages, micro_batches)
        self.model, self.stages, self.mesh, self.precision = model, stages, mesh, precision
        self.schedule, self.micro_batches = schedule, micro_batches
        self._device = torch.device(device)
        self._feed = Feed(precision)
        self._tokens, self._stream, self._loss = _shapes(model, mesh, micro_batch)
        parts = [Stage(model, stages, i, self._feed) for i in stages.of_rank(mesh.pp.rank)]
        self._training = self._schedule(schedule, parts, micro_batches, trains=True)
        forward = "gpipe" if stages.chunks == 1 else "interleaved"
        self._evaluating = self._schedule(forward, parts, mesh.pp.size, trains=False)

    def _schedule(self, name: str, parts: Sequence[Stage], count: int, *, trains: bool) -> Any:
        # Receive buffers belong to a PipelineStage: those of training require gradients.
        wrapped = [
            PipelineStage(
                part,
                index,
                self.stages.count,
                self._device,
                input_args=(self._tokens if part.is_first else self._stream,),
                output_args=(self._loss if part.is_last else self._stream,),
                group=self.mesh.pp.handle,
                dw_builder=self._take_deferred if name == "zero-bubble" else None,
            )
            for part, index in zip(parts, self.stages.of_rank(self.mesh.pp.rank), strict=True)
        ]
        return _SCHEDULES[name](
            wrapped[0] if name in _ONE_STAGE else wrapped,
            n_microbatches=count,
            loss_fn=_as_it_is if trains else None,
            scale_grads=False,
        )

    def _take_deferred(self) -> Callable[[], None]:
        """The wgrads of the backward pass that has just run."""
        waiting, self.precision.deferred = self.precision.deferred or [], []

        def run() -> None:
            while waiting:
                waiting.pop(0)()  # frees its operands

        return run

    def step(
        self,
        batches: Sequence[MicroBatch],
        shares: Tensor,
        first_tokens: Sequence[int | Runs],
        begin: Callable[[bool], None] | None = None,
    ) -> Tensor:
        """Run forward and backward of all micro-batches of this rank of data parallelism.

        Args:
            batches: ``micro_batches`` times tokens and targets [micro-batch, S], the same on all
                ranks of the pipeline.
            shares: FP32 [micro_batches] on the device: weight of each micro-batch's loss.
            first_tokens: Index of each micro-batch's first token in the global batch.
            begin: Told of backward passes, as :meth:`megafp4.optim.zero.ZeroOptimizer.begin`:
                ``begin(False)`` before the first; ``begin(True)`` before the last where a rank has
                one stage and nothing waits, so that every gradient which comes then is complete.

        Returns:
            FP32 [micro_batches]: losses times shares, in order, on every rank of the pipeline.

        Raises:
            ConfigError: Not ``micro_batches`` batches of one shape.
            CommunicationError: Another rank is gone.
        """
        if len(batches) != self.micro_batches:
            raise ConfigError(
                f"a step has {len(batches)} micro-batches and the pipeline was made for "
                f"{self.micro_batches}: make it anew or give as many"
            )
        if begin is not None:
            begin(False)
        announces = self.schedule in _ONE_STAGE
        self._feed.fill(batches, shares, first_tokens, begin if announces else None)
        self.precision.deferred = [] if self.schedule == "zero-bubble" else None
        try:
            return self._run(self._training, trains=True)
        finally:
            self.precision.deferred = None

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor, int | Runs]]) -> Tensor:
        """Loss of each batch, dropout off, leaving no trace in ledger and statistics.

        Args:
            batches: Tokens and targets [micro-batch, S] and the index of the first token, or where
                the tokens are; the same on all ranks of the pipeline.

        Returns:
            FP32 [n]: mean loss of each batch over its targets, on every rank of the pipeline.

        Raises:
            ConfigError: Batches of another shape than a micro-batch's.
            CommunicationError: Another rank is gone.
        """
        losses = [torch.empty(0, device=self._device)]
        was_training, size = self.model.training, self.mesh.pp.size
        self.model.eval()
        try:
            with self.precision.unrecorded():
                for few in _groups(batches, size):
                    padded = [*few, *[few[-1]] * (size - len(few))]
                    micro_batches = [(tokens, targets) for tokens, targets, _ in padded]
                    places = [place for *_, place in padded]
                    self._feed.fill(micro_batches, torch.ones(size, device=self._device), places)
                    losses.append(self._run(self._evaluating, trains=False)[: len(few)])
        finally:
            self.model.train(was_training)
        return torch.cat(losses)

    def _run(self, schedule: Any, *, trains: bool) -> Tensor:
        """Run a schedule on what the feed holds; FP32 [n] losses times shares."""
        batches, group = self._feed.batches, self.mesh.pp
        if any(tokens.shape != self._tokens.shape for tokens, _ in batches):
            raise ConfigError(
                f"the pipeline was made for micro-batches of {list(self._tokens.shape)} tokens and "
                f"got {list(batches[0][0].shape)}: give batches of one shape"
            )
        own = self.stages.of_rank(group.rank)
        first, last = 0 in own, self.stages.count - 1 in own
        tokens = [torch.cat([tokens for tokens, _ in batches])] if first else []
        options: dict[str, Any] = {"number": torch.arange(len(batches))}
        if trains and last:
            options["target"] = self._feed.shares  # any [n]: the losses are the outputs
        self._record(own, len(batches), trains=trains)
        try:
            losses = schedule.step(*tokens, **options)
        except RuntimeError as error:
            if error.__cause__ is not None:  # a stage failed, and was wrapped
                raise error.__cause__ from None
            with group.in_words("pipeline"):
                raise
        finally:
            self._feed.clear()
        if losses is None:
            losses = torch.zeros(len(batches), device=self._device)
        return group.all_reduce(losses.detach().float(), "losses")

    def _record(self, own: range, count: int, *, trains: bool) -> None:
        dtype = str(self._stream.dtype).removeprefix("torch.")
        forward = sum(stage < self.stages.count - 1 for stage in own)
        backward = sum(stage > 0 for stage in own) if trains else 0
        for what, number in (("activations", forward), ("gradients", backward)):
            if number:
                traffic = Traffic(self.mesh.pp.name, "send", dtype, what)
                self.mesh.ledger.record(traffic, number * count * self._stream.nbytes)


def check_schedule(schedule: str, stages: Stages, micro_batches: int) -> None:
    """Refuse what a schedule cannot run, before anything is built.

    Args:
        schedule: Its name.
        stages: How the model is cut.
        micro_batches: Micro-batches of a step on each rank of data parallelism.

    Raises:
        ConfigError: Unknown schedule; stages or micro-batches that do not fit it.
    """
    if schedule not in _SCHEDULES:
        raise unknown_name("pipeline schedule", schedule, _SCHEDULES)
    ranks, chunks = stages.ranks, stages.chunks
    if (schedule in _ONE_STAGE) != (chunks == 1) and schedule != "zero-bubble":
        needs = "one stage a rank" if schedule in _ONE_STAGE else "two or more stages a rank"
        raise ConfigError(
            f"parallel.schedule {schedule} needs {needs} and parallel.chunks is {chunks}: change "
            "one of them"
        )
    if schedule == "gpipe":
        return
    if micro_batches < ranks:
        raise ConfigError(
            f"parallel.schedule {schedule} with pp {ranks} needs at least {ranks} micro-batches a "
            f"step and has {micro_batches}: raise train.global_batch, or lower train.micro_batch "
            "or pp"
        )
    rounds = micro_batches // ranks
    if schedule != "1f1b" and micro_batches % rounds:
        raise ConfigError(
            f"parallel.schedule {schedule} with pp {ranks} runs {micro_batches} micro-batches a "
            f"step in {rounds} rounds, which do not divide them: choose a multiple of {ranks}"
        )


def tied_group(mesh: Mesh, timeout: timedelta = TIMEOUT) -> Group | None:
    """The first and the last stage's ranks, over which a tied embedding's gradient is summed.

    All ranks of the job must call it, together.

    Args:
        mesh: The ranks.
        timeout: How long a collective waits for a rank.

    Returns:
        The group of this rank; None on a rank that holds neither, or without a pipeline.
    """
    if mesh.pp.size == 1:
        return None
    ends = [[ranks[0], ranks[-1]] for ranks in mesh.sizes.groups(("pp",))]
    handle, _ = dist.new_subgroups_by_enumeration(ends, timeout=timeout)
    place = mesh.pp.rank
    if place not in (0, mesh.pp.size - 1):
        return None
    return Group("tied", int(place > 0), 2, handle, mesh.ledger)


def _shapes(model: Decoder, mesh: Mesh, micro_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the first stage takes, what passes between stages, and what the last one returns."""
    sizes, config = mesh.sizes, model.config
    length = config.seq_len // sizes.cp
    cut = length // sizes.tp if sizes.sequence else length
    with torch.device("meta"):
        tokens = torch.empty(micro_batch, length, dtype=torch.int64)
        stream = torch.empty(micro_batch, cut, config.hidden, dtype=model.dtype, requires_grad=True)
        return tokens, stream, torch.empty(1, dtype=torch.float32, requires_grad=True)


def _groups(batches: Iterable[Item], size: int) -> Iterator[list[Item]]:
    left = iter(batches)
    while few := list(islice(left, size)):
        yield few


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    """The last stage returns the loss itself."""
    return loss
