"""Weights of a model that is cut over ranks: drawn, cut and put together again.

Modules say which entries of their state dict they hold a part of, with an attribute ``layouts``;
everything else is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megafp4.config import ModelConfig
from megafp4.errors import CheckpointError
from megafp4.models.initialization import initial_value
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Layout


def layouts(model: nn.Module) -> dict[str, Layout]:
    """How the sharded entries of a model's state dict are cut, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: layout
        for prefix, module in model.named_modules()
        for name, layout in getattr(module, "layouts", {}).items()
    }


@torch.no_grad()
def init_sharded_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter with its part of what :func:`megafp4.models.init_weights` draws.

    Every rank draws the whole of one parameter after the other and keeps its part. Weights that
    live on a grid must be put there afterwards.

    Args:
        model: Built by :class:`~megafp4.parallel.factory.ParallelFactory`.
        config: Shape of the whole model.
        seed: Seed of the run.

    Raises:
        ConfigError: A parameter that no rule covers.
    """
    cut = layouts(model)
    for name, parameter in model.named_parameters():
        layout = cut.get(name)
        if layout is None:
            parameter.copy_(initial_value(name, parameter.shape, config, seed))
        else:
            whole = initial_value(name, layout.whole_shape(parameter.shape), config, seed)
            parameter.copy_(layout.take(whole))


def shard_state(whole: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of a state dict of the whole model.

    Args:
        whole: From a model that is not cut, or from :func:`gather_state`.
        model: The model that is to load it, on its grid already if the weights are.

    Raises:
        CheckpointError: An entry is missing.
        ConfigError: An entry has another length than the model's.
    """
    cut = layouts(model)
    part = {}
    for name in model.state_dict():
        if name not in whole:
            raise CheckpointError(
                f"{name!r} is missing from the state dict: give one of the same model and recipe"
            )
        part[name] = cut[name].take(whole[name]) if name in cut else whole[name]
    return part


@torch.no_grad()
def gather_state(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """The state dict of the whole model, on every rank; undoes :func:`shard_state`.

    Args:
        model: Cut over the ranks of ``group``; all of them must call.
        group: The tensor-parallel ranks.
    """
    cut = layouts(model)
    whole = {}
    for name, part in model.state_dict().items():
        if name in cut and group.size > 1:
            parts = group.all_gather(part[None], "state").unbind(0)
            whole[name] = cut[name].join(parts)
        else:
            whole[name] = part
    return whole
