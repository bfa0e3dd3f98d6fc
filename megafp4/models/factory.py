"""Who makes the layers: the one seam between the models and the numbers they run on.

A model names every linear by block and slot. From that follow its module path
(``blocks.3.attention.qkv``) and its layer id ``16 * block + slot``, which keys the random bits of
stochastic rounding; so both are independent of the recipe and of which rank builds the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

from torch import nn

from megafp4.backends import Backend, resolve_backend
from megafp4.errors import ConfigError, unknown_name
from megafp4.linear import Linear
from megafp4.models.layers import DenseLinear, Embedding, Head, LayerNorm, RMSNorm
from megafp4.precision import Precision
from megafp4.recipes import Recipe, get_recipe
from megafp4.recipes.exemptions import matches, matching_linears

SLOTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.gate_up", "mlp.down")
"""Linears a block can hold. Append only: the position is part of every random stream."""

SLOTS_PER_BLOCK = 16
"""Layer ids reserved for one block."""

SavedAs = Literal["recipe", "input", "operand", "packed"]

_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def layer_id(block: int, slot: str) -> int:
    """Return the stream id of one linear.

    Raises:
        ConfigError: Unknown slot.
    """
    if slot not in SLOTS:
        raise unknown_name("slot", slot, SLOTS)
    return SLOTS_PER_BLOCK * block + SLOTS.index(slot)


def layer_name(block: int, slot: str) -> str:
    """Return the module path of one linear, which is also its name in every report."""
    return f"blocks.{block}.{slot}"


class LayerFactory(Protocol):
    """What a model may ask for."""

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int,
        slot: str,
        parallel: Literal["column", "row"],
        bias: bool,
        segments: tuple[int, ...] | None = None,
    ) -> nn.Module:
        """Make a linear of a block.

        Args:
            in_features: Width of the input.
            out_features: Width of the output.
            block: Index of the transformer block.
            slot: One of :data:`SLOTS`.
            parallel: The dim that tensor parallelism may cut: ``column`` outputs, ``row`` inputs.
            bias: Whether it has a bias.
            segments: Rows of the logical matrices fused in the weight, summing to
                ``out_features``; None means one matrix.
        """
        ...

    def embedding(
        self, rows: int, width: int, *, role: Literal["tokens", "positions"]
    ) -> nn.Module:
        """Make an embedding table; its ``weight`` is [rows, width]."""
        ...

    def norm(self, kind: str, width: int, eps: float) -> nn.Module:
        """Make a ``layernorm`` or ``rmsnorm`` over the last dim."""
        ...

    def sub_norm(self, width: int, eps: float) -> nn.Module:
        """Make the RMSNorm in front of a linear whose inputs tensor parallelism may cut."""
        ...

    def entry(self) -> nn.Module:
        """Make what stands between the embedding and the blocks; maps [B, S, H]."""
        ...

    def head(self, width: int, vocab: int, *, tied: bool) -> nn.Module:
        """Make the output layer.

        It is called with hidden states, the token embedding's weight and the targets or None, and
        returns logits or, given targets, the loss.
        """
        ...

    def check(self, model: nn.Module) -> None:
        """Refuse a model once all of its layers are made, if they do not fit together."""
        ...


class DenseFactory:
    """Ordinary layers: the model without any quantization machinery, the oracle of the tests."""

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int,
        slot: str,
        parallel: Literal["column", "row"],
        bias: bool,
        segments: tuple[int, ...] | None = None,
    ) -> nn.Module:
        """Make a plain linear; block, slot and segments do not matter to it."""
        return DenseLinear(in_features, out_features, bias=bias)

    def embedding(
        self, rows: int, width: int, *, role: Literal["tokens", "positions"]
    ) -> nn.Module:
        """Make an embedding table [rows, width]."""
        return Embedding(rows, width)

    def norm(self, kind: str, width: int, eps: float) -> nn.Module:
        """Make a norm that computes in FP32."""
        if kind not in _NORMS:
            raise unknown_name("norm", kind, _NORMS)
        return _NORMS[kind](width, eps=eps)

    def sub_norm(self, width: int, eps: float) -> nn.Module:
        """Make an RMSNorm."""
        return self.norm("rmsnorm", width, eps)

    def entry(self) -> nn.Module:
        """Make nothing: the blocks take what the embedding gives."""
        return nn.Identity()

    def head(self, width: int, vocab: int, *, tied: bool) -> nn.Module:
        """Make the output layer in the activations' type."""
        return Head(width, vocab, tied=tied)

    def check(self, model: nn.Module) -> None:
        """Accept the model: plain layers always fit together."""


