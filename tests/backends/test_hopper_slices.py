"""What backend hopper makes of a slice is a slice of what it makes of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels import it")

from megafp4.backends import hopper
from megafp4.backends.base import Operand, PackedOperand, Prepared
from megafp4.backends.hopper_cast import Caster
from megafp4.backends.hopper_state import Positions
from megafp4.errors import UnsupportedError
from megafp4.numerics import Key, Origin, Slice
from megafp4.parallel.cut import Cut
from megafp4.parallel.gather import Gathering
from megafp4.parallel.gemms import Shard, ShardedOp
from megafp4.precision import Precision
from megafp4.recipes import Side, get_recipe, recipe_names
from megafp4.recipes.cast import CastRequest
from tests.backends.kernel_twins import install
from tests.backends.slices import AT, Case, Rehearsed, Ungathered, rehearse, value_of

CPU = torch.device("cpu")
LAYOUTS = [("column", False), ("row", False), ("column", True), ("row", True)]


@pytest.fixture
def specified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operands that have no kernel, in order; and no GPU is asked for."""
    made: list[str] = []
    cast = Caster._specified

    def counting(self: Caster, x: Tensor, request: CastRequest) -> Operand:
        if request.operand.quantized:
            made.append(f"{request.key.gemm}.{request.side}")
        return cast(self, x, request)

    monkeypatch.setattr(Caster, "_specified", counting)
    monkeypatch.setattr(hopper, "device_capability", lambda: (9, 0))
    return made


def check(case: Case, specified: list[str]) -> None:
    whole = case.of_whole()
    without_kernels = set(specified)
    specified.clear()
    for rank, found in enumerate(case.of_ranks()):
        assert found.keys() == whole.keys()
        for name, value in found.items():
            expected = case.take(name, whole[name], rank)
            assert torch.equal(value, expected), (rank, name)
            assert len(value.unique()) > 2
    assert set(specified) <= without_kernels


