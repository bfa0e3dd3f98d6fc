"""Steps of weights on a grid: by the specification, or by a kernel in one launch a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megafp4.numerics.formats import Integer
from megafp4.numerics.grid import GridWeight, StoreStatistics, not_finite
from megafp4.numerics.philox import Key
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.dqt import GridNumbers, grid_step
from megafp4.optim.states import GridCodec, State

_GROUP = 128
"""The kernel moves whole groups of so many columns."""


def takes_kernel(grid: GridWeight) -> bool:
    """Whether the kernel can move a weight, or rows of one: on a GPU, by its width and place."""
    first_col = grid.origin[1]
    return (
        grid.codes.is_cuda
        and grid.shape[1] % _GROUP == 0
        and isinstance(first_col, int)
        and first_col % 4 == 0
    )


class GridStep(NamedTuple):
    """A step of Direct Quantized Training, for any weight with the same constants."""

    codec: GridCodec
    """How the moments are kept."""
    hyper: AdamHyper
    """Constants."""
    step: int
    """Its index, counted from 0."""
    seed: int
    """Seed of the run."""
    scale: Tensor | None = None
    """FP32 [1] on the device; multiplies the gradient."""
    skip: Tensor | None = None
    """FP32 [1] on the device: 1 leaves everything as it is."""

    def move(self, grid: GridWeight, grad: Tensor, state: State, *, fused: bool) -> StoreStatistics:
        """Move a weight, or some of its rows.

        Args:
            grid: Its codes are overwritten.
            grad: FP32 or BF16 gradient, of as many elements.
            state: Of the codec's ``adopt``; overwritten.
            fused: Whether the kernel may do it, if it can.

        Returns:
            What it did. The kernel does not wait: :func:`check_stored` looks at what it has counted
            as ``broken``.

        Raises:
            DivergenceError: The new weight is not finite, and no kernel has made it.
        """
        if fused and takes_kernel(grid):
            return self._by_kernel(grid, grad, state)
        if self.skip is not None and self.skip.item():
            none = torch.zeros(3, dtype=torch.int64, device=grid.codes.device)
            return StoreStatistics.of(none, grid.shape.numel())
        grad = grad.float()
        if self.scale is not None:
            grad = grad * self.scale
        return grid_step(self.codec, grid, grad, state, self.hyper, self.step, self.seed)

    def _by_kernel(self, grid: GridWeight, grad: Tensor, state: State) -> StoreStatistics:
        from megafp4_kernels.adamw_grid import (  # needs triton, an optional package
            Draw,
            Grid,
            grid_adamw,
        )

        element, (lines, first_col) = grid.format.element, grid.origin
        assert isinstance(element, Integer)
        assert isinstance(first_col, int)
        runs = ((lines, grid.shape[0]),) if isinstance(lines, int) else lines
        device = grid.codes.device
        where = [torch.arange(at, at + n, dtype=torch.int32, device=device) for at, n in runs]
        stream = Key(self.seed, self.step, grid.layer, "update", "b").stream
        counts = grid_adamw(
            grid.codes,
            grid.scale,
            Grid(grid.format.bits, element.low, element.high),
            (grad if grad.dtype == torch.bfloat16 else grad.float()).contiguous(),
            state,
            GridNumbers.of(self.hyper, self.step),
            Draw(torch.cat(where), first_col, stream, self.seed, self.step),
            self.scale,
            self.skip,
        )
        return StoreStatistics.of(counts, grid.shape.numel())


def broken_values(found: Mapping[str, StoreStatistics]) -> Tensor | None:
    """New values that were not finite, int64 0-dim; None without weights on a grid."""
    return torch.stack([one.broken for one in found.values()]).sum() if found else None


def check_stored(found: Mapping[str, StoreStatistics]) -> None:
    """Refuse values that were not stored; waits for the device.

    Raises:
        DivergenceError: There are some.
    """
    broken = broken_values(found)
    if broken is not None and broken.item():
        raise not_finite()
