"""What quantization loses, per layer, GEMM and operand, on the steps that ask for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from megafp4.backends import Backend
from megafp4.linear import Linear
from megafp4.numerics import Key, QTensor, operand_statistics
from megafp4.optim import Optimizer
from megafp4.parallel.collectives import Group
from megafp4.recipes import GEMMS
from megafp4.train.parallel import Sharded, gather_objects

OperandName = tuple[str, str, str]
"""Layer, GEMM and operand (``a`` or ``b``)."""


class Collector:
    """A probe (see :class:`megafp4.precision.Probe`) that measures each operand once.

    Later micro-batches of the step are not measured: they tell little that the first does not.
    """

    def __init__(self) -> None:
        self._statistics: dict[OperandName, dict[str, Any]] = {}

    @torch.no_grad()
    def __call__(self, layer: str, gemm: str, operand: str, x: torch.Tensor, q: QTensor) -> None:
        """Measure one quantization; ``q`` holds the codes and scales of ``x``."""
        key = (layer, gemm, operand)
        if key not in self._statistics:
            self._statistics[key] = {"format": q.format.name, **operand_statistics(x, q)}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row per operand, in order of first use: step, layer, gemm, operand, statistics."""
        return [
            {"step": step, "layer": layer, "gemm": gemm, "operand": operand, **statistics}
            for (layer, gemm, operand), statistics in self._statistics.items()
        ]


def raised_blocks(model: nn.Module, backend: Backend, world: Group) -> dict[OperandName, int]:
    """Blocks so far whose scale the backend raised on any rank, of each operand that can have any.

    Waits for the device. All ranks must call it.
    """
    counts = backend.raised_blocks()
    linears = [one.op for one in model.modules() if isinstance(one, Linear)] if counts else []
    own = {
        (op.name, gemm, side): counts[stream]
        for op in linears
        for gemm in GEMMS
        for side in ("a", "b")
        if (stream := Key(0, 0, op.layer, gemm, side).stream) in counts
    }
    total: Counter[OperandName] = Counter()
    for counted in gather_objects(world, own):
        total.update(counted)
    return dict(total)


def grid_rates(optimizer: Optimizer | Sharded) -> dict[str, float]:
    """How weights on a grid (DQT) moved in the last step; empty if there are none.

    Returns:
        ``flip_rate``, the share of codes that changed, and ``saturation_rate``, the share that sits
        at an end of the grid and cannot move further out; over all grid weights.
    """
    stored = optimizer.grid_statistics.values()
    count = sum(one.numel for one in stored)
    if not count:
        return {}
    return {
        "flip_rate": sum(int(one.flips) for one in stored) / count,
        "saturation_rate": sum(int(one.saturated) for one in stored) / count,
    }
