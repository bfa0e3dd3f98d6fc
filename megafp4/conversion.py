"""Turning the linears of any PyTorch model into quantized ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

from megafp4.backends import Backend, resolve_backend
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.linear import Linear
from megafp4.precision import Precision
from megafp4.recipes import Recipe, get_recipe
from megafp4.recipes.exemptions import matching_linears

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    recipe: str | Recipe,
    skip: str | Iterable[str] | None = None,
    backend: str | Backend = "reference",
    seed: int = 0,
) -> Model:
    """Replace the linears of a model, in place, by :class:`megafp4.Linear`.

    Converted are ``nn.Linear`` and the transposed ``Conv1D`` of Hugging Face's GPT-2 (whose weight
    becomes [out, in], in the state dict too). Parameters are shared with the old modules, so tied
    weights stay tied; recipes with a grid refuse them. A linear's stream id is its place among all
    linears in ``named_modules`` order, whatever is skipped. Recipes that exempt the first or last
    blocks leave the linears of those blocks as they are; a block's index is the first number in a
    linear's dotted name.

    Afterwards ``model.precision`` is the shared :class:`Precision`, whose ``step`` advances at
    every forward call in training mode (set it by hand to accumulate micro-batches). Data-parallel
    ranks must set its ``first_token`` apart, or all of them draw the same bits. Recipes with a grid
    need :mod:`megafp4.optim`: other optimizers cannot write to their weights.

    Args:
        model: Any module that holds linears.
        recipe: Name or :class:`Recipe`.
        skip: Names of linears, or of modules above them, that stay as they are; ``*`` and ``?``
            match. None skips the output head if the model has ``get_output_embeddings()``, as
            Hugging Face models do, and nothing in other models.
        backend: Name or :class:`Backend`.
        seed: Seed of stochastic rounding and Hadamard signs.

    Returns:
        ``model``.

    Raises:
        ConfigError: A skip name matches no linear; a width is not divisible by the recipe's blocks;
            nothing is left to convert; the model was converted before; a weight that would move
            to a grid is tied to another module's.
        UnsupportedError: A linear is of a subclass whose forward is unknown here, or has hooks.
    """
    found = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if "" in found:
        raise ConfigError("the model is itself a linear: use megafp4.Linear in its place")
    recipe = get_recipe(recipe)
    skipped = _skipped(model, found, skip) | set(_exempt(found, recipe))
    chosen = {name: module for name, module in found.items() if name not in skipped}
    if not chosen:
        raise ConfigError(
            f"the model has {len(found)} linears, of which {len(skipped)} are skipped: nothing is "
            "left to convert"
        )
    for name, module in chosen.items():
        _check_class(name, module)
    if recipe.grid is not None:
        _check_untied(model, chosen, recipe)

    precision = Precision(seed=seed)
    backend = resolve_backend(backend)
    shared: dict[int, nn.Parameter] = {}
    new = {
        id(module): _replacement(
            module, recipe, backend, precision, list(found).index(name), name, shared
        )
        for name, module in chosen.items()
    }
    for parent in list(model.modules()):
        # Not named_children(), which leaves out a module's second name in the same parent.
        for child_name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, child_name, new[id(child)])
    model.precision = precision  # type: ignore[assignment]  # not a submodule
    model.register_forward_pre_hook(_advance_step)
    return model


def _advance_step(model: Any, _args: Any) -> None:
    if model.training:
        model.precision.step += 1


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a linear with weight [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _check_class(name: str, module: nn.Module) -> None:
    if isinstance(module, Linear):
        raise ConfigError(f"{name!r} is a megafp4.Linear already: use its set_recipe(), or skip it")
    if type(module) is not nn.Linear and not _is_conv1d(module):
        raise UnsupportedError(
            f"{name!r} is a {type(module).__name__}, whose forward may differ from nn.Linear's: "
            "skip it, or replace it by an nn.Linear before converting"
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, table) for table in hooks) or "forward" in vars(module):
        raise UnsupportedError(
            f"{name!r} has hooks or a forward of its own (weight norm, device placement), which "
            "its replacement would lose: convert first and add them afterwards, or skip it"
        )


def _check_untied(model: nn.Module, linears: dict[str, nn.Module], recipe: Recipe) -> None:
    """Refuse weights that two modules share: on a grid each would have a copy of its own."""
    owners = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )
    for name, module in linears.items():
        if owners[id(module.weight)] > 1:
            raise ConfigError(
                f"the weight of {name!r} is tied to another module's, which recipe "
                f"{recipe.name!r} cannot keep on its grid: skip it, or untie the weight"
            )


def _skipped(
    model: Any, linears: dict[str, nn.Module], skip: str | Iterable[str] | None
) -> set[str]:
    """Names of the linears that a user, or the default, exempts."""
    if skip is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return {name for name, module in linears.items() if module is head}
    return matching_linears(list(linears), [skip] if isinstance(skip, str) else skip, "skip")


def _exempt(linears: dict[str, nn.Module], recipe: Recipe) -> Iterator[str]:
    """Names of the linears in the blocks that the recipe keeps in BF16."""
    if not recipe.skip_first and not recipe.skip_last:
        return
    blocks = {
        name: int(numbers[0])
        for name in linears
        if (numbers := [part for part in name.split(".") if part.isdecimal()])
    }
    if not blocks:
        raise ConfigError(
            f"recipe {recipe.name!r} exempts blocks, but no linear of the model has a number in "
            "its name: set skip_first and skip_last to 0 and name what to skip"
        )
    count = max(blocks.values()) + 1
    yield from (name for name, index in blocks.items() if recipe.exempts_block(index, count))


def _replacement(
    module: Any,
    recipe: Recipe,
    backend: Backend,
    precision: Precision,
    layer: int,
    name: str,
    shared: dict[int, nn.Parameter],
) -> Linear:
    """Build the quantized twin of a linear around the same parameters."""
    old = module.weight
    if _is_conv1d(module) and id(old) not in shared:
        # One new parameter per old one, so that two modules with one weight keep one weight.
        shared[id(old)] = nn.Parameter(old.detach().t().contiguous(), old.requires_grad)
    weight = shared[id(old)] if _is_conv1d(module) else old
    out_features, in_features = weight.shape
    linear = Linear(
        in_features,
        out_features,
        module.bias is not None,
        recipe,
        backend,
        precision,
        layer,
        name,
        device="meta",
    )
    linear.weight, linear.bias = weight, module.bias
    linear.train(module.training)
    if recipe.grid is not None:
        linear.to_grid()
    return linear
