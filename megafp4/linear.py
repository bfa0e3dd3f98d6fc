"""``nn.Linear`` with a recipe: the module and the autograd function around a :class:`LinearOp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafp4.backends import Backend, resolve_backend
from megafp4.backends.base import hollow, refill
from megafp4.backends.sizes import check_layer, check_tokens
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.linear_op import LinearOp, Wgrad
from megafp4.numerics.grid import GridWeight
from megafp4.numerics.grid_linear import GridLinear
from megafp4.precision import Precision
from megafp4.recipes import GEMMS, Recipe, get_recipe


class _Call(NamedTuple):
    """What a call of a linear is made of besides what autograd follows."""

    op: LinearOp
    weight: Tensor
    keep: bool
    """Whether there may be a wgrad."""
    defers: bool
    """Whether wgrad is left to :attr:`Precision.deferred`. Autograd is not shown the weight then:
    it would call the hooks of its gradient in backward, when there is none yet."""


class _ThreeGemms(torch.autograd.Function):
    """Autograd's view of a :class:`LinearOp`: dgrad and wgrad run only where they are needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shown: Tensor | None, bias: Tensor | None, call: _Call
    ) -> Tensor:
        op, weight, keep = call.op, call.weight, call.keep
        ctx.call, ctx.at, ctx.shape = call, op.precision.position, x.shape
        amax = op.precision.magnitudes.of(x)
        y, kept = op.fprop(
            x.reshape(-1, x.shape[-1]), weight, ctx.at, bias, x.dtype, keep=keep, amax=amax
        )
        tensors, ctx.kept = hollow(kept) if keep else ([], None)
        ctx.save_for_backward(weight, *tensors)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, parameter, _, defers = ctx.call
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"a derivative of the gradient of {op.name!r} was asked for (create_graph): "
                "quantized linears have first derivatives only"
            )
        weight, *tensors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, weight.shape[0])
        at, dx, dw = ctx.at, None, None
        kept = refill(ctx.kept, tensors) if needs_weight or defers else None
        db = dy.new_empty(weight.shape[0], dtype=torch.float32) if needs_bias else None
        if defers:
            dx, wgrad = op.split(dy, kept, weight, at, db)
            op.precision.deferred.append(partial(_accumulate, parameter, op, wgrad))
        elif needs_x and kept is not None:
            target = op.precision.target(parameter, op.backend)
            dx, dw = op.backward(dy, kept, weight, at, target, db)
            dw = dw if target.returned else None
        elif needs_x:
            dx = op.dgrad(dy, weight, at)
        elif kept is not None:
            dw = op.wgrad(dy, kept, weight, at)
        if db is not None and (dx is None or kept is None):
            torch.sum(dy, 0, dtype=torch.float32, out=db)
        return None if dx is None else dx.view(ctx.shape), dw, db, None


class _Later(torch.autograd.Function):
    """Autograd's view of a deferred wgrad: asked for the weight's gradient, it runs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, run: Callable[[], Tensor | None]) -> Tensor:
        ctx.run = run
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.run(), None


def _accumulate(weight: Tensor, op: LinearOp, wgrad: Wgrad) -> None:
    """Run a deferred wgrad and let autograd accumulate it, which calls the weight's hooks."""

    def run() -> Tensor | None:
        target = op.precision.target(weight, op.backend)
        dw = wgrad(target)
        return dw if target.returned else None

    _Later.apply(weight, run).backward(weight.new_empty(0))


