"""``fprop=bf16`` switches the forward GEMM of every recipe, and only that."""

from __future__ import annotations

import pytest
import torch

import megafp4
from megafp4.recipes import PrecisionSchedule, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_only_the_forward_changes(name: str, generator: torch.Generator) -> None:
    schedule = PrecisionSchedule.parse("fprop=bf16@1", 2, name)
    linear = megafp4.Linear(64, 64, False, name)
    if linear.recipe.grid:
        linear.to_grid()
    x = torch.randn(64, 64, generator=generator)
    seen = []
    for step in (0, 1):
        linear.set_recipe(schedule.recipe_at(step))
        linear.op.precision.ledger = type(linear.op.precision.ledger)()
        linear(x.clone().requires_grad_()).square().sum().backward()
        seen.append(linear.op.precision.ledger.by_gemm())
    before, after = seen
    assert after["fprop"] == {"bf16 x bf16": 1}
    assert "residual" not in after
    assert (after["dgrad"], after["wgrad"]) == (before["dgrad"], before["wgrad"])
