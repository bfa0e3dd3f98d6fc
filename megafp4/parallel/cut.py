"""How a dim of a matrix is cut over ranks: which part is whose, and back to the whole.

The weight of a fused linear is several matrices on top of each other (q, k, v; gate, up). Each of
them is cut into equal shares and a rank holds its share of each: with two ranks the rows

    q0 q1 | k0 k1 | v0 v1    become    q0 k0 v0  and  q1 k1 v1

so that a rank's heads are complete. Elements keep their global index, which keys random bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megafp4.errors import ConfigError
from megafp4.numerics import Runs, get_format
from megafp4.recipes import Gemm, Recipe

_RANDOM_BITS = 16
"""Elements whose random bits come out of one Philox call: a shard begins at a multiple."""


@dataclass(frozen=True)
class Cut:
    """A dim made of segments, each cut into ``size`` equal shares.

    Raises:
        ConfigError: A segment is not divisible.
    """

    segments: tuple[int, ...]
    """Lengths of the segments; one for a plain dim."""
    size: int
    """Number of ranks."""

    def __post_init__(self) -> None:
        for segment in self.segments:
            if segment % self.size:
                raise ConfigError(
                    f"a dim of {segment} cannot be cut over tp {self.size}: choose a tp that "
                    f"divides {segment}, or another width"
                )

    @property
    def shares(self) -> tuple[int, ...]:
        """Lengths of one rank's segments."""
        return tuple(segment // self.size for segment in self.segments)

    @property
    def length(self) -> int:
        """Length of one rank's part."""
        return sum(self.shares)

    def runs(self, rank: int) -> Runs:
        """(first, count) of each of a rank's shares within the whole dim."""
        starts = (sum(self.segments[:i]) for i in range(len(self.segments)))
        return tuple(
            (start + rank * share, share) for start, share in zip(starts, self.shares, strict=True)
        )

    def origin(self, rank: int) -> int | Runs:
        """Global index of a rank's first element, or its runs if it has several."""
        runs = self.runs(rank)
        return runs[0][0] if len(runs) == 1 else runs

    def take(self, whole: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's part of the whole, a copy.

        Raises:
            ConfigError: The whole has another length.
        """
        if whole.shape[dim] != sum(self.segments):
            raise ConfigError(
                f"dim {dim} of a tensor {tuple(whole.shape)} should hold {sum(self.segments)} "
                "elements before it is cut: give the tensor of the whole model"
            )
        return torch.cat([whole.narrow(dim, start, n) for start, n in self.runs(rank)], dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole from the parts of all ranks, in rank order."""
        split = [part.split(self.shares, dim) for part in parts]
        return torch.cat([share for shares in zip(*split, strict=True) for share in shares], dim)


@dataclass(frozen=True)
class Layout:
    """Which part of a parameter or buffer a rank holds."""

    cut: Cut
    dim: int
    rank: int

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part; see :meth:`Cut.take`."""
        return self.cut.take(whole, self.dim, self.rank)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all ranks."""
        return self.cut.join(parts, self.dim)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole, of which a part has ``shape``."""
        dims = list(shape)
        dims[self.dim] = sum(self.cut.segments)
        return tuple(dims)


def multiple_of(recipe: Recipe, gemm: Gemm) -> int:
    """Number of elements by which a shard of the dim that ``gemm`` contracts must be divisible.

    Blocks, Hadamard chunks and weight tiles must not straddle two shards, and random bits are drawn
    for 16 elements at a time.
    """
    spec = recipe.gemm(gemm)
    numbers = [spec.divisor]
    if spec.a.quantized or spec.b.quantized:
        numbers.append(_RANDOM_BITS)
    weights = recipe.fprop.b, recipe.dgrad.b
    numbers += [get_format(w.format).block for w in weights if w.shared_scale == "tile"]
    return math.lcm(*numbers)


def check_cut(recipe: Recipe, gemm: Gemm, cut: Cut, layer: str) -> None:
    """Refuse shards that a recipe's blocks would straddle.

    Args:
        recipe: The recipe of the linear.
        gemm: The GEMM that contracts over the dim: ``dgrad`` for outputs, ``fprop`` for inputs.
        cut: How the dim is cut.
        layer: Name of the linear, for the error.

    Raises:
        ConfigError: Gives the share and what it must be a multiple of.
    """
    number = multiple_of(recipe, gemm)
    for segment, share in zip(cut.segments, cut.shares, strict=True):
        if cut.size > 1 and share % number:
            side = "outputs" if gemm == "dgrad" else "inputs"
            raise ConfigError(
                f"tp {cut.size} gives each rank {share} of {segment} {side} of {layer!r}, not a "
                f"multiple of {number}, which recipe {recipe.name!r} needs in {gemm}: choose a "
                "smaller tp, another width or another recipe"
            )
