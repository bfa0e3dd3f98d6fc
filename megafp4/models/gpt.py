"""GPT-2 and GPT-3: LayerNorm, learned positions, GELU, biases, tied head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megafp4.config import ModelConfig
from megafp4.models.decoder import Decoder
from megafp4.models.layers import Context

if TYPE_CHECKING:
    from megafp4.models.factory import LayerFactory


class GPT(Decoder):
    """The decoder of GPT-2 [Radford et al. 2019], as Megatron and the MXFP4 paper train it."""

    norm = "layernorm"
    context = Context()

    def __init__(self, config: ModelConfig, factory: LayerFactory, dtype: torch.dtype) -> None:
        super().__init__(config, factory, dtype)
        self.positions = factory.embedding(config.seq_len, config.hidden, role="positions")

    def embed(self, tokens: Tensor) -> Tensor:
        """Add a learned vector per position to the token embeddings."""
        index = self.context.positions(tokens.shape[-1], tokens.device)
        return self.embedding(tokens) + self.positions(index)
