"""MXFP4: E8M0 bytes over all of FP32, and a million codes at four scales against two oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.prototype.mx_formats import mx_tensor as mx

from megafp4 import numerics
from tests.numerics import oracle

SCALES = (1.0, 1e-4, 1e-8, 1e4)
MILLION = 1 << 20


def gaussian(scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A million values, one block in eight with an outlier 2^0..2^20 times larger."""
    x = torch.randn(MILLION // 256, 256, generator=generator) * scale
    x[:, 5] *= torch.exp2(torch.randint(0, 21, (len(x),), generator=generator).float())
    return x.to(dtype)


def scale_bytes(amax: np.ndarray) -> np.ndarray:
    """megafp4's scale byte for blocks whose largest magnitude is given."""
    x = np.zeros((len(amax), 32), dtype=np.float32)
    x[:, 17] = amax
    x[1::2, 17] = -amax[1::2]
    return numerics.quantize(torch.from_numpy(x), "mxfp4").scales.numpy()[:, 0]


def test_scale_byte_of_every_exponent() -> None:
    exponents = np.arange(256, dtype=np.uint32)
    for mantissa in (0, 1, 0x400000, 0x7FFFFF):  # 2^e up to the largest value below 2^(e+1)
        amax = ((exponents << 23) | mantissa).view(np.float32)
        np.testing.assert_array_equal(scale_bytes(amax), oracle.e8m0_byte(amax))


def test_scale_byte_written_out() -> None:
    below = np.nextafter(np.float32(4.0), np.float32(0.0))
    amax = np.array([4.0, below, 8.0, 1.0, 0.0, 2.0**-149, 2.0**-125, 2.0**-124, 3.4e38,
                     np.inf, np.nan], dtype=np.float32)  # fmt: skip
    expected = [127, 126, 128, 125, 0, 0, 0, 1, 252, 255, 255]
    np.testing.assert_array_equal(scale_bytes(amax), expected)


@pytest.mark.parametrize("exponent", [-140, -126, -125, -60, -1, 0, 1, 60, 126])
@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-away"])
def test_codes_at_the_ends_of_the_exponent_range(
    exponent: int, rounding: numerics.Rounding
) -> None:
    generator = np.random.default_rng(exponent + 200)
    x = np.ldexp(generator.uniform(-1.99, 1.99, (64, 32)), exponent).astype(np.float32)
    q = numerics.quantize(torch.from_numpy(x), "mxfp4", rounding=rounding)
    codes, scales = oracle.mxfp4(x, rounding)
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_codes_against_float64(
    scale: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = gaussian(scale, dtype, generator)
    q = numerics.quantize(x, "mxfp4")
    codes, scales = oracle.mxfp4(x.float().numpy())
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_codes_against_torchao(
    scale: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = gaussian(scale, dtype, generator)
    scales, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32)
    q = numerics.quantize(x, "mxfp4")
    torch.testing.assert_close(q.scales, scales.view(torch.uint8), rtol=0, atol=0)
    torch.testing.assert_close(q.pack(), packed.view(torch.uint8), rtol=0, atol=0)


@pytest.mark.parametrize("rounding", ["nearest-away", "nearest-up"])
def test_other_tie_rules_on_bf16(rounding: numerics.Rounding, generator: torch.Generator) -> None:
    x = gaussian(1.0, torch.bfloat16, generator)[:512]
    q = numerics.quantize(x, "mxfp4", rounding=rounding)
    codes, _ = oracle.mxfp4(x.float().numpy(), rounding)
    np.testing.assert_array_equal(oracle.decode_e2m1(q.codes.numpy()), oracle.decode_e2m1(codes))
    even = numerics.quantize(x, "mxfp4").codes
    share = (even != q.codes).float().mean().item()
    assert 0.001 < share < 0.02  # BF16 has few mantissa bits: ties are common enough to matter


def test_nan_or_inf_poisons_its_block_only(generator: torch.Generator) -> None:
    x = torch.randn(4, 96, generator=generator)
    x[0, 40], x[1, 0], x[2, 95] = float("nan"), float("inf"), float("-inf")
    q = numerics.quantize(x, "mxfp4")
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[0, 1] = bad[1, 0] = bad[2, 2] = True
    assert torch.equal(q.scales == 255, bad)
    decoded = q.dequantize()
    assert torch.equal(decoded.isnan(), bad.repeat_interleave(32, dim=1))
    assert torch.equal(q.scale_values().isnan(), bad)
    assert not q.codes[decoded.isnan()].any()  # one canonical code, so that kernels can agree


def test_zero_blocks_have_zero_codes(generator: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=generator)
    x[1, 32:] = 0.0
    q = numerics.quantize(x, "mxfp4")
    assert not q.codes[1, 32:].any()
    assert q.scales[1, 1] == 0
    assert torch.equal(q.dequantize()[1, 32:], torch.zeros(32))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
)
def test_any_finite_block_matches_the_oracle(values: list[float]) -> None:
    x = np.array([values], dtype=np.float32)
    q = numerics.quantize(torch.from_numpy(x), "mxfp4")
    codes, scales = oracle.mxfp4(x)
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.codes.numpy(), codes)
    decoded = oracle.decode_e2m1(codes) * np.ldexp(1.0, scales.astype(int) - 127).repeat(32, -1)
    np.testing.assert_array_equal(q.dequantize().numpy(), decoded.astype(np.float32))


def test_dequantize_to_bf16_is_exact(generator: torch.Generator) -> None:
    x = torch.randn(64, 256, generator=generator) * torch.exp2(
        torch.randint(-90, 90, (64, 1), generator=generator).float()
    )
    q = numerics.quantize(x, "mxfp4")
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize())
