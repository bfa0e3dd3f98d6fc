"""From a matrix to an operand: where the work is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megafp4.numerics import Key
from megafp4.recipes import Side, get_recipe
from megafp4.recipes.cast import cast


class NoTransfers(TorchDispatchMode):
    """Fails when an operator is given a CPU tensor that is not a scalar, as every copy would be."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in args:
            if isinstance(argument, torch.Tensor) and argument.device.type == "cpu":
                assert argument.dim() == 0, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["a", "b"])
def test_nothing_is_copied_to_the_device(side: Side) -> None:
    """Neither the Hadamard signs nor the dither of stochastic rounding."""
    spec, key = get_recipe("mxfp4").wgrad, Key(1, 2, 3, "wgrad", side)
    cast(torch.zeros(64, 64), spec, side, 0, key)  # a format works its constants out once
    x = torch.empty(64, 64, device="meta")
    with NoTransfers():
        operand, _ = cast(x, spec, side, 0, key)
    assert operand.codes.device.type == "meta"  # type: ignore[union-attr]
