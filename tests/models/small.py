"""Small models for the tests of this folder."""

from typing import Any

import torch

from megafp4.config import ModelConfig
from megafp4.models import DenseFactory, LayerFactory, build_model, init_weights
from megafp4.models.decoder import Decoder


def small_config(family: str = "gpt", **changes: Any) -> ModelConfig:
    """A two-block model whose every linear dim is a multiple of 64."""
    shape: dict[str, Any] = {
        "family": family,
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2 if family == "llama" else None,
        "ffn_hidden": 192 if family == "llama" else None,
        "vocab_size": 101,
        "seq_len": 32,
    }
    return ModelConfig(**shape | changes)


def build(
    config: ModelConfig, factory: LayerFactory | None = None, seed: int = 5, **kwargs: Any
) -> Decoder:
    """Build a model and initialise it."""
    model = build_model(config, factory or DenseFactory(), **kwargs)
    init_weights(model, config, seed)
    return model


def scatter(model: torch.nn.Module, std: float = 0.1) -> None:
    """Add noise to every parameter, so that no bias is 0 and no norm is 1."""
    generator = torch.Generator().manual_seed(77)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += torch.empty(parameter.shape).normal_(0, std, generator=generator)


def batch(
    config: ModelConfig, rows: int = 3, length: int = 17
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]
