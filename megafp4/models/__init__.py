"""What is computed: GPT and Llama, written once, as single-device code.

The models ask a :class:`~megafp4.models.factory.LayerFactory` for their layers, so which numbers a
linear uses (and, later, which rank holds it) is decided outside. Read ``layers.py``, then
``decoder.py``; ``gpt.py`` and ``llama.py`` only say what differs. Names load on first use, so that
listing presets does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megafp4.models.build import build_model
    from megafp4.models.factory import DenseFactory, LayerFactory, QuantizedFactory
    from megafp4.models.flops import flops_per_token, parameter_count
    from megafp4.models.initialization import init_weights
    from megafp4.models.presets import get_preset, preset_names

_HOMES = {
    "build_model": "build",
    "DenseFactory": "factory",
    "LayerFactory": "factory",
    "QuantizedFactory": "factory",
    "flops_per_token": "flops",
    "parameter_count": "flops",
    "init_weights": "initialization",
    "get_preset": "presets",
    "preset_names": "presets",
}

__all__ = [
    "DenseFactory",
    "LayerFactory",
    "QuantizedFactory",
    "build_model",
    "flops_per_token",
    "get_preset",
    "init_weights",
    "parameter_count",
    "preset_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
