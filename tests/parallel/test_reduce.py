"""Sums of gradients over real processes, against the exact mean in FP64."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megafp4.errors import CheckpointError, ConfigError, UnsupportedError
from megafp4.numerics import encode
from megafp4.parallel import blocks
from megafp4.parallel.collectives import Group
from megafp4.parallel.peers import PeerReducer
from megafp4.parallel.reduce import CollectiveReducer, FlatReducer, NodeReducer
from megafp4.parallel.shared_scale import SharedScaleReducer
from tests.parallel.reduce_ranks import run_well, world

SHARD = 3 * blocks.GRANULE
SIZES = (4, 8)
ODD = 1237
"""Elements of a tensor that no number of ranks divides."""


def gradients(size: int, shared: float, count: int | None = None) -> Tensor:
    """FP32 [size, count]: heavy tails, scales that differ by rows, part of the variance shared."""
    count = size * SHARD if count is None else count
    generator = torch.Generator().manual_seed(31)
    normal = torch.randn(size + 1, count, generator=generator)
    chi = torch.randn(5, size + 1, count, generator=generator).square().mean(0).sqrt()
    heavy = normal / chi
    rows = torch.randn(-(-count // 512), generator=generator).exp().repeat_interleave(512)[:count]
    mixed = math.sqrt(shared) * heavy[-1] + math.sqrt(1 - shared) * heavy[:-1]
    return mixed * rows * 1e-4


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def nodes(rank: int, size: int) -> tuple[Group, Group]:
    """Groups of two nodes."""
    each = size // 2
    first = rank // each * each
    within, _ = dist.new_subgroups_by_enumeration([list(range(each)), list(range(each, size))])
    pairs = [[place, place + each] for place in range(each)]
    between, _ = dist.new_subgroups_by_enumeration(pairs)
    return Group("node", rank - first, each, within), Group("nodes", rank // each, 2, between)


def sums(rank: int, size: int) -> dict[str, Any]:
    """Everything that the tests below look at, from the same processes."""
    group = world(rank, size)
    within, between = nodes(rank, size)
    reducers = {
        "fp8": FlatReducer(group, "fp8", 2),
        "bf16": FlatReducer(group, "bf16", 2),
        "fp32": FlatReducer(group, "fp32", 3),
        "nodes": NodeReducer(within, between, "fp8", 1),
        "nodes-fp32": NodeReducer(within, between, "fp32", 1),
        "shared": SharedScaleReducer(group),
        "library": CollectiveReducer(group, torch.float32),
        "library-bf16": CollectiveReducer(group, torch.bfloat16),
    }
    found: dict[str, Any] = {}
    for shared in (0.0, 0.5):
        mine = gradients(size, shared)[rank]
        for name, reducer in reducers.items():
            out = torch.full((SHARD,), 77.0)
            reducer.reduce_scatter(mine, out, "bucket", factor=1 / size)
            found[f"{name} {shared}"] = out
    # One more sum on top of another, in the order of the ranks.
    running = torch.full((SHARD,), 0.125)
    reducers["fp32"].reduce_scatter(mine, running, "bucket", accumulate=True)
    found["accumulated"] = running
    odd = gradients(size, 0.5, ODD)[rank]
    for name in ("fp8", "bf16", "fp32", "nodes", "nodes-fp32", "library"):
        for dtype in (torch.float32, torch.bfloat16):
            x = odd.to(dtype, copy=True)
            reducers[name].all_reduce(x, "odd", factor=1 / size)
            found[f"all {name} {dtype}"] = x
    found["special"] = special(rank, size, reducers)
    found["sent"] = {
        (row["operation"], row["dtype"]): row["bytes"] for row in counted(rank, size).ledger.rows()
    }
    found["mu"] = shared_factors(rank, size)
    return found


def special(rank: int, size: int, reducers: dict[str, Any]) -> dict[str, Tensor]:
    """Squares of the shards of sums in which one rank's gradients are not finite, or all are 0."""
    found = {}
    for name in ("fp8", "shared", "nodes"):
        for kind, value in (("zero", 0.0), ("nan", math.nan), ("inf", math.inf)):
            x = torch.zeros(size * SHARD)
            if rank == 1:
                x[5] = value
            out = torch.empty(SHARD)
            reducers[name].reduce_scatter(x, out, "special")
            square = out.square().sum()
            dist.all_reduce(square)
            found[f"{name} {kind}"] = square
    return found


