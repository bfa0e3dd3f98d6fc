"""How much arithmetic a model is: parameters and training FLOPs, counted from its shape.

Published figures mix two conventions: causal attention counted as the full square of the sequence
(PaLM appendix B, torchtitan, older Megatron) or as the half that is computed (Megatron since May
2025). Say which one a figure uses; tokens per second have no such ambiguity.
"""

from typing import Literal

from megafp4.config import ModelConfig
from megafp4.errors import unknown_name
from megafp4.models.layers import is_gated

AttentionCount = Literal["half", "full"]

_ATTENTION_FLOPS = {"half": 6, "full": 12}
"""Training FLOPs per (layer, query channel, key position).

Two GEMMs (scores and mix) x 2 FLOPs x 3 (forward, and a backward of twice that) is 12; a causal
query meets half of the keys on average.
"""


def flops_per_token(config: ModelConfig, seq_len: int, attention: AttentionCount = "half") -> int:
    """Training FLOPs (forward and backward) per token; recomputation is never counted.

    Six per weight of a GEMM (the output head included, the embedding look-up not), plus attention.

    Args:
        config: Shape of the model.
        seq_len: Tokens per sequence.
        attention: Whether a causal query counts as meeting ``half`` of the keys or the ``full``
            sequence.

    Raises:
        ConfigError: Unknown convention.
    """
    if attention not in _ATTENTION_FLOPS:
        raise unknown_name("attention FLOP convention", attention, _ATTENTION_FLOPS)
    weights = config.layers * _block_weights(config) + config.hidden * config.vocab_size
    pairs = config.layers * config.hidden * seq_len
    return 6 * weights + _ATTENTION_FLOPS[attention] * pairs


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters; a tied head is counted once."""
    norm = config.hidden * (2 if config.family == "gpt" else 1)
    block = _block_weights(config) + 2 * norm
    if config.has_bias:
        block += _qkv_width(config) + 2 * config.hidden + _up_width(config)
    if config.subln:
        block += config.hidden + config.num_ffn_hidden
    embeddings = config.vocab_size * config.hidden * (1 if config.ties_embeddings else 2)
    positions = config.seq_len * config.hidden if config.family == "gpt" else 0
    return embeddings + positions + config.layers * block + norm


def _block_weights(config: ModelConfig) -> int:
    """Elements of one block's matrices."""
    attention = config.hidden * (_qkv_width(config) + config.hidden)
    return attention + config.hidden * (_up_width(config) + config.num_ffn_hidden)


def _qkv_width(config: ModelConfig) -> int:
    return config.hidden + 2 * config.num_kv_heads * config.head_dim


def _up_width(config: ModelConfig) -> int:
    return config.num_ffn_hidden * (2 if is_gated(config.mlp_activation) else 1)
