"""DGE and OCC of arXiv 2501.17116: published vectors, calculus, and figures of the dossier."""

from typing import Literal

import numpy as np
import pytest
import torch

from megafp4 import numerics
from megafp4.errors import ConfigError
from tests.numerics import oracle


def test_dge_published_vector() -> None:
    x = torch.linspace(-6, 6, 20).bfloat16()
    half = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]
    got = numerics.dge_multiplier(x.float(), k=5, cap=3.0)
    # The published numbers are BF16, printed to four digits.
    expected = torch.tensor(half + half[::-1])
    torch.testing.assert_close(got.bfloat16().float(), expected, rtol=0.006, atol=0)


@pytest.mark.parametrize("k", [3.0, 5.0, 10.0])
@pytest.mark.parametrize("cap", [3.0, 1.5])
def test_dge_against_numpy(k: float, cap: float) -> None:
    x = torch.linspace(-6, 6, 4001)
    expected = oracle.dge(x.double().numpy(), k, cap)
    got = numerics.dge_multiplier(x, k, cap).double().numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize("k", [3.0, 5.0])
def test_dge_is_the_derivative_of_its_curve(k: float) -> None:
    grid = np.concatenate([-oracle.E2M1[:0:-1], oracle.E2M1])

    def curve(x: np.ndarray) -> np.ndarray:
        """Eq. 7: g + (delta / 2) (1 + sign(u) |u|^(1/k))."""
        left = np.searchsorted(grid, x, side="right") - 1
        width = grid[left + 1] - grid[left]
        u = 2 * (x - grid[left]) / width - 1
        return grid[left] + width / 2 * (1 + np.sign(u) * np.abs(u) ** (1 / k))

    x = np.random.default_rng(1).uniform(-5.9, 5.9, 2000)
    distance = np.abs(x[:, None] - np.concatenate([grid, -oracle.LADDER_TIES, oracle.LADDER_TIES]))
    x = x[distance.min(1) > 0.02]
    slope = (curve(x + 1e-6) - curve(x - 1e-6)) / 2e-6
    got = numerics.dge_multiplier(torch.from_numpy(x), k, cap=1e9).double().numpy()
    np.testing.assert_allclose(got, slope, rtol=1e-4)


def test_dge_on_grid_points_thresholds_and_beyond() -> None:
    grid = torch.from_numpy(oracle.E2M1).float()
    for sign in (1.0, -1.0):
        got = numerics.dge_multiplier(sign * grid)
        torch.testing.assert_close(got, torch.full_like(got, 0.2), rtol=1e-6, atol=0)
        ties = torch.from_numpy(sign * oracle.LADDER_TIES).float()
        assert (numerics.dge_multiplier(ties) == 3.0).all()
    assert numerics.dge_multiplier(torch.tensor([6.0, 7.0, -9.0])).tolist() == pytest.approx(
        [0.2] * 3
    )


@pytest.mark.parametrize(
    ("k", "mean", "rms"), [(3, 0.778, 1.0), (5, 0.593, 0.864), (10, 0.383, 0.671)]
)
def test_dge_mean_and_rms_over_an_interval(k: float, mean: float, rms: float) -> None:
    # The cap takes 40 % off the mean multiplier at k = 5.
    x = torch.linspace(4.0, 6.0, 1 << 20)
    f = numerics.dge_multiplier(x, k).double()
    assert f.mean().item() == pytest.approx(mean, abs=0.002)
    assert f.square().mean().sqrt().item() == pytest.approx(rms, abs=0.002)
    if k == 5:
        assert (f == 3.0).double().mean().item() == pytest.approx(15**-1.25, abs=2e-4)
        assert (f < 1).double().mean().item() == pytest.approx(0.866, abs=2e-3)
        assert f.median().item() == pytest.approx(0.35, abs=0.005)


def test_dge_keeps_shape_and_takes_bf16(generator: torch.Generator) -> None:
    w = torch.randn(3, 4, 5, generator=generator).bfloat16()
    f = numerics.dge_multiplier(w)
    assert f.shape == w.shape
    assert f.dtype == torch.float32
    assert numerics.dge_multiplier(w[:0]).shape == (0, 4, 5)


