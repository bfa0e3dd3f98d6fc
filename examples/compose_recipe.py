"""Compose a recipe that no paper has and measure its gradients.

Run it with ``python examples/compose_recipe.py``.
"""

from dataclasses import replace

import torch

import megafp4
from megafp4.recipes import GemmSpec, OperandSpec, Recipe

# NVFP4 everywhere; stochastic rounding and a Hadamard transform where gradients are multiplied.
clean = OperandSpec("nvfp4")
noisy = OperandSpec("nvfp4", rounding="stochastic")
mine = Recipe(
    "mine",
    fprop=GemmSpec(clean, clean),
    dgrad=GemmSpec(noisy, clean, hadamard=16),
    wgrad=GemmSpec(noisy, noisy, hadamard=16),
)
# A variant is one line: the same, but weight gradients in BF16.
careful = replace(mine, name="careful", wgrad=GemmSpec())


def weight_gradient(recipe: Recipe | str) -> torch.Tensor:
    torch.manual_seed(0)
    layer = megafp4.Linear(128, 128, recipe=recipe)
    layer(torch.randn(256, 128)).square().mean().backward()
    return layer.weight.grad


exact = weight_gradient("bf16")
for recipe in (mine, careful, "nvfp4", "mxfp4"):
    error = (weight_gradient(recipe) - exact).norm() / exact.norm()
    print(f"{getattr(recipe, 'name', recipe):<8} relative error of the weight gradient {error:.3f}")
