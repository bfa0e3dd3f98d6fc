"""Tensors to and from safetensors, keeping what the file format cannot say.

A safetensors file holds contiguous tensors that share no memory. Two things are therefore kept
beside it, in a table of names: *tied* tensors (stored once, loaded as one tensor under both names)
and *expanded* ones (dims of stride 0 are stored once and expanded again), so that neither grows on
disk or in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megafp4.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors to a safetensors file.

    Args:
        path: File to write.
        tensors: Tensors of any dtype that safetensors knows, on any device.

    Returns:
        The layout that :func:`read_tensors` needs: ``{"tied": {name: stored name},
        "expanded": {name: shape}}``.

    Raises:
        CheckpointError: A value is not a tensor, or of a type that cannot be stored.
    """
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    expanded: dict[str, list[int]] = {}
    first: dict[tuple[object, ...], str] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{name!r} cannot be saved, it is a {type(tensor).__name__} and not a strided "
                "tensor with data: put other values into the checkpoint's JSON part"
            )
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and view in first:
            tied[name] = first[view]
            continue
        first[view] = name
        compact = _compact(tensor.detach())
        if compact.shape != tensor.shape:
            expanded[name] = list(tensor.shape)
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        # Other views of memory that is stored already are copied apart: safetensors refuses them.
        stored[name] = compact.clone().contiguous() if storage in seen else compact.contiguous()
        seen.add(storage)
    try:
        save_file(stored, path, metadata={"format": "pt"})
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"{path.name} cannot be written, safetensors refuses it ({error}): save tensors of "
            "standard types"
        ) from error
    return {"tied": tied, "expanded": expanded}


def read_tensors(path: Path, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file and restore tied and expanded tensors.

    Args:
        path: File to read.
        layout: What :func:`write_tensors` returned.

    Returns:
        CPU tensors by name.

    Raises:
        CheckpointError: The file is not safetensors, or does not fit the layout.
    """
    try:
        tensors = load_file(path)
        for name, shape in layout["expanded"].items():
            tensors[name] = tensors[name].expand(shape)
        for name, source in layout["tied"].items():
            tensors[name] = tensors[source]
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it or load another checkpoint"
        ) from error
    return tensors


def _compact(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that differs: dims of stride 0 reduced to one element."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
