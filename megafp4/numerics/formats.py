"""The number formats, as data.

A format is an element grid (what one code means) plus a scale (what its code is multiplied by). All
tables derive from the bit layout, so the table *is* the definition; tests replay every code against
``ml_dtypes``.

Sources: OCP MX v1.0 (E2M1, E8M0, blocks of 32); OCP FP8 (E4M3, E5M2); NVIDIA arXiv 2509.25149
(NVFP4: blocks of 16, E4M3 scales, one FP32 scale per tensor); arXiv 2501.17116 (vector-wise FP4);
arXiv 2402.17764 (ternary); arXiv 2412.04787 eq. 2-4 (n-bit grids).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megafp4.errors import ConfigError, unknown_name

Scaling = Literal["block", "tile", "vector", "tensor"]
"""Which elements share a scale: ``block`` consecutive ones along the contraction axis, a square
``tile`` of the last two dims, a whole line (``vector``) or the whole ``tensor``."""


@dataclass(frozen=True)
class Minifloat:
    """Sign, exponent and mantissa; subnormals; signed zero; saturating at ``max_value``."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_value: float
    has_nan: bool

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal; subnormals share its step."""
        return 1 - self.bias

    @cached_property
    def max_code(self) -> int:
        """Magnitude code of ``max_value`` (codes are ordered by magnitude)."""
        values = self.magnitudes()
        return int((values == self.max_value).nonzero()[0, 0])

    def magnitudes(self) -> torch.Tensor:
        """Values of the codes without sign bit on CPU, FP32 [2^(exponent_bits + mantissa_bits)]."""
        code = torch.arange(2 ** (self.exponent_bits + self.mantissa_bits), device="cpu")
        exponent = code >> self.mantissa_bits
        fraction = code & ((1 << self.mantissa_bits) - 1)
        normal = exponent > 0
        significand = torch.where(normal, fraction + (1 << self.mantissa_bits), fraction)
        power = torch.where(normal, exponent, 1) - self.bias - self.mantissa_bits
        values = torch.ldexp(significand.float(), power)
        if self.has_nan:
            values = torch.where(values > self.max_value, torch.nan, values)
            if self.exponent_bits == 5:
                values[code == 0b11111 << self.mantissa_bits] = torch.inf
        return values


@dataclass(frozen=True)
class Integer:
    """Two's complement integers from ``low`` to ``high``."""

    low: int
    high: int

    @property
    def max_value(self) -> float:
        """Largest positive integer: the scale maps the range statistic onto it."""
        return float(self.high)


@dataclass(frozen=True)
class Format:
    """One number format: element grid, code width, and how scales are shared and stored."""

    name: str
    element: Minifloat | Integer
    bits: int
    scale: Literal["e8m0", "e4m3", "fp32"]
    scalings: tuple[Scaling, ...]
    block: int = 0
    summary: str = ""

    @property
    def default_scaling(self) -> Scaling:
        """The scaling used when none is asked for."""
        return self.scalings[0]

    @property
    def max_value(self) -> float:
        """Largest finite magnitude of an unscaled code."""
        return self.element.max_value

    @cached_property
    def table(self) -> torch.Tensor:
        """Value of every code without its scale, FP32 [2^bits], on the CPU.

        Kept for ever, so it must not follow a default device that is in force only now.
        """
        if isinstance(self.element, Minifloat):
            positive = self.element.magnitudes()
            return torch.cat([positive, -positive])
        code = torch.arange(2**self.bits, device="cpu")
        signed = torch.where(code >= 2 ** (self.bits - 1), code - 2**self.bits, code)
        return signed.float()

    def check_scaling(self, scaling: Scaling | None) -> Scaling:
        """Return ``scaling``, or the default for None.

        Raises:
            ConfigError: The format does not store scales that way.
        """
        if scaling is None:
            return self.default_scaling
        if scaling not in self.scalings:
            raise ConfigError(
                f"format {self.name!r} has no {scaling!r} scaling: choose one of "
                f"{', '.join(self.scalings)}"
            )
        return scaling


E2M1 = Minifloat(exponent_bits=2, mantissa_bits=1, bias=1, max_value=6.0, has_nan=False)
E4M3 = Minifloat(exponent_bits=4, mantissa_bits=3, bias=7, max_value=448.0, has_nan=True)
E5M2 = Minifloat(exponent_bits=5, mantissa_bits=2, bias=15, max_value=57344.0, has_nan=True)

_FORMATS = {
    f.name: f
    for f in (
        Format("mxfp4", E2M1, 4, "e8m0", ("block",), 32, "E2M1, one E8M0 scale per 32 [OCP MX]"),
        Format(
            "nvfp4",
            E2M1,
            4,
            "e4m3",
            ("block", "tile"),
            16,
            "E2M1, one E4M3 scale per 16 or 16x16, one FP32 scale per tensor [2509.25149]",
        ),
        Format(
            "fp4-vector", E2M1, 4, "fp32", ("vector", "tensor"), 0, "E2M1, one FP32 scale per line"
        ),
        Format("fp8-e4m3", E4M3, 8, "fp32", ("tensor", "vector"), 0, "E4M3, FP32 scale [OCP FP8]"),
        Format("fp8-e5m2", E5M2, 8, "fp32", ("tensor", "vector"), 0, "E5M2, FP32 scale [OCP FP8]"),
        Format("int8", Integer(-128, 127), 8, "fp32", ("vector", "tensor"), 0, "8-bit integers"),
        Format("int4", Integer(-8, 7), 4, "fp32", ("tensor", "vector"), 0, "4-bit integers"),
        Format("int3", Integer(-4, 3), 3, "fp32", ("tensor", "vector"), 0, "3-bit integers"),
        Format("ternary", Integer(-1, 1), 2, "fp32", ("tensor", "vector"), 0, "-1, 0, +1"),
    )
}


def formats() -> tuple[str, ...]:
    """Names of all formats."""
    return tuple(_FORMATS)


def get_format(name: str | Format) -> Format:
    """Look a format up by name; a :class:`Format` is returned as it is.

    Raises:
        ConfigError: No format has this name.
    """
    if isinstance(name, Format):
        return name
    if name not in _FORMATS:
        raise unknown_name("format", name, _FORMATS)
    return _FORMATS[name]
