"""Ranks of one process: what each makes of its slice next to what is made of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from megafp4.backends import HopperBackend, Operand
from megafp4.backends.base import PackedOperand, Prepared
from megafp4.backends.bf16 import decode
from megafp4.linear_op import LinearOp
from megafp4.numerics import QTensor
from megafp4.parallel.context import Zigzag
from megafp4.parallel.cut import Cut
from megafp4.parallel.gemms import Shard, ShardedOp
from megafp4.precision import Position, Precision
from megafp4.recipes import get_recipe

T = TypeVar("T")
AT = Position(step=5, first_token=64)
SEED = 2**63 + 11
LAYER = 3


@dataclass(eq=False)
class Rehearsed:
    """Peers that answer with what the others said the last time: ranks run one after another."""

    rank: int
    size: int
    before: list[list[Tensor]]
    said: list[Tensor] = field(default_factory=list)

    def _others(self, x: Tensor) -> list[Tensor]:
        turn = len(self.said)
        self.said.append(x)
        heard = [calls[turn] if turn < len(calls) else x for calls in self.before]
        return [*heard[: self.rank], x, *heard[self.rank + 1 :]]

    def largest(self, x: Tensor) -> Tensor:
        return torch.stack(self._others(x)).amax(0)

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._others(x)).sum(0)

    def side_by_side(self, x: Tensor) -> Tensor:
        return torch.cat(self._others(x), -1)

    def start_all_gather(self, x: Tensor, what: str) -> SimpleNamespace:
        is_fp8 = x.dtype == torch.float8_e4m3fn
        joined = torch.cat(self._others(x.view(torch.uint8) if is_fp8 else x)).view(x.dtype)
        return SimpleNamespace(wait=lambda: joined)


def rehearse(size: int, part: Callable[[Rehearsed], T]) -> list[T]:
    """Run the ranks until each has heard what the others say in the end."""
    before: list[list[Tensor]] = [[] for _ in range(size)]
    while True:
        ranks = [Rehearsed(rank, size, before) for rank in range(size)]
        results = [part(rank) for rank in ranks]
        now = [rank.said for rank in ranks]
        if [len(said) for said in now] == [len(said) for said in before] and all(
            torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
            for mine, theirs in zip(now, before, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ):
            return results
        before = now


class Ungathered(ShardedOp):
    """Leaves operands of a sequence as the slices that they are cast as."""

    def _start_gather(self, operand: Operand, axis: int) -> Operand:
        return operand


def value_of(operand: Operand, axis: int) -> Tensor:
    """What an operand stands for, in the shape of the matrix: FP32."""
    if isinstance(operand, Tensor):
        return operand.float()
    if isinstance(operand, QTensor):
        return operand.dequantize()
    if isinstance(operand, PackedOperand):
        found, scale = decode(operand.unpacked(), 1)
        found = found.float() if scale is None else found.float() * scale
    else:
        assert isinstance(operand, Prepared)
        found = operand.data.float() * operand.scale.reshape(-1, 1)
    return found if axis == 1 else found.t()


def values(
    op: LinearOp, x: Tensor, dy: Tensor, weight: Tensor | None, at: Position = AT
) -> dict[str, Tensor]:
    """Values of all operands of a linear; outliers that meet the weight as ``outliers``."""
    sums = torch.empty(dy.shape[1], device=dy.device)
    of_x, of_dy = (_own(op, name, t, at) for name, t in (("x", x), ("dy", dy)))
    forward = [op._request("fprop", "a", of_x), op._request("wgrad", "b", of_x)]
    backward = [op._request("dgrad", "a", of_dy), op._request("wgrad", "a", of_dy)]
    backward[1] = replace(backward[1], sums=sums)
    first, outliers, saved = op._cast_input(x, forward, None)
    made = [first, *saved, *op._cast(dy, backward)]
    requests = forward + backward
    if weight is not None:
        of_weight = [op._request("fprop", "b", at, weight), op._request("dgrad", "b", at, weight)]
        made += op._cast(weight, of_weight)
        requests += of_weight
    found = {
        f"{request.key.gemm}.{request.side}": value_of(operand, request.axis)
        for request, operand in zip(requests, made, strict=True)
    }
    torch.testing.assert_close(sums, dy.float().sum(0), rtol=1e-4, atol=1e-8)
    return found if outliers is None else {**found, "outliers": outliers.bfloat16().float()}


def _own(op: LinearOp, matrix: str, x: Tensor, at: Position) -> Position:
    return op._own(at, matrix, x) if isinstance(op, ShardedOp) else at


@dataclass(frozen=True)
class Case:
    """A linear under tensor parallelism, or of kind ``context``."""

    recipe: str
    kind: str
    size: int
    sequence: bool
    segments: tuple[int, ...]
    width: int
    tokens: int
    device: str
    pinned: bool = False
    """Whether the ranks count from a pinned position, as CUDA graphs do."""

    def matrices(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """BF16 x and dy, and the FP32 weight unless the recipe keeps codes in its place."""
        out, where = sum(self.segments), torch.device(self.device)
        generator = torch.Generator(where).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=where)

        x = normal(self.tokens, self.width).mul_(normal(self.width).exp())
        dy = normal(self.tokens, out).mul_(1e-4 * normal(self.tokens, 1).exp())
        if get_recipe(self.recipe).grid:
            return x.bfloat16(), dy.bfloat16(), None
        weight = normal(out, self.width).mul_(0.02 * normal(out, 1).exp())
        return x.bfloat16(), dy.bfloat16(), weight

    def cut(self) -> Cut:
        """Of the outputs or of the inputs."""
        return Cut(self.segments if self.kind == "column" else (self.width,), self.size)

    def take(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """A rank's slice of a matrix, or of an operand made of it."""
        matrix = {"fprop.a": "x", "wgrad.b": "x", "outliers": "x", "dgrad.a": "dy", "wgrad.a": "dy"}
        kind, column = matrix.get(name, name), self.kind == "column"
        if kind in ("fprop.b", "dgrad.b", "weight"):
            parallel = self.kind != "context"
            return self.cut().take(whole, 0 if column else 1, rank) if parallel else whole
        if self.kind == "context":
            return Zigzag(self.size, rank).take(whole, 0)
        if (kind == "dy") == column:
            return self.cut().take(whole, 1, rank)
        return whole.chunk(self.size)[rank] if self.sequence else whole

    def of_whole(self) -> dict[str, Tensor]:
        """Values of the operands that one rank would make of everything."""
        options = (get_recipe(self.recipe), HopperBackend(), Precision(SEED), LAYER, "l")
        return values(LinearOp(*options, self.segments), *self.matrices())

    def of_ranks(self) -> list[dict[str, Tensor]]:
        """Values of the operands that every rank makes of its slices."""
        x, dy, weight = self.matrices()
        recipe = get_recipe(self.recipe)

        def of_context(group: Rehearsed) -> dict[str, Tensor]:
            op = LinearOp(recipe, HopperBackend(), Precision(SEED), LAYER, "l", self.segments)
            zigzag = Zigzag(self.size, group.rank)
            tokens = zigzag.tokens(64, 1, self.tokens)
            at = AT._replace(first_token=tokens, others=group)
            return values(op, zigzag.take(x, 0), zigzag.take(dy, 0), weight, at)

        if self.kind == "context":
            return rehearse(self.size, of_context)

        def part(group: Rehearsed) -> dict[str, Tensor]:
            backend, at = HopperBackend(), AT
            if self.pinned:
                assert isinstance(AT.first_token, int)
                backend.pin_position(SEED, AT.step, AT.first_token, torch.device(self.device))
                at = Position(step=0, first_token=0)
            op = Ungathered(
                recipe=recipe,
                backend=backend,
                precision=Precision(SEED),
                layer=LAYER,
                name="l",
                segments=self.cut().shares if self.kind == "column" else self.segments,
                shard=Shard(self.kind, self.cut(), group, self.sequence),  # type: ignore[arg-type]
            )
            own = [self.take(name, t, group.rank) for name, t in (("x", x), ("dy", dy))]
            of = None if weight is None else self.take("weight", weight, group.rank)
            return values(op, own[0], own[1], of, at)

        return rehearse(self.size, part)
