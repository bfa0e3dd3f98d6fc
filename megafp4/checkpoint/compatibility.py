"""Is this checkpoint the one of this model?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megafp4.errors import CheckpointError

Signature = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of every tensor by name."""

_SHOWN = 3


def signature(tensors: Mapping[str, Tensor]) -> Signature:
    """Shapes and dtypes of tensors."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def check_compatible(expected: Signature, found: Signature, what: str = "model") -> None:
    """Raise unless names, shapes and dtypes agree.

    Args:
        expected: Signature of what the tensors are to be loaded into.
        found: Signature of what the checkpoint holds.
        what: What is being loaded, for the message.

    Raises:
        CheckpointError: They differ; the message lists the first differences.
    """
    differences = [f"{name!r} is missing" for name in expected if name not in found]
    differences += [f"{name!r} is not part of it" for name in found if name not in expected]
    differences += [
        f"{name!r} is {_describe(found[name])} instead of {_describe(entry)}"
        for name, entry in expected.items()
        if name in found and _describe(found[name]) != _describe(entry)
    ]
    if not differences:
        return
    more = len(differences) - _SHOWN
    listed = ", ".join(differences[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    raise CheckpointError(
        f"the checkpoint belongs to another {what}: {listed}; load it with the configuration that "
        "saved it, or start in another folder"
    )


def _describe(entry: tuple[torch.Size, torch.dtype]) -> str:
    shape, dtype = entry
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
