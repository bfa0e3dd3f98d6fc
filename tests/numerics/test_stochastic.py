"""Stochastic rounding: exact against an oracle draw by draw, unbiased, independent, splittable."""

import numpy as np
import pytest
import torch

from megafp4 import numerics
from megafp4.numerics import Key
from megafp4.numerics.rounding import round_steps
from tests.numerics import oracle

KEY = Key(2024, 17, 3, "dgrad", "a")
IDS = (2024, 17, 3, 1, 0)
DRAWS = 1 << 18


def stochastic(
    x: torch.Tensor,
    key: Key = KEY,
    bits: int = 8,
    prescale: float = 0.75,
    axis: int = -1,
    origin: tuple[int, int] = (0, 0),
) -> numerics.QTensor:
    """MXFP4 with stochastic rounding."""
    return numerics.quantize(
        x, "mxfp4", axis, "stochastic", key, prescale=prescale, dither_bits=bits, origin=origin
    )


def probability_of_rounding_up(remainder: float, bits: int) -> float:
    """Share of the 2^bits centred dithers u with remainder + u >= 1; exact for 8 and 16 bits."""
    used = min(bits, 23)
    return float(np.floor(remainder * 2**used + 0.5)) / 2**used


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("prescale", [1.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_the_one_its_random_bits_ask_for(
    bits: int, prescale: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    # BF16 data meets remainder + dither == 1 exactly, where the specification says "up".
    x = torch.randn(300, 1024, generator=generator).to(dtype).float()
    q = stochastic(x, bits=bits, prescale=prescale)
    _, scales = oracle.mxfp4(x.numpy())
    scale = np.ldexp(1.0, scales.astype(int) - 127).repeat(32, axis=1)
    scaled = (x.numpy().astype(np.float64) / scale).astype(np.float32) * np.float32(prescale)
    inside = np.clip(scaled.astype(np.float64), -6.0, 6.0)
    expected = oracle.stochastic_e2m1(inside, oracle.dither((300, 1024), IDS, bits))
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), expected)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("value", "outcomes"),
    [
        (7.9375, {16 / 3, 8.0}),
        (5.0, {4.0, 16 / 3}),
        (1.0, {2 / 3, 4 / 3}),
        (4.0, {4.0}),
        (5.4, {16 / 3, 8.0}),
        (0.1, {0.0, 2 / 3}),
    ],
)
def test_unbiased_within_four_standard_errors(
    value: float, outcomes: set[float], sign: float, bits: int
) -> None:
    # One repeated value; the last element of each block, 7.9375, makes the scale 1.
    x = torch.full((DRAWS // 31 + 1, 32), sign * value)
    x[:, 31] = 7.9375
    q = stochastic(x, bits=bits)
    assert (q.scales == 127).all()
    decoded = q.dequantize()[:, :31].double() * (4 / 3)
    seen = sorted({abs(v) for v in decoded.unique().tolist()})
    assert seen == pytest.approx(sorted(outcomes), rel=1e-12)
    exact = x[0, 0].double().item()
    low, high = decoded.abs().min().item(), decoded.abs().max().item()
    if low == high:
        assert low == pytest.approx(value, rel=1e-7)
        return
    p = (abs(exact) - low) / (high - low)
    p_drawn = probability_of_rounding_up(p, bits)
    # 8 bits can only express multiples of 1/256: half of one is its largest possible bias.
    assert abs(p_drawn - p) <= 2.0 ** -(bits + 1) + 1e-6
    expected = low + p_drawn * (high - low)
    standard_error = (high - low) * (p * (1 - p) / decoded.numel()) ** 0.5
    assert abs(abs(decoded.mean().item()) - expected) < 4 * standard_error


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_centred_dither_has_no_mean_bias(
    bits: int, sign: float, generator: torch.Generator
) -> None:
    # Uncentred 8-bit dither is off by -0.0023 on average: six errors here.
    x = sign * torch.rand(1 << 14, 64, generator=generator) * 5.9
    x[:, ::32] = sign * 7.5
    error = stochastic(x, bits=bits).dequantize().double() - 0.75 * x.double()
    kept = error.view(-1, 2, 32)[..., 1:]
    standard_error = kept.std().item() / kept.numel() ** 0.5
    assert standard_error < 4e-4
    assert abs(kept.mean().item()) < 4 * standard_error


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_grid_points_never_move(bits: int) -> None:
    grid = oracle.decode_e2m1(np.arange(16))
    x = torch.from_numpy(np.tile(grid, (1 << 14, 4)).astype(np.float32))
    q = stochastic(x, bits=bits, prescale=1.0)
    assert torch.equal(q.dequantize(), x)
    x = torch.tensor([2.0, -2.0, 4.0, 7.9] * 8).repeat(1 << 13, 1)
    kept = stochastic(x, bits=bits).dequantize().view(-1, 4)[:, :3]
    assert torch.equal(kept, torch.tensor([1.5, -1.5, 3.0]).expand_as(kept))


def test_the_most_extreme_dither_does_not_move_a_grid_point() -> None:
    # A dither of 1 - 2^-24 added to 3.0 rounds to 4.0 in FP32; the decision must be exact instead.
    steps = torch.tensor([0.0, 1.0, 3.0, 127.0])
    u = torch.full((4,), 1.0 - 2.0**-24)
    assert torch.equal(round_steps(steps, "stochastic", steps, u), steps)
    above = torch.nextafter(steps, torch.tensor(torch.inf))[1:]
    assert torch.equal(round_steps(above, "stochastic", above, u[1:]), steps[1:] + 1)


def test_three_quarters_keeps_every_block_below_six(generator: torch.Generator) -> None:
    exponents = torch.arange(-100, 100).float()
    largest = torch.nextafter(torch.exp2(exponents), torch.tensor(0.0))
    x = torch.randn(200, 32, generator=generator).clamp(-0.99, 0.99) * largest[:, None]
    x[:, 9] = largest
    for step in range(20):
        q = stochastic(x, KEY._replace(step=step))
        scale = q.scale_values()
        assert (0.75 * x.abs() / scale < 6.0).all()
        assert ((q.dequantize() - 0.75 * x).abs() <= 2.0 * scale).all()
    assert numerics.operand_statistics(x, q, 0.75)["clip_rate"] == 0.0


def test_without_the_prescale_clipping_biases() -> None:
    x = torch.full((1024, 32), 7.5)
    assert (stochastic(x, prescale=1.0).dequantize() == 6.0).all()
    assert stochastic(x, bits=16).dequantize().mean().item() == pytest.approx(5.625, abs=0.02)


@pytest.mark.parametrize("fmt", ["nvfp4", "fp4-vector", "fp8-e4m3", "fp8-e5m2", "int8", "int4",
                                 "int3", "ternary"])  # fmt: skip
def test_every_format_is_unbiased_inside_its_range(fmt: str, generator: torch.Generator) -> None:
    row = torch.rand(1, 256, generator=generator) * 1.8 - 0.9
    row[0, 0] = 1.0
    q = numerics.quantize(row.repeat(4096, 1), fmt, rounding="stochastic", key=KEY, dither_bits=16)
    decoded = q.dequantize().double()
    clipped = numerics.operand_statistics(row.repeat(4096, 1), q)["clip_rate"] > 0
    error = decoded.mean(0) - row[0].double()
    standard_error = decoded.std(0) / 64 + 1e-7
    worst = (error / standard_error).abs()
    if clipped:  # NVFP4's rounded scale may lie below amax / 6: those elements saturate
        inside = row[0].abs() <= q.scale_values()[0].repeat_interleave(16) * 6
        worst = worst[inside]
    assert worst.max().item() < 5.0  # the largest of 256 independent normal deviates
    assert worst.mean().item() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.15)


@pytest.mark.parametrize("bits", [8, 32])
def test_integers_on_the_grid_never_move(bits: int) -> None:
    levels = torch.arange(-127.0, 128.0)
    x = levels.repeat(1 << 12, 1)
    for step in range(2):
        key = KEY._replace(step=step)
        q = numerics.quantize(x, "int8", rounding="stochastic", key=key, dither_bits=bits)
        assert torch.equal(q.scales, torch.ones(1 << 12, 1))
        assert torch.equal(q.dequantize(), x)


def test_equal_keys_draw_equal_bits_and_any_other_field_differs(
    generator: torch.Generator,
) -> None:
    x = torch.randn(64, 128, generator=generator)
    base = stochastic(x).codes
    assert torch.equal(base, stochastic(x).codes)
    assert torch.equal(base, stochastic(x, Key(*IDS)).codes)
    for other in (
        KEY._replace(seed=2025), KEY._replace(step=18), KEY._replace(layer=4),
        KEY._replace(gemm="wgrad"), KEY._replace(operand="b"),
    ):  # fmt: skip
        changed = (stochastic(x, other).codes != base).float().mean().item()
        assert 0.2 < changed < 0.5


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    x = torch.linspace(-1, 1, 256).view(2, 128)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stochastic(x).codes
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(stochastic(x).codes, first)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_halves_draw_what_the_whole_draws(bits: int, generator: torch.Generator) -> None:
    x = torch.randn(96, 256, generator=generator)
    whole = stochastic(x, bits=bits)
    for cut in (1, 32, 50):
        parts = [
            stochastic(x[:cut], bits=bits), stochastic(x[cut:], bits=bits, origin=(cut, 0))
        ]  # fmt: skip
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes)
        assert torch.equal(torch.cat([p.scales for p in parts]), whole.scales)
    for cut in (32, 128, 224):
        parts = [
            stochastic(x[:, :cut], bits=bits), stochastic(x[:, cut:], bits=bits, origin=(0, cut))
        ]  # fmt: skip
        assert torch.equal(torch.cat([p.codes for p in parts], dim=1), whole.codes)