@pytest.mark.parametrize("alpha", [0.97, 0.99, 0.999])
@pytest.mark.parametrize("features", [64, 100, 1000, 1001])
def test_occ_clamps_at_sorted_positions(
    alpha: float, features: int, generator: torch.Generator
) -> None:
    x = torch.randn(20, features, generator=generator)
    ordered = np.sort(x.numpy(), axis=1)
    low = ordered[:, int((1 - alpha) * features)][:, None]
    high = ordered[:, int(alpha * features)][:, None]
    clamped, residual = numerics.clamp_outliers(x, alpha)
    np.testing.assert_array_equal(clamped.numpy(), np.clip(x.numpy(), low, high))
    assert torch.equal(residual, x - clamped)
    changed = residual != 0
    below, above = int((1 - alpha) * features), features - 1 - int(alpha * features)
    assert (changed.sum(1) == below + above).all()
    assert torch.equal(clamped[~changed], x[~changed])


@pytest.mark.parametrize("alpha", [0.97, 0.99, 0.999])
def test_occ_share_of_residuals(alpha: float, generator: torch.Generator) -> None:
    x = torch.randn(16, 10000, generator=generator)
    _, residual = numerics.clamp_outliers(x, alpha)
    share = (residual != 0).float().mean().item()
    assert share == pytest.approx(2 * (1 - alpha), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["signed", "magnitude"])
def test_occ_parts_add_up(
    dtype: torch.dtype, mode: Literal["signed", "magnitude"], generator: torch.Generator
) -> None:
    x = torch.randn(64, 256, generator=generator).to(dtype)
    x[:, 5] *= 30
    clamped, residual = numerics.clamp_outliers(x, 0.97, mode)
    assert clamped.dtype == dtype
    total = clamped.double() + residual.double()
    outlier = residual != 0
    assert torch.equal(total[~outlier], x.double()[~outlier])
    error = ((total - x.double()).abs() / x.double().abs())[outlier]
    assert error.max().item() <= torch.finfo(dtype).eps / 2


def test_occ_magnitude_mode_spends_its_budget_on_magnitude(generator: torch.Generator) -> None:
    # GeLU outputs: nothing below -0.17, a long tail above.
    x = torch.nn.functional.gelu(2 * torch.randn(32, 2000, generator=generator))
    _, signed = numerics.clamp_outliers(x, 0.97)
    clamped, magnitude = numerics.clamp_outliers(x, 0.97, "magnitude")
    assert (magnitude != 0).sum() == (signed != 0).sum()
    assert (signed < 0).any()
    assert not (magnitude < 0).any()
    threshold = x.abs().sort(dim=1).values[:, int((2 * 0.97 - 1) * 2000), None]
    torch.testing.assert_close(clamped, x.clamp(-threshold, threshold), rtol=0, atol=0)
    limit = clamped.abs().amax(1)
    assert (limit < numerics.clamp_outliers(x, 0.97)[0].abs().amax(1)).all()


def test_occ_rescues_channels_with_outliers(generator: torch.Generator) -> None:
    # 0.5 % of the channels 30 times larger, alpha 0.99: relative error 41 %
    # without clamping, 85 % clamped and the residual dropped, 4.6 % with the residual.
    x = torch.randn(256, 2000, generator=generator)
    x[:, :10] *= 30

    def relative(estimate: torch.Tensor) -> float:
        return ((estimate - x).norm() / x.norm()).item()

    clamped, residual = numerics.clamp_outliers(x, 0.99)
    quantized = numerics.quantize(clamped, "fp4-vector").dequantize()
    plain = numerics.quantize(x, "fp4-vector").dequantize()
    assert relative(plain) == pytest.approx(0.41, abs=0.03)
    assert relative(quantized) == pytest.approx(0.846, abs=0.03)
    assert relative(quantized + residual) == pytest.approx(0.046, abs=0.006)
    late, rest = numerics.clamp_outliers(x, 0.999)
    too_late = numerics.quantize(late, "fp4-vector").dequantize() + rest
    assert 0.25 < relative(too_late) < 0.35  # two outliers a side are kept out, five are there


