"""Llama: RMSNorm, rotary positions, SwiGLU, optional grouped-query attention, no biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megafp4.config import ModelConfig
from megafp4.errors import ConfigError
from megafp4.models.decoder import Decoder
from megafp4.models.layers import Context, Rotary, rotary_tables

if TYPE_CHECKING:
    from megafp4.models.factory import LayerFactory


class Llama(Decoder):
    """The decoder of LLaMA 2 [arXiv 2307.09288]; with ``subln`` and ``relu2-glu``, BitNet b1.58."""

    norm = "rmsnorm"
    context = Context()

    def __init__(self, config: ModelConfig, factory: LayerFactory, dtype: torch.dtype) -> None:
        if config.head_dim % 2:
            raise ConfigError(
                f"model.hidden {config.hidden} over model.heads {config.heads} gives heads of "
                f"{config.head_dim} elements, which rotary positions cannot pair: "
                "choose an even head width"
            )
        super().__init__(config, factory, dtype)

    def rotary(self, tokens: Tensor) -> Rotary:
        """Return the tables for the positions of the batch's tokens."""
        positions = self.context.positions(tokens.shape[-1], tokens.device)
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
