"""Context parallelism: a rank holds a part of every sequence, and attention alone sees all of it.

A sequence is cut into 2 x cp equal chunks of which rank r holds the r-th and, counted from the end,
the r-th again: queries at the end of a sequence attend to all of it and those at the start to next
to nothing, so that every rank has the same work [Llama 3, arXiv 2407.21783, section 3.3.2].

Linears, norms and loss work token by token. What they share over tokens is told to the linears by
:class:`~megafp4.precision.Precision`: where a rank's tokens lie in the global batch, which keys
random bits, and who holds the others, with whom scales of whole tensors and channels are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from megafp4.errors import ConfigError, UnsupportedError, unknown_name
from megafp4.models.layers import Context
from megafp4.numerics import Runs
from megafp4.parallel.collectives import Group
from megafp4.parallel.context_gather import gathered_attention
from megafp4.parallel.context_ring import ring_attention
from megafp4.parallel.cut import multiple_of
from megafp4.precision import Precision
from megafp4.recipes import Recipe

Attention = Literal["all-gather", "ring"]
"""``all-gather``: keys and values of the whole sequence are gathered. ``ring``: they are passed on
from rank to rank, and none ever holds more than two parts of them."""


@dataclass(frozen=True)
class Zigzag:
    """Which tokens of a sequence a rank holds: chunks ``rank`` and ``2 size - 1 - rank``."""

    size: int
    """Number of ranks."""
    rank: int

    def chunk(self, length: int) -> int:
        """Tokens in a chunk of a sequence.

        Raises:
            ConfigError: The sequence is not divisible.
        """
        if length % (2 * self.size):
            raise ConfigError(
                f"a sequence of {length} tokens cannot be cut into 2 x cp {self.size} equal "
                "chunks: choose a sequence length that is a multiple, or another cp"
            )
        return length // (2 * self.size)

    def runs(self, length: int) -> Runs:
        """(first, count) of the runs of a sequence that this rank holds."""
        if self.size == 1:
            return ((0, length),)
        count = self.chunk(length)
        return tuple((i * count, count) for i in (self.rank, 2 * self.size - 1 - self.rank))

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor with one entry a token along a dim, a copy."""
        runs = self.runs(whole.shape[dim])
        return torch.cat([whole.narrow(dim, first, count) for first, count in runs], dim)

    def join(self, parts: list[Tensor], dim: int = 1) -> Tensor:
        """The whole from the parts of all ranks, in rank order."""
        chunks = [part.chunk(2, dim) for part in parts]
        return torch.cat([a for a, _ in chunks] + [b for _, b in reversed(chunks)], dim)

    def tokens(self, first_token: int, sequences: int, length: int) -> Runs:
        """Where this rank's tokens of a micro-batch lie in the global batch.

        Args:
            first_token: Index of the micro-batch's first token.
            sequences: Sequences in it.
            length: Tokens of a whole sequence.
        """
        starts = (first_token + i * length for i in range(sequences))
        return tuple((at + first, n) for at in starts for first, n in self.runs(length))


class ContextParallel(Context):
    """The context of a rank that holds 1/cp of every sequence.

    Args:
        group: The context-parallel ranks.
        attention: How their tokens meet.

    Raises:
        ConfigError: Unknown kind of attention.
    """

    def __init__(self, group: Group, attention: Attention = "all-gather") -> None:
        if attention not in get_args(Attention):
            raise unknown_name("parallel.attention", attention, get_args(Attention))
        self.group, self.attention = group, attention
        self.zigzag = Zigzag(group.size, group.rank)

    def place(self, model: nn.Module, precision: Precision) -> None:
        """Make a model run on this rank's part of its sequences from now on.

        Args:
            model: GPT or Llama, or the part of it that a pipeline's stage holds.
            precision: Shared by its linears.
        """
        if self.group.size == 1:
            return
        precision.others = self.group
        for module in model.modules():
            if hasattr(module, "context"):
                module.context = self  # type: ignore[assignment]

    def cut(
        self, tokens: Tensor, targets: Tensor, first_token: int
    ) -> tuple[Tensor, Tensor, int | Runs]:
        """This rank's part of a micro-batch.

        Args:
            tokens: int64 [B, S].
            targets: int64 [B, S].
            first_token: Index of the micro-batch's first token in the global batch.

        Returns:
            tokens and targets [B, S / cp], and what ``Precision.first_token`` has to be.

        Raises:
            ConfigError: S is not a multiple of 2 cp.
        """
        if self.group.size == 1:
            return tokens, targets, first_token
        where = self.zigzag.tokens(first_token, *tokens.shape)
        return self.zigzag.take(tokens), self.zigzag.take(targets), where

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions int64 [length] of this rank's tokens in their sequence."""
        return self.zigzag.take(torch.arange(length * self.group.size, device=device), 0)

    def attend(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Causal attention of this rank's queries to the whole sequence, [B, S / cp, N D].

        Args:
            q_BNSD: BF16 [B, N, S / cp, D]; on a CPU FP32 as well.
            k_BGSD: [B, G, S / cp, D], G a divisor of N.
            v_BGSD: As ``k_BGSD``.
            dropout: 0.

        Raises:
            UnsupportedError: There is dropout, or no kernel for these operands.
        """
        if dropout:
            raise UnsupportedError(
                f"model.dropout {dropout} under cp {self.group.size} would drop other elements "
                "than one rank does: set model.dropout to 0 or cp to 1"
            )
        attend = gathered_attention if self.attention == "all-gather" else ring_attention
        return attend(q_BNSD, k_BGSD, v_BGSD, self.group).transpose(1, 2).flatten(2)


def check_context(cp: int, length: int, recipe: Recipe) -> None:
    """Refuse sequences whose chunks a recipe's blocks would straddle.

    Args:
        cp: Number of context-parallel ranks.
        length: Tokens of a sequence.
        recipe: The recipe of the linears, whose wgrad contracts over tokens.

    Raises:
        ConfigError: Gives the chunk and what it must be a multiple of.
    """
    if cp == 1:
        return
    chunk, number = Zigzag(cp, 0).chunk(length), multiple_of(recipe, "wgrad")
    if chunk % number:
        raise ConfigError(
            f"cp {cp} cuts sequences of {length} tokens into chunks of {chunk}, not a multiple of "
            f"{number}, which recipe {recipe.name!r} needs in wgrad: choose a smaller cp, longer "
            "sequences or another recipe"
        )
