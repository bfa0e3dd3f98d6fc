"""Tokens cut over ranks: which are whose, how they attend, and that linears draw the same codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megafp4.errors import ConfigError, UnsupportedError
from megafp4.models.layers import attend
from megafp4.numerics import part_of
from megafp4.parallel.collectives import Group
from megafp4.parallel.context import Attention, ContextParallel, Zigzag, check_context
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.recipes import get_recipe, recipe_names
from tests.parallel.pool import Ranks
from tests.parallel.test_tensor import Watched, same, sharded_linear, watch, whole_linear

KINDS: tuple[Attention, ...] = ("all-gather", "ring")


def test_chunks_are_dealt_from_both_ends() -> None:
    whole = torch.arange(16).expand(3, 16)
    parts = [Zigzag(4, rank).take(whole) for rank in range(4)]
    assert [part[2].tolist() for part in parts] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert torch.equal(Zigzag(4, 0).join(parts), whole)
    assert Zigzag(1, 0).runs(7) == ((0, 7),)


def test_tokens_lie_where_the_whole_batch_has_them() -> None:
    zigzag, whole = Zigzag(2, 1), 100 + torch.arange(24).view(3, 8)
    found = torch.cat([torch.arange(at, at + n) for at, n in zigzag.tokens(100, 3, 8)])
    assert torch.equal(found, zigzag.take(whole).flatten())


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 3), (2, 5), (4, 6), (9, 1)])
def test_a_stretch_of_runs_has_the_indices_of_its_elements(first: int, count: int) -> None:
    runs = ((5, 4), (20, 2), (30, 4))
    every = [i for start, n in runs for i in range(start, start + n)]
    found = part_of(runs, first, count)
    assert not isinstance(found, int)
    assert [i for start, n in found for i in range(start, start + n)] == every[first:][:count]
    assert part_of(7, first, count) == 7 + first


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="100 tokens cannot be cut into 2 x cp 8 equal chunks"):
        Zigzag(8, 0).take(torch.zeros(2, 100))
    with pytest.raises(ConfigError, match=r"chunks of 32, not a multiple of 64, which .*'mxfp4'"):
        check_context(4, 256, get_recipe("mxfp4"))
    check_context(2, 256, get_recipe("mxfp4"))
    check_context(1, 255, get_recipe("mxfp4"))
    with pytest.raises(ConfigError, match="'circle'"):
        ContextParallel(Group("cp"), "circle")  # type: ignore[arg-type]
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match=r"model.dropout 0.1 under cp 2"):
        ContextParallel(Group("cp", 0, 2)).attend(x, x, x, 0.1)


def operands(length: int, heads: int, shared: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(2, n, length, 16, generator=generator).to(dtype)
        for n in (heads, shared, shared, heads)
    ]


def with_gradients(
    context: ContextParallel | None, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    """Output [B, N, S, D] and gradients of causal attention, plain or over the ranks."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = (attend if context is None else context.attend)(*leaves)
    out = out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def attention(kind: Attention, length: int, shared: int, dtype: torch.dtype) -> list[float]:
    """Errors of output and gradients against float64, and those of one rank."""
    mesh = Mesh(MeshSizes(cp=torch.distributed.get_world_size()))
    context = ContextParallel(mesh.cp, kind)
    given = operands(length, 4, shared, dtype)
    exact = with_gradients(None, *(x.double() for x in given))
    whole = with_gradients(None, *given)
    found = with_gradients(context, *(context.zigzag.take(x, 2) for x in given))
    errors = []
    for mine, one, best in zip(found, whole, exact, strict=True):
        assert mine.dtype == dtype
        for value in (mine, context.zigzag.take(one, 2)):
            error = value.double() - context.zigzag.take(best, 2)
            errors.append(float(error.norm() / best.norm()))
    sent = mesh.ledger.total(group="cp", operation="send" if kind == "ring" else "all_gather")
    assert sent > 0
    return errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_the_whole(
    kind: Attention, shared: int, dtype: torch.dtype, two: Ranks
) -> None:
    for errors in two.run(attention, kind, 96, shared, dtype):
        for found, one in zip(errors[::2], errors[1::2], strict=True):
            assert found < 2 * one + 1e-7
            assert found < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_four_ranks(kind: Attention, four: Ranks) -> None:
    for errors in four.run(attention, kind, 64, 2, torch.float32):
        assert max(errors) < 1e-6


