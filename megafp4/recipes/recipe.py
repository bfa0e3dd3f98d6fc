"""A recipe says which numbers go where: {fprop, dgrad, wgrad} x {a, b} -> how to cast one operand.

The three GEMMs of a linear ``y = x W^T`` with x [tokens, in] and W [out, in]:

=======  ==========  =========  ================  =============
GEMM     result      a          b                 contracts over
=======  ==========  =========  ================  =============
fprop    y           x          W                 in
dgrad    dx = dy W   dy         W                 out
wgrad    dW          dy         x                 tokens
=======  ==========  =========  ================  =============

A recipe is data. The library (:mod:`megafp4.recipes.library`) holds the published ones; compose
your own with ``Recipe(...)`` or ``dataclasses.replace``. Contradictions are refused when the object
is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megafp4.errors import ConfigError, unknown_name
from megafp4.numerics import Rounding, Scaling, Statistic, formats, get_format
from megafp4.numerics.formats import E2M1
from megafp4.numerics.grid import grid_format
from megafp4.recipes.estimators import DGE, OCC, STE

HIGH_PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Operand formats that are plain tensors: a cast, no codes and no scales."""

Gemm = Literal["fprop", "dgrad", "wgrad"]
Side = Literal["a", "b"]
GEMMS: tuple[Gemm, ...] = get_args(Gemm)

Source = Literal["original", "fprop", "grid"]
"""Where an operand starts from: the tensor itself, the value that fprop multiplied (decoded), or
the weight codes as stored by a recipe with a :class:`GridSpec`."""

SavedAs = Literal["input", "operand", "packed"]
"""How wgrad's activation waits for backward: ``input`` is x as it is; ``operand`` what the GEMM
will multiply, quantized in forward already; ``packed`` the same, its codes packed. No number
depends on it, because random bits depend on what they are for, never on when they are drawn."""

# What each GEMM contracts over, and what a user can do about its length.
_CONTRACTION: dict[Gemm, tuple[str, str]] = {
    "fprop": ("input features", "pad the layer, exempt it or choose another recipe"),
    "dgrad": ("output features", "pad the layer, exempt it or choose another recipe"),
    "wgrad": ("tokens", "choose micro-batch x sequence length to be a multiple"),
}
_DITHER_BITS = (8, 16, 32)
_STRAIGHT_THROUGH = STE()


