"""The parts of a decoder: norms, rotary embedding, attention, MLPs, the block and the head.

What lies between two linears is a function of tensors, handed to the module's
:class:`~megafp4.models.execution.Execution`: that is where compilation and recomputation happen.

Shape letters, for this file: B batch, S sequence, H hidden, F MLP width, N query heads, G key/value
heads, D head width, V vocabulary. Parameters are FP32; activations keep the type they arrive in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megafp4.config import ModelConfig
from megafp4.errors import unknown_name
from megafp4.models.execution import Execution
from megafp4.models.loss import head_loss, score_chunk

if TYPE_CHECKING:
    from megafp4.models.factory import LayerFactory

ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Attention kernels on a GPU, fastest first; the first one that takes the operands runs."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [S, D / 2], FP32."""


def gelu(x: Tensor) -> Tensor:
    """GELU with the error function."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` [arXiv 2002.05202] of [..., gate then up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def relu2_glu(gate_up: Tensor) -> Tensor:
    """``relu(gate)^2 * up`` [arXiv 2504.12285] of [..., gate then up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.relu(gate).square() * up


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "gelu-tanh": gelu_tanh}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "relu2-glu": relu2_glu}


def is_gated(activation: str) -> bool:
    """Whether an MLP with this activation multiplies a gate into its hidden layer.

    Raises:
        ConfigError: Unknown activation.
    """
    if activation not in _PLAIN and activation not in _GATED:
        raise unknown_name("activation", activation, [*_PLAIN, *_GATED])
    return activation in _GATED


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dim, computed in FP32, returned in the type of ``x``."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """RMSNorm over the last dim, computed in FP32, returned in the type of ``x``."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in FP32, returned in the type of its input."""

    execution = Execution()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``."""
        return self.execution.repeatable(layer_norm, x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in FP32, returned in the type of its input."""

    execution = Execution()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``."""
        return self.execution.repeatable(rms_norm, x, self.weight, self.eps)


class _Lookup(torch.autograd.Function):
    """Rows of a table that is not FP32, with an FP32 gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(dy, tokens, ctx.rows, -1, False)


def lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table [V, H] of FP32 or BF16 in FP32; gradients are summed in FP32 as well."""
    if weight.dtype == torch.float32:
        return F.embedding(tokens, weight)
    # In BF16, a word that occurs often would lose most of its gradient.
    found: Tensor = _Lookup.apply(tokens, weight)
    return found


class Embedding(nn.Embedding):
    """``nn.Embedding`` that returns FP32, also where the optimizer keeps the table in BF16."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens [...] up, FP32 [..., H]."""
        return lookup(tokens, self.weight)


