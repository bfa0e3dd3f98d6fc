"""Which random bits the optimizer of a rank rounds its part of the weights with."""

from __future__ import annotations

import torch
from torch import Tensor

from megafp4.config import ModelConfig
from megafp4.models import DenseFactory, build_model
from megafp4.optim.quantizers import GROUP


def parameter_names(config: ModelConfig) -> list[str]:
    """Names in the whole model, of which a pipeline's rank holds a part, in its order."""
    with torch.device("meta"):
        model = build_model(config, DenseFactory())
    return [name for name, _ in model.named_parameters()]


def place_of(param: Tensor, rank: int) -> int:
    """Where random bits of a tp rank's part begin: behind those of the ranks before it.

    They are the serial run's where parts follow each other in memory, as cut rows do; elsewhere
    they are others, but no two ranks' the same.

    Args:
        param: The rank's part.
        rank: Of tp.
    """
    return rank * -(-param.numel() // GROUP) * GROUP