@dataclass(frozen=True)
class OperandSpec:
    """How one operand of one GEMM is cast.

    Raises:
        ConfigError: A field is unknown, or has no meaning for the format.
    """

    format: str = "bf16"
    """A format of :func:`megafp4.formats`, or ``bf16`` / ``fp32`` for a plain cast."""
    scaling: Scaling | None = None
    """Which elements share a scale; None is the format's default."""
    statistic: Statistic = "absmax"
    """What sets the scale: the largest or the mean magnitude."""
    rounding: Rounding = "nearest-even"
    dither_bits: int = 8
    """Random bits per element of stochastic rounding."""
    prescale: float = 1.0
    """Factor applied after the scale is taken; the GEMM's alpha divides it out again."""
    source: Source = "original"
    estimator: STE | DGE = _STRAIGHT_THROUGH
    """Derivative of the rounding; only fprop's weight has one that matters."""
    clamp: OCC | None = None
    saved_as: SavedAs = "input"
    """How wgrad.b is kept from forward to backward."""

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("rounding", self.rounding, get_args(Rounding)),
            ("statistic", self.statistic, get_args(Statistic)),
            ("operand source", self.source, get_args(Source)),
            ("saved_as", self.saved_as, get_args(SavedAs)),
            ("operand format", self.format, (*HIGH_PRECISION, *formats())),
        ):
            if given not in allowed:
                raise unknown_name(name, given, allowed)
        if self.dither_bits not in _DITHER_BITS:
            raise ConfigError(f"dither_bits is {self.dither_bits}: choose one of {_DITHER_BITS}")
        if not 0 < self.prescale <= 1:
            raise ConfigError(f"prescale is {self.prescale}: give a factor in (0, 1]")
        if self.quantized:
            get_format(self.format).check_scaling(self.scaling)
        else:
            self._check_plain_cast()
        if self.source == "grid" and (self.rounding != "nearest-even" or self.prescale != 1):
            raise ConfigError(
                "an operand with source 'grid' is used as stored: leave rounding and prescale alone"
            )
        if isinstance(self.estimator, DGE):
            self._check_dge()
        if self.folds_outliers:
            self._check_folded()

    def _check_plain_cast(self) -> None:
        plain = OperandSpec.__dataclass_fields__
        for name in ("scaling", "statistic", "rounding", "prescale", "clamp", "saved_as"):
            if getattr(self, name) != plain[name].default:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning for a {self.format} operand: "
                    "remove it or choose a quantized format"
                )

    def _check_dge(self) -> None:
        if not self.quantized or get_format(self.format).element != E2M1 or self.block > 1:
            raise ConfigError(
                f"DGE needs E2M1 codes with one scale per line or tensor, not {self.format!r}: "
                "choose format 'fp4-vector'"
            )
        if self.prescale != 1:
            raise ConfigError(f"DGE assumes unscaled weights: drop prescale={self.prescale}")

    def _check_folded(self) -> None:
        if self.format != "fp4-vector" or self.shared_scale != "vector" or self.prescale != 1:
            raise ConfigError(
                f"OCC folds outliers into E2M1 codes with one scale per token, not {self}: choose "
                "format 'fp4-vector' without prescale, or residual 'exact' or 'none'"
            )

    @property
    def folds_outliers(self) -> bool:
        """Whether the operand is multiplied as E4M3: E2M1 values, and outliers put back."""
        return self.clamp is not None and self.clamp.residual == "folded"

    @property
    def quantized(self) -> bool:
        """Whether the operand has codes and scales (or is just cast)."""
        return self.format not in HIGH_PRECISION

    @property
    def dtype(self) -> torch.dtype:
        """Torch dtype of a high-precision operand."""
        return HIGH_PRECISION[self.format]

    @property
    def shared_scale(self) -> Scaling | None:
        """The scaling with the format's default applied; None for high precision."""
        return get_format(self.format).check_scaling(self.scaling) if self.quantized else None

    def __str__(self) -> str:
        """Short form, e.g. ``mxfp4(stochastic, x0.75)``."""
        if not self.quantized:
            return self.format + (f"({self.source})" if self.source != "original" else "")
        notes: list[str] = [self.source] if self.source != "original" else []
        if self.scaling is not None:
            notes.append(self.scaling)
        if self.statistic != "absmax":
            notes.append(self.statistic)
        if self.source != "grid" and self.rounding != "nearest-even":
            notes.append(self.rounding)
        if self.prescale != 1:
            notes.append(f"x{self.prescale:g}")
        if self.clamp is not None:
            kept = "" if self.clamp.residual == "exact" else f" {self.clamp.residual}"
            notes.append(f"OCC {self.clamp.alpha:g}{kept}")
        if isinstance(self.estimator, DGE):
            notes.append(f"DGE {self.estimator.k:g}")
        return self.format + (f"({', '.join(notes)})" if notes else "")

    @property
    def block(self) -> int:
        """Number by which the contraction length must be divisible."""
        if self.quantized and self.shared_scale in ("block", "tile"):
            return get_format(self.format).block
        return 1


