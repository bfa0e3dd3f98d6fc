"""Layers of a model that is cut over tensor-parallel ranks; the model's code does not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from megafp4.backends import Backend
from megafp4.models.factory import QuantizedFactory, SavedAs, layer_id, layer_name
from megafp4.parallel.collectives import Group
from megafp4.parallel.sequence import SequenceScatter, SplitRMSNorm
from megafp4.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megafp4.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead
from megafp4.precision import Precision
from megafp4.recipes import Recipe


class ParallelFactory(QuantizedFactory):
    """Linears, embedding and head of which each rank makes its share.

    Args:
        recipe, backend, precision, num_layers, exempt, saved_as: As in
            :class:`~megafp4.models.factory.QuantizedFactory`.
        group: The tensor-parallel ranks.
        sequence: Cut norms and residuals over tokens as well (sequence parallelism).
        reduce_dtype: Type in which partial sums of activations and of their gradients travel; None
            for the activations' own, as in Megatron.

    Raises:
        ConfigError: As there.
    """

    def __init__(
        self,
        recipe: str | Recipe,
        backend: str | Backend,
        precision: Precision,
        num_layers: int,
        group: Group,
        exempt: Sequence[str] = (),
        saved_as: SavedAs = "recipe",
        *,
        sequence: bool = False,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(recipe, backend, precision, num_layers, exempt, saved_as)
        self.group = group
        self.sequence = sequence and group.size > 1
        self.reduce_dtype = reduce_dtype

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
        """Make this rank's share of a linear."""
        kind = ColumnParallelLinear if parallel == "column" else RowParallelLinear
        return kind(
            in_features,
            out_features,
            self.group,
            bias,
            self.recipe_of(block, slot),
            self.backend,
            self.precision,
            layer_id(block, slot),
            layer_name(block, slot),
            segments,
            self.sequence,
            self.reduce_dtype,
        )

    def embedding(
        self, rows: int, width: int, *, role: Literal["tokens", "positions"]
    ) -> nn.Module:
        """Make this rank's rows of the token table; positions are everybody's."""
        if role == "tokens":
            return VocabParallelEmbedding(rows, width, self.group, sequence=self.sequence)
        return super().embedding(rows, width, role=role)

    def norm(self, kind: str, width: int, eps: float) -> nn.Module:
        """Make a norm; with sequence parallelism its gradients are those of this rank's tokens."""
        norm = super().norm(kind, width, eps)
        if self.sequence:
            names = tuple(name for name, _ in norm.named_parameters())
            norm.partial_gradients = names  # type: ignore[assignment]
        return norm

    def sub_norm(self, width: int, eps: float) -> nn.Module:
        """Make a norm over features that are cut over the ranks."""
        if self.group.size == 1:
            return super().sub_norm(width, eps)
        return SplitRMSNorm(width, eps, self.group)

    def entry(self) -> nn.Module:
        """Make what stands between embedding and blocks."""
        return SequenceScatter(self.group) if self.sequence else super().entry()

    def head(self, width: int, vocab: int, *, tied: bool) -> nn.Module:
        """Make this rank's words of the output layer."""
        return VocabParallelHead(
            width,
            vocab,
            self.group,
            tied=tied,
            sequence=self.sequence,
            reduce_dtype=self.reduce_dtype,
        )
