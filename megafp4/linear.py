"""The heart: a linear layer is three GEMMs, and a recipe says what each of them multiplies.

For y = x W^T + bias, with dy the gradient of y:

=======  ================  ==================  ===================  ====================
GEMM     result            a                   b                    contracts over
=======  ================  ==================  ===================  ====================
fprop    y [tokens, out]   x [tokens, in]      W [out, in]          in
dgrad    dx [tokens, in]   dy [tokens, out]    W [out, in]          out
wgrad    dW [out, in]      dy [tokens, out]    x [tokens, in]       tokens
=======  ================  ==================  ===================  ====================

Every operand takes the same way: start from the original (or from what fprop multiplied), Hadamard
transform, quantize; the GEMM's alpha then undoes prescale and transform on the FP32 accumulator.
The bias gradient is the plain sum of dy. Models are in FP32 or BF16; y and dx have x's type.

Random bits depend on (seed, step, layer, GEMM, operand, global element), never on a generator: an
element draws the same bits however the batch is cut, when it is recomputed, and after a resume.
The weight draws once per step, so it is quantized once per step and shared by all micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megafp4.backends import Backend, Operand, Slope, operand_format, resolve_backend
from megafp4.backends.base import hollow, refill
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.numerics import Key, QTensor
from megafp4.numerics.grid import GridWeight
from megafp4.numerics.grid_linear import GridLinear
from megafp4.precision import Position, Precision, WeightCache
from megafp4.recipes import DGE, GEMMS, Gemm, Recipe, Side, get_recipe
from megafp4.recipes.cast import CastRequest, cast_from, split_outliers

FP32 = torch.float32
# Contraction axis of a and of b, as in the table above.
_AXES = {"fprop": (1, 1), "residual": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}


@dataclass
class LinearOp:
    """The three GEMMs of one layer; a function of tensors that owns no parameters.

    ``fprop``, ``dgrad`` and ``wgrad`` can be called on their own, as pipeline schedules do; ``at``
    is the position of the forward pass they belong to.

    Raises:
        UnsupportedError: The backend cannot multiply what the recipe asks for.
    """

    recipe: Recipe
    backend: Backend
    precision: Precision
    layer: int = 0
    name: str = ""
    segments: tuple[int, ...] | None = None
    grid: GridWeight | None = None
    _cache: WeightCache = field(default_factory=WeightCache, init=False, repr=False)

    def __post_init__(self) -> None:
        self.name = self.name or f"layer {self.layer}"
        for gemm in GEMMS:
            self.backend.check(self.recipe.gemm(gemm).a.format, self.recipe.gemm(gemm).b.format)

    def fprop(
        self,
        x: Tensor,
        weight: Tensor,
        at: Position,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = FP32,
        *,
        keep: bool = True,
    ) -> tuple[Tensor, Operand]:
        """x [tokens, in], W [out, in] -> y [tokens, out], and what wgrad needs of x.

        Args:
            x: FP32 or BF16 [tokens, in].
            weight: [out, in].
            at: Where in the run this is.
            bias: [out], added in FP32.
            out_dtype: Type of y, rounded to once.
            keep: Whether there will be a wgrad.
        """
        spec = self.recipe.fprop.a
        requests = [self._request("fprop", "a", at)]
        early = keep and self.recipe.wgrad.b.saved_as != "input"
        if early:
            requests.append(self._request("wgrad", "b", at))
        inner, outliers = split_outliers(x, spec)
        if inner is x:
            a, *saved = self._cast(x, requests)
        else:
            (a,), saved = self._cast(inner, requests[:1]), self._cast(x, requests[1:])
        b = self._weight("fprop", weight, at)
        if outliers is None:
            y = self._multiply("fprop", a, b, out_dtype, bias=bias)
        else:
            # What was clamped off meets the weight as it is [2501.17116, section 3.2].
            y = self._multiply("fprop", a, b)
            dense = self._dense(weight).bfloat16()
            y += self._multiply("residual", outliers.bfloat16(), dense)
            y = (y if bias is None else y + bias).to(out_dtype)
        return y, saved[0] if early else x

    def dgrad(self, dy: Tensor, weight: Tensor, at: Position) -> Tensor:
        """dy [tokens, out], W [out, in] -> dx [tokens, in] in dy's dtype."""
        (a,) = self._cast(dy, [self._request("dgrad", "a", at)])
        return self._dgrad(a, weight, at, dy.dtype)

    def wgrad(self, dy: Tensor, kept: Operand, weight: Tensor, at: Position) -> Tensor:
        """dy [tokens, out], what fprop kept -> dW [out, in] in W's dtype."""
        (a,) = self._cast(dy, [self._request("wgrad", "a", at)])
        return self._wgrad(a, kept, weight, at)

    def backward(
        self,
        dy: Tensor,
        kept: Operand,
        weight: Tensor,
        at: Position,
        accumulate_into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both gradients, dy cast for both GEMMs at once.

        Args:
            dy: [tokens, out].
            kept: What fprop kept.
            weight: [out, in].
            at: Position of the forward pass.
            accumulate_into: FP32 [out, in] that dW is added to.
        """
        a, b = self._cast(dy, [self._request("dgrad", "a", at), self._request("wgrad", "a", at)])
        dx = self._dgrad(a, weight, at, dy.dtype)
        return dx, self._wgrad(b, kept, weight, at, accumulate_into)

    def forget_weights(self) -> None:
        """Quantize the weight anew when it is next multiplied."""
        self._cache.clear()

    def _dgrad(self, a: Operand, weight: Tensor, at: Position, dtype: torch.dtype) -> Tensor:
        return self._multiply("dgrad", a, self._weight("dgrad", weight, at), dtype)

    def _wgrad(
        self,
        a: Operand,
        kept: Operand,
        weight: Tensor,
        at: Position,
        accumulate_into: Tensor | None = None,
    ) -> Tensor:
        if self.recipe.wgrad.b.saved_as == "input":
            assert isinstance(kept, Tensor)
            (kept,) = self._cast(kept, [self._request("wgrad", "b", at)])
        slope = None
        if isinstance(dge := self.recipe.fprop.b.estimator, DGE):
            slope = Slope(self._dense(weight), self._weight("fprop", weight, at), dge)
        return self._multiply(
            "wgrad", a, kept, weight.dtype, slope=slope, accumulate_into=accumulate_into
        )

    def _request(self, gemm: Gemm, side: Side, at: Position) -> CastRequest:
        """Say how the recipe casts one operand, at its place in the global batch."""
        axis = _AXES[gemm]["ab".index(side)]
        is_weight = side == "b" and gemm != "wgrad"
        first = 0 if is_weight else at.first_token
        spec = self.recipe.gemm(gemm)
        through = spec.side(side).source == "fprop"
        return CastRequest(
            spec,
            side,
            axis,
            Key(self.precision.seed, at.step, self.layer, gemm, side),
            (first, 0) if axis == 1 else (0, first),
            self.segments if is_weight else None,
            self._request("fprop", side if is_weight else "a", at) if through else None,
            spec.side(side).saved_as == "packed",
        )

    def _cast(self, x: Tensor, requests: list[CastRequest]) -> list[Operand]:
        """Make operands of a matrix, and show them to whoever watches."""
        if self.precision.probe is not None:
            for request in requests:
                operand, seen = cast_from(x, request)
                if isinstance(operand, QTensor):
                    gemm = str(request.key.gemm)
                    self.precision.probe(self.name, gemm, request.side, seen, operand)
        return self.backend.cast(x, requests)

    def _weight(self, gemm: Gemm, weight: Tensor, at: Position) -> Operand:
        """Operand b of fprop or dgrad, quantized once per step and version of the weight."""
        if self.recipe.grid and self.grid is None:
            raise ConfigError(f"{self.name!r} has no grid weight yet: call to_grid() first")
        stored = self.grid.codes if self.grid else weight
        return self._cache.get(gemm, stored, at.step, lambda: self._cast_weight(gemm, weight, at))

    def _cast_weight(self, gemm: Gemm, weight: Tensor, at: Position) -> Operand:
        spec = self.recipe.gemm(gemm).b
        if self.grid and spec.source == "grid" and spec.quantized:
            return self.backend.adopt(self.grid.to_qtensor())
        return self._cast(self._dense(weight), [self._request(gemm, "b", at)])[0]

    def _dense(self, weight: Tensor) -> Tensor:
        return self.grid.decode() if self.grid else weight

    def _multiply(
        self,
        gemm: str,
        a: Operand,
        b: Operand,
        out_dtype: torch.dtype = FP32,
        *,
        bias: Tensor | None = None,
        slope: Slope | None = None,
        accumulate_into: Tensor | None = None,
    ) -> Tensor:
        formats, who = (operand_format(a), operand_format(b)), self.backend.ran_as(a, b)
        self.precision.ledger.record(self.name, gemm, *formats, who)
        alpha = 1.0 if gemm == "residual" else getattr(self.recipe, gemm).alpha
        return self.backend.gemm(
            a,
            b,
            _AXES[gemm],
            alpha,
            out_dtype,
            bias=bias,
            slope=slope,
            accumulate_into=accumulate_into,
        )


def _in_backward() -> bool:
    """Whether autograd is at work, so that a forward call recomputes what was computed before."""
    return torch._C._current_graph_task_id() != -1


class _ThreeGemms(torch.autograd.Function):
    """Autograd's view of a :class:`LinearOp`: dgrad and wgrad run only where they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, op: LinearOp) -> Tensor:
        ctx.op, ctx.at, ctx.shape, ctx.weight = op, op.precision.position, x.shape, weight
        keep = ctx.needs_input_grad[1]
        y, kept = op.fprop(
            x.reshape(-1, x.shape[-1]), weight, ctx.at, bias, out_dtype=x.dtype, keep=keep
        )
        tensors, ctx.kept = hollow(kept) if keep else ([], None)
        ctx.save_for_backward(weight, *tensors)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"a derivative of the gradient of {ctx.op.name!r} was asked for (create_graph): "
                "quantized linears have first derivatives only"
            )
        weight, *tensors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, weight.shape[0])
        op, at, dx, dw = ctx.op, ctx.at, None, None
        into = _main_gradient(ctx.weight, op) if needs_weight else None
        kept = refill(ctx.kept, tensors) if needs_weight else None
        if needs_x and kept is not None:
            dx, dw = op.backward(dy, kept, weight, at, into)
        elif needs_x:
            dx = op.dgrad(dy, weight, at)
        elif kept is not None:
            dw = op.wgrad(dy, kept, weight, at)
            into = None
        db = dy.sum(0, dtype=torch.float32) if needs_bias else None
        return (
            None if dx is None else dx.view(ctx.shape),
            None if into is not None else dw,
            db,
            None,
        )


def _main_gradient(weight: Tensor, op: LinearOp) -> Tensor | None:
    """The FP32 gradient that exists already, if the GEMM may and can add into it."""
    if not (op.precision.accumulates and op.backend.accumulates and weight.is_leaf):
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    grad = weight.grad
    fits = grad is not None and grad.dtype == torch.float32 and grad.is_contiguous()
    return grad if fits else None


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
        self.op.recipe.check_layer(in_features, out_features, rows, self.op.name)

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
        new.check_layer(self.in_features, self.out_features, self.op.segments, self.op.name)
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
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.recipe.check_length("wgrad", x.shape[:-1].numel(), self.op.name)
        if not torch.is_grad_enabled():
            # Without a training step in between, a write through `.data` would go unnoticed.
            self.op.forget_weights()
        if self.training and self.op.precision is self._own_precision and not _in_backward():
            self.op.precision.step += 1
        return _ThreeGemms.apply(x, self.weight, self.bias, self.op)

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
