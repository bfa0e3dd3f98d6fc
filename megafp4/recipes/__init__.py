"""Which numbers go where: recipes as data, the published ones, and schedules between them."""

from megafp4.recipes.estimators import DGE, OCC, STE
from megafp4.recipes.library import get_recipe, recipe_names
from megafp4.recipes.recipe import (
    GEMMS,
    HIGH_PRECISION,
    Gemm,
    GemmSpec,
    GridSpec,
    OperandSpec,
    Recipe,
    Side,
    Source,
)
from megafp4.recipes.schedule import PrecisionSchedule

__all__ = [
    "DGE",
    "GEMMS",
    "HIGH_PRECISION",
    "OCC",
    "STE",
    "Gemm",
    "GemmSpec",
    "GridSpec",
    "OperandSpec",
    "PrecisionSchedule",
    "Recipe",
    "Side",
    "Source",
    "get_recipe",
    "recipe_names",
]
