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

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from megafp4.backends import Backend, Operand, Slope, operand_format
from megafp4.backends.base import Measuring, Splitting
from megafp4.errors import ConfigError
from megafp4.numerics import Key, QTensor, Slice
from megafp4.numerics.grid import GridWeight
from megafp4.precision import RETURNED, Position, Precision, Target, WeightCache
from megafp4.recipes import DGE, GEMMS, Gemm, Recipe, Side
from megafp4.recipes.cast import CastRequest, cast_from, split_outliers

FP32 = torch.float32

Wgrad: TypeAlias = Callable[[Target], Tensor]
"""A wgrad whose operands are ready: computes dW [out, in], for the target that it is given."""

# Contraction axis of a and of b, as in the table above.
_AXES = {"fprop": (1, 1), "residual": (1, 1), "dgrad": (1, 0), "wgrad": (0, 0)}


@dataclass
class LinearOp:
    """The three GEMMs of one layer; a function of tensors that owns no parameters.

    ``fprop``, ``dgrad`` and ``wgrad`` can be called on their own; ``split`` runs dgrad and leaves
    wgrad for later, as zero-bubble pipelines do. ``at`` is the position of the forward pass that
    they belong to.

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
        amax: Tensor | None = None,
    ) -> tuple[Tensor, Operand]:
        """x [tokens, in], W [out, in] -> y [tokens, out], and what wgrad needs of x.

        Args:
            x: FP32 or BF16 [tokens, in].
            weight: [out, in].
            at: Where in the run this is.
            bias: [out], added in FP32.
            out_dtype: Type of y, rounded to once.
            keep: Whether there will be a wgrad.
            amax: FP32 [n]: largest magnitudes of parts of x, if they are known.
        """
        early = keep and self.recipe.wgrad.b.saved_as != "input"
        requests = [self._request("fprop", "a", at)]
        if early:
            requests.append(self._request("wgrad", "b", at))
        a, outliers, saved = self._cast_input(x, requests, amax)
        b = self._weight_ahead(weight, at) if keep else self._weight("fprop", weight, at)
        if outliers is None:
            y = self._multiply("fprop", a, b, out_dtype, bias=bias)
        else:
            # What was clamped off meets the weight as it is [2501.17116, section 3.2].
            y = self._multiply("fprop", a, b)
            y += self._multiply("residual", outliers.bfloat16(), self._dense(weight).bfloat16())
            y = (y if bias is None else y + bias).to(out_dtype)
        return y, saved[0] if early else x

    def _cast_input(
        self, x: Tensor, requests: list[CastRequest], amax: Tensor | None
    ) -> tuple[Operand, Tensor | None, list[Operand]]:
        """What fprop multiplies of x, the outliers that meet the weight as it is, the rest."""
        first, *others = requests
        if self.precision.probe is None and isinstance(self.backend, Splitting):
            apart = self.backend.cast_apart(x, first)
            if apart is not None:
                a, outliers = apart
                return self._joined(a, first), outliers, self._cast(x, others, apart)
        inner, outliers = split_outliers(x, first.operand, first.part)
        if inner is x:
            known = amax if first.part is None else None  # of a slice, not of the whole
            a, *saved = self._cast(x, [replace(first, amax=known), *others])
            return a, outliers, saved
        (a,) = self._cast(inner, [first])  # what is left of x after clamping is not as large
        return a, outliers, self._cast(x, others, (a, outliers))

    def _joined(self, operand: Operand, request: CastRequest) -> Operand:
        """What is multiplied, where the operand is only of a slice."""
        return operand

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
        target: Target = RETURNED,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both gradients, dy cast for both GEMMs at once.

        Args:
            dy: [tokens, out].
            kept: What fprop kept.
            weight: [out, in].
            at: Position of the forward pass.
            target: What becomes of dW.
            sums: FP32 [out], to be filled with the sums of dy over the tokens.
        """
        dx, wgrad = self.split(dy, kept, weight, at, sums)
        return dx, wgrad(target)

    def split(
        self, dy: Tensor, kept: Operand, weight: Tensor, at: Position, sums: Tensor | None = None
    ) -> tuple[Tensor, Wgrad]:
        """Dgrad now, wgrad when it is called; arguments as in :meth:`backward`.

        dy is cast once for both, so that nothing is drawn twice: until the call, wgrad's operand is
        all that is kept of it.
        """
        for_wgrad = replace(self._request("wgrad", "a", at), sums=sums)
        a, b = self._cast(dy, [self._request("dgrad", "a", at), for_wgrad])
        dx = self._dgrad(a, weight, at, dy.dtype)
        return dx, functools.partial(self._wgrad, b, kept, weight, at)

    def use_cache(self, cache: WeightCache) -> None:
        """Keep the weight's operands there from now on."""
        self._cache = cache

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
        target: Target = RETURNED,
    ) -> Tensor:
        if self.recipe.wgrad.b.saved_as == "input":
            assert isinstance(kept, Tensor)
            (kept,) = self._cast(kept, [self._request("wgrad", "b", at)])
        slope = None
        if isinstance(dge := self.recipe.fprop.b.estimator, DGE):
            slope = Slope(self._dense(weight), self._weight("fprop", weight, at), dge)
        dtype = (weight.grad_dtype if weight.is_leaf else None) or weight.dtype
        return self._multiply("wgrad", a, kept, dtype, slope=slope, target=target)

    def _request(
        self, gemm: Gemm, side: Side, at: Position, weight: Tensor | None = None
    ) -> CastRequest:
        """Say how the recipe casts one operand, at its place in the global batch."""
        axis, spec = _AXES[gemm]["ab".index(side)], self.recipe.gemm(gemm)
        first = 0 if weight is not None else at.first_token
        source: Side = "a" if weight is None else "b"
        through = spec.side(side).source == "fprop"
        return CastRequest(
            spec,
            side,
            axis,
            Key(self.precision.seed, at.step, self.layer, gemm, side),
            (first, 0) if axis == 1 else (0, first),
            None if weight is None else self.segments,
            self._request("fprop", source, at, weight) if through else None,
            spec.side(side).saved_as == "packed",
            amax=None if weight is None else self.precision.magnitudes.of(weight),
            part=None if weight is not None or at.others is None else Slice(at.others, 0),
        )

    def _cast(
        self,
        x: Tensor,
        requests: list[CastRequest],
        used: tuple[Operand, Tensor | None] | None = None,
    ) -> list[Operand]:
        """Make operands of a matrix, and show them to whoever watches."""
        if self.precision.probe is not None:
            for request in requests:
                operand, seen = cast_from(x, request)
                if isinstance(operand, QTensor):
                    where = self.name, str(request.key.gemm), request.side
                    self.precision.probe(*where, seen, operand)
        return self.backend.cast(x, requests, used)

    def _weight(self, gemm: Gemm, weight: Tensor, at: Position) -> Operand:
        """Operand b of fprop or dgrad, quantized once per step and version of the weight."""
        if self.recipe.grid and self.grid is None:
            raise ConfigError(f"{self.name!r} has no grid weight yet: call to_grid() first")
        stored = self.grid.codes if self.grid else weight
        return self._cache.get(gemm, stored, at.step, lambda: self._cast_weight(gemm, weight, at))

    def _weight_ahead(self, weight: Tensor, at: Position) -> Operand:
        """Operand b of fprop; one pass over the weight makes dgrad's too, where it can."""
        requests = [self._request(gemm, "b", at, weight) for gemm in ("fprop", "dgrad")]
        if self.recipe.grid or not all(each.operand.quantized for each in requests):
            return self._weight("fprop", weight, at)
        both = functools.cache(lambda: self._cast(weight, requests))
        self._cache.get("dgrad", weight, at.step, lambda: both()[1])
        return self._cache.get("fprop", weight, at.step, lambda: both()[0])

    def _cast_weight(self, gemm: Gemm, weight: Tensor, at: Position) -> Operand:
        spec = self.recipe.gemm(gemm).b
        if self.grid and spec.source == "grid" and spec.quantized:
            return self.backend.adopt(self.grid.to_qtensor())
        request = self._request(gemm, "b", at, weight)
        used = None if request.through is None else (self._weight("fprop", weight, at), None)
        return self._cast(self._dense(weight), [request], used)[0]

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
        target: Target = RETURNED,
    ) -> Tensor:
        formats, who = (operand_format(a), operand_format(b)), self.backend.ran_as(a, b)
        self.precision.ledger.record(self.name, gemm, *formats, who)
        alpha = 1.0 if gemm == "residual" else getattr(self.recipe, gemm).alpha
        into, parameter = target.accumulate_into, target.measured_for
        if parameter is not None and out_dtype == FP32 and isinstance(self.backend, Measuring):
            out, squares = self.backend.measured_gemm(
                a, b, _AXES[gemm], alpha, slope=slope, accumulate_into=into
            )
            if squares is not None:
                self.precision.squares.record(parameter, out, squares)
            return out
        return self.backend.gemm(
            a,
            b,
            _AXES[gemm],
            alpha,
            out_dtype,
            bias=bias,
            slope=slope,
            accumulate_into=into,
            overwrite=target.overwrite,
        )
