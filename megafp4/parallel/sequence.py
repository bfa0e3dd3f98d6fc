"""Where replicated tokens, tokens cut over the ranks and features cut over the ranks meet.

Each function is one arrow of Megatron's figures, forward and backward: f and g of arXiv 1909.08053,
figure 3, and their versions for sharded sequences of arXiv 2205.05198, figure 5.

With sequence parallelism, norms, residuals and whatever else works token by token see 1/tp of the
tokens: of all B x S tokens of a batch, in order, rank r holds the r-th run. It travels through the
model as [B, S / tp, H], a shape that only counts; which token is which matters to attention and to
the loss alone, and both see all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megafp4.errors import ConfigError
from megafp4.parallel.collectives import Group
from megafp4.parallel.cut import Cut, Layout


class _Enter(torch.autograd.Function):
    """f: give all tokens to layers that hold some of the features."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sequence: bool, reduce_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.group, ctx.sequence, ctx.shape = group, sequence, x.shape
        ctx.reduce_dtype = reduce_dtype
        if not sequence:
            return x.view_as(x)
        rows = group.all_gather(x.flatten(0, -2), "activations")
        return rows.view(*x.shape[:-2], -1, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = dy.flatten(0, -2)
        # A copy where it would be reduced in place: autograd may still need what it gave.
        rows = rows.to(ctx.reduce_dtype or dy.dtype, copy=not ctx.sequence)
        reduce = ctx.group.reduce_scatter if ctx.sequence else ctx.group.all_reduce
        return reduce(rows, "gradients").to(dy.dtype).view(ctx.shape), None, None, None


class _Leave(torch.autograd.Function):
    """g: sum what ranks with some of the features computed, for all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, own_tokens: bool) -> Tensor:
        out = x.clone()
        if not own_tokens:
            return group.all_reduce(out, "activations")
        rows = out.view(-1, out.shape[-1])
        group.own(rows).copy_(group.reduce_scatter(rows, "activations"))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None


class _Scatter(torch.autograd.Function):
    """Keep this rank's run of tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        rows = group.own(x.flatten(0, -2))
        return rows.reshape(*x.shape[:-2], -1, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(dy.flatten(0, -2), "gradients").view(ctx.shape), None


class _GatherFeatures(torch.autograd.Function):
    """Join features that are cut over the ranks, for layers that every rank runs alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.side_by_side(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.chunk(ctx.group.size, -1)[ctx.group.rank].contiguous(), None


def enter(
    x: Tensor, group: Group, *, sequence: bool, reduce_dtype: torch.dtype | None = None
) -> Tensor:
    """Give layers that hold some of the features all tokens.

    Args:
        x: [..., S, H], or [..., S / tp, H] if ``sequence``.
        group: The tensor-parallel ranks.
        sequence: Whether tokens are cut.
        reduce_dtype: Type in which partial gradients travel; None for x's.

    Returns:
        [..., S, H]; its gradients are summed over the ranks.
    """
    out: Tensor = _Enter.apply(x, group, sequence, reduce_dtype)
    return out


def leave(x: Tensor, group: Group, *, own_tokens: bool = False) -> Tensor:
    """Sum partial results over the ranks; the gradient is everybody's.

    Args:
        x: [...], or [..., S, H] with ``own_tokens``.
        group: The tensor-parallel ranks.
        own_tokens: Sum this rank's run of the tokens only, which sends half as much; a
            :class:`SequenceScatter` must follow, for the others' sums are not complete.

    Raises:
        ConfigError: With ``own_tokens``, the ranks do not divide S.
    """
    if own_tokens:
        _check_tokens(x, group)
    out: Tensor = _Leave.apply(x, group, own_tokens)
    return out


def gather_features(x: Tensor, group: Group) -> Tensor:
    """Join [..., V / tp] of the ranks to [..., V]."""
    out: Tensor = _GatherFeatures.apply(x, group)
    return out


class SequenceScatter(nn.Module):
    """What stands between embedding and blocks: each rank goes on with its run of the tokens.

    Args:
        group: The tensor-parallel ranks.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., S, H] to [..., S / tp, H].

        Raises:
            ConfigError: S is not divisible.
        """
        _check_tokens(x, self.group)
        out: Tensor = _Scatter.apply(x, self.group)
        return out


def _check_tokens(x: Tensor, group: Group) -> None:
    if x.shape[-2] % group.size:
        raise ConfigError(
            f"a sequence of {x.shape[-2]} tokens cannot be cut over tp {group.size}: choose a "
            "sequence length that is a multiple, or no sequence parallelism"
        )


class SplitRMSNorm(nn.Module):
    """RMSNorm over features that are cut over the ranks, such as BitNet's SubLN [2504.12285].

    Args:
        width: Features of the whole.
        eps: Added to the mean square.
        group: The tensor-parallel ranks.

    Raises:
        ConfigError: tp does not divide the features.
    """

    def __init__(self, width: int, eps: float, group: Group) -> None:
        super().__init__()
        self.width, self.eps, self.group, self.cut = width, eps, group, Cut((width,), group.size)
        self.weight = nn.Parameter(torch.ones(self.cut.length))

    @property
    def layouts(self) -> dict[str, Layout]:
        """How each sharded entry of the state dict is cut."""
        return {"weight": Layout(self.cut, 0, self.group.rank)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., width / tp] in FP32, returned in the type of ``x``."""
        wide = x.float()
        # Every rank's result depends on every rank's squares: summed forward and backward.
        squares = leave(wide.square().sum(-1, keepdim=True), self.group)
        squares = enter(squares, self.group, sequence=False)
        return (wide * torch.rsqrt(squares / self.width + self.eps) * self.weight).to(x.dtype)


def partial_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients sequence parallelism leaves partial.

    These are norms and row biases: each rank has summed over its own tokens. A module says which of
    its parameters these are with an attribute ``partial_gradients``.
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "partial_gradients", ())
    ]


def sum_partial_gradients(model: nn.Module, group: Group) -> None:
    """Sum the gradients that sequence parallelism leaves partial: those of norms and row biases.

    Call it once a step, after the last micro-batch and before clipping, where no optimizer of
    :mod:`megafp4.optim.zero` does so (its argument ``partial``).

    Args:
        model: Built by :class:`~megafp4.parallel.factory.ParallelFactory`.
        group: The tensor-parallel ranks.
    """
    gradients = (model.get_parameter(name).grad for name in partial_parameters(model))
    found = [gradient for gradient in gradients if gradient is not None]
    if group.size == 1 or not found:
        return
    flat = group.all_reduce(torch.cat([one.float().flatten() for one in found]), "norm gradients")
    for gradient, total in zip(found, flat.split([g.numel() for g in found]), strict=True):
        gradient.copy_(total.view_as(gradient))
