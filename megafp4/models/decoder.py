"""What GPT and Llama share: embed, run the blocks, normalise, project, score."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError
from megafp4.models.execution import Execution
from megafp4.models.layers import Block, Rotary

if TYPE_CHECKING:
    from megafp4.models.factory import LayerFactory


class Decoder(nn.Module):
    """A decoder-only language model; a family is a subclass that says how positions enter."""

    execution = Execution()
    norm: str
    """Norm of the family, ``layernorm`` or ``rmsnorm``."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding = factory.embedding(config.vocab_size, config.hidden, role="tokens")
        self.dropout = nn.Dropout(config.dropout)
        self.entry = factory.entry()
        self.blocks = nn.ModuleList(
            Block(config, factory, index, norm=self.norm) for index in range(config.layers)
        )
        self.final_norm = factory.norm(self.norm, config.hidden, config.norm_eps)
        self.head = factory.head(config.hidden, config.vocab_size, tied=config.ties_embeddings)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return FP32 embeddings [B, S, H] of tokens [B, S]."""
        return self.embedding(tokens)

    def rotary(self, tokens: Tensor) -> Rotary | None:
        """Return the rotary tables of a batch, or None where positions enter elsewhere."""
        return None

    def execute(self, execution: Execution) -> None:
        """Run from now on as ``execution`` says; what is computed stays the same."""
        for module in self.modules():
            if hasattr(module, "execution"):
                module.execution = execution  # type: ignore[assignment]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens: int64 [B, S] with S at most ``config.seq_len``.
            targets: int64 [B, S], or None; positions that hold -1 are ignored.

        Returns:
            Logits [B, S, V] in the activations' type or, given targets, the mean cross-entropy in
            nats (FP32, 0-dim; NaN when every target is ignored).

        Raises:
            ConfigError: The sequence is longer than the model was built for.
        """
        x = self.through(self.enter(tokens), tokens, self.blocks)
        return self.leave(x, targets)

    def enter(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [B, S, H] in front of the blocks; arguments as forward's."""
        if tokens.shape[-1] > self.config.seq_len:
            raise ConfigError(
                f"a sequence of {tokens.shape[-1]} tokens was given to a model with model.seq_len "
                f"{self.config.seq_len}: shorten the sequence or raise model.seq_len"
            )
        return self.entry(self.dropout(self.embed(tokens).to(self.dtype)))

    def through(self, x: Tensor, tokens: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
        """Run some of the blocks on the residual stream of a batch."""
        rotary = self.rotary(tokens)
        for block in blocks:
            x = block(x, rotary)
        return x

    def leave(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits or loss of the residual stream behind the blocks; as forward does."""
        # A head that is not tied reads no embedding: a pipeline's last stage then has none.
        tied = None if self.embedding is None else self.embedding.weight
        return self.head(self.final_norm(x), tied, targets)
