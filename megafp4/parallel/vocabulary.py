"""Embedding and output layer whose vocabulary is cut over the tensor-parallel ranks.

The loss never sees all logits of a token: each rank scores its own words, and three numbers a token
are reduced, the largest logit, the sum of exponentials and the logit of the target [arXiv
1909.08053, section 3]. Tokens go through in chunks, so no rank holds all logits of its words.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafp4.models.execution import Execution
from megafp4.models.layers import lookup
from megafp4.models.loss import IGNORED_TARGET, linear_cross_entropy
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Cut, Layout
from megafp4.parallel.sequence import enter, gather_features, leave


class VocabParallelEmbedding(nn.Module):
    """An embedding table of which each rank holds 1/tp of the rows.

    Args:
        rows: Words of the whole table.
        width: Features.
        group: The tensor-parallel ranks.
        sequence: Whether a :class:`~megafp4.parallel.sequence.SequenceScatter` follows, which keeps
            this rank's tokens only.

    Raises:
        ConfigError: tp does not divide the words.
    """

    def __init__(self, rows: int, width: int, group: Group, *, sequence: bool = False) -> None:
        super().__init__()
        self.group, self.sequence, self.cut = group, sequence, Cut((rows,), group.size)
        self.weight = nn.Parameter(torch.empty(self.cut.length, width).normal_(std=0.02))

    @property
    def layouts(self) -> dict[str, Layout]:
        """How each sharded entry of the state dict is cut."""
        return {"weight": Layout(self.cut, 0, self.group.rank)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens [..., S] up, FP32 [..., S, width]; complete on every rank.

        With ``sequence`` complete for the rank's own run of tokens, undefined for the others.

        Raises:
            ConfigError: With ``sequence``, tp does not divide S.
        """
        row, mine = _rows(tokens, self.group, len(self.weight))
        found = torch.where(mine[..., None], lookup(row, self.weight), 0.0)
        return leave(found, self.group, own_tokens=self.sequence)


class VocabParallelHead(nn.Module):
    """The output layer, with 1/tp of the words on each rank: logits, or the loss.

    A tied head owns no weight and multiplies by the embedding's rows of this rank.

    Args:
        width: Features.
        vocab: Words of the whole vocabulary.
        group: The tensor-parallel ranks.
        tied: Whether it shares the embedding.
        sequence: Whether hidden states arrive cut over tokens.
        reduce_dtype: Type in which the hidden states' gradients are summed; None for theirs.

    Raises:
        ConfigError: tp does not divide the words.
    """

    execution = Execution()

    def __init__(
        self,
        width: int,
        vocab: int,
        group: Group,
        *,
        tied: bool,
        sequence: bool = False,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sequence, self.reduce_dtype = group, sequence, reduce_dtype
        self.cut = Cut((vocab,), group.size)
        self.weight: nn.Parameter | None
        own = None if tied else nn.Parameter(torch.empty(self.cut.length, width).normal_(std=0.02))
        self.register_parameter("weight", own)

    @property
    def layouts(self) -> dict[str, Layout]:
        """How each sharded entry of the state dict is cut."""
        return {} if self.weight is None else {"weight": Layout(self.cut, 0, self.group.rank)}

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] or, given targets [B, S], their mean cross-entropy, on every rank.

        Args:
            x: [B, S, H], or [B, S / tp, H] if tokens are cut.
            embedding: FP32 [V / tp, H], this rank's rows.
            targets: int64 [B, S], the same on all ranks; -1 is ignored.
        """
        weight = embedding if self.weight is None else self.weight
        x = enter(x, self.group, sequence=self.sequence, reduce_dtype=self.reduce_dtype)
        if targets is None:
            return gather_features(F.linear(x, weight.to(x.dtype)), self.group)
        rows = x.flatten(0, -2)
        return vocab_parallel_loss(rows, weight, targets.flatten(), self.group, self.execution)


def vocab_parallel_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: Group,
    execution: Execution | None = None,
) -> Tensor:
    """Mean cross-entropy of ``x weight^T`` in nats, each rank scoring its words, chunk by chunk.

    Args:
        x: [T, H], FP32 or BF16, the same on all ranks.
        weight: FP32 [V / tp, H].
        targets: int64 [T], words of the whole vocabulary; -1 is ignored.
        group: The ranks that share the vocabulary.
        execution: What runs the pieces between the collectives; None runs them as they are.

    Returns:
        FP32, 0-dim, the same on all ranks. The gradient of x is this rank's summand.
    """
    score = partial(_score, group=group, execution=execution or Execution())
    return linear_cross_entropy(x, weight, targets, score)


def _score(
    logits: Tensor, targets: Tensor, weight: Tensor, group: Group, execution: Execution
) -> tuple[Tensor, Tensor]:
    """:func:`megafp4.models.loss.score_chunk` of logits [T, V / tp]."""
    row, mine = _rows(targets, group, logits.shape[-1])
    peak = group.all_reduce(execution.run(_peak, logits), "loss", "max")
    total, hit = group.all_reduce(execution.run(_sums, logits, row, mine, peak), "loss")
    log_sum = total.log() + peak
    kept = targets != IGNORED_TARGET
    loss = torch.where(kept, log_sum - hit, 0.0).sum()
    weights = torch.where(kept, weight, 0.0)
    return loss, execution.run(_slope, logits, row, mine, log_sum, weights)


def _peak(logits: Tensor) -> Tensor:
    """Largest logit of each token, FP32 [T]."""
    return logits.amax(-1).float()


def _sums(logits: Tensor, row: Tensor, mine: Tensor, peak: Tensor) -> Tensor:
    """Sum of exponentials, and the logit of the target if it is here, FP32 [2, T]."""
    wide = logits.float()
    hit = torch.where(mine, wide.gather(-1, row[:, None])[:, 0], 0.0)
    return torch.stack(((wide - peak[:, None]).exp().sum(-1), hit))


def _slope(logits: Tensor, row: Tensor, mine: Tensor, log_sum: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the loss with respect to the logits, in their type."""
    words = torch.arange(logits.shape[-1], device=logits.device)
    one = (words == row[:, None]) & mine[:, None]
    slope = (logits.float() - log_sum[:, None]).exp() - one.float()
    return (slope * weights[:, None]).to(logits.dtype)


def _rows(words: Tensor, group: Group, count: int) -> tuple[Tensor, Tensor]:
    """Row of each word among a rank's ``count`` (0 for others' words), and whether it is there."""
    row = words - group.rank * count
    mine = (row >= 0) & (row < count) & (words >= 0)
    return torch.where(mine, row, 0), mine