def test_occ_on_gaussian_data(generator: torch.Generator) -> None:
    # Relative error of vector-wise E2M1: 11.7 % plain, 10.4 % at alpha 0.99, 9.4 % at 0.97.
    x = torch.randn(512, 2048, generator=generator)
    for alpha, expected in ((None, 0.117), (0.99, 0.104), (0.97, 0.094)):
        clamped, residual = (x, 0.0) if alpha is None else numerics.clamp_outliers(x, alpha)
        q = numerics.quantize(clamped, "fp4-vector").dequantize()
        assert ((q + residual - x).norm() / x.norm()).item() == pytest.approx(expected, abs=0.004)


def test_occ_odd_input(generator: torch.Generator) -> None:
    empty = torch.zeros(0, 8)
    clamped, residual = numerics.clamp_outliers(empty, 0.99)
    assert clamped.shape == residual.shape == (0, 8)
    x = torch.randn(2, 100, generator=generator)
    x[0, 3] = float("nan")
    clamped, residual = numerics.clamp_outliers(x, 0.97)
    assert (clamped + residual)[0, 3].isnan()
    assert (clamped + residual)[1].isfinite().all()
    three_dims = torch.randn(2, 3, 100, generator=generator)
    flat = numerics.clamp_outliers(three_dims.view(6, 100), 0.97)[0]
    assert torch.equal(numerics.clamp_outliers(three_dims, 0.97)[0].view(6, 100), flat)
    single = numerics.clamp_outliers(torch.tensor([[2.0]]), 0.99)
    assert single[0].item() == 2.0
    assert single[1].item() == 0.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.0, 1.5, float("nan")])
def test_occ_refuses_a_quantile_that_makes_no_sense(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        numerics.clamp_outliers(torch.zeros(2, 8), alpha)


def test_occ_refuses_an_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="both"):
        numerics.clamp_outliers(torch.zeros(2, 8), 0.99, "both")  # type: ignore[arg-type]


def test_folded_outliers_are_e4m3_and_the_rest_stays_e2m1(generator: torch.Generator) -> None:
    x = torch.randn(32, 400, generator=generator) * 3
    x[:, ::100] *= 20
    clamped, residual = numerics.clamp_outliers(x, 0.97)
    inner = numerics.quantize(clamped, "fp4-vector", 1, "nearest-up")
    folded = numerics.fold_outliers(inner, x, clamped)
    assert (folded.format.name, folded.scaling) == ("fp8-e4m3", "vector")
    assert torch.equal(folded.scales, inner.scales)
    outlier = residual != 0
    assert torch.equal(folded.dequantize()[~outlier], inner.dequantize()[~outlier])
    error = ((folded.dequantize() - x).abs() / x.abs())[outlier]
    assert 0.01 < error.max().item() <= 2**-4 * (1 + 1e-6)


def test_folded_outliers_saturate_and_infinity_is_not_hidden() -> None:
    x = torch.linspace(-1, 1, 100).repeat(3, 1)
    x[0, 5], x[1, 5], x[2, 5] = 1e4, torch.inf, torch.nan
    clamped, _ = numerics.clamp_outliers(x, 0.97)
    inner = numerics.quantize(clamped, "fp4-vector", 1, "nearest-up")
    folded = numerics.fold_outliers(inner, x, clamped)
    assert folded.dequantize()[0, 5] == 448 * inner.scales[0, 0]
    assert folded.dequantize()[1:].isnan().all()
    assert (folded.codes[1:] == 0).all()
    with pytest.raises(ConfigError, match="cannot fold outliers into 'int8'"):
        numerics.fold_outliers(numerics.quantize(clamped, "int8", 1), x, clamped)


def test_occ_limits_of_zero_are_positive() -> None:
    x = torch.tensor([[-1.0, -0.0, -0.0, 0.0, 2.0, -0.0, 0.0, 0.0, -0.0, -0.0]])
    clamped, _ = numerics.clamp_outliers(x, 0.8)
    negative = {1, 2, 5, 8, 9}  # zeros inside the limits keep their sign
    assert {i for i in range(10) if clamped[0, i].signbit()} == negative
