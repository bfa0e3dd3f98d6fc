"""Weights that live on an integer grid and have no other copy.

Direct Quantized Training [2412.04787] rounds a weight to a grid once, at initialisation, and from
then on only ever moves it between grid points: the optimizer computes a new value in FP32 and
stochastic rounding picks one of its two neighbours. What is stored is one packed code per weight
and one FP32 step per row; the step is frozen, because a step that followed the weights would move
every grid point and re-sample weights whose update was zero.

The grid of a tensor W with codes from Qn to Qp has the step ``range * AbsMean(W) / Qp`` (the
paper's 1/s, eq. 2-4, with range 1); ternary codes run from -1 to 1, so their step is AbsMean(W).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics.formats import Format, Integer, get_format
from megafp4.numerics.philox import Key
from megafp4.numerics.qtensor import QTensor, codes_per_byte, unpack
from megafp4.numerics.quantize import amax, encode, scales_from_amax
from megafp4.numerics.rounding import Rounding
from megafp4.numerics.shards import Origin, Slice

GRID_FORMATS: dict[float, str] = {1.58: "ternary", 3: "int3", 4: "int4", 8: "int8"}
"""Format of the codes by bits per weight; the one place where grids are listed."""


@dataclass(frozen=True)
class StoreStatistics:
    """What one :meth:`GridWeight.store` did; counts stay on the device until they are read."""

    flips: Tensor
    """Codes that changed, int64 0-dim."""
    saturated: Tensor
    """Codes at either end of the grid, int64 0-dim."""
    broken: Tensor
    """New values that were not finite and whose codes stayed, int64 0-dim."""
    numel: int
    """Codes in all."""

    @classmethod
    def of(cls, counts: Tensor, numel: int) -> StoreStatistics:
        """Take flips, saturated and broken, int64 [3], apart."""
        flips, saturated, broken = counts.unbind()
        return cls(flips, saturated, broken, numel)

    def counts(self) -> Tensor:
        """Flips, saturated and broken: int64 [3]."""
        return torch.stack([self.flips, self.saturated, self.broken])

    @property
    def flip_rate(self) -> float:
        """Share of codes that changed."""
        return self.flips.item() / max(1, self.numel)

    @property
    def saturation_rate(self) -> float:
        """Share of codes at either end of the grid, which cannot move further out."""
        return self.saturated.item() / max(1, self.numel)


class GridWeight:
    """A matrix stored as packed integer codes and one frozen FP32 step per row.

    Shapes: weights [rows, cols]; ``codes`` uint8 [rows, ceil(cols / codes per byte)], packed along
    cols as :meth:`QTensor.pack` does, padded with zero codes; ``scale`` FP32 [rows, 1].
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        fmt: str | Format,
        cols: int,
        layer: int = 0,
        origin: Origin = (0, 0),
    ) -> None:
        """Wrap stored codes; :meth:`from_dense` makes them from weights.

        Args:
            codes: Packed codes, written in place by :meth:`store`.
            scale: Step per row.
            fmt: Integer format of the codes.
            cols: Columns of the weight (the packed width may hold a few more).
            layer: Stream id of the layer: which random bits its updates draw.
            origin: Global (row, column) of a shard's first weight, or runs of them.
        """
        self.codes = codes
        self.scale = scale
        self.format = get_format(fmt)
        self.shape = torch.Size((codes.shape[0], cols))
        self.layer = layer
        self.origin = origin

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bits: float,
        range: float = 1.0,
        segments: Sequence[int] | None = None,
        layer: int = 0,
        origin: Origin = (0, 0),
        part: Slice | None = None,
    ) -> GridWeight:
        """Round weights to their grid, nearest point, ends saturating [2412.04787, eq. 2-4].

        Args:
            weight: Floating [rows, cols].
            bits: 8, 4, 3, or 1.58 for ternary.
            range: Largest value of the grid in units of AbsMean; the paper uses 1.
            segments: Row counts of the matrices fused in ``weight`` (q, k, v, say), each of which
                has its own AbsMean; None means one.
            layer: Stream id of the layer.
            origin: Global (row, column) of a shard's first weight, or runs of them.
            part: Who holds the other shards of the matrices, which AbsMean is taken over too.

        Raises:
            ConfigError: ``bits`` is unknown, ``range`` is not positive, the segments do not add up
                to the rows, or the weight is not a finite floating matrix.
        """
        fmt = grid_format(bits)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ConfigError(
                f"a grid weight was asked for from {weight.dtype} of shape {list(weight.shape)}: "
                "give a floating matrix"
            )
        if not 0 < range < float("inf"):
            raise ConfigError(f"the grid's range is {range}: give a positive multiple of AbsMean")
        rows, cols = weight.shape
        parts = [rows] if segments is None else list(segments)
        if sum(parts) != rows or any(part < 0 for part in parts):
            raise ConfigError(
                f"segments {parts} of a weight with {rows} rows: give row counts that add up to it"
            )
        w = weight.detach().float()
        if not w.isfinite().all():
            raise ConfigError(
                "a weight holds NaN or Inf and has no grid: initialise it before moving it there"
            )
        steps = [_step(one, fmt, range, part).expand(len(one), 1) for one in w.split(parts)]
        scale = torch.cat(steps)
        codes = encode(w, fmt, scale, 1, scaling="vector").codes
        return cls(_pack(codes, fmt), scale, fmt, cols, layer, origin)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [rows, cols]: code times step in FP32, cast to ``dtype``."""
        return self.to_qtensor().dequantize(dtype)

    def to_qtensor(self) -> QTensor:
        """The weight as a quantized tensor, one unpacked code per element, one scale per row.

        It shares memory with the grid where nothing had to be unpacked: use it before the next
        :meth:`store`.
        """
        codes = unpack(self.codes, self.format)[:, : self.shape[1]]
        return QTensor(codes, self.scale, None, self.format, 1, "vector")

    @torch.no_grad()
    def store(
        self,
        new: Tensor,
        key: Key | None = None,
        rounding: Rounding = "stochastic",
        dither_bits: int = 32,
    ) -> StoreStatistics:
        """Move every weight to a grid point next to its new value [2412.04787, eq. 5], in place.

        Stochastic rounding is unbiased between the ends of the grid; beyond them a value saturates.
        A weight whose new value equals the stored one, bit for bit, keeps its code with certainty.

        Args:
            new: FP32 [rows, cols], the values after an optimizer step.
            key: What the random draw is for; needed by stochastic rounding.
            rounding: Mode; the nearest ones are controls, which stop learning at few bits.
            dither_bits: Random bits per weight: 32 here, since updates are far smaller than a step.

        Raises:
            ConfigError: Stochastic rounding without a key, or a new value of another shape.
            DivergenceError: A new value is not finite; the stored codes are left as they were.
        """
        if new.shape != self.shape:
            raise ConfigError(
                f"a grid weight of shape {list(self.shape)} was given new values of shape "
                f"{list(new.shape)}: give the same shape"
            )
        if not new.isfinite().all():
            raise not_finite()
        old = self.to_qtensor()
        # Relative to the old code, and with the product rounded as decode() rounds it (no fused
        # multiply-add): (code * scale) / scale is not always code, so dividing the new value alone
        # would let weights drift that were not updated.
        position = old.values() + (new.float() - self.decode()) / self.scale
        codes = encode(
            position,
            self.format,
            torch.ones_like(self.scale),
            1,
            rounding,
            key,
            scaling="vector",
            dither_bits=dither_bits,
            origin=self.origin,
        ).codes
        low, high = _end_codes(self.format)
        saturated = ((codes == low) | (codes == high)).sum()
        # Before the write: 8-bit codes are not unpacked, so ``old`` is the stored memory itself.
        flips = (codes != old.codes).sum()
        self.codes.copy_(_pack(codes, self.format))
        return StoreStatistics(flips, saturated, torch.zeros_like(flips), codes.numel())

    @property
    def nbytes(self) -> int:
        """Bytes that the stored weight takes."""
        return self.codes.nbytes + self.scale.nbytes

    def parameter(self) -> GridParameter:
        """A parameter of the weight's shape that owns one element and carries this grid.

        It exists to be named, to receive a dense ``.grad`` and to lead the optimizer here. Its one
        element is NaN, so that code which mistakes it for the weight shows at once.
        """
        storage = torch.full((), torch.nan, device=self.codes.device)
        parameter = GridParameter(storage.expand(self.shape))
        parameter.grid = self
        return parameter

    def state_dict(self) -> dict[str, Tensor]:
        """The stored tensors: ``codes`` and ``scale``."""
        return {"codes": self.codes, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into this weight's own.

        Raises:
            CheckpointError: A tensor is missing or has another shape or dtype.
        """
        for name, mine in self.state_dict().items():
            found = state.get(name)
            if found is None or found.shape != mine.shape or found.dtype != mine.dtype:
                given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise CheckpointError(
                    f"{name!r} of a {self.format.name} grid weight is {given}, expected "
                    f"{mine.dtype} {list(mine.shape)}: load the checkpoint of the same model"
                )
            mine.copy_(found)

    def __repr__(self) -> str:
        """Format, shape and size."""
        return f"GridWeight({self.format.name}, {list(self.shape)}, {self.nbytes} bytes)"


