"""Formats with FP32 scales: vector-wise FP4, FP8, integers and ternary, against numpy."""

import numpy as np
import pytest
import torch

from megafp4 import numerics
from tests import tolerances
from tests.numerics import oracle

FLOATS = {"fp4-vector": 6.0, "fp8-e4m3": 448.0, "fp8-e5m2": 57344.0}
INTEGERS = {"int8": (-128, 127), "int4": (-8, 7), "int3": (-4, 3), "ternary": (-1, 1)}
BF16_MAX = 3.3895313892515355e38


def positive_grid(name: str) -> np.ndarray:
    """Non-negative finite values of a floating format, ascending."""
    if name == "fp4-vector":
        return oracle.E2M1
    values = oracle.decode_fp8(np.arange(128, dtype=np.uint8), name)
    return values[np.isfinite(values)]


def integer_grid(name: str) -> np.ndarray:
    """Non-negative integers of a format."""
    return np.arange(INTEGERS[name][1] + 1.0)


def scale_of(x: np.ndarray, limit: float, scaling: str, statistic: str = "absmax") -> np.ndarray:
    """FP32 scale: the statistic over the line or the tensor, divided by the largest value."""
    magnitude = np.abs(x.astype(np.float64))
    axis = 1 if scaling == "vector" else None
    stat = magnitude.max(axis) if statistic == "absmax" else magnitude.mean(axis)
    return np.asarray(stat, np.float32).reshape(-1, 1) / np.float32(limit)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("scaling", ["vector", "tensor"])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_against_numpy(
    name: str,
    scaling: numerics.Scaling,
    scale: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    x = (torch.randn(65, 129, generator=generator) * scale).to(dtype)
    q = numerics.quantize(x, name, scaling=scaling)
    data = x.float().numpy()
    scales = scale_of(data, FLOATS[name], scaling)
    scaled = data * (np.float32(1) / scales)
    encode = oracle.encode_e2m1 if name == "fp4-vector" else oracle.encode_fp8
    arguments = (scaled.astype(np.float64),) if name == "fp4-vector" else (scaled, name)
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), encode(*arguments))


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("scaling", ["vector", "tensor"])
@pytest.mark.parametrize("statistic", ["absmax", "absmean"])
def test_integers_against_numpy(
    name: str,
    scaling: numerics.Scaling,
    statistic: numerics.Statistic,
    generator: torch.Generator,
) -> None:
    x = torch.randn(33, 77, generator=generator)
    low, high = INTEGERS[name]
    q = numerics.quantize(x, name, scaling=scaling, statistic=statistic)
    scales = scale_of(x.numpy(), high, scaling, statistic)
    np.testing.assert_allclose(q.scales.numpy(), scales, rtol=2e-7)
    # Given the scales, the codes follow exactly: round half to even, clip, two's complement.
    scaled = x.numpy() * (np.float32(1) / q.scales.numpy())
    signed = np.clip(np.rint(scaled), low, high)
    bits = numerics.get_format(name).bits
    np.testing.assert_array_equal(q.codes.numpy(), signed.astype(np.int64) & (2**bits - 1))
    expected = (signed * q.scales.numpy()).astype(np.float32)
    np.testing.assert_array_equal(q.dequantize().numpy(), expected)
    clipped = (np.abs(scaled) > high + 0.5).any()
    assert clipped == (statistic == "absmean")


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_ties_in_each_rounding(name: str) -> None:
    low, high = INTEGERS[name]
    halves = np.arange(low + 0.5, high, dtype=np.float32)
    x = torch.from_numpy(np.append(halves, np.float32(high)))[None]
    ones = torch.ones(1, 1)
    answers: dict[numerics.Rounding, np.ndarray] = {
        "nearest-even": np.rint(halves),
        "nearest-away": np.sign(halves) * np.floor(np.abs(halves) + 0.5),
        "nearest-up": np.floor(halves + 0.5),
    }
    for rounding, expected in answers.items():
        q = numerics.encode(x, name, ones, rounding=rounding, scaling="vector")
        np.testing.assert_array_equal(q.dequantize()[0, :-1].numpy(), np.clip(expected, low, high))


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_saturate_at_both_ends(name: str) -> None:
    low, high = INTEGERS[name]
    x = torch.tensor([[1e9, high + 0.4, high + 5.0, -1e9, low - 0.4, low - 5.0, 3e38, -3e38]])
    q = numerics.encode(x, name, torch.ones(1, 1), scaling="vector")
    assert q.dequantize().tolist() == [[high, high, high, low, low, low, high, low]]