def one_rank_attends(dtype: torch.dtype) -> bool:
    """Whether gathered attention gives the bits of one rank."""
    context = ContextParallel(Mesh(MeshSizes(cp=torch.distributed.get_world_size())).cp)
    q, k, v, _ = operands(128, 4, 2, dtype)
    mine = context.attend(*(context.zigzag.take(x, 2) for x in (q, k, v)))
    return torch.equal(mine, context.zigzag.take(attend(q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_attention_keeps_the_bits_of_one_rank(dtype: torch.dtype, two: Ranks) -> None:
    assert two.run(one_rank_attends, dtype) == [True, True]


def test_the_oracle_is_causal() -> None:
    q, k, v, _ = operands(8, 2, 1, torch.float64)
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    expected = (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(attend(q, k, v), expected)


def linear_of_part(recipe: str, kind: str, tp: int, sequence: bool) -> int:
    """Run on every rank: the whole linear, this rank's tokens of its share, and their comparison.

    Returns the number of operands that were compared.
    """
    mesh = Mesh(MeshSizes(tp=tp, cp=torch.distributed.get_world_size() // tp))
    zigzag = ContextParallel(mesh.cp).zigzag
    whole, x, dy = whole_linear(recipe, kind)
    x, dy = (torch.cat((t, t.flip(0, 1)), 1) for t in (x, dy))
    y, dx, dw = whole.train(x, dy)
    shard = sharded_linear(whole, mesh.tp, recipe, kind, sequence) if tp > 1 else copy(whole, kind)
    precision = shard.linear.op.precision
    precision.first_token = zigzag.tokens(512, *x.shape[:2])
    precision.others = mesh.cp
    column = kind == "column"
    cut = shard.linear.shard.cut if tp > 1 else None

    def mine(matrix: str, t: Tensor) -> Tensor:
        """A rank's slice of x or dy [B, S, features] or of the weight."""
        if matrix == "weight":
            return t if cut is None else cut.take(t, 0 if column else 1, mesh.tp.rank)
        t = zigzag.take(t)
        if cut is not None and (matrix == "dy") == column:
            return cut.take(t, 2, mesh.tp.rank)
        if not sequence:
            return t
        return mesh.tp.own(t.flatten(0, 1)).view(t.shape[0], -1, t.shape[-1])

    found_y, found_dx, found_dw = shard.train(mine("x", x), mine("dy", dy))
    assert shard.seen.keys() == whole.seen.keys()
    for (gemm, side), expected in whole.seen.items():
        matrix = "weight" if side == "b" else "dy"
        matrix = "x" if (gemm, side) in (("fprop", "a"), ("wgrad", "b")) else matrix
        found = shard.seen[gemm, side]
        for name, one, all_of_it in (
            ("codes", found.codes, expected.codes),
            ("values", found.dequantize(), expected.dequantize()),
        ):
            if matrix != "weight":
                all_of_it = all_of_it.view(*x.shape[:2], -1)
            part = mine(matrix, all_of_it)
            assert torch.equal(one, part.flatten(0, -2)), (gemm, side, name)
    assert same(found_y, mine("dy", y)), "y"
    assert same(found_dx, mine("x", dx)), "dx"
    assert same(mesh.cp.sum(found_dw), mine("weight", dw)), "dW"
    assert not same(found_dw, mine("weight", dw))
    return len(whole.seen)


def copy(whole: Watched, kind: str) -> Watched:
    """The same linear, with a precision of its own."""
    found = watch(type(whole.linear), whole.linear.recipe.name, kind)
    if whole.linear.recipe.grid:
        found.linear.to_grid()
    found.linear.load_state_dict(whole.linear.state_dict())
    return found


@pytest.mark.parametrize("recipe", recipe_names())
def test_codes_are_those_of_all_tokens(recipe: str, two: Ranks) -> None:
    first, second = two.run(linear_of_part, recipe, "column", 1, False)
    assert first == second
    assert first >= (0 if recipe == "bf16" else 1)


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "mxfp4", "fp4", "dqt8", "nvfp4"])
def test_codes_under_context_and_tensor_parallelism(
    recipe: str, kind: str, sequence: bool, four: Ranks
) -> None:
    assert len(set(four.run(linear_of_part, recipe, kind, 2, sequence))) == 1
