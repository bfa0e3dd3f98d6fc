"""Parts of tensors that no process holds whole.

A part is a *box* of the whole tensor: an offset and a size in every dim. What a rank owns is not
always one box, a run of elements in row-major order say, but it is always a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor; a 0-dim tensor has the empty box."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor, a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        return tensor

    def within(self, other: Box) -> Box:
        """The same part, counted from where ``other`` begins."""
        moved = zip(self.offsets, other.offsets, strict=True)
        return Box(tuple(mine - start for mine, start in moved), self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What lies in both; None if nothing does."""
        offsets, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            first = max(a, b)
            offsets.append(first)
            sizes.append(min(a + n, b + m) - first)
        return Box(tuple(offsets), tuple(sizes)) if min(sizes, default=1) > 0 else None


@dataclass(frozen=True)
class Parts:
    """What a rank holds of a tensor, to be saved or to be filled."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    """Of the whole tensor."""
    held: tuple[tuple[Box, Tensor], ...]
    """Boxes of the whole tensor, each with memory of its size; none where the rank holds nothing,
    or leaves it to another rank to save what both hold."""

    @classmethod
    def whole(cls, tensor: Tensor) -> Parts:
        """All of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, ((Box.whole(tensor.shape), tensor),))

    @classmethod
    def none(cls, shape: Sequence[int], dtype: torch.dtype) -> Parts:
        """Nothing of a tensor."""
        return cls(tuple(shape), dtype, ())


def run_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Cut a run of elements, in row-major order, into boxes.

    Args:
        shape: Of the tensor, at least one dim.
        start: First element.
        stop: Behind the last element.

    Yields:
        Boxes in the order of their elements, each with the number of its first element within the
        run: at most two for each dim before the last, and one more.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,)), 0
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows: first .. last - 1
    if first > last:  # it begins and ends within one row
        yield from _row_boxes(shape, last, start, stop, start)
        return
    if start < first * row:
        yield from _row_boxes(shape, first - 1, start, first * row, start)
    if first < last:
        sizes = (last - first, *shape[1:])
        yield Box((first, *(0 for _ in shape[1:])), sizes), first * row - start
    if last * row < stop:
        yield from _row_boxes(shape, last, last * row, stop, start)


def _row_boxes(
    shape: Sequence[int], row: int, start: int, stop: int, origin: int
) -> Iterator[tuple[Box, int]]:
    """Boxes of a run that lies within one index of the first dim."""
    base = row * math.prod(shape[1:])
    for box, place in run_boxes(shape[1:], start - base, stop - base):
        yield Box((row, *box.offsets), (1, *box.sizes)), start + place - origin
