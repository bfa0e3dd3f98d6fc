"""Every code, every tie and both FP32 neighbours of each tie, for E2M1, E4M3 and E5M2."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from megafp4 import numerics
from tests.numerics import oracle

E2M1_CODES = np.arange(16, dtype=np.uint8)


def in_blocks(values: np.ndarray) -> torch.Tensor:
    """Put values into MXFP4 blocks of 31 whose 32nd element, 6, makes the block scale 1."""
    padded = np.zeros(-(-len(values) // 31) * 31, dtype=np.float32)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, 31)
    return torch.from_numpy(np.concatenate([blocks, np.full((len(blocks), 1), 6.0, "f")], 1))


def e2m1_codes(values: np.ndarray, rounding: numerics.Rounding) -> np.ndarray:
    """megafp4's codes of values that lie in [-6, 6], taken at block scale 1."""
    q = numerics.quantize(in_blocks(values), "mxfp4", rounding=rounding)
    assert (q.scales == 127).all()
    return q.codes[:, :31].reshape(-1).numpy()[: len(values)]


def ladder() -> np.ndarray:
    """All E2M1 ties, their FP32 neighbours and the grid itself, with both signs."""
    points = np.array([list(triple) for triple in oracle.float32_ladder()]).reshape(-1)
    points = np.concatenate([points, oracle.E2M1, [2.0**-126, 2.0**-149]])
    return np.concatenate([points, -points]).astype(np.float32)


def test_e2m1_decodes_like_ml_dtypes() -> None:
    codes = torch.from_numpy(np.tile(E2M1_CODES, 2))[None]
    q = dataclasses.replace(numerics.quantize(in_blocks(np.zeros(1)), "mxfp4"), codes=codes)
    decoded = q.dequantize().numpy().reshape(2, 16)
    expected = oracle.decode_e2m1(E2M1_CODES)
    for half in decoded:
        np.testing.assert_array_equal(half, expected)
        np.testing.assert_array_equal(np.signbit(half), np.signbit(expected))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp4-vector", "fp8-e4m3", "fp8-e5m2"])
def test_tables_equal_ml_dtypes_for_all_codes(name: str) -> None:
    table = numerics.get_format(name).table.double().numpy()
    codes = np.arange(len(table), dtype=np.uint8)
    decode_fp8 = name in oracle.FP8_TYPES
    expected = oracle.decode_fp8(codes, name) if decode_fp8 else oracle.decode_e2m1(codes)
    np.testing.assert_array_equal(table, expected)  # NaN and Inf codes of FP8 included
    np.testing.assert_array_equal(np.signbit(table), np.signbit(expected))


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away"])
def test_e2m1_codes_survive_a_round_trip(rounding: numerics.Rounding) -> None:
    values = oracle.decode_e2m1(E2M1_CODES)
    np.testing.assert_array_equal(e2m1_codes(values, rounding), E2M1_CODES)


def test_e2m1_values_survive_nearest_up_and_stochastic() -> None:
    values = oracle.decode_e2m1(E2M1_CODES)
    up = e2m1_codes(values, "nearest-up")
    np.testing.assert_array_equal(oracle.decode_e2m1(up), values)
    q = numerics.quantize(in_blocks(values), "mxfp4", rounding="stochastic", key=(1, 2, 3, 0, 1))
    np.testing.assert_array_equal(oracle.decode_e2m1(q.codes[0, :16].numpy()), values)


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away"])
def test_e2m1_ties_and_their_neighbours(rounding: numerics.Rounding) -> None:
    values = ladder()
    np.testing.assert_array_equal(
        e2m1_codes(values, rounding), oracle.encode_e2m1(values.astype(np.float64), rounding)
    )


def test_e2m1_nearest_even_is_ml_dtypes_rounding() -> None:
    values = ladder()
    expected = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(e2m1_codes(values, "nearest-even"), expected)


