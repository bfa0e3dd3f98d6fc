"""The three GEMMs of a linear cut over tensor-parallel ranks, equal to the whole code by code.

A column-parallel linear holds some of the outputs, a row-parallel one some of the inputs [Megatron,
arXiv 1909.08053, section 3]. Notation: T tokens, K inputs, N outputs, a subscript p where a dim is
cut over the ranks, {p} where a sum over the ranks is still due:

========  ==============================  =====================================
GEMM      column                          row
========  ==============================  =====================================
fprop     x[T, K] W[Np, K] -> y[T, Np]    x[T, Kp] W[N, Kp] -> y[T, N]{p}
dgrad     dy[T, Np] W[Np, K] -> dx{p}     dy[T, N] W[N, Kp] -> dx[T, Kp]
wgrad     dy[T, Np] x[T, K] -> dW[Np, K]  dy[T, N] x[T, Kp] -> dW[N, Kp]
========  ==============================  =====================================

With sequence parallelism [arXiv 2205.05198, section 4.2.2] x of a column and dy of a row arrive as
[Tp, ...], are cast by the rank that holds them and gathered as operands; sums are scattered over
the tokens instead of being given to all. wgrad runs while dgrad's sum is on its way, and dgrad
while wgrad's operand is.

Every operand is a slice of what the whole linear would multiply: scales that ranks share are
reduced before encoding, and random bits are keyed by global positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from megafp4.backends import Operand
from megafp4.errors import ConfigError
from megafp4.linear_op import FP32, LinearOp, Wgrad
from megafp4.numerics import Runs, Slice, part_of
from megafp4.parallel.collectives import Group, Pending
from megafp4.parallel.cut import Cut
from megafp4.parallel.gather import Gathering, gather_tokens
from megafp4.precision import RETURNED, Position, Target
from megafp4.recipes import Gemm, Side
from megafp4.recipes.cast import CastRequest

Kind = Literal["column", "row"]


@dataclass(frozen=True)
class Shard:
    """Which part of a linear a rank holds, and how it talks to the others."""

    kind: Kind
    cut: Cut
    """Of the outputs (column) or of the inputs (row)."""
    group: Group
    sequence: bool = False
    """Whether tokens are cut where features are not."""
    reduce_dtype: torch.dtype | None = None
    """Type in which partial sums travel; None for that of the activations, as in Megatron."""

    @property
    def origin(self) -> int | Runs:
        """Global index of this rank's first output or input, or runs."""
        return self.cut.origin(self.group.rank)