def counted(rank: int, size: int) -> Group:
    """A group whose ledger holds the traffic of one FP8 reduce-scatter and nothing else."""
    group = world(rank, size)
    out = torch.empty(SHARD)
    FlatReducer(group, "fp8", 2).reduce_scatter(torch.ones(size * SHARD), out, "bucket")
    return group


def shared_factors(rank: int, size: int) -> list[float]:
    """The automatic scale of a bucket whose sum saturates, then of one that does not."""
    reducer = SharedScaleReducer(world(rank, size))
    out = torch.empty(SHARD)
    for value in (1.75, 1.75, 0.0):
        reducer.reduce_scatter(torch.full((size * SHARD,), value), out, "loud")
    return [float(mu) for mu in reducer.state_dict().values()]


@pytest.fixture(scope="module", params=SIZES)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_well(sums, request.param)


def exact_mean(size: int, shared: float, count: int | None = None) -> Tensor:
    return gradients(size, shared, count).double().mean(0)


@pytest.mark.parametrize(
    ("name", "shared", "limit"),
    [
        ("fp8", 0.0, 0.028),
        ("fp8", 0.5, 0.018),
        ("bf16", 0.0, 0.0025),
        ("fp32", 0.0, 1e-7),
        ("library", 0.0, 1e-6),
        ("library-bf16", 0.0, 0.01),
        ("nodes", 0.0, 0.04),
        ("nodes", 0.5, 0.03),
        ("nodes-fp32", 0.5, 1e-6),
        ("shared", 0.0, 0.15),
    ],
)
def test_reduce_scatter(
    found: list[dict[str, Any]], name: str, shared: float, limit: float
) -> None:
    whole = torch.cat([result[f"{name} {shared}"] for result in found])
    measured = error(whole, exact_mean(len(found), shared))
    assert measured <= limit
    if limit > 1e-5:
        assert measured > limit / 20  # otherwise nothing was rounded


def test_exchanging_beats_adding_in_fp8(found: list[dict[str, Any]]) -> None:
    exact = exact_mean(len(found), 0.5)
    wholes = [torch.cat([one[f"{name} 0.5"] for one in found]) for name in ("fp8", "shared")]
    assert error(wholes[1], exact) > 2.5 * error(wholes[0], exact)


def test_fp32_sums_are_those_of_a_serial_accumulation(found: list[dict[str, Any]]) -> None:
    every = gradients(len(found), 0.5)
    serial = torch.full((every.shape[1],), 0.125)
    for one in every:
        serial += one
    assert torch.equal(torch.cat([result["accumulated"] for result in found]), serial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8", "bf16", "fp32", "nodes", "nodes-fp32", "library"])
def test_all_reduce_gives_every_rank_the_same_bytes(
    found: list[dict[str, Any]], name: str, dtype: torch.dtype
) -> None:
    results = [result[f"all {name} {dtype}"] for result in found]
    assert results[0].shape == (ODD,)
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.uint8), other.view(torch.uint8))
    fp8, rounded = name in ("fp8", "nodes"), name == "bf16" or dtype == torch.bfloat16
    limit = 0.05 if fp8 else 0.005 if rounded else 1e-6
    assert error(results[0], exact_mean(len(found), 0.5, ODD)) <= limit