def test_integers_decode_as_twos_complement() -> None:
    for name, (low, high) in INTEGERS.items():
        levels = torch.arange(float(low), high + 1)[None]
        q = numerics.encode(levels, name, torch.ones(1, 1), scaling="vector")
        bits = numerics.get_format(name).bits
        assert q.codes[0].tolist() == [level % 2**bits for level in range(low, high + 1)]
        assert torch.equal(q.dequantize(), levels)
        assert torch.equal(q.values(torch.bfloat16).float(), levels)


def test_ternary_absmean_is_bitnets_weight_quantizer(generator: torch.Generator) -> None:
    # [2402.17764]: gamma = mean |W|; RoundClip(W / gamma, -1, 1) * gamma.
    w = torch.randn(64, 96, generator=generator) * 0.02
    q = numerics.quantize(w, "ternary", statistic="absmean")
    gamma = w.double().abs().mean()
    expected = (w.double() / gamma).round().clamp(-1, 1)
    assert torch.equal(q.values(), expected.float())
    assert q.scales.item() == pytest.approx(gamma.item(), rel=1e-6)
    assert set(q.codes.unique().tolist()) == {0, 1, 3}


def test_int8_per_token_is_bitnets_activation_quantizer(generator: torch.Generator) -> None:
    x = torch.randn(10, 96, generator=generator)
    q = numerics.quantize(x, "int8")
    assert q.scales.shape == (10, 1)
    s = 127.0 / x.double().abs().amax(1, keepdim=True)
    expected = (x.double() * s).round() / s
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=0)


def test_tiny_mean_magnitudes_stop_at_1e_5() -> None:
    q = numerics.quantize(torch.full((1, 4), 1e-9), "ternary", statistic="absmean")
    assert q.scales.item() == pytest.approx(1e-5, rel=1e-6)
    assert not q.codes.any()


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("exponent", [-20, -40, -80])
def test_small_tensors_keep_their_resolution(
    name: str, exponent: int, generator: torch.Generator
) -> None:
    """Gradients of a loss averaged over 2^20 tokens are small, and as precise as any others."""
    x = torch.randn(6, 48, generator=generator)
    small, plain = (numerics.quantize(t, name) for t in (x * 2.0**exponent, x))
    assert torch.equal(small.codes, plain.codes)
    assert torch.equal(small.scales, plain.scales * 2.0**exponent)


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
def test_nan_and_inf_poison_the_line_or_tensor(name: str, generator: torch.Generator) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(3, 8, generator=generator)
        x[1, 2] = bad
        by_line = numerics.quantize(x, name, scaling="vector").dequantize()
        assert torch.equal(by_line.isnan().all(1), torch.tensor([False, True, False]))
        assert by_line[[0, 2]].isfinite().all()
        assert numerics.quantize(x, name, scaling="tensor").dequantize().isnan().all()


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-130, BF16_MAX])
def test_extreme_ranges(name: str, value: float) -> None:
    x = torch.tensor([[value, -value, value / 2, 0.0]])
    q = numerics.quantize(x, name)
    decoded = q.dequantize()
    grid = integer_grid(name) if name in INTEGERS else positive_grid(name)
    scale = q.scales.double().item()
    error = np.abs(decoded.double().numpy() - x.double().numpy()) / scale
    limit = oracle.half_step_bound(grid[-1], x.double().numpy() / scale, grid)
    assert (error <= limit + 1e-4).all()
    if value == 0.0:
        assert q.codes[0, 0] == q.codes[0, 3] == 0
        assert torch.equal(decoded, torch.zeros(1, 4))
    elif value > 1:
        assert decoded[0, 0].item() == pytest.approx(value, rel=1e-6)
        assert decoded[0, 1].item() == pytest.approx(-value, rel=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", *FLOATS, *INTEGERS])
def test_signal_to_noise_on_gaussian_data(name: str, generator: torch.Generator) -> None:
    x = torch.randn(512, 512, generator=generator)
    # Ternary only makes sense with the mean: with absmax almost everything becomes zero.
    statistic: numerics.Statistic = "absmean" if name == "ternary" else "absmax"
    q = numerics.quantize(x, name, statistic=statistic)
    error = (q.dequantize() - x).double().square().sum() / x.double().square().sum()
    snr = -10 * torch.log10(error).item()
    assert tolerances.MIN_SNR_DB[name] < snr < tolerances.MIN_SNR_DB[name] + 3
