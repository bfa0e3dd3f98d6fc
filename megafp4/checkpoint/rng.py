"""State of the random generators that dropout draws from: the CPU's, and that of the run's GPU.

Stochastic rounding, Hadamard signs and data order need none: they are functions of the seed and the
step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.errors import CheckpointError

_CPU = "torch_cpu"
_CUDA = "torch_cuda"


def capture_rng(device: torch.device | None = None) -> dict[str, Tensor]:
    """State of PyTorch's generators as uint8 CPU tensors, ready to be saved.

    Args:
        device: Where the model is: a GPU has a generator of its own, which is saved as well.
    """
    state = {_CPU: torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        state[_CUDA] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Set PyTorch's generators to a captured state.

    Args:
        state: What :func:`capture_rng` returned.
        device: Where the model is.

    Raises:
        CheckpointError: A state is missing or not one of these generators'; nothing is set then.
    """
    _check(state, _CPU, torch.get_rng_state().numel())
    if device is not None and device.type == "cuda":
        _check(state, _CUDA, torch.cuda.get_rng_state(device).numel())
        torch.cuda.set_rng_state(state[_CUDA], device)
    torch.set_rng_state(state[_CPU])


def _check(state: Mapping[str, Tensor], name: str, size: int) -> None:
    found = state.get(name)
    if found is None or found.dtype != torch.uint8 or found.numel() != size:
        given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"the random generator's state {name!r} is {given}, expected torch.uint8 [{size}]: "
            "load a checkpoint of this version of PyTorch"
        )