class DenseLinear(nn.Linear):
    """``nn.Linear`` whose FP32 weight is cast to the type of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Head(nn.Module):
    """The output layer: hidden states to logits, in the type of the activations, or to the loss.

    A tied head owns no weight and multiplies by the token embedding instead.
    """

    execution = Execution()

    def __init__(self, width: int, vocab: int, *, tied: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None
        weight = None if tied else nn.Parameter(torch.empty(vocab, width).normal_(std=0.02))
        self.register_parameter("weight", weight)

    def forward(self, x_BSH: Tensor, embedding_VH: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits [B, S, V] or, given targets [B, S], their mean cross-entropy (FP32)."""
        weight = embedding_VH if self.weight is None else self.weight
        if targets is None:
            return F.linear(x_BSH, weight.to(x_BSH.dtype))
        return head_loss(x_BSH.flatten(0, -2), weight, targets.flatten(), self._score)

    def _score(self, logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.execution.run(score_chunk, logits, targets, weight)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of positions [S] x frequency [arXiv 2104.09864, eq. 15].

    Computed per forward pass (it costs nothing beside a GEMM) rather than kept in buffers, which a
    cast of the model to BF16 would silently round.
    """
    device = positions.device
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle = torch.outer(positions.float(), 1.0 / theta**exponent)
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


def rotate_both(q_BNSD: Tensor, k_BGSD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """:func:`rotate` queries and keys."""
    return rotate(q_BNSD, rotary), rotate(k_BGSD, rotary)


class Context:
    """Which tokens of a sequence a rank holds, and how they attend to the sequence: here, all."""

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions int64 [length] of the tokens that the model is given."""
        return torch.arange(length, device=device)

    def attend(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Causal attention of these tokens, [B, S, N D]; see :func:`attend`."""
        return attend(q_BNSD, k_BGSD, v_BGSD, dropout)


class SelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention.

    The rows of ``qkv`` are all queries, then all keys, then all values. Head counts are read off
    the width that arrives, so a shard that holds a share of the heads needs no other code.
    """

    execution = Execution()
    context = Context()

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
        qkv = self.qkv(x_BSH)
        kv_width = qkv.shape[-1] // (self.group + 2)
        # Cut before the heads are moved to the front: backward then joins contiguous gradients.
        parts = qkv.split((self.group * kv_width, kv_width, kv_width), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if rotary is not None:
            q, k = self.execution.run(rotate_both, q, k, rotary)
        mixed = self.context.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out(self.sub_norm(mixed))


def attend(q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention, [B, S, N D]; ``dropout`` is the probability of dropping a weight.

    Not compiled: it is one fused kernel, on a GPU the first of :data:`ATTENTION` that takes it.
    """
    group = q_BNSD.shape[1] // k_BGSD.shape[1]
    shared = group > 1 and q_BNSD.is_cuda
    if group > 1 and not shared:  # the fused CPU kernel wants as many key heads as query heads
        k_BGSD, v_BGSD = _repeat_heads(k_BGSD, group), _repeat_heads(v_BGSD, group)
    # Here and not around the model: a block that is computed again must take the same kernel.
    fastest = sdpa_kernel(list(ATTENTION), set_priority=True)
    with fastest if q_BNSD.is_cuda else contextlib.nullcontext():
        mixed_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BGSD, v_BGSD, dropout_p=dropout, is_causal=True, enable_gqa=shared
        )
    return mixed_BNSD.transpose(1, 2).flatten(2)


def _repeat_heads(x_BGSD: Tensor, group: int) -> Tensor:
    """Give each of ``group`` consecutive query heads the same key/value head."""
    return x_BGSD.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


class MLP(nn.Module):
    """``down(activation(up(x)))``, the MLP of GPT."""

    execution = Execution()

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
        hidden = self.execution.repeatable(self.activation, self.up(x_BSH))
        return self.down(self.sub_norm(hidden))


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` [arXiv 2002.05202], the MLP of Llama.

    The rows of ``gate_up`` are all gates, then all ups.
    """

    execution = Execution()

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
        hidden = self.execution.repeatable(self.activation, self.gate_up(x_BSH))
        return self.down(self.sub_norm(hidden))


def add_residual(x: Tensor, y: Tensor, dropout: float) -> Tensor:
    """``x + dropout(y)``."""
    return x + F.dropout(y, dropout) if dropout else x + y


class Block(nn.Module):
    """One pre-norm transformer block."""

    execution = Execution()

    def __init__(
        self, config: ModelConfig, factory: LayerFactory, block: int, *, norm: str
    ) -> None:
        super().__init__()
        mlp = GatedMLP if is_gated(config.mlp_activation) else MLP
        self.dropout = config.dropout
        self.attention_norm = factory.norm(norm, config.hidden, config.norm_eps)
        self.attention = SelfAttention(config, factory, block)
        self.mlp_norm = factory.norm(norm, config.hidden, config.norm_eps)
        self.mlp = mlp(config, factory, block)

    def forward(self, x_BSH: Tensor, rotary: Rotary | None) -> Tensor:
        """Add attention, then the MLP, to the residual stream."""
        draws = self.training and self.dropout > 0
        return self.execution.block(self._forward, x_BSH, rotary, draws=draws)

    def _forward(self, x_BSH: Tensor, rotary: Rotary | None) -> Tensor:
        run, dropout = self.execution.run, self.dropout if self.training else 0.0
        mixed = self.attention(self.attention_norm(x_BSH), rotary)
        x_BSH = run(add_residual, x_BSH, mixed, dropout)
        return run(add_residual, x_BSH, self.mlp(self.mlp_norm(x_BSH)), dropout)


def _sub_norm(config: ModelConfig, factory: LayerFactory, width: int) -> nn.Module:
    """BitNet's SubLN [arXiv 2504.12285]: a norm in front of an output projection, or nothing."""
    return factory.sub_norm(width, config.norm_eps) if config.subln else nn.Identity()


def _mlp_down(config: ModelConfig, factory: LayerFactory, block: int) -> nn.Module:
    return factory.linear(
        config.num_ffn_hidden,
        config.hidden,
        block=block,
        slot="mlp.down",
        parallel="row",
        bias=config.has_bias,
    )
