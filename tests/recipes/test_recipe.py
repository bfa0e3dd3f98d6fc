"""Contradictions are refused where a recipe is built, each in one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch

import megafp4
from megafp4.errors import ConfigError
from megafp4.recipes import DGE, OCC, GemmSpec, GridSpec, OperandSpec, Recipe, get_recipe

MX = OperandSpec("mxfp4")
E2M1 = OperandSpec("fp4-vector")
GRID = OperandSpec("int8", source="grid")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OperandSpec("mxfp5"), "unknown operand format 'mxfp5': did you mean 'mxfp4'"),
        (lambda: OperandSpec("mxfp4", scaling="vector"), "'mxfp4' has no 'vector' scaling"),
        (lambda: OperandSpec("mxfp4", rounding="nearest"), "unknown rounding 'nearest'"),
        (lambda: OperandSpec("int8", statistic="mean"), "unknown statistic 'mean'"),
        (lambda: OperandSpec("int8", source="forward"), "unknown operand source 'forward'"),
        (lambda: OperandSpec("mxfp4", dither_bits=7), "dither_bits is 7: choose one of"),
        (lambda: OperandSpec("mxfp4", prescale=0.0), r"prescale is 0.0: give a factor in \(0, 1\]"),
        (lambda: OperandSpec("mxfp4", prescale=1.5), "prescale is 1.5"),
        (lambda: OperandSpec("bf16", rounding="stochastic"), "rounding='stochastic' has no"),
        (lambda: OperandSpec("bf16", prescale=0.75), "prescale=0.75 has no meaning for a bf16"),
        (lambda: OperandSpec("fp32", scaling="tensor"), "scaling='tensor' has no meaning"),
        (lambda: OperandSpec("bf16", clamp=OCC()), "clamp=.* has no meaning for a bf16 operand"),
        (lambda: replace(GRID, rounding="stochastic"), "source 'grid' is used as stored"),
        (lambda: OperandSpec("mxfp4", estimator=DGE()), "DGE needs E2M1 codes with one scale per"),
        (lambda: OperandSpec("int8", estimator=DGE()), "not 'int8': choose format 'fp4-vector'"),
        (lambda: replace(E2M1, estimator=DGE(), prescale=0.5), "drop prescale=0.5"),
        (lambda: DGE(k=0.5), "DGE has k=0.5 and cap=3.0: give k >= 1"),
        (lambda: DGE(k=math.nan), "DGE has k=nan and cap=3.0: .* both finite"),
        (lambda: DGE(cap=math.inf), "DGE has k=5.0 and cap=inf: .* both finite"),
        (lambda: OCC(alpha=0.3), "OCC has alpha=0.3: give a quantile between 0.5 and 1"),
        (lambda: OCC(mode="both"), "unknown OCC mode 'both'"),
        (lambda: OCC(residual=True), "unknown OCC residual 'True'"),
        (
            lambda: OperandSpec("int8", clamp=OCC(residual="folded")),
            "folds outliers into E2M1 codes with one scale per token, not int8",
        ),
        (
            lambda: GemmSpec(replace(E2M1, clamp=OCC(residual="folded")), E2M1, hadamard=16),
            "operand a folds outliers, which a Hadamard transform would spread",
        ),
        (lambda: GridSpec(5), "no weight grid has 5 bits"),
        (lambda: GridSpec(8, range=0), "grid range is 0: give a positive"),
        (lambda: GridSpec(8, range=math.inf), "grid range is inf: give a positive, finite factor"),
        (lambda: GridSpec(8, range=math.nan), "grid range is nan: give a positive, finite factor"),
        (lambda: GemmSpec(MX, MX, hadamard=48), "Hadamard block is 48: give a power of two"),
        (lambda: GemmSpec(MX, MX, hadamard=16), "16 is not a multiple of the block of mxfp4, 32"),
        (lambda: GemmSpec(MX, hadamard=64), "operand b of a GEMM with a Hadamard trans.* is bf16"),
        (lambda: GemmSpec(MX, GRID, hadamard=64), "operand b .* is used as stored: quantize both"),
        (lambda: GemmSpec(MX, MX, signs="none"), "unknown Hadamard signs 'none'"),
        (lambda: Recipe("r", skip_last=-1), "recipe 'r' skips 0 first and -1 last blocks"),
        (lambda: Recipe("r", fprop=GemmSpec(replace(E2M1, estimator=DGE()))), "fprop.a: DGE b"),
        (lambda: Recipe("r", wgrad=GemmSpec(replace(E2M1, clamp=OCC()))), "wgrad.a: OCC belongs"),
        (lambda: Recipe("r", dgrad=GemmSpec(replace(MX, source="fprop"))), "only dgrad.b and"),
        (lambda: Recipe("r", fprop=GemmSpec(b=replace(MX, source="fprop"))), "only dgrad.b and wg"),
        (lambda: Recipe("r", fprop=GemmSpec(b=GRID)), "source 'grid' is for the weight of"),
        (lambda: Recipe("r", wgrad=GemmSpec(b=GRID), grid=GridSpec(8)), "wgrad.b: source 'grid'"),
        (lambda: Recipe("r", fprop=GemmSpec(b=GRID), grid=GridSpec(4)), "the grid stores int4, so"),
        (
            lambda: replace(get_recipe("mxfp4-fp8"), fprop=GemmSpec(MX, MX, hadamard=32)),
            "wgrad.b: fprop's Hadamard transform rotates its operands",
        ),
    ],
)  # fmt: skip
def test_contradictions(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_unusual_but_meaningful_is_allowed() -> None:
    """Nearest rounding with 3/4, stochastic without it, one operand stochastic only."""
    nearest = OperandSpec("mxfp4", prescale=0.75)
    clipping = OperandSpec("mxfp4", rounding="stochastic")
    assert GemmSpec(nearest, clipping, 64).alpha == pytest.approx(4 / 3 / 64)


def test_divisor_and_length() -> None:
    spec = GemmSpec(MX, OperandSpec("nvfp4"), 64)
    recipe = Recipe("r", wgrad=spec)
    assert spec.divisor == 64
    assert GemmSpec(MX, OperandSpec("nvfp4")).divisor == 32
    assert GemmSpec(E2M1, E2M1).divisor == 1
    recipe.check_length("wgrad", 128, "l")
    recipe.check_length("wgrad", 0, "l")
    with pytest.raises(ConfigError) as caught:
        recipe.check_length("wgrad", 96, "blocks.0.mlp")
    assert str(caught.value) == (
        "wgrad of 'blocks.0.mlp' contracts over 96 tokens, not divisible by 64 (block 32 of mxfp4, "
        "block 16 of nvfp4, Hadamard block 64): choose micro-batch x sequence length to be a "
        "multiple"
    )
    with pytest.raises(ConfigError, match=r"^wgrad contracts over 96 tokens, not divisible by 64 "):
        recipe.check_length("wgrad", 96)


@pytest.mark.parametrize("part", [Recipe, GemmSpec, OperandSpec, GridSpec, DGE, OCC])
def test_every_choice_is_read_by_the_code_that_computes(part: type) -> None:
    """A field that only the table of recipes knows would promise what nothing keeps."""
    package = Path(megafp4.__file__).parent
    files = ("linear.py", "linear_op.py", "conversion.py", "recipes/cast.py")
    code = "".join((package / name).read_text(encoding="utf-8") for name in files)
    # These two are read through Recipe.exempts_block; the rest says where a recipe comes from.
    elsewhere = {"skip_first", "skip_last", "summary", "paper", "notes"}
    names = {field.name for field in fields(part)} - elsewhere
    assert [name for name in names if not re.search(rf"\.{name}\b", code)] == []


def test_recipes_are_values() -> None:
    recipe = get_recipe("fp4")
    assert recipe == get_recipe("fp4")
    assert hash(recipe) == hash(get_recipe("fp4"))
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


def test_operand_properties() -> None:
    assert (OperandSpec("bf16").dtype, OperandSpec("fp32").dtype) == (torch.bfloat16, torch.float32)
    assert (MX.shared_scale, E2M1.shared_scale, OperandSpec().shared_scale) == (
        "block",
        "vector",
        None,
    )
    assert OperandSpec("nvfp4", scaling="tile").block == 16
