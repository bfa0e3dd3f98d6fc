"""Runs to start from, by name: the models of the papers, with their hyper-parameters.

A preset is a function that returns a whole :class:`~megafp4.config.RunConfig`; a variant calls
another one and replaces fields. Every docstring names its source and what that source does not
print. None of them sets a recipe: the default is the BF16 baseline, and ``--recipe`` changes it
without touching anything else.
"""

from collections.abc import Callable

from megafp4.config import RunConfig
from megafp4.errors import unknown_name
from megafp4.models import gpt_presets, llama_presets

_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "gpt-tiny": gpt_presets.gpt_tiny,
    "gpt-30m": gpt_presets.gpt_30m,
    "gpt-125m": gpt_presets.gpt_125m,
    "gpt-345m": gpt_presets.gpt_345m,
    "gpt-1.3b": gpt_presets.gpt_1_3b,
    "gpt-6.7b": gpt_presets.gpt_6_7b,
    "gpt-13b": gpt_presets.gpt_13b,
    "llama-tiny": llama_presets.llama_tiny,
    "llama-130m": llama_presets.llama_130m,
    "llama-320m": llama_presets.llama_320m,
    "llama-1b": llama_presets.llama_1b,
    "llama-1.3b": llama_presets.llama_1_3b,
    "llama-7b": llama_presets.llama_7b,
    "llama-13b": llama_presets.llama_13b,
}


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, small to large within a family."""
    return tuple(_PRESETS)


def get_preset(name: str) -> RunConfig:
    """Return the run that ``name`` stands for.

    Raises:
        ConfigError: No preset has that name; the message suggests the nearest.
    """
    return _find(name)()


def preset_summary(name: str) -> str:
    """Return the one-line description of a preset.

    Raises:
        ConfigError: No preset has that name; the message suggests the nearest.
    """
    return (_find(name).__doc__ or "").splitlines()[0]


def _find(name: str) -> Callable[[], RunConfig]:
    if name not in _PRESETS:
        raise unknown_name("preset", name, _PRESETS)
    return _PRESETS[name]
