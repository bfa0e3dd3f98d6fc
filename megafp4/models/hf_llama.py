"""Llama, and Llama with SubLN (BitNet), as transformers stores them: one matrix per projection."""

from collections.abc import Mapping
from typing import Any, Literal

from megafp4.config import ModelConfig
from megafp4.errors import UnsupportedError
from megafp4.models.hf_rules import HEAD, Rule, require

EMBEDDING = "model.embed_tokens.weight"

_ACTIVATIONS: dict[str, Literal["swiglu", "relu2-glu"]] = {"silu": "swiglu", "relu2": "relu2-glu"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "bitnet": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
}


def full_name(name: str) -> str:
    """Return ``name``: these models have one spelling."""
    return name


def rules(config: ModelConfig) -> list[Rule]:
    """List every parameter of the model."""
    hidden, ffn = config.hidden, config.num_ffn_hidden
    kv_width = config.num_kv_heads * config.head_dim
    found = [Rule("embedding.weight", (EMBEDDING,), (config.vocab_size, hidden))]
    for index in range(config.layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        linears = (
            ("attention.qkv", "self_attn", ("q", "k", "v"), hidden, (hidden, kv_width, kv_width)),
            ("attention.out", "self_attn", ("o",), hidden, (hidden,)),
            ("mlp.gate_up", "mlp", ("gate", "up"), hidden, (ffn, ffn)),
            ("mlp.down", "mlp", ("down",), ffn, (hidden,)),
        )
        for slot, module, parts, width, rows in linears:
            names = tuple(f"{theirs}.{module}.{part}_proj" for part in parts)
            found += _linear(f"{ours}.{slot}", names, width, rows, bias=config.has_bias)
        norms = {
            "attention_norm": ("input_layernorm", hidden),
            "mlp_norm": ("post_attention_layernorm", hidden),
        }
        if config.subln:
            norms["attention.sub_norm"] = ("self_attn.attn_sub_norm", hidden)
            norms["mlp.sub_norm"] = ("mlp.ffn_sub_norm", ffn)
        for name, (their_name, width) in norms.items():
            found.append(
                Rule(f"{ours}.{name}.weight", (f"{theirs}.{their_name}.weight",), (width,))
            )
    found.append(Rule("final_norm.weight", ("model.norm.weight",), (hidden,)))
    if not config.ties_embeddings:
        found.append(Rule("head.weight", (HEAD,), (config.vocab_size, hidden)))
    return found


def export_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a ``LlamaConfig`` or, with SubLN, of a ``BitNetConfig``.

    Raises:
        UnsupportedError: Neither has such an option.
    """
    activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.mlp_activation not in activation or (config.subln and config.has_bias):
        raise UnsupportedError(
            f"model.activation {config.mlp_activation!r}, bias {config.has_bias} and subln "
            f"{config.subln} cannot be exported: Llama in transformers has a gated MLP and, with "
            "SubLN (as BitNet), no biases"
        )
    fields = {
        "model_type": "bitnet" if config.subln else "llama",
        "architectures": ["BitNetForCausalLM" if config.subln else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.seq_len,
        "hidden_size": config.hidden,
        "intermediate_size": config.num_ffn_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": activation[config.mlp_activation],
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.has_bias,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.ties_embeddings,
        "bos_token_id": None,  # known to the tokenizer, not to the model
        "eos_token_id": None,
        # Up to transformers 4 the base is a field of its own; version 5 reads the table.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if not config.subln:
        fields["mlp_bias"] = config.has_bias
    return fields


def import_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Read a ``LlamaConfig`` or ``BitNetConfig``.

    Raises:
        UnsupportedError: An option that our Llama does not have.
        CheckpointError: A size is missing.
    """
    subln = hf_config.get("model_type") == "bitnet"
    given = _DEFAULTS["bitnet" if subln else "llama"] | dict(hf_config)
    hidden, heads = require(given, "hidden_size"), require(given, "num_attention_heads")
    bias = bool(given.get("attention_bias", False))
    refused = {
        "hidden_act": given["hidden_act"] not in _ACTIVATIONS,
        "head_dim": given.get("head_dim") not in (None, hidden // heads),
        "attention_bias": bias != (not subln and bool(given.get("mlp_bias", False))),
        "quantization_config": given.get("quantization_config") is not None,
        "rope_scaling": not _is_plain_rope(given.get("rope_scaling")),
        "rope_parameters": not _is_plain_rope(given.get("rope_parameters")),
    }
    for key, bad in refused.items():
        if bad:
            raise UnsupportedError(
                f"a {given['model_type']} with {key} = {given[key]} cannot be imported: only SiLU "
                "or squared-ReLU gates, heads of hidden / heads, biases everywhere or nowhere, "
                "dense weights and unscaled rotary positions are implemented"
            )
    rope = given.get("rope_parameters") or {}
    return ModelConfig(
        family="llama",
        layers=require(given, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=given.get("num_key_value_heads"),
        ffn_hidden=require(given, "intermediate_size"),
        vocab_size=require(given, "vocab_size"),
        seq_len=require(given, "max_position_embeddings"),
        activation=_ACTIVATIONS[given["hidden_act"]],
        norm_eps=given["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", given["rope_theta"]),
        tie_embeddings=given.get("tie_word_embeddings", False),
        bias=bias,
        subln=subln,
        dropout=given.get("attention_dropout") or 0.0,
        init_std=given.get("initializer_range", 0.02),
    )


def _is_plain_rope(rope: Mapping[str, Any] | None) -> bool:
    if rope is None:
        return True
    return rope.get("rope_type", rope.get("type", "default")) == "default"


def _linear(
    ours: str, theirs: tuple[str, ...], width: int, rows: tuple[int, ...], *, bias: bool
) -> list[Rule]:
    """Rules of a linear whose rows several of theirs hold."""
    weights, biases = (tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias"))
    found = [Rule(f"{ours}.weight", weights, (sum(rows), width), rows)]
    if bias:
        found.append(Rule(f"{ours}.bias", biases, (sum(rows),), rows))
    return found
