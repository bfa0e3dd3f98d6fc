"""Slices of a matrix: where their elements lie in the whole, and who holds the rest.

A slice is quantized as the whole would be. Its random bits are those of the global positions of its
elements, and a statistic that the scale is taken from is reduced over the ranks that hold the other
slices of the group of elements which share that scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""(first, count) of each contiguous run of global indices, in the order of the slice."""

Origin: TypeAlias = tuple[int | Runs, int | Runs]
"""Global (line, k) of a slice's elements: of the first one where they are contiguous, or runs."""


class Peers(Protocol):
    """The ranks that together hold a matrix, each a slice of it; all of them call the same."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks of non-negative FP32 numbers; NaN is the largest."""
        ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over the ranks."""
        ...

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, joined along the last dim in rank order."""
        ...


@dataclass(frozen=True)
class Slice:
    """A matrix that is cut along one dim into equal slices."""

    peers: Peers
    """Who holds the slices."""
    dim: int
    """The dim that is cut, 0 or 1."""
    within: Slice | None = None
    """Of what this is a slice, where that is itself a slice."""

    def peers_along(self, dims: Sequence[int]) -> list[Peers]:
        """Who holds other elements along some of the dims."""
        others = [] if self.within is None else self.within.peers_along(dims)
        return [self.peers, *others] if self.dim in dims else others

    def largest(self, x: torch.Tensor, dims: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Elementwise maximum over all who hold other elements along the dims."""
        for peers in self.peers_along(dims):
            x = peers.largest(x)
        return x


def part_of(where: int | Runs, first: int, count: int) -> int | Runs:
    """Global indices of a stretch of a slice.

    Args:
        where: Global index of the slice's first element, or its runs.
        first: Where in the slice the stretch begins.
        count: Its length.
    """
    if isinstance(where, int):
        return where + first
    found, before, last = [], 0, first + count
    for start, length in where:
        low, high = max(first - before, 0), min(last - before, length)
        if low < high:
            found.append((start + low, high - low))
        before += length
    return tuple(found)