class Linear(GridLinear):
    """``nn.Linear`` whose three GEMMs follow a recipe.

    Args:
        in_features, out_features, bias, device, dtype: As in ``nn.Linear``.
        recipe: Name or :class:`Recipe`.
        backend: Name or :class:`Backend`.
        precision: Shared by the linears of a model. Advance its ``step`` before each step of
            training: at one step, one token draws the same bits again. None makes one of the
            layer's own, whose ``step`` advances at every forward call in training mode. Activation
            checkpointing recomputes with the step of the latest call, so a layer that is called
            several times before its backward pass should then be given a Precision.
        layer: Stream id; layers with different ids draw different random bits.
        name: Name in errors, ledger and statistics.
        segments: Row counts of the matrices fused in the weight (q, k, v; gate, up): the scale that
            BitNet and DQT take from the mean of a whole matrix is taken from each.

    Raises:
        ConfigError: Unknown names; widths that the recipe's blocks do not divide.
        UnsupportedError: The backend cannot run the recipe.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        recipe: str | Recipe = "bf16",
        backend: str | Backend = "reference",
        precision: Precision | None = None,
        layer: int = 0,
        name: str = "",
        segments: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        rows = None if segments is None else tuple(segments)
        used = precision or Precision()
        self._own_precision = None if precision else used
        self.op = LinearOp(get_recipe(recipe), resolve_backend(backend), used, layer, name, rows)
        check_layer(self.op.recipe, self.op.backend, self.weight.shape, rows, self.op.name)

    @property
    def recipe(self) -> Recipe:
        """The recipe in force."""
        return self.op.recipe

    def set_recipe(self, recipe: str | Recipe) -> None:
        """Switch to another recipe, between steps.

        Raises:
            ConfigError: As the constructor; or the weight would have to leave its grid.
        """
        new = get_recipe(recipe)
        if self.grid is not None and new.grid != self.recipe.grid:
            raise ConfigError(
                f"{self.op.name!r} holds its weight on the grid of {self.recipe.name!r}, which "
                f"{new.name!r} does not share: choose a recipe with the same grid"
            )
        check_layer(new, self.op.backend, self.weight.shape, self.op.segments, self.op.name)
        self.op = replace(self.op, recipe=new)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], FP32 or BF16 -> [..., out] of the same dtype.

        Stays outside the graphs of ``torch.compile``, which would be compiled anew at every step.
        """
        if torch.compiler.is_compiling():
            # Wrapped here and not as a decorator, for which `import megafp4` would load dynamo.
            outside: Tensor = torch.compiler.disable(self._forward)(x)
            return outside
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedError(f"{self.op.name!r} got a {x.dtype} input: give FP32 or BF16")
        # Under no_grad, autograd still says that the weight needs a gradient.
        keep = torch.is_grad_enabled() and self.weight.requires_grad
        if keep:
            check_tokens(self.recipe, self.op.backend, x.shape[:-1].numel(), self.op.name)
        if x.numel() == 0:  # nothing to multiply, and gradients of zeros
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        if not torch.is_grad_enabled():
            # Without a training step in between, a write through `.data` would go unnoticed.
            self.op.forget_weights()
        # While autograd is at work, a forward call recomputes what was computed before.
        again = torch._C._current_graph_task_id() != -1
        if self.training and self.op.precision is self._own_precision and not again:
            self.op.precision.step += 1
        # Where x needs no gradient, no backward pass would come by to leave a wgrad.
        defers = keep and x.requires_grad and self.op.precision.deferred is not None
        call = _Call(self.op, self.weight, keep, defers)
        return _ThreeGemms.apply(x, None if defers else self.weight, self.bias, call)

    def to_grid(self) -> None:
        """Move the weight onto the recipe's grid: packed codes and steps become its only copy.

        Raises:
            ConfigError: The recipe has no grid.
        """
        spec = self.recipe.grid
        if spec is None:
            raise ConfigError(f"recipe {self.recipe.name!r} of {self.op.name!r} has no grid")
        segments, layer = self.op.segments, self.op.layer
        self.op.grid = GridWeight.from_dense(self.weight, spec.bits, spec.range, segments, layer)
        self.hold_grid(self.op.grid)

    def extra_repr(self) -> str:
        """Show every cast."""
        gemms = ", ".join(f"{gemm}: {self.recipe.gemm(gemm)}" for gemm in GEMMS)
        return f"{super().extra_repr()}, recipe={self.recipe.name}, {gemms}"
