"""How wgrad's activation waits for backward: memory depends on it, numbers do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.precision import Precision
from megafp4.recipes import OperandSpec, Recipe, get_recipe


def saved_by(recipe: Recipe) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of one step, and the bytes kept for it besides the weight."""
    precision = Precision(seed=7, step=2, first_token=64)
    torch.manual_seed(0)
    linear = Linear(64, 128, recipe=recipe, precision=precision, layer=1)
    x = torch.randn(96 if recipe.wgrad.divisor <= 32 else 128, 64).bfloat16().requires_grad_()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor is linear.weight else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = linear(x)
    y.backward(torch.randn(y.shape).bfloat16())
    assert x.grad is not None
    assert linear.weight.grad is not None
    return [y.detach(), x.grad, linear.weight.grad], kept


def keeping(name: str, form: str) -> Recipe:
    base = get_recipe(name)
    b = replace(base.wgrad.b, saved_as=form)  # type: ignore[arg-type]
    return replace(base, wgrad=replace(base.wgrad, b=b))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-fp8", "mxfp4-rtn", "nvfp4", "fp8", "fp4"])
def test_the_numbers_do_not_depend_on_it(name: str) -> None:
    results = {form: saved_by(keeping(name, form)) for form in ("input", "operand", "packed")}
    expected, _ = results["input"]
    for found, _ in results.values():
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packed_mxfp4_is_a_quarter_of_bf16() -> None:
    tokens, width = 128, 64
    _, plain = saved_by(keeping("mxfp4", "input"))
    _, packed = saved_by(keeping("mxfp4", "packed"))
    assert plain == tokens * width * 2
    assert packed == tokens * width // 2 + tokens * width // 32


def test_it_belongs_to_the_quantized_activation_of_wgrad() -> None:
    with pytest.raises(ConfigError, match=r"unknown saved_as 'fp9': .*choose one of input, op"):
        OperandSpec("mxfp4", saved_as="fp9")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"saved_as='packed' has no meaning for a bf16 operand"):
        OperandSpec("bf16", saved_as="packed")
    base = get_recipe("mxfp4")
    a = replace(base.dgrad.a, saved_as="operand")
    with pytest.raises(ConfigError, match=r"dgrad\.a: saved_as belongs to .* wgrad\.b"):
        replace(base, dgrad=replace(base.dgrad, a=a))