@dataclass(kw_only=True)
class ShardedOp(LinearOp):
    """One rank's share of a linear's three GEMMs; all ranks of the group must call the same."""

    shard: Shard

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
        """y [T, Np] of x [T or Tp, K]; or y [T or Tp, N], summed, of x [T, Kp]."""
        if self.shard.kind == "column":
            # What is known of a slice says nothing of the whole, from which scales are taken.
            amax = amax if self._slices("x") is None else None
            own = self._own(at, "x", x)
            return super().fprop(x, weight, own, bias, out_dtype, keep=keep, amax=amax)
        partial, kept = super().fprop(x, weight, at, None, self._travels(out_dtype), keep=keep)
        y = self._reduce(partial, "fprop").wait()
        # In place: one pass that adds in FP32 and rounds once.
        return (y if bias is None else y.add_(bias)).to(out_dtype), kept

    def dgrad(self, dy: Tensor, weight: Tensor, at: Position) -> Tensor:
        """dx [T or Tp, K], summed, of dy [T, Np]; or dx [T, Kp] of dy [T or Tp, N]."""
        (a,) = self._cast(dy, [self._request("dgrad", "a", self._own(at, "dy", dy))])
        return self._start_dx(a, weight, at, dy.dtype).wait().to(dy.dtype)

    def wgrad(self, dy: Tensor, kept: Operand, weight: Tensor, at: Position) -> Tensor:
        """DW [Np, K] or [N, Kp]; see :meth:`LinearOp.wgrad`."""
        if self._slices("x") == 0 and self._waits_as_operand:
            kept = self._start_gather(kept, 0)
        (a,) = self._cast(dy, [self._request("wgrad", "a", self._own(at, "dy", dy))])
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
        """Both gradients; dgrad's sum over the ranks is on its way while wgrad runs."""
        own = self._own(at, "dy", dy)
        if self._slices("x") == 0 and self._waits_as_operand:
            kept = self._start_gather(kept, 0)
        a, b = self._cast(dy, self._requests_of_dy(own, sums))
        dx = self._start_dx(a, weight, at, dy.dtype)
        dw = self._wgrad(b, kept, weight, at, target)
        return dx.wait().to(dy.dtype), dw

    def split(
        self, dy: Tensor, kept: Operand, weight: Tensor, at: Position, sums: Tensor | None = None
    ) -> tuple[Tensor, Wgrad]:
        """Dgrad now; wgrad, and the gathering of what fprop kept, when it is called."""
        own = self._own(at, "dy", dy)
        a, b = self._cast(dy, self._requests_of_dy(own, sums))

        def wgrad(target: Target) -> Tensor:
            late = self._slices("x") == 0 and self._waits_as_operand
            return self._wgrad(b, self._start_gather(kept, 0) if late else kept, weight, at, target)

        return self._start_dx(a, weight, at, dy.dtype).wait().to(dy.dtype), wgrad

    def _requests_of_dy(self, own: Position, sums: Tensor | None) -> list[CastRequest]:
        for_wgrad = replace(self._request("wgrad", "a", own), sums=sums)
        return [self._request("dgrad", "a", own), for_wgrad]

    def _start_dx(self, a: Operand, weight: Tensor, at: Position, dtype: torch.dtype) -> Pending:
        if self.shard.kind == "row":
            return Pending(self.shard.group, "dgrad", self._dgrad(a, weight, at, dtype))
        return self._reduce(self._dgrad(a, weight, at, self._travels(dtype)), "dgrad")

    def _wgrad(
        self,
        a: Operand,
        kept: Operand,
        weight: Tensor,
        at: Position,
        target: Target = RETURNED,
    ) -> Tensor:
        if self._slices("x") == 0 and not self._waits_as_operand:
            assert isinstance(kept, Tensor)
            at = self._own(at, "x", kept)
        return super()._wgrad(a, kept, weight, at, target)

    def _multiply(
        self, gemm: str, a: Operand | Gathering, b: Operand | Gathering, *args: Any, **options: Any
    ) -> Tensor:
        a, b = (one.wait() if isinstance(one, Gathering) else one for one in (a, b))
        if gemm == "residual" and self._slices("x") == 0:
            a = gather_tokens(a, 1, self.shard.group).wait()
        return super()._multiply(gemm, a, b, *args, **options)

    def _request(
        self, gemm: Gemm, side: Side, at: Position, weight: Tensor | None = None
    ) -> CastRequest:
        """Say where in the whole operand this rank's slice lies."""
        request = super()._request(gemm, side, at, weight)
        matrix = _matrix(gemm, side)
        dim = self._slices(matrix)
        if dim is None:
            return request
        origin = request.origin
        if dim == 1 or matrix == "weight":  # tokens begin where `at` says
            contracted = dim == request.axis
            line, k = origin
            origin = (line, self.shard.origin) if contracted else (self.shard.origin, k)
        part = Slice(self.shard.group, dim, within=request.part)
        travels = self._is_gathered(request) or self._waits(request)
        return replace(request, origin=origin, part=part, travels=travels)

    def _cast(
        self,
        x: Tensor,
        requests: list[CastRequest],
        used: tuple[Operand, Tensor | None] | None = None,
    ) -> list[Operand]:
        """Cast this rank's slice, then gather the operands that GEMMs read whole."""
        if used is not None and isinstance(used[0], Gathering):
            used = None  # what fprop multiplies is of all tokens, where x is this rank's
        operands = super()._cast(x, requests, used)
        plain: dict[torch.dtype, Operand] = {}  # the same cast for two GEMMs travels once
        for i, request in enumerate(requests):
            operand = operands[i]
            if not self._is_gathered(request):
                continue
            if not isinstance(operand, Tensor):
                operands[i] = self._start_gather(operand, request.axis)
                continue
            if operand.dtype not in plain:
                plain[operand.dtype] = self._start_gather(operand, request.axis)
            operands[i] = plain[operand.dtype]
        return operands

    def _joined(self, operand: Operand, request: CastRequest) -> Operand:
        gathered = self._is_gathered(request)
        return self._start_gather(operand, request.axis) if gathered else operand

    def _start_gather(self, operand: Operand, axis: int) -> Operand:
        """Give all tokens' operand while it is on its way; only :meth:`_multiply` looks at it."""
        return cast("Operand", gather_tokens(operand, axis, self.shard.group))

    def _is_gathered(self, request: CastRequest) -> bool:
        matrix = _matrix(request.key.gemm, request.side)
        if matrix == "weight" or self._slices(matrix) != 0:
            return False
        return not self._waits(request)

    def _waits(self, request: CastRequest) -> bool:
        """Whether an operand waits for wgrad as a slice and is gathered then."""
        gathered = self._slices("x") == 0 and self._waits_as_operand
        return gathered and (request.key.gemm, request.side) == ("wgrad", "b")

    @property
    def _waits_as_operand(self) -> bool:
        return self.recipe.wgrad.b.saved_as != "input"

    def _slices(self, matrix: str) -> int | None:
        """Dim along which this rank holds a slice of ``x``, ``dy`` or ``weight``; None if none."""
        column, sequence = self.shard.kind == "column", self.shard.sequence
        if matrix == "weight":
            return 0 if column else 1
        if matrix == ("dy" if column else "x"):
            return 1
        return 0 if sequence else None

    def _own(self, at: Position, matrix: str, x: Tensor) -> Position:
        """Position of this rank's first token of a matrix."""
        if self._slices(matrix) != 0:
            return at
        first, count = self.shard.group.rank * x.shape[0], x.shape[0]
        return at._replace(first_token=part_of(at.first_token, first, count))

    def _travels(self, dtype: torch.dtype) -> torch.dtype:
        return self.shard.reduce_dtype or dtype

    def _reduce(self, partial: Tensor, what: str) -> Pending:
        group = self.shard.group
        if not self.shard.sequence:
            return group.start_all_reduce(partial, what)
        if partial.shape[0] % group.size:
            raise ConfigError(
                f"{partial.shape[0]} tokens of {self.name!r} cannot be scattered over tp "
                f"{group.size}: choose micro-batch x sequence length to be a multiple"
            )
        return group.start_reduce_scatter(partial, what)


def _matrix(gemm: int | str, side: Side) -> str:
    """Which matrix of a linear an operand is made of."""
    if side == "a":
        return "x" if gemm == "fprop" else "dy"
    return "x" if gemm == "wgrad" else "weight"