@pytest.mark.parametrize("name", ["fp8", "shared", "nodes"])
def test_every_rank_sees_what_is_not_finite(found: list[dict[str, Any]], name: str) -> None:
    for result in found:
        assert result["special"][f"{name} zero"] == 0
        assert not result["special"][f"{name} nan"].isfinite()
        assert not result["special"][f"{name} inf"].isfinite()


def test_bytes_on_the_wire_are_counted(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["sent"] == {
            ("all_to_all", "uint8"): (len(found) - 1) * blocks.message_bytes(SHARD)
        }


def test_the_shared_scale_adapts(found: list[dict[str, Any]]) -> None:
    # size * 1.75 at mu = size^-0.5 exceeds 1.75 * 2^8, the largest sum, and so it does at half mu.
    expected = len(found) ** -0.5 / 4 * 2 ** (1 / 1000)
    for result in found:
        assert result["mu"] == pytest.approx([expected])


def test_a_group_of_one_changes_nothing() -> None:
    x = gradients(1, 0.0)[0]
    out = torch.empty(SHARD)
    reducer = FlatReducer(Group("dp"))
    reducer.reduce_scatter(x, out, "bucket")
    assert torch.equal(out, x)
    reducer.reduce_scatter(x, out, "bucket", accumulate=True)
    assert torch.equal(out, x + x)
    reducer.all_reduce(out, "bucket", factor=0.5)
    assert torch.equal(out, x)


def test_codes_are_the_specification_s_e4m3() -> None:
    x = gradients(2, 0.0)
    message = torch.empty(2, blocks.message_bytes(x.shape[1]), dtype=torch.uint8)
    blocks.cast_blocks(x, message)
    count = x.shape[1]
    scales = blocks.scales_of(message[:, count:].int()).view(-1, 1)
    expected = encode(x.view(-1, blocks.BLOCK), "fp8-e4m3", scales, 1, scaling="vector").codes
    assert torch.equal(message[:, :count].reshape(-1, blocks.BLOCK), expected)
    peaks = (x.view(-1, blocks.BLOCK).abs().amax(1, keepdim=True) / scales).flatten()
    assert peaks.max() <= 448
    assert peaks.min() > 224


def test_refusals() -> None:
    group = Group("dp")
    with pytest.raises(ConfigError, match="did you mean 'fp8'"):
        FlatReducer(group, "fp4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 chunks"):
        FlatReducer(group, "fp8", 0)
    reducer = FlatReducer(group)
    with pytest.raises(ConfigError, match="multiple of 2048"):
        reducer.reduce_scatter(torch.zeros(100), torch.zeros(100), "bucket")
    with pytest.raises(ConfigError, match="float64"):
        reducer.all_reduce(torch.zeros(100).double(), "bucket")
    x = torch.zeros(blocks.GRANULE)
    with pytest.raises(ConfigError, match="scale what is accumulated"):
        reducer.reduce_scatter(x, x.clone(), "bucket", factor=0.5, accumulate=True)
    with pytest.raises(CheckpointError, match=r"\(0, 1\]"):
        SharedScaleReducer(group).load_state_dict({"bucket": torch.tensor(0.0)})


def test_peers_need_gpus() -> None:
    with pytest.raises(UnsupportedError, match=r"'dp' have no GPUs .* FlatReducer"):
        PeerReducer(Group("dp"))


def test_shared_factors_round_bf16_once() -> None:
    """A BF16 gradient times the common factor is rounded to E4M3 from FP32, not from BF16."""
    x = torch.full((blocks.GRANULE,), 1.0078125, dtype=torch.bfloat16)  # 1 + 2^-7
    factor = torch.tensor([1.0625 - 2.0**-8])
    exact = x.double() * factor.double()  # just above the middle of two codes
    codes = blocks.cast_shared(x, factor)
    assert torch.equal(codes.double(), exact.float().to(torch.float8_e4m3fn).double())
    assert exact[0] != (x * factor[0]).double()[0]
