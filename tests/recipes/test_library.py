"""The published recipes, cast by cast, against a table written down from the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megafp4.errors import ConfigError
from megafp4.recipes import (
    DGE,
    GEMMS,
    OCC,
    GemmSpec,
    OperandSpec,
    Recipe,
    get_recipe,
    recipe_names,
)
from megafp4.recipes.library import fp4, fp4_folded, mxfp4, nvfp4

BF16 = "bf16 x bf16"
SR = "mxfp4(stochastic, x0.75)"
AWAY = "mxfp4(nearest-away)"
BACKWARD_FP8 = "fp8-e5m2 x fp8-e4m3(fprop)"
TABLE = {
    "bf16": (BF16, BF16, BF16),
    "fp8": ("fp8-e4m3 x fp8-e4m3", "fp8-e5m2 x fp8-e4m3", "fp8-e5m2 x fp8-e4m3"),
    "fp8-row": ("fp8-e4m3(vector) x fp8-e4m3(vector)",) * 3,
    "mxfp4": (BF16, f"H64 {SR} x {SR}", f"H64 {SR} x {SR}"),
    "mxfp4-fp8": (
        "fp8-e4m3 x fp8-e4m3",
        f"H64 {SR} x {SR}",
        f"H64 {SR} x mxfp4(fprop, stochastic, x0.75)",
    ),
    "mxfp4-rht": (BF16, f"H64 {AWAY} x {AWAY}", f"H64 {AWAY} x {AWAY}"),
    "mxfp4-sr": (BF16, f"{SR} x {SR}", f"{SR} x {SR}"),
    "mxfp4-rtn": (BF16, f"{AWAY} x {AWAY}", f"{AWAY} x {AWAY}"),
    "fp4": (
        "fp4-vector(nearest-up, OCC 0.99) x fp4-vector(nearest-up, DGE 5)",
        BACKWARD_FP8,
        BACKWARD_FP8,
    ),
    "fp4-folded": (
        "fp4-vector(nearest-up, OCC 0.99 folded) x fp4-vector(nearest-up, DGE 5)",
        BACKWARD_FP8,
        BACKWARD_FP8,
    ),
    "fp4-direct": (
        "fp4-vector(nearest-up) x fp4-vector(nearest-up)",
        BACKWARD_FP8,
        BACKWARD_FP8,
    ),
    "dqt8": ("int8(vector) x int8(grid)", "bf16 x bf16(grid)", "bf16 x bf16(fprop)"),
    "dqt4": ("int8(vector) x int4(grid)", "bf16 x bf16(grid)", "bf16 x bf16(fprop)"),
    "dqt3": ("int8(vector) x int3(grid)", "bf16 x bf16(grid)", "bf16 x bf16(fprop)"),
    "dqt-ternary": ("int8(vector) x ternary(grid)", "bf16 x bf16(grid)", "bf16 x bf16(fprop)"),
    "dqt8-ternary": (
        "int8(vector) x ternary(tensor, absmean)",
        "bf16 x bf16(fprop)",
        "bf16 x bf16(fprop)",
    ),
    "bitnet": (
        "int8(vector) x ternary(tensor, absmean)",
        "bf16 x bf16(fprop)",
        "bf16 x bf16(fprop)",
    ),
    "nvfp4": (
        "nvfp4 x nvfp4(tile)",
        "nvfp4(stochastic) x nvfp4(tile)",
        "H16 nvfp4(stochastic) x nvfp4",
    ),
    "int8": ("int8(vector) x int8(tensor)", "int8(vector) x int8(tensor)", BF16),
}


@pytest.mark.parametrize("name", recipe_names())
def test_casts(name: str) -> None:
    recipe = get_recipe(name)
    assert tuple(str(recipe.gemm(gemm)) for gemm in GEMMS) == TABLE[name]
    assert recipe.name == name
    assert recipe.summary
    assert recipe.paper


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(recipe_names())


@pytest.mark.parametrize(
    ("name", "gemm", "alpha"),
    [
        ("bf16", "fprop", 1),
        ("mxfp4", "fprop", 1),
        ("mxfp4", "dgrad", 16 / 9 / 64),
        ("mxfp4", "wgrad", 16 / 9 / 64),
        ("mxfp4-sr", "dgrad", 16 / 9),
        ("mxfp4-rht", "wgrad", 1 / 64),
        ("mxfp4-rtn", "wgrad", 1),
        ("nvfp4", "dgrad", 1),
        ("nvfp4", "wgrad", 1 / 16),
    ],
)
def test_alpha_is_derived(name: str, gemm: str, alpha: float) -> None:
    assert getattr(get_recipe(name), gemm).alpha == pytest.approx(alpha, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("dqt8", 8), ("dqt4", 4), ("dqt3", 3), ("dqt-ternary", 1.58), ("dqt8-ternary", 8)],
)
def test_grids(name: str, bits: float) -> None:
    grid = get_recipe(name).grid
    assert grid is not None
    assert (grid.bits, grid.range) == (bits, 1.0)


def test_only_dqt_has_grids() -> None:
    assert {n for n in recipe_names() if get_recipe(n).grid} == {n for n in TABLE if "dqt" in n}


def test_published_parameters() -> None:
    assert fp4().fprop.a.clamp == OCC(0.99, "signed", residual="exact")
    assert fp4_folded().fprop.a.clamp == OCC(0.99, "signed", residual="folded")
    assert fp4().fprop.b.estimator == DGE(5.0, 3.0)
    assert mxfp4().dgrad.signs == "random"
    assert nvfp4().wgrad.signs == "fixed"


def test_options_of_library_functions() -> None:
    assert mxfp4(g=128).dgrad.hadamard == 128
    assert fp4(k=3, alpha=0.97).fprop.b.estimator == DGE(3)
    recipe = nvfp4(skip_first=2, skip_last=8)
    assert [recipe.exempts_block(i, 62) for i in (0, 1, 2, 53, 54, 61)] == [
        True, True, False, False, True, True,
    ]  # fmt: skip


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'mxfp4_sr': did you mean 'mxfp4-sr'\?"):
        get_recipe("mxfp4_sr")


def test_a_recipe_of_ones_own() -> None:
    """Ten lines, no registration: wherever a name is taken, the object is."""
    sr = OperandSpec("mxfp4", rounding="stochastic", prescale=0.75)
    mine = Recipe(
        "all-mxfp4",
        fprop=GemmSpec(OperandSpec("mxfp4"), OperandSpec("mxfp4")),
        dgrad=GemmSpec(sr, sr, hadamard=32),
        wgrad=GemmSpec(sr, sr, hadamard=32),
        skip_last=1,
    )
    assert get_recipe(mine) is mine
    assert replace(mine, skip_last=0).exempts_block(3, 4) is False
    assert mine.exempts_block(3, 4) is True
