"""The parts of a decoder: norms, rotary embedding, attention, MLPs, the block and the head.

Shape letters, for this file: B batch, S sequence, H hidden, F MLP width, N query heads, G key/value
heads, D head width, V vocabulary. Parameters are FP32; activations keep the type they arrive in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafp4.config import ModelConfig
from megafp4.errors import unknown_name

if TYPE_CHECKING:
    from megafp4.models.factory import LayerFactory

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [S, D / 2], FP32."""

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "relu2-glu": lambda x: F.relu(x).square(),
}


def is_gated(activation: str) -> bool:
    """Whether an MLP with this activation multiplies a gate into its hidden layer.

    Raises:
        ConfigError: Unknown activation.
    """
    if activation not in _PLAIN and activation not in _GATED:
        raise unknown_name("activation", activation, [*_PLAIN, *_GATED])
    return activation in _GATED


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in FP32, returned in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``."""
        return super().forward(x.float()).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in FP32, returned in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``."""
        return super().forward(x.float()).to(x.dtype)


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose FP32 weight is cast to the type of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Head(nn.Module):
    """The output layer: hidden states to logits, in the type of the activations.

    A tied head owns no weight and multiplies by the token embedding instead.
    """

    def __init__(self, width: int, vocab: int, *, tied: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None
        weight = None if tied else nn.Parameter(torch.empty(vocab, width).normal_(std=0.02))
        self.register_parameter("weight", weight)

    def forward(self, x_BSH: Tensor, embedding_VH: Tensor) -> Tensor:
        """Return logits [B, S, V]."""
        weight = embedding_VH if self.weight is None else self.weight
        return F.linear(x_BSH, weight.to(x_BSH.dtype))


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Cosines and sines of position x frequency [arXiv 2104.09864, eq. 15].

    Computed per forward pass (it costs nothing beside a GEMM) rather than kept in buffers, which a
    cast of the model to BF16 would silently round.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / theta**exponent)
    return angle.cos(), angle.sin()


def rotate(x_BNSD: Tensor, rotary: Rotary) -> Tensor:
    """Apply the rotary embedding, pairing element i with element i + D / 2.

    This is the half-split pairing of Hugging Face and of Megatron's default; Meta's original
    checkpoints pair neighbours and need their rows permuted.
    """
    cos, sin = rotary
    first, second = x_BNSD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BNSD.dtype)


class SelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention.

    The rows of ``qkv`` are all queries, then all keys, then all values. Head counts are read off
    the width that arrives, so a shard that holds a share of the heads needs no other code.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory, block: int) -> None:
        super().__init__()
        kv_width = config.num_kv_heads * config.head_dim
        segments = (config.hidden, kv_width, kv_width)
        self.head_dim = config.head_dim
        self.group = config.heads // config.num_kv_heads
        self.dropout = config.dropout
        self.qkv = factory.linear(
            config.hidden,
            sum(segments),
            block=block,
            slot="attention.qkv",
            parallel="column",
            bias=config.has_bias,
            segments=segments,
        )
        self.sub_norm = _sub_norm(config, factory, config.hidden)
        self.out = factory.linear(
            config.hidden,
            config.hidden,
            block=block,
            slot="attention.out",
            parallel="row",
            bias=config.has_bias,
        )

    def forward(self, x_BSH: Tensor, rotary: Rotary | None) -> Tensor:
        """Attend over the sequence; [B, S, H] to [B, S, H]."""
        heads_BNSD = self.qkv(x_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        kv_heads = heads_BNSD.shape[1] // (self.group + 2)
        q, k, v = heads_BNSD.split((self.group * kv_heads, kv_heads, kv_heads), dim=1)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        # Repeated by hand: the fused CPU kernel does not take fewer key heads than query heads.
        k, v = _repeat_heads(k, self.group), _repeat_heads(v, self.group)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(self.sub_norm(mixed.transpose(1, 2).flatten(2)))


def _repeat_heads(x_BGSD: Tensor, group: int) -> Tensor:
    """Give each of ``group`` consecutive query heads the same key/value head; no copy for 1."""
    return x_BGSD.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


class MLP(nn.Module):
    """``down(activation(up(x)))``, the MLP of GPT."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, block: int) -> None:
        super().__init__()
        self.activation = _PLAIN[config.mlp_activation]
        self.up = factory.linear(
            config.hidden,
            config.num_ffn_hidden,
            block=block,
            slot="mlp.up",
            parallel="column",
            bias=config.has_bias,
        )
        self.sub_norm = _sub_norm(config, factory, config.num_ffn_hidden)
        self.down = _mlp_down(config, factory, block)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Map [B, S, H] to [B, S, H]."""
        return self.down(self.sub_norm(self.activation(self.up(x_BSH))))


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` [arXiv 2002.05202], the MLP of Llama.

    The rows of ``gate_up`` are all gates, then all ups.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory, block: int) -> None:
        super().__init__()
        segments = (config.num_ffn_hidden, config.num_ffn_hidden)
        self.activation = _GATED[config.mlp_activation]
        self.gate_up = factory.linear(
            config.hidden,
            sum(segments),
            block=block,
            slot="mlp.gate_up",
            parallel="column",
            bias=config.has_bias,
            segments=segments,
        )
        self.sub_norm = _sub_norm(config, factory, config.num_ffn_hidden)
        self.down = _mlp_down(config, factory, block)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Map [B, S, H] to [B, S, H]."""
        gate_BSF, up_BSF = self.gate_up(x_BSH).chunk(2, dim=-1)
        return self.down(self.sub_norm(self.activation(gate_BSF) * up_BSF))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(
        self, config: ModelConfig, factory: LayerFactory, block: int, *, norm: str
    ) -> None:
        super().__init__()
        mlp = GatedMLP if is_gated(config.mlp_activation) else MLP
        self.attention_norm = factory.norm(norm, config.hidden, config.norm_eps)
        self.attention = SelfAttention(config, factory, block)
        self.mlp_norm = factory.norm(norm, config.hidden, config.norm_eps)
        self.mlp = mlp(config, factory, block)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSH: Tensor, rotary: Rotary | None) -> Tensor:
        """Add attention, then the MLP, to the residual stream."""
        x_BSH = x_BSH + self.dropout(self.attention(self.attention_norm(x_BSH), rotary))
        return x_BSH + self.dropout(self.mlp(self.mlp_norm(x_BSH)))


def _sub_norm(config: ModelConfig, factory: LayerFactory, width: int) -> nn.Module:
    """BitNet's SubLN [arXiv 2504.12285]: a norm in front of an output projection, or nothing."""
    return factory.norm("rmsnorm", width, config.norm_eps) if config.subln else nn.Identity()


def _mlp_down(config: ModelConfig, factory: LayerFactory, block: int) -> nn.Module:
    return factory.linear(
        config.num_ffn_hidden,
        config.hidden,
        block=block,
        slot="mlp.down",
        parallel="row",
        bias=config.has_bias,
    )
