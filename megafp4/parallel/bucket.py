"""Parameters laid out in flat buckets, of which every rank owns an equal part.

Buckets are filled in the reverse of the order in which parameters are used, so that backward
completes the first bucket first. Two layouts:

* *flat*: parameters one behind the other; a shard may end in the middle of one.
* *by rows*: for weights on a grid, which are packed and rounded row by row: every rank owns whole
  rows of each parameter, and these lie together.

Every parameter starts at a multiple of 128, the block that shares a scale on an FP8 wire. So no
block holds values of two parameters, and an elementwise step cuts a parameter only where vector
instructions end as well: it gives the same bits as on the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megafp4.errors import ConfigError
from megafp4.parallel.blocks import BLOCK, GRANULE

BUCKET_ELEMENTS = 1 << 26
"""Elements after which a bucket is closed: 256 MiB in FP32."""


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements, in row-major order, and where it lies."""

    name: str
    """The parameter."""
    start: int
    """First element of the parameter."""
    stop: int
    """Behind the last element."""
    offset: int
    """Place of the first element: in the bucket or, of an owned piece, in the shard."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """The piece of a flat bucket or shard, a view."""
        return flat[self.offset : self.offset + self.numel]


@dataclass(frozen=True)
class Bucket:
    """Where some parameters lie in one flat buffer of ``ranks * shard`` elements."""

    name: str
    """What errors and ledgers call it."""
    kind: str
    """The kind that all its parameters are of."""
    pieces: tuple[Piece, ...]
    """In order of their offsets."""
    shard: int
    """Elements of one rank, a multiple of ``GRANULE``."""
    ranks: int
    """Number of ranks."""

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.shard * self.ranks

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces))

    @cached_property
    def gaps(self) -> Tensor:
        """Indices of the padding, int64."""
        used = torch.zeros(self.numel, dtype=torch.bool)
        for piece in self.pieces:
            piece.of(used).fill_(True)
        return (~used).nonzero().view(-1)

    def pieces_of(self, name: str) -> list[Piece]:
        """The pieces of one parameter."""
        return [piece for piece in self.pieces if piece.name == name]

    def owned(self, rank: int) -> list[Piece]:
        """What a rank owns, at most one piece of each parameter; offsets are in its shard."""
        first = rank * self.shard
        found = []
        for piece in self.pieces:
            skip = max(first - piece.offset, 0)
            end = min(piece.numel, first + self.shard - piece.offset)
            if skip < end:
                place = piece.offset + skip - first
                found.append(Piece(piece.name, piece.start + skip, piece.start + end, place))
        return found


def plan_buckets(
    shapes: Mapping[str, torch.Size],
    kinds: Mapping[str, str],
    ranks: int,
    *,
    by_rows: Collection[str] = (),
    bucket_elements: int = BUCKET_ELEMENTS,
) -> list[Bucket]:
    """Lay parameters out in buckets, in the order in which backward completes them.

    Args:
        shapes: Shape of every parameter, in order of use.
        kinds: Kind of every parameter: a bucket holds parameters of one kind.
        ranks: Number of ranks.
        by_rows: Kinds of which every rank owns whole rows.
        bucket_elements: Size at which a bucket is closed.

    Raises:
        ConfigError: ``ranks`` or ``bucket_elements`` is not positive, or there is no parameter.
    """
    if ranks < 1 or bucket_elements < 1 or not shapes:
        raise ConfigError(
            f"{len(shapes)} parameters in buckets of {bucket_elements} elements over {ranks} "
            "ranks: give at least one of each"
        )
    buckets: list[Bucket] = []
    open_names: dict[str, list[str]] = {}

    def close(kind: str) -> None:
        layout = _rows_layout if kind in by_rows else _flat_layout
        pieces, shard = layout(open_names.pop(kind), shapes, ranks)
        buckets.append(Bucket(f"bucket {len(buckets)}", kind, pieces, shard, ranks))

    for name in reversed(list(shapes)):
        names = open_names.setdefault(kinds[name], [])
        names.append(name)
        if sum(math.prod(shapes[one]) for one in names) >= bucket_elements:
            close(kinds[name])
    for kind in list(open_names):
        close(kind)
    return buckets


def _flat_layout(
    names: Sequence[str], shapes: Mapping[str, torch.Size], ranks: int
) -> tuple[tuple[Piece, ...], int]:
    pieces, end = [], 0
    for name in names:
        count = math.prod(shapes[name])
        pieces.append(Piece(name, 0, count, end))
        end += _up(count, BLOCK)
    return tuple(pieces), _up(max(end, 1), ranks * GRANULE) // ranks


def _rows_layout(
    names: Sequence[str], shapes: Mapping[str, torch.Size], ranks: int
) -> tuple[tuple[Piece, ...], int]:
    places, end = {}, 0
    for name in names:
        rows, cols = shapes[name]
        places[name] = end
        end += _up(-(-rows // ranks) * cols, BLOCK)
    shard = _up(max(end, 1), GRANULE)
    pieces = []
    for rank in range(ranks):
        for name in names:
            rows, cols = shapes[name]
            share = -(-rows // ranks)
            start, stop = min(rank * share, rows) * cols, min((rank + 1) * share, rows) * cols
            if start < stop:
                pieces.append(Piece(name, start, stop, rank * shard + places[name]))
    return tuple(pieces), shard


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
