"""Which blocks of a model each stage of a pipeline holds, and the part of the model that makes.

Stage s of P ranks with C stages each lies on rank s mod P [arXiv 2104.04473, section 2.2]. Parts
keep the names that they have in the whole model (``blocks.7.mlp.up.weight``), so initial weights,
checkpoints and random streams are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor, nn

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.models.build import build_model
from megafp4.models.decoder import Decoder
from megafp4.models.factory import LayerFactory
from megafp4.numerics import Runs
from megafp4.precision import Precision

MicroBatch: TypeAlias = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [B, S]."""

_LAST = ("final_norm", "head")
"""What the last stage holds besides blocks; all the rest that is not a block is the first's."""


@dataclass(frozen=True)
class Stages:
    """How the blocks of a model are cut into the stages of a pipeline.

    Args:
        ranks: Ranks of the pipeline.
        layers: Blocks of each stage, in order.
    """

    ranks: int
    layers: tuple[int, ...]

    @property
    def count(self) -> int:
        """Stages in all."""
        return len(self.layers)

    @property
    def chunks(self) -> int:
        """Stages of each rank."""
        return self.count // self.ranks

    def of_rank(self, rank: int) -> range:
        """The stages of a rank, in order."""
        return range(rank, self.count, self.ranks)

    def blocks(self, stage: int) -> range:
        """The blocks of a stage."""
        ends = list(accumulate(self.layers))
        return range(ends[stage] - self.layers[stage], ends[stage])


def plan_stages(num_layers: int, ranks: int, chunks: int = 1, layers: Sequence[int] = ()) -> Stages:
    """Cut the blocks of a model into ``ranks * chunks`` stages.

    Args:
        num_layers: Blocks of the model.
        ranks: Ranks of the pipeline.
        chunks: Stages of each rank.
        layers: Blocks of each stage. Empty cuts evenly; a remainder goes to the first stages, for
            the last one has the head.

    Raises:
        ConfigError: The numbers do not fit.
    """
    count = ranks * chunks
    if chunks < 1:
        raise ConfigError(f"parallel.chunks is {chunks}: give a positive number of stages a rank")
    if not layers:
        if num_layers < count:
            raise ConfigError(
                f"pp {ranks} x chunks {chunks} needs at least {count} blocks and model.layers is "
                f"{num_layers}: choose fewer ranks or chunks"
            )
        size, more = divmod(num_layers, count)
        return Stages(ranks, tuple(size + (stage < more) for stage in range(count)))
    if len(layers) != count:
        raise ConfigError(
            f"parallel.layers names {len(layers)} stages and pp {ranks} x chunks {chunks} has "
            f"{count}: give the blocks of each of them"
        )
    if min(layers) < 1 or sum(layers) != num_layers:
        raise ConfigError(
            f"parallel.layers {' '.join(map(str, layers))} must be positive and add up to "
            f"model.layers {num_layers}: change one of them"
        )
    return Stages(ranks, tuple(layers))


def build_part(
    config: ModelConfig,
    factory: LayerFactory,
    stages: Stages,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Build what one rank of a pipeline holds of a model; of the rest, nothing is allocated.

    The result trains in a :class:`~megafp4.parallel.pipeline.Pipeline` only. Its ``blocks`` is a
    ``ModuleDict`` by number, and parts that other ranks hold are None; the table of a tied
    embedding is on the first rank and on the last. Weights are not initialised.

    Args:
        config: Shape of the whole model.
        factory: Makes the layers.
        stages: How the model is cut.
        rank: Whose part.
        dtype: Type of the activations between the layers; parameters are FP32.
        device: Where the part goes.

    Raises:
        ConfigError: As :func:`~megafp4.models.build.build_model`.
        UnsupportedError: The model has dropout.
    """
    if config.dropout:
        raise UnsupportedError(
            f"model.dropout {config.dropout} under pp {stages.ranks} would drop other elements "
            "than one rank does: set model.dropout to 0 or pp to 1"
        )
    with torch.device("meta"):
        model = build_model(config, factory, dtype)
    own = stages.of_rank(rank)
    first, last = 0 in own, stages.count - 1 in own
    blocks = {str(i): model.blocks[i] for stage in own for i in stages.blocks(stage)}
    model.blocks = nn.ModuleDict(blocks)  # type: ignore[assignment]
    for name, _ in list(model.named_children()):
        table = name == "embedding" and config.ties_embeddings
        ours = last if name in _LAST else first or (last and table)
        if name != "blocks" and not ours:
            setattr(model, name, None)
    return model.to_empty(device=device)


class Feed:
    """Where each micro-batch of a step stands; all stages of a rank read it.

    A pipeline runs other micro-batches between forward and backward of one. So the position that
    random bits depend on is set in front of both: blocks that are computed again read it again.

    Args:
        precision: Shared by the linears of the model.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.clear()

    def fill(
        self,
        batches: Sequence[MicroBatch],
        shares: Tensor,
        first_tokens: Sequence[int | Runs],
        announce: Callable[[bool], None] | None = None,
    ) -> None:
        """Say what comes; ``announce(True)`` is called when the last backward pass begins."""
        self.batches, self.shares, self.first_tokens = batches, shares, first_tokens
        self._announce = announce

    def clear(self) -> None:
        """Forget the step."""
        self.fill((), torch.empty(0), ())

    def enter(self, number: int) -> MicroBatch:
        """Tokens and targets of a micro-batch, whose forward pass begins."""
        self.precision.first_token = self.first_tokens[number]
        return self.batches[number]

    def leave(self, number: int, out: Tensor) -> None:
        """Be told when the backward pass of a stage's output begins."""
        if out.requires_grad:
            out.register_hook(lambda _: self._begin_backward(number))

    def _begin_backward(self, number: int) -> None:
        self.precision.first_token = self.first_tokens[number]
        if self._announce is not None and number == len(self.batches) - 1:
            self._announce(True)


class Stage(nn.Module):
    """One stage of a pipeline, as ``torch.distributed.pipelining`` runs it.

    It maps tokens (the first) or the residual stream to the residual stream or (the last) to the
    loss times its share, FP32 [1]. Only the number of the micro-batch comes along; the rest is in
    ``feed``.

    Args:
        model: From :func:`build_part`.
        stages: How the model is cut.
        index: Which stage this is.
        feed: Knows the micro-batches.
    """

    def __init__(self, model: Decoder, stages: Stages, index: int, feed: Feed) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == stages.count - 1
        self.feed = feed
        # In lists: parameters have their names in the model and are listed there.
        self._model = [model]
        self._blocks = [model.blocks.get_submodule(str(i)) for i in stages.blocks(index)]

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """Run the stage on micro-batch ``number``, int64 [1] on the CPU."""
        (model,), index = self._model, int(number)
        tokens, targets = self.feed.enter(index)
        if self.is_first:
            x = model.enter(x)
        x = model.through(x, tokens, self._blocks)
        if self.is_last:
            share = self.feed.shares[index]
            # Under context parallelism a rank may hold no target, and the mean over none is NaN.
            x = torch.where(share > 0, model.leave(x, targets), 0.0)[None] * share
        x = x.contiguous()  # the receiver expects it
        self.feed.leave(index, x)
        return x
