"""Collectives: results, traffic, and operands that travel as codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megafp4 import numerics
from megafp4.backends import Operand
from megafp4.backends.base import Prepared, cast_all
from megafp4.errors import UnsupportedError
from megafp4.numerics import Key, QTensor, Slice
from megafp4.parallel.collectives import Group
from megafp4.parallel.gather import gather_tokens
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.recipes import GemmSpec, OperandSpec
from megafp4.recipes.cast import CastRequest
from tests.parallel.pool import Ranks


def everything() -> dict[str, Any]:
    mesh = Mesh(MeshSizes(tp=dist.get_world_size()))
    tp, mine = mesh.tp, torch.arange(8.0).view(4, 2) + 10 * dist.get_rank()
    pending = tp.start_all_reduce(mine.clone(), "a")
    values = torch.tensor([0.0, 1.0 + tp.rank, [math.nan, 1.0][tp.rank], [2.0, math.inf][tp.rank]])
    return {
        "gather": tp.all_gather(mine, "b"),
        "float8": tp.all_gather(mine.to(torch.float8_e4m3fn), "c").float(),
        "scatter": tp.reduce_scatter(mine, "d"),
        "reduce": pending.wait(),
        "largest": tp.largest(values),
        "sum": tp.sum(values[:2]),
        "beside": tp.side_by_side(mine),
        "own": tp.own(mine),
        "sent": {(row["operation"], row["what"]): row["bytes"] for row in mesh.ledger.rows()},
        "total": mesh.ledger.total(group="tp", operation="all_gather", dtype="float32"),
    }


def test_results_and_bytes(two: Ranks) -> None:
    one = torch.arange(8.0).view(4, 2)
    both, total = torch.cat([one, one + 10]), one + one + 10
    for rank, found in enumerate(two.run(everything)):
        assert torch.equal(found["gather"], both)
        assert torch.equal(found["float8"], both.to(torch.float8_e4m3fn).float())
        assert torch.equal(found["reduce"], total)
        assert torch.equal(found["scatter"], total[2 * rank : 2 * rank + 2])
        assert found["largest"][:2].tolist() == [0.0, 2.0]
        assert found["largest"][2].isnan()
        assert found["largest"][3] == math.inf
        assert found["sum"].tolist() == [0.0, 3.0]
        assert torch.equal(found["beside"], torch.cat([one, one + 10], 1))
        assert torch.equal(found["own"], (one + 10 * rank)[2 * rank : 2 * rank + 2])
        sent = found["sent"]
        assert sent["all_reduce", "a"] == 32  # 2 (n - 1) / n of 32 bytes
        assert sent["all_gather", "b"] == 32
        assert sent["all_gather", "c"] == 8
        assert sent["reduce_scatter", "d"] == 16
        assert found["total"] == 32 + 32  # with side_by_side's


def test_a_group_of_one_talks_to_nobody() -> None:
    group, x = Group("tp"), torch.randn(4, 4)
    for found in (
        group.all_reduce(x, "a"), group.all_gather(x, "a"), group.reduce_scatter(x, "a"),
        group.side_by_side(x), group.own(x),
    ):  # fmt: skip
        assert found.data_ptr() == x.data_ptr()
    assert group.ledger.rows() == []


SPECS = {
    "bf16": OperandSpec("bf16"),
    "mxfp4": OperandSpec("mxfp4", rounding="stochastic", prescale=0.75),
    "packed": OperandSpec("mxfp4", rounding="stochastic", saved_as="packed"),
    "nvfp4": OperandSpec("nvfp4"),
    "tile": OperandSpec("nvfp4", scaling="tile"),
    "token": OperandSpec("int8", scaling="vector"),
    "tensor": OperandSpec("fp8-e4m3"),
    "int4": OperandSpec("int4", scaling="vector"),
}


def fields(operand: Operand) -> list[Tensor]:
    if isinstance(operand, Tensor):
        return [operand]
    return [held for held in vars(operand).values() if isinstance(held, Tensor)]


def gathered(name: str, axis: int) -> bool:
    """Whether the ranks' operands, gathered, are the operand of all tokens."""
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    spec = SPECS[name]
    x = torch.randn(128, 96, generator=torch.Generator().manual_seed(2))
    x[90:] *= 5  # ranks see other magnitudes
    key, packed = Key(1, 2, 3, "wgrad", "b"), spec.saved_as == "packed"

    def cast(rows: Tensor, first: int, part: Slice | None) -> Operand:
        origin = (first, 0) if axis == 1 else (0, first)
        request = CastRequest(
            GemmSpec(spec, spec), "b", axis, key, origin, packed=packed, part=part
        )
        return cast_all(rows, [request])[0]

    whole, rows = cast(x, 0, None), group.own(x)
    own = cast(rows, group.rank * len(rows), Slice(group, 0))
    joined = gather_tokens(own, axis, group).wait()
    pairs = zip(fields(joined), fields(whole), strict=True)
    assert not isinstance(own, QTensor) or own.codes.shape[0] == 64
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", SPECS)
def test_gathered_operands_are_those_of_all_tokens(name: str, axis: int, two: Ranks) -> None:
    assert two.run(gathered, name, axis) == [True, True]


def prepared(axis: int) -> tuple[Tensor, Tensor]:
    """What a backend that keeps lines x K holds of two tokens a rank with three features."""
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    tokens = torch.arange(12.0).view(4, 3).to(torch.float8_e4m3fn)
    own, scale = group.own(tokens), torch.tensor([1.0, 2.0]) + 2 * group.rank
    if axis == 0:
        own, scale = own.t().contiguous(), torch.ones(3)
    found = gather_tokens(Prepared(own, scale, "fp8-e4m3"), axis, group).wait()
    assert isinstance(found, Prepared)
    return found.data.float(), found.scale


def test_prepared_operands_are_gathered_by_token(two: Ranks) -> None:
    tokens = torch.arange(12.0).view(4, 3)
    data, scale = two.run(prepared, 1)[0]
    assert torch.equal(data, tokens)
    assert scale.tolist() == [1.0, 2.0, 3.0, 4.0]
    data, scale = two.run(prepared, 0)[1]
    assert torch.equal(data, tokens.t())
    assert scale.tolist() == [1.0, 1.0, 1.0]


def test_folded_mxfp4_is_not_gathered() -> None:
    folded = Prepared(torch.zeros(32, 32, dtype=torch.float8_e5m2), torch.ones(1), "mxfp4")
    with pytest.raises(UnsupportedError, match="gather it as codes"):
        gather_tokens(folded, 1, Group("tp", 0, 2))


def outliers(mode: str, alpha: float, poison: bool) -> bool:
    """Whether a share of each token's features is clamped where the whole token is."""
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(4))
    x[:, 40:] *= 4
    x[0] = 0.0
    if poison:
        x[1, 50] = math.nan
    inner, cut = numerics.clamp_outliers(x, alpha, mode)  # type: ignore[arg-type]
    share = x.chunk(group.size, 1)[group.rank]
    found = numerics.clamp_outliers(share, alpha, mode, group)  # type: ignore[arg-type]
    expected = (part.chunk(group.size, 1)[group.rank] for part in (inner, cut))
    return all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("alpha", [0.51, 0.9, 0.995])
@pytest.mark.parametrize("mode", ["signed", "magnitude"])
def test_outliers_are_those_of_the_whole_token(
    mode: str, alpha: float, poison: bool, two: Ranks
) -> None:
    assert two.run(outliers, mode, alpha, poison) == [True, True]