@pytest.mark.parametrize(("kind", "sequence"), LAYOUTS)
@pytest.mark.parametrize("recipe", recipe_names())
def test_halves(
    recipe: str,
    kind: str,
    sequence: bool,
    specified: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    check(Case(recipe, kind, 2, sequence, (256, 128, 128), 128, 128, "cpu"), specified)


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-fp8", "nvfp4", "int8"])
def test_quarters(recipe: str, specified: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    check(Case(recipe, "column", 4, True, (256, 256), 64, 256, "cpu"), specified)
    specified.clear()
    check(Case(recipe, "row", 4, False, (64,), 256, 128, "cpu"), specified)


@pytest.mark.parametrize(("kind", "sequence"), LAYOUTS)
@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-fp8", "fp8"])
def test_halves_counted_from_a_pinned_position(
    recipe: str,
    kind: str,
    sequence: bool,
    specified: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    case = Case(recipe, kind, 2, sequence, (256, 128, 128), 128, 128, "cpu", pinned=True)
    check(case, specified)


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-fp8", "nvfp4", "fp8", "fp4", "fp4-folded"])
def test_sequences(recipe: str, specified: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    check(Case(recipe, "context", 2, False, (128,), 128, 256, "cpu"), specified)


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4"])
def test_only_what_travels_is_packed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    asked = replace(request(0, (64, 0)), gemm=get_recipe(recipe).dgrad)
    for travels, form in ((False, Prepared), (True, PackedOperand)):
        (made,) = Caster().cast(torch.randn(64, 64), [replace(asked, travels=travels)])
        assert isinstance(made, form)


def test_what_is_left_of_clamped_tokens_is_gathered(
    specified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    case = Case("fp4", "column", 2, True, (256,), 128, 128, "cpu")
    x, _, _ = case.matrices()

    def part(group: Rehearsed) -> Tensor:
        op = ShardedOp(
            recipe=get_recipe("fp4"),
            backend=hopper.HopperBackend(),
            precision=Precision(7),
            shard=Shard("column", case.cut(), group, True),  # type: ignore[arg-type]
        )
        own = x.chunk(2)[group.rank]
        a, outliers, _ = op._cast_input(own, [op._request("fprop", "a", AT)], None)
        assert isinstance(a, Gathering)
        assert outliers is not None
        assert outliers.shape == own.shape
        assert type(a.wait()) is Prepared
        return value_of(a.wait(), 1)

    whole = case.of_whole()["fprop.a"]
    assert all(torch.equal(found, whole) for found in rehearse(2, part))


def test_limits_are_exchanged_once(specified: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    op = Ungathered(
        recipe=get_recipe("fp4"),
        backend=hopper.HopperBackend(),
        precision=Precision(7),
        shard=Shard("row", Cut((256,), 2), Rehearsed(0, 2, [[], []])),  # type: ignore[arg-type]
    )
    requests = [op._request("fprop", "a", AT), op._request("wgrad", "b", AT)]
    op._cast_input(torch.randn(64, 128).bfloat16(), requests, None)
    assert calls == ["tails", "occ.exact", "recast"]
    assert not specified


def request(dim: int, origin: Origin, axis: int = 1, side: Side = "a") -> CastRequest:
    part = Slice(Rehearsed(0, 2, [[], []]), dim)
    key = Key(7, 2, 0, "dgrad", side)
    return CastRequest(get_recipe("mxfp4").dgrad, side, axis, key, origin, part=part)


def test_places_of_runs() -> None:
    positions = Positions()
    runs = ((64, 32), (256, 16), (512, 112))
    place = positions.of(request(1, origin=(32, runs)), CPU)
    assert place.position.tolist() == [7, 2, 32, 0]
    assert place.row_runs is None
    assert place.col_runs is not None
    assert place.col_runs.dtype == torch.int32
    firsts = [64, 80, 256, *range(512, 624, 16)]
    assert place.col_runs.tolist() == [first // 16 for first in firsts] + [0] * 6
    again = positions.of(request(1, origin=(32, runs)), CPU)
    assert again.col_runs is place.col_runs


def test_places_of_slices_move_with_a_pinned_position() -> None:
    positions = Positions()
    runs = ((64, 32), (256, 16))
    positions.pin(7, 2, 32, CPU)
    asked = [
        request(1, origin=(64, runs)),
        request(0, origin=(32, 64), axis=0),
        request(1, origin=(16, 48), axis=0, side="b"),
    ]
    places = [positions.of(each, CPU) for each in asked]
    positions.pin(2**63 + 3, 5, 1024, CPU)
    assert [place.position.tolist() for place in places] == [
        [3 - 2**63, 5, 1024 + 64, 0],
        [3 - 2**63, 5, 1024 + 64, 32],
        [3 - 2**63, 5, 48, 16],  # a weight does not move with the tokens
    ]
    again = [positions.of(each, CPU) for each in asked]
    for place, same in zip(places, again, strict=True):
        assert place.position.data_ptr() == same.position.data_ptr()
    assert places[0].col_runs is again[0].col_runs is not None
    with pytest.raises(UnsupportedError, match=r"leave train\.cuda_graph off under context"):
        positions.of(request(1, origin=(runs, 64)), CPU)


def test_runs_that_random_bits_would_straddle_are_left_to_the_specification(
    specified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    x = torch.randn(16, 64).bfloat16()
    odd = request(1, origin=(32, ((0, 24), (72, 40))))
    even = request(1, origin=(32, ((0, 32), (64, 32))))
    Caster().cast(x, [odd])
    assert specified == ["dgrad.a"]
    Caster().cast(x, [even])
    assert specified == ["dgrad.a"]


@pytest.mark.gpu
@pytest.mark.skipif(hopper.device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize(("kind", "sequence"), LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recipe", recipe_names())
def test_slices_on_the_gpu(
    recipe: str, size: int, kind: str, sequence: bool, specified: list[str]
) -> None:
    check(Case(recipe, kind, size, sequence, (1024, 512, 512), 1024, 1024, "cuda"), specified)
