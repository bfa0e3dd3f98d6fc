"""A linear cut over ranks multiplies the codes of the whole one, whatever the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import megafp4
from megafp4.errors import ConfigError
from megafp4.linear_op import LinearOp
from megafp4.numerics import QTensor
from megafp4.parallel.collectives import Group, Pending, Reduction
from megafp4.parallel.cut import Cut
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megafp4.parallel.weights import gather_state, shard_state
from megafp4.precision import Precision
from megafp4.recipes import recipe_names
from tests.parallel.pool import Ranks
from tests.tolerances import FP32_SUM

Seen = dict[tuple[str, str], QTensor]
BATCH, LENGTH, WIDTH = 2, 128, 256
SEGMENTS = (512, 256, 256)


@dataclass
class Watched:
    """A linear, and the operands that it quantized."""

    linear: megafp4.Linear
    seen: Seen

    def train(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and dW of one forward and backward pass."""
        x = x.clone().requires_grad_()
        y = self.linear(x)
        y.backward(dy)
        assert x.grad is not None
        assert self.linear.weight.grad is not None
        return y.detach(), x.grad, self.linear.weight.grad


def watch(make: type[megafp4.Linear], recipe: str, kind: str, **options: object) -> Watched:
    seen: Seen = {}
    precision = Precision(seed=77, step=3, first_token=512)
    precision.probe = lambda name, gemm, side, x, q: seen.update({(gemm, side): q})
    column = kind == "column"
    linear = make(
        WIDTH,
        sum(SEGMENTS) if column else WIDTH,
        bias=True,
        recipe=recipe,
        precision=precision,
        layer=5,
        segments=SEGMENTS if column else None,
        **options,
    )
    return Watched(linear, seen)


