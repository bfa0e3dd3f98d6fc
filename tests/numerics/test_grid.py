"""Weights on a grid: the stored bits, the initial grid, and updates by stochastic rounding."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megafp4 import numerics
from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics import Key
from megafp4.numerics.grid import GRID_FORMATS, GridWeight
from tests.numerics import oracle

BITS = list(GRID_FORMATS)
ENDS = {1.58: (-1, 1), 3: (-4, 3), 4: (-8, 7), 8: (-128, 127)}
KEY = Key(5, 7, 3, "update", "b")
DRAWS = 1 << 18


def integers(grid: GridWeight) -> Tensor:
    """Signed codes as int64."""
    return grid.to_qtensor().values().long()


def unit_grid(codes: Tensor, bits: float) -> GridWeight:
    """A grid with steps of 1 whose codes are the given integers."""
    grid = GridWeight.from_dense(torch.ones(codes.shape), bits)
    grid.scale.fill_(1.0)
    grid.store(codes.float(), rounding="nearest-even")
    assert torch.equal(integers(grid), codes.long())
    return grid


@pytest.mark.parametrize("bits", BITS)
def test_initial_grid_is_equations_2_to_4(bits: float, generator: torch.Generator) -> None:
    w = torch.randn(33, 20, generator=generator) * 0.02
    grid = GridWeight.from_dense(w, bits)
    low, high = ENDS[bits]
    s = high / w.double().abs().mean().item()
    expected = np.clip(np.round(w.numpy().astype(np.float64) * s), low, high)
    differ = integers(grid).numpy() != expected
    # FP32 against float64 may differ only on a tie.
    assert differ.mean() < 1e-3
    torch.testing.assert_close(grid.scale, torch.full((33, 1), 1 / s), rtol=1e-6, atol=0)
    assert torch.equal(grid.decode(), integers(grid).float() * grid.scale)


@pytest.mark.parametrize("bits", BITS)
def test_initial_grid_equals_absmean_quantization(bits: float, generator: torch.Generator) -> None:
    w = torch.randn(16, 24, generator=generator)
    q = numerics.quantize(w, GRID_FORMATS[bits], scaling="tensor", statistic="absmean")
    grid = GridWeight.from_dense(w, bits)
    assert torch.equal(grid.to_qtensor().codes, q.codes)
    assert torch.equal(grid.decode(), q.dequantize())


def test_saturation_at_initialisation_is_that_of_a_clipped_gaussian(
    generator: torch.Generator,
) -> None:
    # The range is AbsMean = sqrt(2/pi) sigma; 3 bits reach from -4/3 to 1 of it.
    w = torch.randn(512, 512, generator=generator)
    codes = integers(GridWeight.from_dense(w, 3))
    mean = math.sqrt(2 / math.pi)

    def above(z: float) -> float:
        return 0.5 * math.erfc(z / math.sqrt(2))

    assert (codes == 3).double().mean().item() == pytest.approx(above(2.5 / 3 * mean), abs=4e-3)
    assert (codes == -4).double().mean().item() == pytest.approx(above(3.5 / 3 * mean), abs=4e-3)


@pytest.mark.parametrize("bits", BITS)
def test_range_widens_the_step(bits: float, generator: torch.Generator) -> None:
    w = torch.randn(8, 16, generator=generator)
    narrow, wide = GridWeight.from_dense(w, bits), GridWeight.from_dense(w, bits, range=3.0)
    torch.testing.assert_close(wide.scale, 3 * narrow.scale)
    assert wide.decode().abs().max() > narrow.decode().abs().max()


def test_segments_have_their_own_step(generator: torch.Generator) -> None:
    q, k, v = (
        torch.randn(n, 12, generator=generator) * s for n, s in [(8, 1.0), (4, 10), (4, 0.1)]
    )
    fused = GridWeight.from_dense(torch.cat([q, k, v]), 8, segments=[8, 4, 4])
    apart = [GridWeight.from_dense(part, 8) for part in (q, k, v)]
    assert torch.equal(fused.codes, torch.cat([grid.codes for grid in apart]))
    assert torch.equal(fused.scale, torch.cat([grid.scale for grid in apart]))
    assert not torch.equal(fused.scale, GridWeight.from_dense(torch.cat([q, k, v]), 8).scale)


def test_a_weight_of_zeros_has_a_grid() -> None:
    grid = GridWeight.from_dense(torch.zeros(2, 4), 8)
    assert not grid.decode().any()
    assert grid.scale.flatten().tolist() == pytest.approx([1e-5 / 127] * 2)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (8, [[-128, -1, 0, 127]], [[0x80, 0xFF, 0x00, 0x7F]]),
        (4, [[-8, 7, -1, 0]], [[0x78, 0x0F]]),
        (3, [[-4, 3, -1, 0]], [[0x34, 0x07]]),
        (1.58, [[1, -1, 0, 1]], [[0b01001101]]),
        (4, [[-8, 7, -1]], [[0x78, 0x0F]]),
        (1.58, [[1, -1, 0, 1, -1]], [[0b01001101, 0b11]]),
    ],
)
def test_stored_bits(bits: float, codes: list[list[int]], packed: list[list[int]]) -> None:
    grid = unit_grid(torch.tensor(codes), bits)
    assert grid.codes.dtype == torch.uint8
    assert grid.codes.tolist() == packed


@pytest.mark.parametrize(("bits", "nbytes"), [(8, 640), (4, 320), (3, 320), (1.58, 160)])
def test_bytes(bits: float, nbytes: int) -> None:
    grid = GridWeight.from_dense(torch.randn(16, 40), bits)
    assert grid.nbytes == nbytes + 16 * 4


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 5),
    cols=st.integers(0, 9),
    scale=st.sampled_from([1e-30, 1e-5, 0.02, 1.0, 3.0, 1e20]),
    rounding=st.sampled_from(["stochastic", "nearest-even", "nearest-away", "nearest-up"]),
    seed=st.integers(0, 99),
)
def test_an_update_of_zero_keeps_every_bit(
    bits: float, rows: int, cols: int, scale: float, rounding: numerics.Rounding, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = GridWeight.from_dense(torch.randn(rows, cols, generator=generator) * scale, bits)
    before = grid.codes.clone()
    statistics = grid.store(grid.decode(), Key(seed, 0, 0, "update", "b"), rounding)
    assert torch.equal(grid.codes, before)
    assert statistics.flip_rate == 0.0


def test_an_update_of_zero_keeps_codes_whose_division_is_inexact() -> None:
    # In FP32 (code * step) / step is not always code: rounding that quotient would flip some codes
    # at each step, with the odds of its last bit.
    codes = torch.arange(64.0, 128.0)
    step = next(
        step
        for step in torch.linspace(0.5, 1.0, 1000)
        if (codes * step / step != codes).sum() >= 10
    )
    fragile = codes[codes * step / step != codes]
    grid = unit_grid(fragile.repeat(1 << 20)[: 1 << 20].view(1024, 1024), 8)
    grid.scale.fill_(step)
    before = grid.codes.clone()
    ones, flips = torch.ones(1024, 1), 0
    for draw in range(2):
        key = KEY._replace(step=draw)
        quotient = grid.decode() / grid.scale
        naive = numerics.encode(
            quotient, "int8", ones, 1, "stochastic", key, scaling="vector", dither_bits=32
        )
        flips += int((naive.codes != before).sum())
        grid.store(grid.decode(), key)
    assert flips > 0
    assert torch.equal(grid.codes, before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("old", "move"), [(0, 0.3), (0, -0.3), (-1, 0.9), (1, -0.01), (0, -0.999), (-1, 1.7), (0, 1e-3)]
)
def test_stochastic_store_is_unbiased(bits: float, old: int, move: float) -> None:
    grid = unit_grid(torch.full((512, 512), old), bits)
    grid.scale.fill_(0.037)
    new = grid.decode() + np.float32(move * 0.037)
    target = (new / 0.037)[0, 0].item()
    grid.store(new, KEY)
    codes = integers(grid).double()
    fraction = target - math.floor(target)
    error = 4 * math.sqrt(max(fraction * (1 - fraction), 1e-9) / DRAWS)
    assert abs(codes.mean().item() - target) < error + 1e-6
    assert set(codes.unique().tolist()) <= {math.floor(target), math.floor(target) + 1}


def test_stochastic_store_draws_the_bits_of_its_key(generator: torch.Generator) -> None:
    grid = unit_grid(torch.zeros(33, 17), 8)
    new = torch.randn(33, 17, generator=generator) * 3
    grid.store(new, KEY)
    noise = oracle.dither((33, 17), (5, 7, 3, 3, 1), 32)
    magnitude = new.abs().double().numpy()
    expected = np.sign(new.numpy()) * np.floor(magnitude + noise)
    np.testing.assert_array_equal(integers(grid).numpy(), expected)


def test_a_shard_draws_what_the_whole_draws(generator: torch.Generator) -> None:
    w = torch.randn(24, 32, generator=generator)
    new = w + 0.01 * torch.randn(24, 32, generator=generator)
    whole = GridWeight.from_dense(w, 4)
    rows = torch.cat([torch.arange(16, 20), torch.arange(8, 12)])
    runs = (((16, 4), (8, 4)), 0)
    shard = GridWeight(whole.codes[rows], whole.scale[rows], "int4", 32, origin=runs)
    before = shard.codes.clone()
    whole.store(new, KEY)
    shard.store(new[rows], KEY)
    assert torch.equal(shard.codes, whole.codes[rows])
    assert not torch.equal(shard.codes, before)


@pytest.mark.parametrize("bits", BITS)
def test_codes_stay_in_range_and_saturation_is_counted(
    bits: float, generator: torch.Generator
) -> None:
    low, high = ENDS[bits]
    grid = GridWeight.from_dense(torch.randn(32, 30, generator=generator), bits)
    new = torch.randn(32, 30, generator=generator) * 100
    new[0, :4] = torch.tensor([3e38, -3e38, 1e-45, -0.0])
    before = integers(grid)
    statistics = grid.store(new, KEY)
    codes = integers(grid)
    assert codes.min() == low
    assert codes.max() == high
    assert codes[0, :4].tolist() == [high, low, 0, 0]
    assert statistics.flip_rate == (codes != before).double().mean().item()
    ends = (codes == low) | (codes == high)
    assert statistics.saturation_rate == ends.double().mean().item() > 0.5
    # The unused codes (int3's high bit, ternary's 0b10) never appear.
    assert grid.to_qtensor().codes.int().max() < 2**grid.format.bits
    if bits == 1.58:
        assert not (grid.to_qtensor().codes == 0b10).any()


def test_scale_is_frozen(generator: torch.Generator) -> None:
    grid = GridWeight.from_dense(torch.randn(8, 8, generator=generator), 1.58)
    scale = grid.scale.clone()
    grid.store(torch.zeros(8, 8), KEY)
    assert not grid.decode().any()
    assert torch.equal(grid.scale, scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_nothing_moves(bad: float) -> None:
    grid = GridWeight.from_dense(torch.ones(2, 4), 8)
    before = grid.codes.clone()
    new = torch.zeros(2, 4)
    new[1, 2] = bad
    with pytest.raises(DivergenceError, match="weight update is NaN or Inf"):
        grid.store(new, KEY)
    assert torch.equal(grid.codes, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "no weight grid has 5 bits: choose 8, 4, 3 or 1.58"),
        ({"range": 0.0}, "range is 0.0"),
        ({"range": math.nan}, "range is nan"),
        ({"segments": [1, 2]}, r"segments \[1, 2\] of a weight with 4 rows"),
        ({"weight": torch.ones(3)}, "give a floating matrix"),
        ({"weight": torch.ones(3, 3, dtype=torch.int8)}, "give a floating matrix"),
        ({"weight": torch.full((2, 2), math.nan)}, "holds NaN or Inf"),
    ],
)
def test_grids_that_cannot_exist(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GridWeight.from_dense(**{"weight": torch.ones(4, 4), "bits": 8, **arguments})


def test_store_refuses_a_missing_key_and_a_foreign_shape() -> None:
    grid = GridWeight.from_dense(torch.ones(2, 4), 8)
    with pytest.raises(ConfigError, match="needs key="):
        grid.store(torch.ones(2, 4))
    with pytest.raises(ConfigError, match=r"shape \[2, 4\] was given new values of shape \[4, 2\]"):
        grid.store(torch.ones(4, 2), KEY)


def test_parameter_owns_four_bytes_and_takes_a_dense_gradient() -> None:
    grid = GridWeight.from_dense(torch.randn(6, 4), 4, layer=9)
    param = grid.parameter()
    assert isinstance(param, nn.Parameter)
    assert param.shape == (6, 4)
    assert param.untyped_storage().nbytes() == 4
    assert param.grid is grid
    assert param.grid.layer == 9
    # Whoever reads the placeholder instead of the grid must notice.
    assert param.isnan().all()
    for _ in range(2):
        (param * torch.arange(24.0).view(6, 4)).sum().backward()
    assert torch.equal(param.grad, 2 * torch.arange(24.0).view(6, 4))


def test_deep_copy_copies_the_grid_once_and_stays_small() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grid = GridWeight.from_dense(torch.randn(6, 4), 4)
            self.weight = self.grid.parameter()
            self.register_buffer("weight_codes", self.grid.codes)

    layer = Layer()
    twin = copy.deepcopy(layer)
    assert twin.weight.grid is twin.grid is not layer.grid
    assert twin.weight_codes is twin.grid.codes
    assert twin.weight.untyped_storage().nbytes() == 4
    twin.grid.store(torch.zeros(6, 4), KEY)
    assert layer.grid.decode().any()


def test_state_round_trip_writes_into_the_same_memory() -> None:
    source, target = (GridWeight.from_dense(torch.randn(6, 4), 4) for _ in range(2))
    codes = target.codes
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.decode(), source.decode())
    assert target.codes is codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": None}, "'codes' of a int4 grid weight is missing"),
        ({"codes": torch.zeros(6, 4, dtype=torch.uint8)}, r"torch.uint8 \[6, 4\], expected"),
        ({"scale": torch.zeros(6, 1, dtype=torch.float64)}, r"torch.float64 \[6, 1\], expected"),
    ],
)
def test_state_of_another_weight_is_refused(change: dict, message: str) -> None:
    grid = GridWeight.from_dense(torch.randn(6, 4), 4)
    state = {k: v for k, v in {**grid.state_dict(), **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        grid.load_state_dict(state)


def test_decode_casts_after_the_product() -> None:
    grid = GridWeight.from_dense(torch.randn(4, 6), 8)
    assert torch.equal(grid.decode(torch.bfloat16), grid.decode().bfloat16())


def test_repr_says_what_it_is() -> None:
    assert repr(GridWeight.from_dense(torch.ones(2, 4), 1.58)) == (
        "GridWeight(ternary, [2, 4], 10 bytes)"
    )
