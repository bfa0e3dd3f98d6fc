"""The table of recipes and the explanation of one, as a reader sees them."""

from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from megafp4.recipes import GemmSpec, OperandSpec, Recipe, get_recipe, recipe_names
from megafp4.recipes.describe import explain, recipe_table
from megafp4.recipes.library import nvfp4


def rendered(item: RenderableType, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(item)
    return capture.get()


def test_table_has_every_recipe() -> None:
    lines = rendered(recipe_table()).splitlines()
    for name in recipe_names():
        assert (
            sum(f" {name} " in line.split("\u2502")[1] for line in lines if "\u2502" in line) == 1
        )


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_arxiv_number_is_cut_in_two(width: int) -> None:
    lines = rendered(recipe_table(), width).splitlines()
    assert max(map(len, lines)) <= width
    for recipe in map(get_recipe, recipe_names()):
        (row,) = (line for line in lines if line.startswith(f"│ {recipe.name} "))
        assert recipe.paper.split()[0] in row.split("│")[-2]
    assert sum("│ fp4-vector" in line for line in lines) == 3  # nor is anything else


def test_table_of_chosen_recipes() -> None:
    mine = Recipe("mine", fprop=GemmSpec(OperandSpec("int8"), OperandSpec("int4")))
    shown = rendered(recipe_table(["bf16", mine]))
    assert "mine" in shown
    assert "int8 x int4" in shown
    assert "nvfp4" not in shown


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_explained(name: str) -> None:
    shown = rendered(explain(name))
    recipe = get_recipe(name)
    for expected in (recipe.summary, "fprop: y = x W^T", "dgrad: dx = dy W", "wgrad: dW = dy^T x"):
        assert expected in shown
    for _, _, spec in recipe.operands():
        assert spec.format in shown


def test_explanation_of_mxfp4() -> None:
    shown = rendered(explain("mxfp4"))
    for expected in (
        "one scale per 32 along out",
        "one scale per 32 along tokens",
        "stochastic (8 random bits)",
        "after x 0.75",
        "Hadamard of block 64, random signs",
        "FP32 result x 16/9 / 64",
        "2502.20586, algorithm 3",
        "embedding, norms, head",
    ):
        assert expected in shown


def test_explanation_of_fp4() -> None:
    shown = rendered(explain("fp4"), width=300)
    for expected in (
        "clamped per token at quantile 0.99 (signed)",
        "outliers multiplied in BF16",
        "one scale per token",
        "one scale per output channel",
        "nearest, ties up",
        "dW x DGE slope (k=5, cap=3)",
        "W as fprop multiplied it",
    ):
        assert expected in shown


def test_explanation_of_grid_and_exemptions() -> None:
    assert "int8 codes and a frozen FP32 step per row, no master copy" in rendered(explain("dqt8"))
    assert "W as stored on the grid" in rendered(explain("dqt8"))
    assert "first 2 blocks, last 8 blocks" in rendered(explain(nvfp4(2, 8)))
    assert "FP32 result x 1 / 16" in rendered(explain("nvfp4"))