def test_e2m1_nearest_up_sends_ties_toward_plus_infinity() -> None:
    # [2501.17116, comparison ladder]: each threshold itself goes upwards.
    vectors = {
        -5.0: -4.0, -3.5: -3.0, -2.5: -2.0, -1.75: -1.5, -1.25: -1.0, -0.75: -0.5, -0.25: 0.0,
        0.25: 0.5, 0.75: 1.0, 1.25: 1.5, 1.75: 2.0, 2.5: 3.0, 3.5: 4.0, 5.0: 6.0,
    }  # fmt: skip
    got = oracle.decode_e2m1(e2m1_codes(np.array(list(vectors)), "nearest-up"))
    np.testing.assert_array_equal(got, list(vectors.values()))
    values = ladder()
    expected = oracle.decode_e2m1(oracle.encode_e2m1(values.astype(np.float64), "nearest-up"))
    np.testing.assert_array_equal(oracle.decode_e2m1(e2m1_codes(values, "nearest-up")), expected)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("nearest-even", [0, 1, 1, 2, 2, 4, 4]),
        ("nearest-away", [0.5, 1, 1.5, 2, 3, 4, 6]),
        ("nearest-up", [0.5, 1, 1.5, 2, 3, 4, 6]),
    ],
)
def test_e2m1_published_tie_vectors(rounding: numerics.Rounding, expected: list[float]) -> None:
    got = oracle.decode_e2m1(e2m1_codes(oracle.LADDER_TIES, rounding))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away", "nearest-up"])
def test_e2m1_saturates_at_six(rounding: numerics.Rounding) -> None:
    # 7.9375 keeps the block scale at 1, so everything in (5, 8) must end at 6.
    values = np.array([5.0000005, 6.5, 7.0, 7.5, 7.9375] * 6 + [0.0, 7.9375], dtype=np.float32)
    x = torch.from_numpy(np.stack([values, -values]))
    decoded = numerics.quantize(x, "mxfp4", rounding=rounding).dequantize()
    expected = torch.where(x == 0, 0.0, 6.0 * torch.sign(x))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0)


def fp8_points(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All finite codes, and the sorted distinct finite values of an FP8 format."""
    codes = np.arange(256, dtype=np.uint8)
    values = oracle.decode_fp8(codes, name)
    finite = codes[np.isfinite(values)]
    return finite, np.unique(oracle.decode_fp8(finite, name))


def fp8_codes(
    values: np.ndarray, name: str, rounding: numerics.Rounding = "nearest-even"
) -> np.ndarray:
    """megafp4's codes at scale 1, which an element equal to the format's maximum brings about."""
    x = torch.from_numpy(np.append(values, oracle.FP8_MAX[name]).astype(np.float32))[None]
    q = numerics.quantize(x, name, scaling="tensor", rounding=rounding)
    assert float(q.scales) == 1.0
    return q.codes[0, :-1].numpy()


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2"])
def test_fp8_codes_survive_a_round_trip(name: str) -> None:
    codes, _ = fp8_points(name)
    assert len(codes) == {"fp8-e4m3": 254, "fp8-e5m2": 248}[name]
    got = fp8_codes(oracle.decode_fp8(codes, name), name)
    np.testing.assert_array_equal(got, codes)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2"])
def test_fp8_decodes_like_ml_dtypes(name: str) -> None:
    codes, _ = fp8_points(name)
    values = oracle.decode_fp8(codes, name)
    x = torch.from_numpy(values.astype(np.float32))[None]
    q = numerics.quantize(x, name, scaling="tensor")
    decoded = q.dequantize().numpy()[0]
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(values))


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2"])
def test_fp8_ties_and_their_neighbours(name: str) -> None:
    _, values = fp8_points(name)
    ties = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    infinity = np.float32(np.inf)
    points = np.concatenate([np.nextafter(ties, -infinity), ties, np.nextafter(ties, infinity)])
    assert np.array_equal(ties.astype(np.float64), (values[:-1] + values[1:]) / 2)
    np.testing.assert_array_equal(fp8_codes(points, name), oracle.encode_fp8(points, name))


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2"])
def test_fp8_nearest_even_equals_torch_cast(name: str, generator: torch.Generator) -> None:
    dtype = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}[name]
    x = torch.randn(1 << 16, generator=generator) * torch.exp2(
        torch.randint(-24, 6, (1 << 16,), generator=generator).float()
    )
    expected = x.to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8_codes(x.numpy(), name), expected)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2"])
def test_fp8_other_roundings_differ_from_even_only_at_ties(name: str) -> None:
    _, values = fp8_points(name)
    low, high = values[:-1], values[1:]
    ties = (low + high) / 2
    away = oracle.decode_fp8(fp8_codes(ties, name, "nearest-away"), name)
    np.testing.assert_array_equal(away, np.where(ties > 0, high, low))
    up = oracle.decode_fp8(fp8_codes(ties, name, "nearest-up"), name)
    np.testing.assert_array_equal(up, high)