class GridParameter(nn.Parameter):
    """Parameter without memory of its own; see :meth:`GridWeight.parameter`."""

    grid: GridWeight

    def __deepcopy__(self, memo: dict[int, Any]) -> GridParameter:
        """Copy the grid, not the (expanded) placeholder, which a plain copy would materialise."""
        if id(self) not in memo:
            parameter = copy.deepcopy(self.grid, memo).parameter()
            memo[id(self)] = parameter.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the grid: a plain parameter would come back, which deepcopy then cuts off it."""
        return _rebuild_parameter, (self.grid, self.requires_grad)


def _rebuild_parameter(grid: GridWeight, requires_grad: bool) -> GridParameter:
    parameter = grid.parameter()
    parameter.requires_grad = requires_grad
    return parameter


def not_finite() -> DivergenceError:
    """What is raised for new values that are not finite."""
    return DivergenceError(
        "a weight update is NaN or Inf: lower the learning rate or go on from an earlier checkpoint"
    )


def grid_format(bits: float) -> Format:
    """Format of a grid with that many bits per weight.

    Raises:
        ConfigError: There is no such grid.
    """
    if bits not in GRID_FORMATS:
        raise ConfigError(f"no weight grid has {bits} bits: choose 8, 4, 3 or 1.58 (ternary)")
    return get_format(GRID_FORMATS[bits])


def _step(weight: Tensor, fmt: Format, range: float, part: Slice | None) -> Tensor:
    """Distance of two grid points, FP32 [1, 1]: range * AbsMean / Qp, the product at least 1e-5."""
    mean = amax(weight, fmt, 1, "tensor", "absmean", part)
    return scales_from_amax(mean * range, fmt, statistic="absmean")[0]


def _end_codes(fmt: Format) -> tuple[int, int]:
    """Codes of the lowest and the highest grid point."""
    assert isinstance(fmt.element, Integer), "GRID_FORMATS lists integer formats only"
    return fmt.element.low & ((1 << fmt.bits) - 1), fmt.element.high


def _pack(codes: Tensor, fmt: Format) -> Tensor:
    """Codes [rows, cols] packed along cols, which is padded with zero codes where needed."""
    padding = -codes.shape[1] % codes_per_byte(fmt)
    padded = F.pad(codes, (0, padding)) if padding else codes
    return QTensor(padded, padded, None, fmt, 1, "vector").pack()
