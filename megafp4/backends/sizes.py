"""Sizes that a recipe or a backend cannot multiply, refused before any work is done."""

from __future__ import annotations

import torch

from megafp4.backends.base import Backend
from megafp4.errors import UnsupportedError
from megafp4.recipes import GEMMS, Gemm, Recipe


def check_layer(
    recipe: Recipe,
    backend: Backend,
    shape: torch.Size,
    segments: tuple[int, ...] | None,
    layer: str,
) -> None:
    """Refuse the widths of a linear that recipe or backend cannot divide.

    Args:
        recipe: The recipe.
        backend: Who multiplies.
        shape: Of the weight, [out, in].
        segments: Row counts of the matrices fused in it.
        layer: Name of the linear, for the error.

    Raises:
        ConfigError: See :meth:`megafp4.Recipe.check_layer`.
        UnsupportedError: The backend multiplies the formats of a GEMM in multiples of more.
    """
    out_features, in_features = shape
    recipe.check_layer(in_features, out_features, segments, layer)
    for gemm in GEMMS:
        for count, what in ((in_features, "input"), (out_features, "output")):
            advice = "pad the layer, exempt it"
            _check_multiple(recipe, backend, gemm, count, f"{what} features", advice, layer)


def check_tokens(recipe: Recipe, backend: Backend, tokens: int, layer: str | None = None) -> None:
    """Refuse a number of tokens that wgrad cannot contract over; no layer means all of them.

    Raises:
        ConfigError: See :meth:`megafp4.Recipe.check_length`.
        UnsupportedError: As :func:`check_layer`.
    """
    recipe.check_length("wgrad", tokens, layer)
    advice = "change micro-batch or sequence length"
    _check_multiple(recipe, backend, "wgrad", tokens, "tokens", advice, layer)


def _check_multiple(
    recipe: Recipe,
    backend: Backend,
    gemm: Gemm,
    count: int,
    what: str,
    advice: str,
    layer: str | None,
) -> None:
    a, b = recipe.gemm(gemm).a.format, recipe.gemm(gemm).b.format
    multiple = backend.multiple(a, b)
    if count % multiple:
        who = "a linear" if layer is None else repr(layer)
        raise UnsupportedError(
            f"{who} has {count} {what}, and backend {backend.name!r} multiplies {a} x {b} ({gemm}) "
            f"in multiples of {multiple}: {advice} or choose another backend"
        )
