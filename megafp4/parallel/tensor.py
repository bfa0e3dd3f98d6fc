"""Linears that hold some of the outputs, or some of the inputs, of the whole linear.

What they compute and how they talk is in :mod:`megafp4.parallel.gemms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megafp4.backends import Backend
from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.numerics import Slice
from megafp4.numerics.grid import GridWeight
from megafp4.numerics.qtensor import codes_per_byte
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Cut, Layout, check_cut
from megafp4.parallel.gemms import Kind, Shard, ShardedOp
from megafp4.precision import Precision
from megafp4.recipes import Gemm, Recipe, get_recipe


class _ShardedLinear(Linear):
    """What column- and row-parallel linears share; see their docstrings."""

    kind: Kind

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group,
        bias: bool = True,
        recipe: str | Recipe = "bf16",
        backend: str | Backend = "reference",
        precision: Precision | None = None,
        layer: int = 0,
        name: str = "",
        segments: Sequence[int] | None = None,
        sequence: bool = False,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        used, name = get_recipe(recipe), name or f"layer {layer}"
        whole = None if segments is None else tuple(segments)
        used.check_layer(in_features, out_features, whole, name)
        column = self.kind == "column"
        cut = Cut((whole or (out_features,)) if column else (in_features,), group.size)
        check_cut(used, self._cut_gemm, cut, name)
        super().__init__(
            in_features if column else cut.length,
            cut.length if column else out_features,
            bias,
            used,
            backend,
            precision,
            layer,
            name,
            cut.shares if whole and column else whole,
            device,
            dtype,
        )
        self.shard = Shard(self.kind, cut, group, sequence, reduce_dtype)
        plain = self.op
        self.op = ShardedOp(
            recipe=used,
            backend=plain.backend,
            precision=plain.precision,
            layer=layer,
            name=name,
            segments=plain.segments,
            shard=self.shard,
        )

    @property
    def layouts(self) -> dict[str, Layout]:
        """How each sharded entry of the state dict is cut."""
        cut, rank = self.shard.cut, self.shard.group.rank
        dim = 0 if self.kind == "column" else 1
        found = {"weight": Layout(cut, dim, rank)}
        if self.grid is not None:
            per_byte = 1 if self.kind == "column" else codes_per_byte(self.grid.format)
            packed = Cut(tuple(n // per_byte for n in cut.segments), cut.size)
            found["weight_codes"] = Layout(packed, dim, rank)
            if self.kind == "column":
                found["weight_scale"] = found["weight"]
        if self.kind == "column" and self.bias is not None:
            found["bias"] = found["weight"]
        return found

    @property
    def partial_gradients(self) -> tuple[str, ...]:
        """Parameters whose gradients are still to be summed over the group."""
        own_tokens = self.kind == "row" and self.shard.sequence and self.bias is not None
        return ("bias",) if own_tokens else ()

    def set_recipe(self, recipe: str | Recipe) -> None:
        """Switch to another recipe, between steps; see :meth:`Linear.set_recipe`."""
        check_cut(get_recipe(recipe), self._cut_gemm, self.shard.cut, self.op.name)
        super().set_recipe(recipe)

    def to_grid(self) -> None:
        """Move the weight onto the recipe's grid, whose steps are those of the whole weight.

        Raises:
            ConfigError: The recipe has no grid.
        """
        spec = self.recipe.grid
        if spec is None:
            raise ConfigError(f"recipe {self.recipe.name!r} of {self.op.name!r} has no grid")
        first, dim = self.shard.origin, 0 if self.kind == "column" else 1
        self.op.grid = GridWeight.from_dense(
            self.weight,
            spec.bits,
            spec.range,
            self.op.segments,
            self.op.layer,
            (first, 0) if dim == 0 else (0, first),
            Slice(self.shard.group, dim),
        )
        self.hold_grid(self.op.grid)

    def _forward(self, x: Tensor) -> Tensor:
        if self.kind == "row" and self.shard.sequence and torch.is_grad_enabled():
            # wgrad's dy arrives, and is cast, in runs of tokens, as a column's x does.
            tokens = x.shape[:-1].numel() // self.shard.group.size
            self.recipe.check_length("wgrad", tokens, self.op.name)
        y = super()._forward(x.flatten(0, -2))
        return y.view(*x.shape[:-2], -1, self.out_features)

    @property
    def _cut_gemm(self) -> Gemm:
        """The GEMM that contracts over the dim that is cut."""
        return "dgrad" if self.kind == "column" else "fprop"

    def extra_repr(self) -> str:
        """Show the share."""
        return f"{super().extra_repr()}, {self.kind} 1/{self.shard.group.size}"


class ColumnParallelLinear(_ShardedLinear):
    """A :class:`Linear` that holds 1/tp of the outputs: of each segment, if it has several.

    It maps x [..., S, in] to [..., S, out / tp]; with ``sequence``, x is [..., S / tp, in], the
    rank's run of all tokens.

    Args:
        in_features, out_features, bias, recipe, backend, layer, name, segments, device, dtype: As
            in :class:`Linear`, of the whole linear.
        group: The tensor-parallel ranks.
        precision: Shared by the linears of a model.
        sequence: Whether tokens are cut where features are not.
        reduce_dtype: Type in which partial sums travel; None for the activations'.

    Raises:
        ConfigError: As :class:`Linear`; a width that cannot be cut, or not between the recipe's
            blocks.
    """

    kind = "column"


class RowParallelLinear(_ShardedLinear):
    """A :class:`Linear` that holds 1/tp of the inputs and sums over the ranks.

    It maps x [..., S, in / tp] to [..., S, out]; with ``sequence``, to [..., S / tp, out], the
    rank's run of all tokens. The bias is added once, by all ranks alike.

    Args:
        in_features, out_features, bias, recipe, backend, layer, name, segments, device, dtype: As
            in :class:`Linear`, of the whole linear.
        group: The tensor-parallel ranks.
        precision: Shared by the linears of a model.
        sequence: Whether tokens are cut where features are not.
        reduce_dtype: Type in which partial sums travel; None for the activations'.

    Raises:
        ConfigError: As :class:`ColumnParallelLinear`.
    """

    kind = "row"
