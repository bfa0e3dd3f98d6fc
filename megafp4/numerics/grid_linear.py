"""A linear whose weight may live on a grid: how the codes are saved, loaded and moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from megafp4.numerics.grid import GridWeight


class GridLinear(nn.Linear):
    """``nn.Linear`` whose weight :meth:`hold_grid` may replace by a grid weight.

    The codes and steps become the buffers ``weight_codes`` and ``weight_scale``, so that they are
    saved, loaded and moved like any state. ``weight`` stays a parameter that can be listed and
    receives gradients, but owns no memory, carries ``weight.grid`` and is not in the state dict.
    Such a module cannot multiply by itself: :class:`megafp4.Linear` does.
    """

    grid: GridWeight | None = None
    weight_codes: Tensor
    weight_scale: Tensor

    def hold_grid(self, grid: GridWeight) -> None:
        """Make ``grid`` the only copy of the weight."""
        self.grid = grid
        self.weight = grid.parameter().requires_grad_(self.weight.requires_grad)
        self.register_buffer("weight_codes", grid.codes)
        self.register_buffer("weight_scale", grid.scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.grid is not None:
            del destination[prefix + "weight"]

    def _load_from_state_dict(self, *args: Any) -> None:
        weight = self.weight
        if self.grid is not None:
            # Neither looked for in the state dict nor written to.
            self._parameters["weight"] = None
        super()._load_from_state_dict(*args)
        if self.grid is not None:
            # With ``assign=True`` the buffers are other tensors than before, perhaps elsewhere.
            self.grid.codes, self.grid.scale = self.weight_codes, self.weight_scale
            weight.data = self.grid.parameter().data
            self.weight = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device; a change of dtype leaves codes and FP32 steps as they are."""
        if self.grid is None:
            super()._apply(fn, recurse)
            return self
        weight, scale = self.weight, self.weight_scale
        # Out of reach of `fn`, which would give the placeholder memory and round the steps.
        self._parameters["weight"] = self._buffers["weight_scale"] = None
        super()._apply(fn, recurse)
        self.grid.codes = self.weight_codes
        self.grid.scale = self._buffers["weight_scale"] = scale.to(self.grid.codes.device)
        weight.data = self.grid.parameter().data
        if weight.grad is not None:
            weight.grad = weight.grad.to(self.grid.codes.device)
        self.weight = weight
        return self
