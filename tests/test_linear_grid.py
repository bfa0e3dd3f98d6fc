"""Linears whose weight lives on a grid: storage, state dict, moves, gradients."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch

import megafp4
from megafp4.errors import ConfigError
from megafp4.numerics import Key
from megafp4.recipes import GridSpec, get_recipe

GRID_RECIPES = [n for n in megafp4.recipe_names() if get_recipe(n).grid]


def on_grid(recipe: str = "dqt8") -> megafp4.Linear:
    linear = megafp4.Linear(64, 96, recipe=recipe, segments=(32, 64), name="lin")
    linear.to_grid()
    return linear


@pytest.mark.parametrize("recipe", GRID_RECIPES)
def test_codes_are_the_only_copy(recipe: str) -> None:
    linear = on_grid(recipe)
    assert linear.weight.untyped_storage().nbytes() == 4
    assert linear.weight.shape == (96, 64)
    assert set(linear.state_dict()) == {"bias", "weight_codes", "weight_scale"}
    assert linear.state_dict()["weight_codes"] is not None
    grid = linear.grid
    assert grid is not None
    assert linear.weight.grid is grid  # type: ignore[attr-defined]
    assert linear.weight_codes is grid.codes
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("recipe", GRID_RECIPES)
def test_gradient_arrives_dense_and_accumulates(recipe: str, generator: torch.Generator) -> None:
    linear = on_grid(recipe)
    x = torch.randn(8, 64, generator=generator)
    linear(x).square().sum().backward()
    assert linear.weight.grad is not None
    once = linear.weight.grad.clone()
    assert once.shape == (96, 64)
    linear(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, 2 * once)


def test_an_update_is_seen_in_the_same_step(generator: torch.Generator) -> None:
    linear = on_grid()
    grid = linear.grid
    assert grid is not None
    x = torch.randn(8, 64, generator=generator)
    before = linear(x)
    grid.store(-grid.decode(), Key(1, 0, 0, "update", "b"))
    after = linear(x)
    torch.testing.assert_close(after - linear.bias, linear.bias - before, rtol=0.02, atol=0.02)


def test_state_dict_round_trip(generator: torch.Generator) -> None:
    linear, other = on_grid(), on_grid()
    x = torch.randn(8, 64, generator=generator)
    assert not torch.equal(linear(x), other(x))
    assert other.load_state_dict(linear.state_dict()) == ([], [])
    assert torch.equal(linear(x), other(x))


def test_state_dict_of_an_ordinary_linear_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_codes"):
        on_grid().load_state_dict(megafp4.Linear(64, 96).state_dict())


def test_deepcopy_is_independent(generator: torch.Generator) -> None:
    linear = on_grid()
    twin = copy.deepcopy(linear)
    x = torch.randn(8, 64, generator=generator)
    expected = linear(x)
    assert torch.equal(twin(x), expected)
    assert twin.grid is twin.op.grid is twin.weight.grid  # type: ignore[attr-defined]
    assert twin.grid is not None
    twin.grid.store(-twin.grid.decode(), Key(1, 0, 0, "update", "b"))
    assert torch.equal(linear(x), expected)
    assert not torch.equal(twin(x), expected)


def test_change_of_dtype_keeps_codes_and_steps(generator: torch.Generator) -> None:
    linear = on_grid()
    x = torch.randn(8, 64, generator=generator)
    expected = linear(x)
    weight, scale = linear.weight, linear.weight_scale.clone()
    linear.double().bfloat16().float()
    assert linear.weight is weight
    assert weight.untyped_storage().nbytes() == 4
    assert torch.equal(linear.weight_scale, scale)
    assert linear.grid is not None
    assert linear.grid.scale is linear.weight_scale
    assert linear.grid.codes is linear.weight_codes
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=2**-8)  # the bias was rounded


def test_moving_to_other_memory_keeps_the_grid_together(generator: torch.Generator) -> None:
    linear = on_grid()
    x = torch.randn(8, 64, generator=generator)
    expected = linear(x)
    old = linear.weight_codes
    linear._apply(torch.clone)
    assert linear.weight_codes is not old
    assert linear.grid is not None
    assert linear.grid.codes is linear.weight_codes
    linear.grid.store(-linear.grid.decode(), Key(1, 0, 0, "update", "b"))
    assert not torch.equal(linear(x), expected)


def test_recipes_with_another_storage_are_refused() -> None:
    linear = on_grid("dqt8")
    linear.set_recipe("dqt8-ternary")
    with pytest.raises(ConfigError, match=r"'lin' holds its weight on the grid of 'dqt8-ternary'"):
        linear.set_recipe("bf16")
    with pytest.raises(ConfigError, match="does not share"):
        linear.set_recipe("dqt4")
    with pytest.raises(ConfigError, match=r"recipe 'bf16' of 'layer 0' has no grid"):
        megafp4.Linear(64, 64).to_grid()


def test_a_wider_range_is_a_field() -> None:
    """Three mean magnitudes: fewer weights saturate, the step is three times coarser."""
    wide = replace(get_recipe("dqt8"), grid=GridSpec(8, range=3.0))
    torch.manual_seed(0)
    narrow_linear = on_grid()
    torch.manual_seed(0)
    linear = megafp4.Linear(64, 96, recipe=wide, segments=(32, 64))
    linear.to_grid()
    torch.testing.assert_close(linear.weight_scale, 3 * narrow_linear.weight_scale)


def test_loading_by_assignment_reaches_the_grid(generator: torch.Generator) -> None:
    """load_state_dict(assign=True) replaces the buffers: the grid must follow them."""
    linear, other = on_grid(), on_grid()
    x = torch.randn(8, 64, generator=generator)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert other.load_state_dict(state, assign=True) == ([], [])
    assert other.grid is not None
    assert other.grid.codes is other.weight_codes is state["weight_codes"]
    assert other.grid.scale is other.weight_scale
    assert other.weight.grid is other.grid  # type: ignore[attr-defined]
    assert torch.equal(other(x), linear(x))
    other.grid.store(-other.grid.decode(), Key(1, 0, 0, "update", "b"))
    assert not torch.equal(other(x), linear(x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_weight_cannot_take_the_place_of_the_grid(assign: bool) -> None:
    linear = on_grid()
    dense = {"weight": torch.ones(96, 64)}
    missing, unexpected = linear.load_state_dict(dense, strict=False, assign=assign)
    assert missing == ["bias", "weight_codes", "weight_scale"]
    assert unexpected == ["weight"]
    assert linear.weight.grid is linear.grid  # type: ignore[attr-defined]
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


def test_pickles_keep_the_parameter_on_its_grid() -> None:
    """A plain parameter would lose its grid when copied, and train a placeholder of NaN."""
    linear = on_grid()
    linear.weight.requires_grad_(False)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (loaded, copy.deepcopy(loaded)):
        assert twin.weight.grid is twin.grid is twin.op.grid is not linear.grid
        assert twin.weight_codes is twin.grid.codes
        assert twin.weight.untyped_storage().nbytes() == 4
        assert not twin.weight.requires_grad


def test_a_frozen_weight_stays_frozen() -> None:
    linear = megafp4.Linear(64, 96, recipe="dqt8")
    linear.weight.requires_grad_(False)
    linear.to_grid()
    assert not linear.weight.requires_grad
