"""GPT-2 as transformers stores it: Conv1D matrices [in, out], q, k and v fused."""

from collections.abc import Mapping
from typing import Any, Literal

from megafp4.config import ModelConfig
from megafp4.errors import UnsupportedError
from megafp4.models.hf_rules import HEAD, Rule, require

EMBEDDING = "transformer.wte.weight"

_ACTIVATIONS: dict[str, Literal["gelu", "gelu-tanh"]] = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu",
}
_EXPECTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Options that change the function, with the value that our GPT computes (also GPT-2's default)."""


def full_name(name: str) -> str:
    """Add the prefix that the files on the hub leave out."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def rules(config: ModelConfig) -> list[Rule]:
    """List every parameter of the model."""
    hidden, ffn = config.hidden, config.num_ffn_hidden
    found = [
        Rule("embedding.weight", (EMBEDDING,), (config.vocab_size, hidden)),
        Rule("positions.weight", ("transformer.wpe.weight",), (config.seq_len, hidden)),
    ]
    for index in range(config.layers):
        ours, theirs = f"blocks.{index}", f"transformer.h.{index}"
        found += _pair(f"{ours}.attention_norm", f"{theirs}.ln_1", (hidden,))
        found += _pair(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", (3 * hidden, hidden))
        found += _pair(f"{ours}.attention.out", f"{theirs}.attn.c_proj", (hidden, hidden))
        found += _pair(f"{ours}.mlp_norm", f"{theirs}.ln_2", (hidden,))
        found += _pair(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", (ffn, hidden))
        found += _pair(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", (hidden, ffn))
    found += _pair("final_norm", "transformer.ln_f", (hidden,))
    if not config.ties_embeddings:
        found.append(Rule("head.weight", (HEAD,), (config.vocab_size, hidden)))
    return found


def export_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a ``GPT2Config``.

    Raises:
        UnsupportedError: GPT-2 in transformers has no such option.
    """
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    plain = config.num_kv_heads == config.heads and config.has_bias and not config.subln
    if not plain or config.mlp_activation not in activation:
        raise UnsupportedError(
            f"model.bias {config.has_bias}, kv_heads {config.num_kv_heads}, subln {config.subln}, "
            f"activation {config.mlp_activation!r} cannot be exported: GPT-2 in transformers has "
            "biases, a key/value head per query head, no SubLN and a GELU"
        )
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.seq_len,
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.num_ffn_hidden,
        "activation_function": activation[config.mlp_activation],
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.ties_embeddings,
        "bos_token_id": None,  # known to the tokenizer, not to the model
        "eos_token_id": None,
    }


def import_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Read a ``GPT2Config``.

    Raises:
        UnsupportedError: An option that our GPT does not have.
        CheckpointError: A size is missing.
    """
    for key, value in _EXPECTED.items():
        if hf_config.get(key, value) != value:
            raise UnsupportedError(
                f"a GPT-2 with {key} = {hf_config[key]} cannot be imported: only {value} is "
                "implemented"
            )
    activation = hf_config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"a GPT-2 with activation_function {activation!r} cannot be imported: "
            f"choose one of {', '.join(_ACTIVATIONS)}"
        )
    return ModelConfig(
        family="gpt",
        layers=require(hf_config, "n_layer"),
        hidden=require(hf_config, "n_embd"),
        heads=require(hf_config, "n_head"),
        ffn_hidden=hf_config.get("n_inner"),
        vocab_size=require(hf_config, "vocab_size"),
        seq_len=require(hf_config, "n_positions"),
        activation=_ACTIVATIONS[activation],
        norm_eps=hf_config.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf_config.get("tie_word_embeddings", True),
        bias=True,
        dropout=hf_config.get("resid_pdrop", 0.1),
        init_std=hf_config.get("initializer_range", 0.02),
    )


def _pair(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Rule]:
    """Rules of a module with a weight and a bias; matrices are transposed."""
    return [
        Rule(f"{ours}.weight", (f"{theirs}.weight",), shape, transposed=len(shape) == 2),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), shape[:1]),
    ]
