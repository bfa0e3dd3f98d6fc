"""The parts of 2501.17116 one by one: tensor-wise, token- and channel-wise, OCC, DGE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import megafp4
from megafp4.recipes import DGE, OCC, GemmSpec, OperandSpec, Recipe, get_recipe

DIRECT = get_recipe("fp4-direct")


def forward(a: OperandSpec, b: OperandSpec, name: str) -> Recipe:
    return replace(DIRECT, name=name, fprop=GemmSpec(a, b))


A, B = DIRECT.fprop.a, DIRECT.fprop.b
LADDER = {
    "bf16": get_recipe("bf16"),
    "fp8": get_recipe("fp8"),
    "occ": forward(replace(A, clamp=OCC()), B, "occ"),
    "fine": DIRECT,
    "coarse": forward(replace(A, scaling="tensor"), replace(B, scaling="tensor"), "coarse"),
}


@pytest.fixture
def data(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of very different size, channels of very different size, one outlier channel."""
    x = torch.randn(128, 512, generator=generator)
    x *= torch.exp(torch.randn(128, 1, generator=generator))
    x[:, ::256] *= 20
    w = torch.randn(96, 512, generator=generator) * 0.05
    w *= torch.exp(0.5 * torch.randn(96, 1, generator=generator))
    return x, w, torch.randn(128, 96, generator=generator)


def run(recipe: Recipe, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and weight gradient."""
    x, w, dy = data
    linear = megafp4.Linear(512, 96, False, recipe)
    with torch.no_grad():
        linear.weight.copy_(w)
    y = linear(x)
    y.backward(dy)
    assert linear.weight.grad is not None
    return y.detach(), linear.weight.grad


def test_each_step_of_the_ladder_lowers_the_error(data: tuple[Tensor, Tensor, Tensor]) -> None:
    """The paper's order [table 1 and figure 6]: coarse scales, fine ones, OCC, FP8, BF16."""
    x, w, _ = data
    exact = (x.double() @ w.double().T).float()
    errors = [float((run(r, data)[0] - exact).norm() / exact.norm()) for r in LADDER.values()]
    assert errors == sorted(errors)
    assert errors[2] < 0.6 * errors[3]  # OCC on an outlier channel
    assert errors[1] < 0.5 * errors[2]  # FP8's three mantissa bits


def test_dge_changes_the_weight_gradient_and_nothing_else(
    data: tuple[Tensor, Tensor, Tensor],
) -> None:
    fine = LADDER["fine"]
    estimated = forward(A, replace(B, estimator=DGE()), "dge")
    (y, dw), (y_dge, dw_dge) = run(fine, data), run(estimated, data)
    assert torch.equal(y, y_dge)
    slope = dw_dge / dw
    finite = slope[dw != 0]
    # 0.593 is the mean of the capped slope: divide by it to compare direction without shrinkage.
    assert float(finite.mean()) == pytest.approx(0.593, abs=0.02)
    assert float(finite.min()) == pytest.approx(0.2, abs=1e-3)
    assert float(finite.max()) == pytest.approx(3.0, rel=1e-5)
    cosine = torch.cosine_similarity(dw.flatten(), dw_dge.flatten(), 0)
    assert 0.5 < float(cosine) < 0.9
