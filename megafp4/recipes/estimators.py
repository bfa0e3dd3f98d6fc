"""Estimators of a recipe, as data: derivatives of the rounding, and what is done to outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megafp4.errors import ConfigError, unknown_name

Residual = Literal["exact", "folded", "none"]
"""What becomes of the outliers that OCC clamps: ``exact`` multiplies them by the weight as it is,
in BF16, in a GEMM of their own; ``folded`` puts them back into the quantized operand as E4M3
values, so that they meet the quantized weight; ``none`` drops them."""


@dataclass(frozen=True)
class STE:
    """Straight-through estimator: the weight gradient ignores the rounding."""


@dataclass(frozen=True)
class DGE:
    """Differentiable gradient estimator: dW *= min(|u|^(1/k - 1) / k, cap) [2501.17116, eq. 8]."""

    k: float = 5.0
    cap: float = 3.0

    def __post_init__(self) -> None:
        if not (1 <= self.k < math.inf and 0 < self.cap < math.inf):
            raise ConfigError(
                f"DGE has k={self.k} and cap={self.cap}: give k >= 1 and cap > 0, both finite"
            )


@dataclass(frozen=True)
class OCC:
    """Outlier clamping and compensation of activations, per token [2501.17116, section 3.2]."""

    alpha: float = 0.99
    """Quantile beyond which a token's features are clamped."""
    mode: Literal["signed", "magnitude"] = "signed"
    """``signed``: quantiles of the values, as published; ``magnitude``: of the magnitudes."""
    residual: Residual = "exact"
    """What becomes of what was cut off."""

    def __post_init__(self) -> None:
        if not 0.5 < self.alpha < 1.0:
            raise ConfigError(f"OCC has alpha={self.alpha}: give a quantile between 0.5 and 1")
        if self.mode not in ("signed", "magnitude"):
            raise unknown_name("OCC mode", self.mode, ("signed", "magnitude"))
        if self.residual not in get_args(Residual):
            raise unknown_name("OCC residual", str(self.residual), get_args(Residual))
