"""Weights to and from Hugging Face's GPT-2, Llama and BitNet, as pure functions on state dicts.

A family's module lists, parameter by parameter, what transformers calls it (:class:`Rule`); this
module applies the list in either direction. Both sides stack queries, keys and values in that order
and pair rotary halves alike, so nothing is permuted: fused matrices are split into rows, and
GPT-2's are transposed. A tied head is not written, like in Hugging Face's own files.

Options that change the function computed and have no counterpart here are refused. Dropout, which
does not, is carried over as far as the other side can say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megafp4.config import ModelConfig
from megafp4.errors import CheckpointError, UnsupportedError
from megafp4.models import hf_gpt2, hf_llama
from megafp4.models.hf_rules import HEAD, Rule

State = dict[str, Tensor]

_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Constants that older versions of transformers saved beside the weights."""


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """Translate one of our state dicts for transformers.

    Args:
        config: Shape of the model.
        state: Our state dict with dense weights (decode grid codes first).

    Returns:
        The contents of ``config.json``, which are also keyword arguments of the configuration class
        that its ``model_type`` names, and the state dict of ``GPT2LMHeadModel``,
        ``LlamaForCausalLM`` or, with SubLN, ``BitNetForCausalLM``. Tensors may share memory with
        ``state``.

    Raises:
        UnsupportedError: No model of transformers computes what ``config`` describes.
        CheckpointError: ``state`` lacks a parameter, has one too many or of another shape.
    """
    family = hf_gpt2 if config.family == "gpt" else hf_llama
    hf_config, rules = family.export_config(config), family.rules(config)
    _check_names([rule.ours for rule in rules], state, "megafp4")
    result: State = {}
    for rule in rules:
        weight = state[rule.ours]
        _check_shape(rule.ours, weight, rule.shape)
        for name, part in zip(rule.theirs, weight.split(rule.rows), strict=True):
            result[name] = part.t().contiguous() if rule.transposed else part
    return hf_config, result


def from_hf(hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[ModelConfig, State]:
    """Translate a state dict of transformers for us.

    Args:
        hf_config: Contents of ``config.json``, or a configuration object's ``to_dict()``.
        state: State dict of the causal model, with or without its tied head; GPT-2's names may lack
            the ``transformer.`` prefix, as in the files on the hub.

    Returns:
        Our configuration and state dict. Tensors may share memory with ``state``.

    Raises:
        UnsupportedError: The architecture, or an option of it, has no counterpart here.
        CheckpointError: ``state`` lacks a parameter, has one too many or of another shape, or its
            tied head differs from its embedding.
    """
    kind = hf_config.get("model_type")
    if kind not in ("gpt2", "llama", "bitnet"):
        raise UnsupportedError(
            f"model_type {kind!r} cannot be imported: give a gpt2, llama or bitnet checkpoint"
        )
    family = hf_gpt2 if kind == "gpt2" else hf_llama
    config = family.import_config(hf_config)
    given = {
        family.full_name(name): tensor
        for name, tensor in state.items()
        if not name.endswith(_BUFFERS)
    }
    if config.ties_embeddings and HEAD in given:
        head = given.pop(HEAD)
        if family.EMBEDDING in given and not torch.equal(head, given[family.EMBEDDING]):
            raise CheckpointError(
                f"{HEAD} differs from the token embedding although tie_word_embeddings is true: "
                "set it to false to keep both"
            )
    rules = family.rules(config)
    _check_names([name for rule in rules for name in rule.theirs], given, kind)
    return config, {rule.ours: _join(rule, given) for rule in rules}


def _join(rule: Rule, given: Mapping[str, Tensor]) -> Tensor:
    parts = [given[name].t() if rule.transposed else given[name] for name in rule.theirs]
    for name, part, rows in zip(rule.theirs, parts, rule.rows, strict=True):
        _check_shape(name, part, (rows, *rule.shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _check_names(expected: list[str], given: Mapping[str, Tensor], kind: str) -> None:
    missing = sorted(set(expected) - set(given))
    surplus = sorted(set(given) - set(expected))
    if missing or surplus:
        raise CheckpointError(
            f"the state dict does not fit its {kind} configuration: it lacks "
            f"{_some(missing)} and has {_some(surplus)} too many: give the weights of that model"
        )


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:4]) or "nothing"
    return f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)} where the configuration asks for {shape}: "
            "give the configuration that belongs to these weights"
        )
