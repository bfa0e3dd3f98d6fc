"""Weights on a grid under ZeRO: every rank moves and rounds its rows, then codes are gathered.

Rounding a row twice, on two ranks, would have to draw the same bits twice; rounding it once and
sending codes sends a byte or less for each weight. A row's random bits are those of its place in
the whole weight, so the codes are those of a run on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.numerics.shards import Origin
from megafp4.parallel.bucket import Bucket
from megafp4.parallel.collectives import Group


class GridShards:
    """The rows of grid weights that this rank owns.

    Args:
        grids: The whole weights, by parameter.
        buckets: Layouts by rows that hold them.
        group: The ranks.
    """

    def __init__(
        self, grids: Mapping[str, GridWeight], buckets: list[Bucket], group: Group
    ) -> None:
        self.group = group
        self._grids = dict(grids)
        self._rows: dict[str, list[tuple[int, int]]] = {}
        self.pieces: dict[str, GridWeight] = {}
        """The owned rows as grid weights that share the whole ones' memory."""
        for bucket in buckets:
            for name in bucket.names:
                grid = grids[name]
                spans = [(0, 0)] * group.size
                for piece in bucket.pieces_of(name):
                    first, last = piece.start // grid.shape[1], piece.stop // grid.shape[1]
                    spans[piece.offset // bucket.shard] = (first, last)
                self._rows[name] = spans
                first, last = spans[group.rank]
                if first < last:
                    self.pieces[name] = grid_rows(grid, first, last)

    def gather(self) -> None:
        """Give every rank the codes of all rows."""
        if self.group.size == 1 or not self._grids:
            return
        parts = {
            name: [self._grids[name].codes[first:last] for first, last in spans]
            for name, spans in self._rows.items()
        }
        mine = torch.cat([part[self.group.rank].flatten() for part in parts.values()])
        widths = [sum(p[rank].numel() for p in parts.values()) for rank in range(self.group.size)]
        sent = torch.nn.functional.pad(mine, (0, max(widths) - len(mine)))
        received = self.group.all_gather(sent[None], "grid codes")
        for rank in range(self.group.size):
            first = 0
            for part in parts.values():
                count = part[rank].numel()
                codes = received[rank, first : first + count]
                part[rank].copy_(codes.view_as(part[rank]))
                first += count

    def statistics(self, found: Mapping[str, StoreStatistics]) -> dict[str, StoreStatistics]:
        """Add up what the ranks' steps did to each weight."""
        if not self._grids:
            return {}
        device = next(iter(self._grids.values())).codes.device
        none = torch.zeros(3, dtype=torch.int64, device=device)
        counts = torch.stack([found[n].counts() if n in found else none for n in self._grids])
        total = self.group.all_reduce(counts, "grid statistics")
        return {
            name: StoreStatistics.of(total[i], grid.shape.numel())
            for i, (name, grid) in enumerate(self._grids.items())
        }


def grid_rows(grid: GridWeight, first: int, last: int) -> GridWeight:
    """Some rows of a grid weight, as views of its codes and steps."""
    return GridWeight(
        grid.codes[first:last],
        grid.scale[first:last],
        grid.format,
        grid.shape[1],
        grid.layer,
        _later(grid.origin, first, last),
    )


def _later(origin: Origin, first: int, last: int) -> Origin:
    """Global place of rows ``first`` to ``last`` of a weight that begins at ``origin``."""
    line, k = origin
    if isinstance(line, int):
        return line + first, k
    runs, before = [], 0
    for start, count in line:
        low, high = max(first - before, 0), min(last - before, count)
        if low < high:
            runs.append((start + low, high - low))
        before += count
    return tuple(runs), k
