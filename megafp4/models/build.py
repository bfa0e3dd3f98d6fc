"""From a model configuration to a module."""

import torch

from megafp4.config import ModelConfig
from megafp4.errors import unknown_name
from megafp4.models.decoder import Decoder
from megafp4.models.factory import LayerFactory
from megafp4.models.gpt import GPT
from megafp4.models.llama import Llama

_FAMILIES: dict[str, type[Decoder]] = {"gpt": GPT, "llama": Llama}


def build_model(
    config: ModelConfig, factory: LayerFactory, dtype: torch.dtype = torch.float32
) -> Decoder:
    """Build the model that ``config`` describes out of the layers of ``factory``.

    The weights are whatever the layers' constructors draw; call
    :func:`megafp4.models.init_weights` to make them a function of a seed. Under
    ``with torch.device("meta")`` nothing is allocated.

    Args:
        config: Shape of the model.
        factory: Makes the linears, embeddings, norms and the head.
        dtype: Type of the activations between the layers; parameters stay FP32.

    Raises:
        ConfigError: Unknown family, a head width that the family cannot use, or exemptions of the
            factory that do not fit the model.
    """
    if config.family not in _FAMILIES:
        raise unknown_name("model family", config.family, _FAMILIES)
    model = _FAMILIES[config.family](config, factory, dtype)
    factory.check(model)
    return model
