"""Which boxes of which tensors a rank holds, for checkpoints of runs on many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megafp4.checkpoint.boxes import Box, Parts, run_boxes
from megafp4.optim.shard_states import OwnedRows, OwnedState
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Layout
from megafp4.parallel.weights import layouts


def model_parts(
    model: nn.Module, tp: Group, replicas: Group, *, writing: bool, skip: frozenset[str]
) -> dict[str, Parts]:
    """What a rank holds of a model's state dict.

    Args:
        model: This rank's part of the model.
        tp: Ranks over which its layers are cut.
        replicas: Ranks that hold the same part.
        writing: Leave out what another rank writes: of what several ranks hold, each writes some.
        skip: Entries that another pipeline stage writes.
    """
    cut, found = layouts(model), {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        layout = cut.get(name)
        mine = number % replicas.size == replicas.rank and name not in skip
        mine = mine and (layout is not None or tp.rank == 0)
        boxes = _whole_boxes(tensor, layout) if mine or not writing else ()
        found[name] = Parts(_whole_shape(tensor.shape, layout), tensor.dtype, tuple(boxes))
    return found


def row_parts(owned: Iterable[OwnedRows]) -> dict[str, Parts]:
    """What a rank holds of a model whose tensors are cut by rows, each on one rank."""
    found = {}
    for name, shape, first, memory in owned:
        box = Box((first, *(0 for _ in shape[1:])), tuple(memory.shape))
        held = ((box, memory),) if memory.numel() else ()
        found[name] = Parts(tuple(shape), memory.dtype, held)
    return found


def optimizer_parts(
    owned: Iterator[OwnedState],
    model: nn.Module,
    tp: Group,
    *,
    writing: bool,
    skip: frozenset[str],
) -> dict[str, Parts]:
    """What a rank holds of the optimizer's state, each kind laid out as its parameter.

    Rows that stand for several elements cannot be cut where the parameter is: of a parameter that
    is cut over tp, they belong to this tp and no other, and their names say so.

    Args:
        owned: State of the runs that this rank owns.
        model: This rank's part of the model.
        tp: Ranks over which its layers are cut.
        writing: Leave out what another rank writes.
        skip: Parameters that another pipeline stage writes.
    """
    cut, found = layouts(model), {}
    for each in owned:
        layout, shape = cut.get(each.name), each.shape
        left_out = writing and (each.name in skip or (layout is None and tp.rank > 0))
        key = f"{each.label}.{each.name}"
        if each.kind.group == each.kind.width == 1:
            boxes = () if left_out or each.memory is None else _run_parts(each, shape, layout)
            found[key] = Parts(_whole_shape(shape, layout), each.kind.dtype, tuple(boxes))
            continue
        if layout is not None:
            key = f"{key}@tp{tp.rank}of{tp.size}"
        rows = (shape.numel() + each.kind.group - 1) // each.kind.group
        held: tuple[tuple[Box, Tensor], ...] = ()
        if each.memory is not None and not left_out:
            memory = each.memory.view(-1, each.kind.width)
            held = ((Box((each.start // each.kind.group, 0), tuple(memory.shape)), memory),)
        found[key] = Parts((rows, each.kind.width), each.kind.dtype, held)
    return found


def expected_names(parts: Mapping[str, Parts]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the whole tensors, as :func:`megafp4.checkpoint.signature` has them."""
    return {name: (torch.Size(part.shape), part.dtype) for name, part in parts.items()}


def _whole_shape(shape: torch.Size, layout: Layout | None) -> tuple[int, ...]:
    return tuple(shape) if layout is None else layout.whole_shape(shape)


def _whole_boxes(tensor: Tensor, layout: Layout | None) -> Iterator[tuple[Box, Tensor]]:
    """Boxes of the whole that all of this rank's part covers."""
    if not tensor.numel():
        return
    for box, within in _through(Box.whole(tensor.shape), layout):
        yield box, within.of(tensor)


def _run_parts(
    each: OwnedState, shape: torch.Size, layout: Layout | None
) -> Iterator[tuple[Box, Tensor]]:
    """Boxes of the whole that a run of this rank's part covers, as views of its state."""
    assert each.memory is not None
    flat = each.memory.view(-1)
    for local, place in run_boxes(shape, each.start, each.stop):
        values = flat[place : place + local.numel].view(local.sizes)
        for box, within in _through(local, layout):
            yield box, within.of(values)


def _through(local: Box, layout: Layout | None) -> Iterator[tuple[Box, Box]]:
    """Where a box of a rank's part lies in the whole, piece by piece.

    Yields:
        A box of the whole, and the same one counted from where ``local`` begins.
    """
    if layout is None:
        yield local, Box.whole(local.sizes)
        return
    dim, begin = layout.dim, 0
    for first, count in layout.cut.runs(layout.rank):
        offsets, sizes = list(local.offsets), list(local.sizes)
        offsets[dim], sizes[dim] = begin, count
        common = local.overlap(Box(tuple(offsets), tuple(sizes)))
        if common is not None:
            moved = list(common.offsets)
            moved[dim] += first - begin
            yield Box(tuple(moved), common.sizes), common.within(local)
        begin += count