@dataclass(frozen=True)
class GemmSpec:
    """One GEMM: two operands and, optionally, the Hadamard transform that both go through.

    Raises:
        ConfigError: The Hadamard block does not fit the operands.
    """

    a: OperandSpec = OperandSpec()
    b: OperandSpec = OperandSpec()
    hadamard: int | None = None
    """Block g of the transform along the contraction axis."""
    signs: Literal["random", "fixed"] = "random"
    """``random``: drawn per layer, GEMM and step; ``fixed``: one vector for the whole run."""

    def __post_init__(self) -> None:
        if self.signs not in ("random", "fixed"):
            raise unknown_name("Hadamard signs", self.signs, ("random", "fixed"))
        g = self.hadamard
        if g is None:
            return
        if g < 2 or g & (g - 1):
            raise ConfigError(f"Hadamard block is {g}: give a power of two")
        for side, spec in (("a", self.a), ("b", self.b)):
            if not spec.quantized or spec.source == "grid":
                how = f"is {spec.format}" if not spec.quantized else "is used as stored"
                raise ConfigError(
                    f"operand {side} of a GEMM with a Hadamard transform {how}: quantize both "
                    "along the contraction axis, or drop the transform"
                )
            if spec.folds_outliers:
                raise ConfigError(
                    f"operand {side} folds outliers, which a Hadamard transform would spread: drop "
                    "the transform, or choose OCC residual 'exact' or 'none'"
                )
            if g % spec.block:
                raise ConfigError(
                    f"Hadamard block {g} is not a multiple of the block of {spec.format}, "
                    f"{spec.block}: choose a multiple"
                )

    def side(self, side: Side) -> OperandSpec:
        """Return one of the two operands."""
        return self.a if side == "a" else self.b

    @property
    def alpha(self) -> float:
        """Factor on the FP32 accumulator that undoes both prescales and the Hadamard's g.

        With 3/4 on both sides it is 16/9 (over g) [2502.20586, section 3.1]. It never multiplies
        an operand: 4/3 is not a BF16 number.
        """
        return 1.0 / (self.a.prescale * self.b.prescale * (self.hadamard or 1))

    @property
    def divisor(self) -> int:
        """Number by which the contraction length must be divisible."""
        return math.lcm(self.a.block, self.b.block, self.hadamard or 1)

    def __str__(self) -> str:
        """Short form, e.g. ``H64 mxfp4(stochastic, x0.75) x mxfp4(stochastic, x0.75)``."""
        prefix = f"H{self.hadamard} " if self.hadamard else ""
        return f"{prefix}{self.a} x {self.b}"


@dataclass(frozen=True)
class GridSpec:
    """Weights that live on a grid, without a master copy [2412.04787]."""

    bits: float
    """Bits per weight: 8, 4, 3, or 1.58 for ternary."""
    range: float = 1.0
    """Largest value of the grid, in units of the mean magnitude at initialisation (paper: 1)."""

    def __post_init__(self) -> None:
        grid_format(self.bits)
        if not 0 < self.range < math.inf:
            raise ConfigError(f"grid range is {self.range}: give a positive, finite factor")

    @property
    def format(self) -> str:
        """Name of the format of the stored codes."""
        return grid_format(self.bits).name


