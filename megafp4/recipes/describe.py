"""Recipes for human readers: the table of all of them, and one explained GEMM by GEMM."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megafp4.numerics import get_format
from megafp4.recipes.estimators import DGE
from megafp4.recipes.exemptions import NEVER_QUANTIZED
from megafp4.recipes.library import get_recipe, recipe_names
from megafp4.recipes.recipe import Gemm, GemmSpec, OperandSpec, Recipe

# GEMM -> result, (operand a, operand b), contracted dimension.
_GEMMS: dict[Gemm, tuple[str, tuple[str, str], str]] = {
    "fprop": ("y = x W^T", ("x", "W"), "in"),
    "dgrad": ("dx = dy W", ("dy", "W"), "out"),
    "wgrad": ("dW = dy^T x", ("dy", "x"), "tokens"),
}
_LINES = {
    ("x", "in"): "token",
    ("W", "in"): "output channel",
    ("dy", "out"): "token",
    ("W", "out"): "input channel",
    ("dy", "tokens"): "output channel",
    ("x", "tokens"): "input channel",
}
_ROUNDING = {
    "nearest-even": "nearest, ties to even",
    "nearest-away": "nearest, ties away from zero",
    "nearest-up": "nearest, ties up",
    "stochastic": "stochastic",
}


def recipe_table(recipes: Iterable[str | Recipe] | None = None) -> Table:
    """One row per recipe: what each GEMM multiplies.

    Args:
        recipes: Names or recipes; None means all published ones.
    """
    table = Table(
        header_style="bold",
        caption="H64: Hadamard, block 64. SR: stochastic rounding. OCC: outlier clamping and "
        "compensation. DGE: differentiable gradient estimator.",
        caption_justify="left",
    )
    for column in ("recipe", "fprop", "dgrad", "wgrad", "weights", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column in ("recipe", "paper"))
    for item in recipe_names() if recipes is None else recipes:
        recipe = get_recipe(item)
        table.add_row(
            recipe.name,
            *(_formats(spec) for spec in (recipe.fprop, recipe.dgrad, recipe.wgrad)),
            f"{recipe.grid.format} grid" if recipe.grid else "fp32",
            _folded(recipe.paper),
        )
    return table


def explain(recipe: str | Recipe) -> RenderableType:
    """Explain one recipe, GEMM by GEMM."""
    recipe = get_recipe(recipe)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("paper", recipe.paper or "none given")
    facts.add_row("weights", _storage(recipe))
    facts.add_row("exempt", _exemptions(recipe))
    if recipe.notes:
        facts.add_row("notes", recipe.notes)
    gemms = Table(header_style="bold")
    for column in ("GEMM", "operand", "quantized to", "rounding", "transform, result"):
        gemms.add_column(column, overflow="fold")
    for name in _GEMMS:
        _add_gemm(gemms, name, recipe)
    return Group(Text(f"{recipe.name}: {recipe.summary}", style="bold"), facts, gemms)


def _add_gemm(table: Table, name: Gemm, recipe: Recipe) -> None:
    result, (first, second), contracted = _GEMMS[name]
    spec = recipe.gemm(name)
    table.add_row(
        f"{name}: {result}",
        _origin(first, spec.a),
        _target(first, spec.a, contracted),
        _rounding(spec.a),
        _epilogue(name, recipe),
    )
    table.add_row(
        f"contracts over {contracted}",
        _origin(second, spec.b),
        _target(second, spec.b, contracted),
        _rounding(spec.b),
        end_section=True,
    )


def _folded(text: str) -> str:
    """Fold at spaces, so that a narrow terminal does not cut through an arXiv number."""
    return textwrap.fill(text, 13, break_long_words=False, break_on_hyphens=False)


def _formats(spec: GemmSpec) -> str:
    same = spec.a.format == spec.b.format
    text = spec.a.format if same else f"{spec.a.format} x {spec.b.format}"
    marks = [f"H{spec.hadamard}"] if spec.hadamard else []
    if "stochastic" in (spec.a.rounding, spec.b.rounding):
        marks.append("SR")
    if spec.a.clamp:
        marks.append("OCC")
    if isinstance(spec.b.estimator, DGE):
        marks.append("DGE")
    return f"{text} ({' '.join(marks)})" if marks else text


def _storage(recipe: Recipe) -> str:
    if recipe.grid is None:
        return "FP32 parameters"
    return (
        f"{recipe.grid.format} codes and a frozen FP32 step per row, no master copy; range "
        f"{recipe.grid.range:g} x mean magnitude at initialisation"
    )


def _exemptions(recipe: Recipe) -> str:
    parts = [*NEVER_QUANTIZED]
    if recipe.skip_first:
        parts.append(f"first {recipe.skip_first} blocks")
    if recipe.skip_last:
        parts.append(f"last {recipe.skip_last} blocks")
    return ", ".join(parts)


def _origin(tensor: str, operand: OperandSpec) -> str:
    origin = {
        "original": tensor,
        "fprop": f"{tensor} as fprop multiplied it",
        "grid": f"{tensor} as stored on the grid",
    }[operand.source]
    if operand.clamp is None:
        return origin
    kept = {
        "exact": "outliers multiplied in BF16",
        "folded": "outliers put back as E4M3",
        "none": "outliers dropped",
    }[operand.clamp.residual]
    return (
        f"{origin}, clamped per token at quantile {operand.clamp.alpha:g} ({operand.clamp.mode}), "
        + kept
    )


def _target(tensor: str, operand: OperandSpec, contracted: str) -> str:
    if not operand.quantized:
        return operand.format
    fmt = get_format(operand.format)
    sharing = {
        "block": f"one scale per {fmt.block} along {contracted}",
        "tile": f"one scale per {fmt.block}x{fmt.block} tile",
        "vector": f"one scale per {_LINES[tensor, contracted]}",
        "tensor": "one scale per tensor",
        None: "",
    }[operand.shared_scale]
    if operand.source == "grid":
        sharing = "one step per row"
    mean = ", from the mean magnitude" if operand.statistic == "absmean" else ""
    return f"{operand.format}\n{sharing}{mean}"


def _rounding(operand: OperandSpec) -> str:
    if not operand.quantized or operand.source == "grid":
        return ""
    text = _ROUNDING[operand.rounding]
    if operand.rounding == "stochastic":
        text += f" ({operand.dither_bits} random bits)"
    if operand.prescale != 1:
        text += f"\nafter x {operand.prescale:g}"
    return text


def _epilogue(name: Gemm, recipe: Recipe) -> str:
    spec, dge = recipe.gemm(name), recipe.fprop.b.estimator
    parts = []
    if spec.hadamard:
        parts.append(f"a, b through Hadamard of block {spec.hadamard}, {spec.signs} signs")
    if spec.alpha != 1:
        parts.append(f"FP32 result x {_alpha(spec)}")
    if name == "wgrad" and isinstance(dge, DGE):
        parts.append(f"dW x DGE slope (k={dge.k:g}, cap={dge.cap:g})")
    return "\n".join(parts)


def _alpha(spec: GemmSpec) -> str:
    prescales = spec.a.prescale * spec.b.prescale
    text = "16/9" if prescales == 9 / 16 else f"{1 / prescales:g}"
    return f"{text} / {spec.hadamard}" if spec.hadamard else text