def whole_linear(recipe: str, kind: str) -> tuple[Watched, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    whole = watch(megafp4.Linear, recipe, kind)
    with torch.no_grad():
        for parameter in whole.linear.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if whole.linear.recipe.grid:
        whole.linear.to_grid()
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    x *= torch.exp(torch.randn(WIDTH, generator=generator))  # outliers, unlike on each rank
    dy = torch.randn(BATCH, LENGTH, whole.linear.out_features, generator=generator)
    return whole, x, dy * torch.exp(torch.randn(dy.shape[-1], generator=generator))


def sharded_linear(whole: Watched, group: Group, recipe: str, kind: str, sequence: bool) -> Watched:
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    options = {"group": group, "sequence": sequence, "reduce_dtype": torch.float32}
    shard = watch(make, recipe, kind, **options)
    if whole.linear.recipe.grid:
        shard.linear.weight.data.normal_(generator=torch.Generator().manual_seed(3))
        shard.linear.to_grid()
    shard.linear.load_state_dict(shard_state(whole.linear.state_dict(), shard.linear))
    return shard


def rows(x: Tensor, group: Group) -> Tensor:
    """A rank's run of all tokens, in the shape of a sequence."""
    return group.own(x.flatten(0, 1)).view(x.shape[0], -1, x.shape[-1])


def same(found: Tensor, expected: Tensor) -> bool:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return bool(error <= 4 * FP32_SUM)


def compare(recipe: str, kind: str, sequence: bool) -> tuple[int, float]:
    """Run on every rank: the whole linear, the share, and their comparison."""
    size = torch.distributed.get_world_size()
    tp = Mesh(MeshSizes(tp=size)).tp
    whole, x, dy = whole_linear(recipe, kind)
    y, dx, dw = whole.train(x, dy)
    shard = sharded_linear(whole, tp, recipe, kind, sequence)
    column = kind == "column"
    cut = shard.linear.shard.cut

    def mine(matrix: str, t: Tensor) -> Tensor:
        """A rank's slice of x or dy [tokens, features] or of the weight."""
        if matrix == "weight":
            return cut.take(t, 0 if column else 1, tp.rank)
        if (matrix == "dy") == column:
            return cut.take(t, 1, tp.rank)
        return tp.own(t) if sequence else t

    def part(matrix: str, t: Tensor) -> Tensor:
        flat = mine(matrix, t.flatten(0, 1))
        return flat.view(t.shape[0], -1, flat.shape[-1])

    found_y, found_dx, found_dw = shard.train(part("x", x), part("dy", dy))
    assert shard.seen.keys() == whole.seen.keys()
    for (gemm, side), expected in whole.seen.items():
        matrix = "weight" if side == "b" else "dy"
        matrix = "x" if (gemm, side) in (("fprop", "a"), ("wgrad", "b")) else matrix
        found = shard.seen[gemm, side]
        assert torch.equal(found.codes, mine(matrix, expected.codes)), (gemm, side, "codes")
        values = mine(matrix, expected.dequantize())
        assert torch.equal(found.dequantize(), values), (gemm, side, "scales")
    assert same(found_y, part("dy", y)), "y"
    assert same(found_dx, part("x", dx)), "dx"
    assert same(found_dw, mine("weight", dw)), "dW"
    bias, whole_bias = shard.linear.bias.grad, whole.linear.bias.grad
    assert bias is not None
    assert whole_bias is not None
    if shard.linear.partial_gradients:
        bias = tp.sum(bias)
    assert same(bias, cut.take(whole_bias, 0, tp.rank) if column else whole_bias), "bias"
    return len(whole.seen), float(y.square().sum())


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_codes_are_those_of_the_whole(recipe: str, kind: str, sequence: bool, two: Ranks) -> None:
    first, second = two.run(compare, recipe, kind, sequence)
    assert first == second
    assert first[0] >= (0 if recipe == "bf16" else 1)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4", "dqt8", "nvfp4"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_codes_on_four_ranks(recipe: str, kind: str, four: Ranks) -> None:
    assert len(four.run(compare, recipe, kind, True)) == 4


def put_on_grid(recipe: str, kind: str) -> bool:
    """Whether shards of a dense weight, put on the grid and moved there, follow the whole."""
    group = Mesh(MeshSizes(tp=torch.distributed.get_world_size())).tp
    generator = torch.Generator().manual_seed(9)
    whole = watch(megafp4.Linear, recipe, kind).linear
    with torch.no_grad():
        whole.weight.normal_(generator=generator)
        whole.weight[: WIDTH // 2] *= 3  # ranks have other means
        whole.weight[:, : WIDTH // 2] *= 2
    dense = shard_state(whole.state_dict(), _share(recipe, kind, group))
    shard = _share(recipe, kind, group)
    shard.load_state_dict(dense)
    new = whole.weight + 0.05 * torch.randn(whole.weight.shape, generator=generator)
    part = shard.layouts["weight"].take(new)
    key = megafp4.numerics.Key(1, 2, 5, "update", "b")
    for linear, value in ((whole, new), (shard, part)):
        linear.to_grid()
        before = linear.weight_codes.clone()
        linear.grid.store(value, key)
        assert not torch.equal(before, linear.weight_codes)
    gathered = gather_state(shard, group)
    expected = whole.state_dict()
    assert gathered.keys() == expected.keys()
    return all(torch.equal(gathered[name], expected[name]) for name in expected)


def _share(recipe: str, kind: str, group: Group) -> megafp4.Linear:
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    return watch(make, recipe, kind, group=group).linear


@pytest.mark.parametrize("recipe", ["dqt8", "dqt4", "dqt-ternary"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_grids_are_parts_of_one_grid(recipe: str, kind: str, two: Ranks) -> None:
    assert two.run(put_on_grid, recipe, kind) == [True, True]


def broken(recipe: str, kind: str, poison: float) -> list[bool]:
    """Where y of the whole and of the share are NaN, given one bad element on one rank."""
    group = Mesh(MeshSizes(tp=torch.distributed.get_world_size())).tp
    whole, x, dy = whole_linear(recipe, kind)
    x[0, 3, 5] = poison
    shard = sharded_linear(whole, group, recipe, kind, sequence=False)
    y = whole.train(x, dy)[0].isfinite()
    column = kind == "column"
    cut = shard.linear.shard.cut
    found = shard.train(*((x, cut.take(dy, 2, group.rank)) if column else
                          (cut.take(x, 2, group.rank), dy)))[0].isfinite()  # fmt: skip
    assert not y.all()
    return [torch.equal(found, cut.take(y, 2, group.rank) if column else y), bool(y.any())]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["fp8", "fp8-row", "fp4", "fp4-folded", "nvfp4"])
def test_a_bad_element_spoils_what_it_spoils_in_the_whole(
    recipe: str, poison: float, two: Ranks
) -> None:
    for same_places, _ in two.run(broken, recipe, "row", poison):
        assert same_places


def traffic(recipe: str, kind: str) -> list[tuple[str, str, str, int]]:
    """What one step of a sharded sequence sends: operation, dtype, purpose and bytes."""
    mesh = Mesh(MeshSizes(tp=torch.distributed.get_world_size()))
    whole, x, dy = whole_linear(recipe, kind)
    shard = sharded_linear(whole, mesh.tp, recipe, kind, sequence=True)
    shard.linear.op.precision.probe = None
    cut = shard.linear.shard.cut
    if kind == "column":
        x, dy = rows(x, mesh.tp), cut.take(dy, 2, mesh.tp.rank)
    else:
        x, dy = cut.take(x, 2, mesh.tp.rank), rows(dy, mesh.tp)
    before = {(r["operation"], r["dtype"], r["what"]): r["bytes"] for r in mesh.ledger.rows()}
    assert not before or set(before) <= {("all_reduce", "int32", "amax")}
    shard.train(x, dy)
    return [
        (row["operation"], row["dtype"], row["what"], int(row["bytes"]))
        for row in mesh.ledger.rows()
        if row["what"] not in ("amax", "statistic")
    ]


def test_quantized_activations_travel_as_codes(two: Ranks) -> None:
    """mxfp4-fp8: x in E4M3 forward and in MXFP4 (4.25 bits) for wgrad; dx in FP32, as asked."""
    x, dx = BATCH * LENGTH * WIDTH // 2, BATCH * LENGTH * WIDTH * 4 // 2
    sent = two.run(traffic, "mxfp4-fp8", "column")[0]
    assert sorted(sent) == sorted(
        [
            ("all_gather", "uint8", "operand", x + x // 2),
            ("all_gather", "uint8", "scales", x // 32),
            ("reduce_scatter", "float32", "dgrad", dx),
        ]
    )


def test_bf16_travels_in_bf16_and_dy_once_for_both_gemms(two: Ranks) -> None:
    x, wide = BATCH * LENGTH * WIDTH * 2 // 2, BATCH * LENGTH * WIDTH * 4 // 2
    column, row = (two.run(traffic, "bf16", kind)[0] for kind in ("column", "row"))
    # Forward gathers x, and backward again for wgrad: only the rank's own tokens are kept.
    assert ("all_gather", "bfloat16", "operand", 2 * x) in column
    assert sorted(row) == [
        ("all_gather", "bfloat16", "operand", x),
        ("reduce_scatter", "float32", "fprop", wide),
    ]


def test_fused_matrices_are_cut_one_by_one() -> None:
    cut = Cut((8, 4, 4), 2)
    whole = torch.arange(16)[:, None] * torch.ones(1, 3)
    parts = [cut.take(whole, 0, rank) for rank in range(2)]
    assert parts[1][:, 0].tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert cut.runs(1) == ((4, 4), (10, 2), (14, 2))
    assert torch.equal(cut.join(parts, 0), whole)
    assert torch.equal(cut.join([p.t() for p in parts], 1), whole.t())


@pytest.mark.parametrize(
    ("make", "sizes", "recipe", "message"),
    [
        (ColumnParallelLinear, (64, 128), "mxfp4", "multiple of 64"),
        (RowParallelLinear, (32, 64), "nvfp4", "multiple of 16"),
        (RowParallelLinear, (63, 64), "bf16", "cannot be cut over tp 4"),
    ],
)
def test_impossible_cuts_are_refused(
    make: type[ColumnParallelLinear], sizes: tuple[int, int], recipe: str, message: str
) -> None:
    group = Group("tp", 0, 4)
    with pytest.raises(ConfigError, match=message):
        make(*sizes, group, recipe=recipe)


class Diary(Group):
    """A group of one that notes when its sums start and when they are waited for."""

    def __init__(self) -> None:
        super().__init__("tp")
        self.events: list[str] = []

    def start_all_reduce(self, x: Tensor, what: str, reduction: Reduction = "sum") -> Pending:
        self.events.append(f"start {what}")
        diary = self

        class Noted(Pending):
            def wait(self) -> Tensor:
                diary.events.append(f"wait {what}")
                return super().wait()

        return Noted(self, what, x)


def test_wgrad_runs_while_the_sum_of_dgrad_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary()
    linear = ColumnParallelLinear(32, 64, diary)
    multiply = LinearOp._multiply

    def noted(self: LinearOp, gemm: str, *args: Any, **options: Any) -> Tensor:
        diary.events.append(gemm)
        return multiply(self, gemm, *args, **options)

    monkeypatch.setattr(LinearOp, "_multiply", noted)
    linear(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert diary.events == ["fprop", "dgrad", "start dgrad", "wgrad", "wait dgrad"]