@dataclass(frozen=True)
class Recipe:
    """Which numbers go where in every linear of a model.

    Raises:
        ConfigError: A field stands where it has no meaning, e.g. DGE on an activation.
    """

    name: str
    summary: str = ""
    paper: str = ""
    """Source: arXiv number and section."""
    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()
    grid: GridSpec | None = None
    """Storage of the weights; None keeps ordinary parameters."""
    skip_first: int = 0
    """Blocks at the start of the model whose linears stay BF16."""
    skip_last: int = 0
    """Blocks at the end of the model whose linears stay BF16."""
    notes: str = ""
    """What the paper leaves open and how it was decided."""

    def __post_init__(self) -> None:
        if self.skip_first < 0 or self.skip_last < 0:
            raise ConfigError(
                f"recipe {self.name!r} skips {self.skip_first} first and {self.skip_last} last "
                "blocks: give numbers that are not negative"
            )
        for gemm, side, spec in self.operands():
            where = f"recipe {self.name!r}, {gemm}.{side}"
            if isinstance(spec.estimator, DGE) and (gemm, side) != ("fprop", "b"):
                raise ConfigError(f"{where}: DGE belongs to the forward weight, fprop.b")
            if spec.clamp is not None and (gemm, side) != ("fprop", "a"):
                raise ConfigError(f"{where}: OCC belongs to the forward activation, fprop.a")
            if spec.saved_as != "input" and (gemm, side) != ("wgrad", "b"):
                raise ConfigError(
                    f"{where}: saved_as belongs to the activation that waits for wgrad, wgrad.b"
                )
            if spec.source == "fprop" and (gemm == "fprop" or side == "a"):
                raise ConfigError(
                    f"{where}: only dgrad.b and wgrad.b can start from the value fprop used"
                )
            if self.fprop.hadamard and (spec.source == "fprop" or spec.estimator != STE()):
                raise ConfigError(
                    f"{where}: fprop's Hadamard transform rotates its operands, which neither "
                    "source 'fprop' nor DGE can use: drop one of them"
                )
            if spec.source == "grid":
                self._check_grid_source(where, spec, is_weight=side == "b" and gemm != "wgrad")

    def _check_grid_source(self, where: str, spec: OperandSpec, is_weight: bool) -> None:
        if self.grid is None or not is_weight:
            raise ConfigError(
                f"{where}: source 'grid' is for the weight of a recipe with grid=GridSpec(...)"
            )
        if spec.quantized and spec.format != self.grid.format:
            raise ConfigError(
                f"{where}: the grid stores {self.grid.format}, so format {spec.format!r} cannot be "
                f"used as stored: choose {self.grid.format!r}, a high precision or another source"
            )

    def gemm(self, name: Gemm) -> GemmSpec:
        """Return the spec of one of the three GEMMs."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}[name]

    def operands(self) -> tuple[tuple[Gemm, Side, OperandSpec], ...]:
        """All six (gemm, side, spec)."""
        return tuple((g, s, self.gemm(g).side(s)) for g in GEMMS for s in get_args(Side))

    def check_length(self, gemm: Gemm, length: int, layer: str | None = None) -> None:
        """Refuse a contraction length that the blocks or Hadamard chunks of a GEMM do not divide.

        Args:
            gemm: Which GEMM.
            length: Elements along its contraction axis.
            layer: Name of the layer, for the error; None if it is the same for all.

        Raises:
            ConfigError: Gives the length and what it must be a multiple of.
        """
        spec = self.gemm(gemm)
        if length % spec.divisor == 0:
            return
        parts = [f"block {o.block} of {o.format}" for o in (spec.a, spec.b) if o.block > 1]
        parts += [f"Hadamard block {spec.hadamard}"] if spec.hadamard else []
        over, advice = _CONTRACTION[gemm]
        what = gemm if layer is None else f"{gemm} of {layer!r}"
        raise ConfigError(
            f"{what} contracts over {length} {over}, not divisible by {spec.divisor} "
            f"({', '.join(dict.fromkeys(parts))}): {advice}"
        )

    def check_layer(
        self, in_features: int, out_features: int, segments: tuple[int, ...] | None, layer: str
    ) -> None:
        """Refuse widths that fprop or dgrad cannot contract over, or segments that do not fit.

        Raises:
            ConfigError: See :meth:`check_length`; or the segments do not add up to the outputs.
        """
        self.check_length("fprop", in_features, layer)
        self.check_length("dgrad", out_features, layer)
        if segments is not None and (sum(segments) != out_features or min(segments) < 0):
            raise ConfigError(
                f"segments {list(segments)} of {layer!r} must add up to its {out_features} output "
                "features: give the row count of each fused matrix"
            )

    def exempts_block(self, index: int, num_blocks: int) -> bool:
        """Whether block ``index`` of ``num_blocks`` keeps BF16 linears."""
        return index < self.skip_first or index >= num_blocks - self.skip_last