@pytest.mark.parametrize("cut", [32, 96])
def test_halves_along_the_other_axis(cut: int, generator: torch.Generator) -> None:
    # wgrad contracts over tokens, dim 0: micro-batches cut the contraction axis.
    x = torch.randn(160, 48, generator=generator)
    whole = stochastic(x, axis=0).codes
    tokens = [stochastic(x[:cut], axis=0), stochastic(x[cut:], axis=0, origin=(0, cut))]
    assert torch.equal(torch.cat([q.codes for q in tokens]), whole)
    lines = [stochastic(x[:, :16], axis=0), stochastic(x[:, 16:], axis=0, origin=(16, 0))]
    assert torch.equal(torch.cat([q.codes for q in lines], dim=1), whole)


def test_a_transpose_draws_the_same_bits(generator: torch.Generator) -> None:
    x = torch.randn(640, 1056, generator=generator)
    codes = stochastic(x).codes
    assert torch.equal(stochastic(x.T, axis=0).codes.T, codes)
    assert torch.equal(stochastic(x.T.contiguous(), axis=0).codes.T, codes)
    assert torch.equal(stochastic(x.view(4, 160, 1056)).codes.view(640, 1056), codes)


def test_mean_of_stochastic_gemms_converges_as_one_over_root_n(
    generator: torch.Generator,
) -> None:
    k, g = 256, 64
    a = torch.randn(8, k, generator=generator)
    b = torch.randn(8, k, generator=generator)
    a[:, 7] *= 20.0
    exact = a.double() @ b.double().T
    signs = numerics.hadamard_signs(KEY._replace(operand="signs"), g)
    errors = []
    for n in (64, 1024):
        operands = []
        for x, operand in ((a, "a"), (b, "b")):
            spread = numerics.hadamard(x, g, signs=signs).repeat(n, 1)
            q = stochastic(spread, KEY._replace(operand=operand))
            operands.append(q.dequantize().view(n, 8, k))
        mean = torch.bmm(operands[0], operands[1].mT).double().mean(0) * (16 / 9 / g)
        errors.append(((mean - exact).norm() / exact.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.35)
    assert errors[1] < 0.012
    nearest = [
        numerics.quantize(numerics.hadamard(x, g, signs=signs), "mxfp4").dequantize()
        for x in (a, b)
    ]
    biased = (nearest[0] @ nearest[1].T).double() / g
    assert (biased - exact).norm() / exact.norm() > 10 * errors[1]


def test_the_price_of_stochastic_rounding(generator: torch.Generator) -> None:
    # The variance of one draw is (c - z)(z - f) for neighbours f <= z <= c.
    x = torch.randn(1 << 12, 256, generator=generator)
    _, scales = oracle.mxfp4(x.numpy())
    step = np.ldexp(1.0, scales.astype(int) - 127).repeat(32, axis=1)
    z = np.abs(x.double().numpy()) * 0.75 / step
    index = np.minimum(np.searchsorted(oracle.E2M1, z, side="right") - 1, 6)
    variance = (oracle.E2M1[index + 1] - z) * (z - oracle.E2M1[index]) * (step * 4 / 3) ** 2
    expected = variance.sum() / (x.double().numpy() ** 2).sum()
    measured = numerics.operand_statistics(x, stochastic(x), 0.75)["snr_db"]
    assert 10 ** (-measured / 10) == pytest.approx(expected, rel=0.01)
