"""megafp4: train large language models in 4-bit arithmetic.

Importing the package loads nothing heavy; the public names below are looked up on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megafp4.conversion import convert
    from megafp4.linear import Linear
    from megafp4.numerics.formats import formats
    from megafp4.numerics.quantize import quantize
    from megafp4.precision import Precision
    from megafp4.recipes import Recipe, get_recipe, recipe_names

__all__ = [
    "Linear",
    "Precision",
    "Recipe",
    "__version__",
    "convert",
    "formats",
    "get_recipe",
    "quantize",
    "recipe_names",
]

_HOMES = {
    "Linear": "megafp4.linear",
    "Precision": "megafp4.precision",
    "Recipe": "megafp4.recipes",
    "convert": "megafp4.conversion",
    "formats": "megafp4.numerics.formats",
    "get_recipe": "megafp4.recipes",
    "quantize": "megafp4.numerics.quantize",
    "recipe_names": "megafp4.recipes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megafp4' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
