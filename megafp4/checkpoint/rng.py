"""State of the random generator that dropout draws from.

Stochastic rounding, Hadamard signs and data order need none: they are functions of the seed and the
step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.errors import CheckpointError

_CPU = "torch_cpu"


def capture_rng() -> dict[str, Tensor]:
    """State of PyTorch's CPU generator as uint8 tensors, ready to be saved."""
    return {_CPU: torch.get_rng_state()}


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Set PyTorch's CPU generator to a captured state.

    Raises:
        CheckpointError: The state is missing or not one of this generator's.
    """
    found = state.get(_CPU)
    size = torch.get_rng_state().numel()
    if found is None or found.dtype != torch.uint8 or found.numel() != size:
        given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"the random generator's state {_CPU!r} is {given}, expected torch.uint8 [{size}]: "
            "load a checkpoint of this version of PyTorch"
        )
    torch.set_rng_state(found)
