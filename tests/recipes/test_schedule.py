"""Precision schedules: which recipe at which step."""

from __future__ import annotations

import pytest

from megafp4.errors import ConfigError
from megafp4.recipes import PrecisionSchedule, get_recipe


def names(text: str, steps: int = 1000, base: str | None = None) -> list[tuple[int, str]]:
    stages = PrecisionSchedule.parse(text, steps, base).stages
    return [(start, recipe.name) for start, recipe in stages]


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("mxfp4:0.9,bf16:0.1", None, [(0, "mxfp4"), (900, "bf16")]),
        (" mxfp4 : 0.25 , fp4:0.25, bf16:0.5", "fp8", [(0, "mxfp4"), (250, "fp4"), (500, "bf16")]),
        ("mxfp4@0,bf16@900", None, [(0, "mxfp4"), (900, "bf16")]),
        ("bf16@900", "fp4", [(0, "fp4"), (900, "bf16")]),
        ("", "nvfp4", [(0, "nvfp4")]),
        ("mxfp4-fp8@0,fprop=bf16@900", None, [(0, "mxfp4-fp8"), (900, "mxfp4-fp8, fprop=bf16")]),
        ("fprop=bf16@900", "nvfp4", [(0, "nvfp4"), (900, "nvfp4, fprop=bf16")]),
        ("nvfp4:0.9,fprop=bf16:0.1", None, [(0, "nvfp4"), (900, "nvfp4, fprop=bf16")]),
        ("dqt8@0,dqt8-ternary@10", None, [(0, "dqt8"), (10, "dqt8-ternary")]),
    ],
)
def test_parse(text: str, base: str | None, expected: list[tuple[int, str]]) -> None:
    assert names(text, base=base) == expected


def test_a_stage_may_last_one_step() -> None:
    assert names("mxfp4@0,bf16@999") == [(0, "mxfp4"), (999, "bf16")]
    assert names("mxfp4:0.999,bf16:0.001") == [(0, "mxfp4"), (999, "bf16")]


def test_recipe_at() -> None:
    schedule = PrecisionSchedule.parse("mxfp4@0,fp8@3,bf16@5", 10)
    found = [schedule.recipe_at(step).name for step in range(8)]
    assert found == ["mxfp4"] * 3 + ["fp8"] * 2 + ["bf16"] * 3
    assert schedule.recipe_at(10**9).name == "bf16"
    with pytest.raises(ConfigError, match="step is -1"):
        schedule.recipe_at(-1)


def test_forward_only_keeps_the_backward() -> None:
    late = PrecisionSchedule.parse("fp4@0,fprop=bf16@5", 10).recipe_at(5)
    assert late.fprop == get_recipe("bf16").fprop
    assert (late.dgrad, late.wgrad) == (get_recipe("fp4").dgrad, get_recipe("fp4").wgrad)


def test_recipes_of_ones_own() -> None:
    schedule = PrecisionSchedule(((0, get_recipe("fp8")), (7, get_recipe("bf16"))))
    assert schedule.recipe_at(7).name == "bf16"


@pytest.mark.parametrize(
    ("text", "base", "message"),
    [
        ("mxfp4:0.9,bf16:0.2", None, r"shares of a precision schedule add up to 1\.1: make it 1"),
        ("mxfp4:0.9", None, "add up to 0.9"),
        ("mxfp4:0.9,bf16", None, "has 'bf16': write e.g. "),
        ("mxfp4:x,bf16:0.1", None, "has share 'x' in 'mxfp4:x'"),
        ("mxfp4:nan,bf16:0.1", None, "has share 'nan'"),
        ("mxfp4:-0.5,bf16:1.5", None, "has share '-0.5'"),
        ("mxfp4:0.5,bf16@500", None, "has 'bf16@500'"),
        ("mxfp4@0,bf16@1.5", None, "has step '1.5'"),
        ("mxfp4@0,bf16@-5", None, "has step '-5'"),
        ("mxfp4@5,bf16@9", None, "must say which recipe runs at step 0"),
        ("", None, "must say which recipe runs at step 0"),
        ("mxfp4@0,bf16@9,fp8@9", None, r"start steps \[0, 9, 9\]: they must increase"),
        ("mxfp4@0,bf17@9", None, "unknown recipe 'bf17': did you mean"),
        ("fprop=bf16@0", None, "starts with 'fprop=bf16': name a recipe before it"),
        ("mxfp4@0,dgrad=bf16@9", None, "only fprop can be switched alone"),
        ("dqt8@0,bf16@9", None, r"\['dqt8', 'bf16'\] mixes recipes that store weights differently"),
        ("dqt8:0.5,dqt4:0.5", None, "mixes recipes that store weights differently"),
        ("@0", None, "has '@0'"),
        ("bf16@1000", "mxfp4", "'bf16' at step 1000, but a run of 1000 steps ends at step 999: st"),
        ("mxfp4@0,fprop=bf16@5000", None, "starts 'fprop=bf16' at step 5000, but a run of 1000"),
        ("mxfp4:0.9999,bf16:0.0001", None, "starts 'bf16' at step 1000, but a run of 1000 steps"),
    ],
)
def test_errors(text: str, base: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        names(text, base=base)
    assert "\n" not in str(caught.value)