class QuantizedFactory(DenseFactory):
    """Linears that run a recipe's three GEMMs; everything else stays ordinary.

    Args:
        recipe: Recipe of the linears, by name or as data; the blocks it exempts get ``bf16``.
        backend: Who computes, e.g. ``reference``.
        precision: Seed, step and ledger, shared by all layers of the model.
        num_layers: Blocks of the model.
        exempt: Glob patterns of the linears that get ``bf16`` as well, by name or by the name of a
            module above them: ``*.mlp.down``, ``blocks.0``.
        saved_as: Form in which the linears keep their input for wgrad, where wgrad quantizes it;
            ``recipe`` leaves it to the recipe.

    Raises:
        ConfigError: Unknown recipe, or a form that its formats do not have.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        backend: str | Backend,
        precision: Precision,
        num_layers: int,
        exempt: Sequence[str] = (),
        saved_as: SavedAs = "recipe",
    ) -> None:
        self.recipe = keep_input_as(get_recipe(recipe), saved_as)
        self.backend = resolve_backend(backend)  # one for all linears
        self.precision = precision
        self.num_layers = num_layers
        self.exempt = tuple(exempt)

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int,
        slot: str,
        parallel: Literal["column", "row"],
        bias: bool,
        segments: tuple[int, ...] | None = None,
    ) -> nn.Module:
        """Make a linear that runs the recipe, or BF16 if it is exempt."""
        return Linear(
            in_features,
            out_features,
            bias=bias,
            recipe=self.recipe_of(block, slot),
            backend=self.backend,
            precision=self.precision,
            layer=layer_id(block, slot),
            name=layer_name(block, slot),
            segments=segments,
        )

    def recipe_of(self, block: int, slot: str) -> Recipe:
        """The recipe that one linear runs."""
        name = layer_name(block, slot)
        return _recipe_of(name, block, self.recipe, self.num_layers, self.exempt)

    def check(self, model: nn.Module) -> None:
        """Refuse exemptions that a model of this factory cannot have.

        Raises:
            ConfigError: A pattern matches no linear, or recipe and patterns exempt all of them.
        """
        _check_exemptions(_linears(model), self.recipe, self.num_layers, self.exempt)


def keep_input_as(recipe: Recipe, saved_as: SavedAs) -> Recipe:
    """The recipe with another form in which linears keep their input; the numbers stay the same.

    Args:
        recipe: The recipe.
        saved_as: ``recipe`` for its own form. An input that wgrad does not quantize is kept as it
            is whatever is asked for.

    Raises:
        ConfigError: The format has no such form.
    """
    kept = recipe.wgrad.b
    if saved_as == "recipe" or not kept.quantized:
        return recipe
    return replace(recipe, wgrad=replace(recipe.wgrad, b=replace(kept, saved_as=saved_as)))


def set_recipe(
    model: nn.Module,
    recipe: str | Recipe,
    num_layers: int,
    exempt: Sequence[str] = (),
    saved_as: SavedAs = "recipe",
) -> None:
    """Switch every linear of a model built by :class:`QuantizedFactory` to another recipe.

    Args:
        model: The model.
        recipe: The new recipe; the blocks it exempts get ``bf16``.
        num_layers: Blocks of the model.
        exempt: Linears that get ``bf16`` as well, as for :class:`QuantizedFactory`.
        saved_as: Form in which the linears keep their input, as there.

    Raises:
        ConfigError: Unknown recipe, a pattern that matches no linear, exemptions that leave nothing
            to quantize, or a recipe that the weights' storage does not allow.
    """
    found = keep_input_as(get_recipe(recipe), saved_as)
    linears = _linears(model)
    _check_exemptions(linears, found, num_layers, exempt)
    for linear in linears:
        linear.set_recipe(_recipe_of(linear.op.name, _block(linear), found, num_layers, exempt))


def _linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def _block(linear: Linear) -> int:
    return linear.op.layer // SLOTS_PER_BLOCK


def _recipe_of(
    name: str, block: int, recipe: Recipe, num_layers: int, exempt: Sequence[str]
) -> Recipe:
    stays = recipe.exempts_block(block, num_layers) or any(matches(name, p) for p in exempt)
    return get_recipe("bf16") if stays else recipe


def _check_exemptions(
    linears: list[Linear], recipe: Recipe, num_layers: int, exempt: Sequence[str]
) -> None:
    slots = {SLOTS[linear.op.layer % SLOTS_PER_BLOCK] for linear in linears}
    # A pipeline's rank holds some of the blocks; exemptions are those of the whole model.
    names = {layer_name(block, slot): block for block in range(num_layers) for slot in slots}
    named = matching_linears(sorted(names), exempt, "exempt")
    if all(
        name in named or recipe.exempts_block(block, num_layers) for name, block in names.items()
    ):
        parts = [f"the linears named by exempt {' '.join(exempt)}"] if exempt else []
        if recipe.skip_first or recipe.skip_last:
            parts.append(f"the first {recipe.skip_first} and last {recipe.skip_last} blocks")
        raise ConfigError(
            f"under recipe {recipe.name!r} {' and '.join(parts)} stay BF16, which are all of a "
            f"model with {num_layers} blocks: choose a deeper model or exempt less"
        )
