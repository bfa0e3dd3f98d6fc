"""A linear inside of torch.compile: outside of its graphs, and the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from megafp4.linear import Linear
from megafp4.precision import Precision

STEPS = 4


class Block(nn.Module):
    """Two linears and what lies between them."""

    def __init__(self, recipe: str, precision: Precision) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = Linear(64, 128, recipe=recipe, precision=precision, layer=0)
        self.down = Linear(128, 64, recipe=recipe, precision=precision, layer=1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return made


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4"])
def test_a_compiled_block_computes_the_same_and_is_compiled_once(recipe: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    precision, counter = Precision(seed=1), CompileCounter()
    block, x = Block(recipe, precision), torch.randn(64, 64)
    compiled = torch.compile(block, backend=counter)

    def step(model: nn.Module) -> list[Tensor]:
        block.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in block.parameters() if p.grad is not None)]

    for precision.step in range(STEPS):
        expected = step(block)
        found = step(compiled)
        assert len(found) == len(expected) == 7
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Before, between and after the linears; one more graph would be one that depends on the step.
    assert counter.frame_count == 3
