"""Shards of weights as FSDP2 sees them, and in what form the whole weight reaches the model.

FSDP2 asks a sharded parameter what to gather and gives it what arrived
(``fsdp_pre_all_gather``, ``fsdp_post_all_gather``). Three answers:

* *as kept*: rows of BF16, where the optimizer keeps them so;
* *as operands*: the rank casts its rows, and codes and scales travel
  (:mod:`megafp4.parallel.fsdp_operands`);
* *on a grid*: the stored codes and steps.

In the last two cases no dense weight exists: the parameter that autograd sees has a shape and no
memory, and the GEMMs find their operands in the layer's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megafp4.numerics.grid import GridWeight


class Form(ABC):
    """In what form rows of a weight travel and arrive.

    Args:
        shape: Of the whole weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self._hollow: Tensor | None = None

    @abstractmethod
    def send(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """What this rank sends of its rows, and what it must remember until the rest is there."""

    @abstractmethod
    def receive(self, parts: tuple[Tensor, ...], kept: Any) -> Tensor | None:
        """Take what all ranks sent, stacked along dim 0: the weight; None if there is no dense one.

        The memory of ``parts`` is taken away when the weight is sharded again.
        """

    def stand_in(self, device: torch.device) -> Tensor:
        """An FP32 tensor of the weight's shape, for autograd; it has memory until :meth:`hollow`.

        FSDP2 takes a view of it, which needs memory.
        """
        self._hollow = torch.empty(self.shape, device=device)
        return self._hollow

    def release(self) -> None:
        """Forget what arrived, whose memory goes."""
        self.hollow()

    def hollow(self) -> None:
        """Take the stand-in's memory away."""
        if self._hollow is not None:
            self._hollow.untyped_storage().resize_(0)


class AsKept(Form):
    """The rows themselves.

    Args:
        shape: Of the whole weight.
        share: Rows of a rank, of which the last ones may have fewer.
    """

    def __init__(self, shape: torch.Size, share: int) -> None:
        super().__init__(shape)
        self.share = share

    def send(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """The rows, padded to those of any other rank."""
        missing = self.share - len(rows)
        return (F.pad(rows, (0, 0, 0, missing)) if missing else rows,), None

    def receive(self, parts: tuple[Tensor, ...], kept: Any) -> Tensor | None:
        """The whole weight and padding behind it."""
        return parts[0]


class OnGrid(Form):
    """Packed codes and steps, which become the grid that the layer multiplies.

    Args:
        grid: The layer's.
        own: This rank's rows of it.
    """

    def __init__(self, grid: GridWeight, own: GridWeight) -> None:
        super().__init__(grid.shape)
        self.grid, self.own = grid, own

    def send(self, rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Codes and steps."""
        return (self.own.codes, self.own.scale), None

    def receive(self, parts: tuple[Tensor, ...], kept: Any) -> Tensor | None:
        """Let the layer's grid be what arrived."""
        self.grid.codes, self.grid.scale = parts
        return None


class StoredRows(Tensor):
    """Rows of a parameter as FSDP2 shards them: an FP32 matrix to look at, kept in another form.

    Cutting and copying move what is kept; nothing computes with it.

    Args:
        stored: What is kept, [rows, anything], in any type.
        cols: Columns of the matrix.
        form: How it travels.
    """

    stored: Tensor
    form: Form

    @staticmethod
    def __new__(cls, stored: Tensor, cols: int, form: Form) -> StoredRows:
        """Make an FP32 tensor without memory of its own."""
        shape = (stored.shape[0], cols)
        made: StoredRows = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=stored.device
        )
        return made

    def __init__(self, stored: Tensor, cols: int, form: Form) -> None:
        self.stored, self.form = stored, form

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # typed without the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Apply what FSDP2 does with shards to what is kept."""
        aten, rows = torch.ops.aten, args[0]
        if func is aten.copy_.default:
            rows.stored.copy_(args[1].stored)
            return rows
        stored = rows.stored
        if func is aten.view.default and len(args[1]) == 1:
            return stored.view(-1)  # a shard's memory, which nothing reads as a matrix
        if func is aten.split.Tensor:
            return [rows._with(part) for part in stored.split(args[1])]
        if func in (aten.new_zeros.default, aten.new_empty.default):
            return rows._with(stored.new_zeros(args[1][0], *stored.shape[1:]))
        if func is aten.slice.Tensor:
            return rows._with(stored[slice(*args[2:4])])
        if func in (aten.detach.default, aten.alias.default, aten.view.default):
            return rows._with(stored.detach())
        if func in (aten._to_copy.default, aten.clone.default):
            device = (kwargs or {}).get("device", stored.device)
            return rows._with(stored.to(device, copy=True))
        if func is aten._pin_memory.default:
            return rows._with(stored.pin_memory())
        raise NotImplementedError(f"{func} of rows that are kept as {stored.dtype}")

    def _with(self, stored: Tensor) -> StoredRows:
        return StoredRows(stored, self.shape[-1], self.form)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Memory of what is kept, by which FSDP2 knows a shard again."""
        return self.stored.untyped_storage()

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Tell FSDP2 what to gather."""
        del mesh, outer_size, outer_stride, module, mp_policy
        return self.form.send(self.stored)

    def fsdp_post_all_gather(
        self, parts: tuple[Tensor, ...], kept: Any, dtype: Any, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Take what FSDP2 gathered; the first time, return what becomes the parameter."""
        del dtype
        weight = self.form.receive(parts, kept)
        if out is not None:
            return None
        return self.form.stand_in(parts[0].device) if weight is None else weight, ()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and what is kept."""
        return f"StoredRows({list(self.shape)}, kept as {self.stored.dtype})"
