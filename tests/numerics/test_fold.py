"""What lets FP8 hardware run FP4 exactly: E2M1 times a power of two lies on the FP8 grids."""

import ml_dtypes
import numpy as np
import pytest
import torch

from megafp4.errors import ConfigError, UnsupportedError
from megafp4.numerics.fold import fold
from megafp4.numerics.formats import get_format
from megafp4.numerics.qtensor import QTensor
from megafp4.numerics.quantize import quantize
from megafp4.numerics.rounding import round_steps
from tests.numerics import oracle

MXFP4 = get_format("mxfp4")


@pytest.mark.parametrize(
    ("kind", "octaves"), [(ml_dtypes.float8_e4m3fn, 15), (ml_dtypes.float8_e5m2, 29)]
)
def test_e2m1_is_exact_on_fp8_for_so_many_octaves(kind: type, octaves: int) -> None:
    # The values with sign and 0.5, the subnormal; ml_dtypes alone, so this is about the formats.
    values = oracle.decode_e2m1(np.arange(16))
    exact = []
    for k in range(-40, 40):
        scaled = np.ldexp(values, k).astype(np.float32)
        back = scaled.astype(kind).astype(np.float64)
        if np.array_equal(back, np.ldexp(values, k)):
            exact.append(k)
    assert len(exact) == octaves
    assert exact == list(range(exact[0], exact[0] + octaves))


def mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> QTensor:
    """Blocks of 32 with the given E8M0 bytes."""
    return QTensor(codes.to(torch.uint8), scales.to(torch.uint8), None, MXFP4, 1, "block")


def test_every_code_of_every_octave_is_folded_exactly() -> None:
    # 29 lines, one an octave; each holds all 16 codes twice.
    codes = torch.arange(16).repeat(29, 2)
    q = mxfp4(codes, torch.arange(100, 129)[:, None])
    folded = fold(q, base=100 - 127 + 15)
    assert folded.raised == 0
    assert folded.data.dtype == torch.float8_e5m2
    values = folded.data.float() * folded.scale
    assert torch.equal(values.view(torch.int32), q.dequantize().view(torch.int32))


def test_the_base_follows_the_largest_block_with_content() -> None:
    codes = torch.ones(1, 128)
    codes[0, 32:64] = 8  # -0.0
    q = mxfp4(codes, torch.tensor([[120, 200, 95, 255]]))
    folded = fold(q)
    assert float(folded.scale) == 2.0 ** (120 - 127 - 10)
    assert folded.raised == 0  # the smallest of its blocks lies exactly at the limit
    expected = q.dequantize()
    assert torch.equal(folded.data.float().nan_to_num() * folded.scale, expected.nan_to_num())
    assert folded.data[0, 96:].isnan().all()
    assert torch.signbit(folded.data[0, 32:64].float()).all()


def test_blocks_below_the_range_are_counted() -> None:
    q = mxfp4(torch.ones(1, 96), torch.tensor([[120, 94, 60]]))
    folded = fold(q)
    assert folded.raised == 2
    assert not folded.data[0, 64:].float().any()
    zeros = mxfp4(torch.zeros(1, 96), torch.tensor([[120, 94, 60]]))
    assert fold(zeros).raised == 0


def test_folding_refuses_what_it_cannot_hold() -> None:
    q = mxfp4(torch.ones(2, 32), torch.tensor([[120], [121]]))
    with pytest.raises(ConfigError, match=r"base is -20 .*exponent is -6"):
        fold(q, base=-20)
    with pytest.raises(ConfigError, match="base is 128"):
        fold(q, base=128)
    with pytest.raises(UnsupportedError, match="along axis 0 of 2 dims"):
        fold(quantize(torch.ones(32, 32), "mxfp4", axis=0))
    with pytest.raises(UnsupportedError, match="nvfp4"):
        fold(quantize(torch.ones(32, 32), "nvfp4"))


def halves(values: torch.Tensor) -> torch.Tensor:
    """|v| * 2^-14 truncated to FP16, as int32 bits: what the GPU's packed rounding starts from."""
    exact = values.double() * 2.0**-14
    near = exact.half()
    bits = near.view(torch.int16).int()
    return torch.where(near.double() > exact, bits - 1, bits)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest-away"])
def test_rounding_in_half_precision_is_the_specification(rounding: str) -> None:
    # Random magnitudes, the E2M1 numbers and midpoints with their FP32 neighbours, and tiny ones.
    special = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0])
    steps = torch.arange(0, 6, 2.0**-8)
    points = torch.cat([torch.rand(2000) * 6, special, steps, torch.logspace(-40, 0, 100)])
    ends = torch.tensor(torch.inf), torch.tensor(0.0)
    points = torch.cat([points, *(torch.nextafter(points, end) for end in ends)])
    points = points[points < 6]
    up = 2 * torch.arange(256) + 1 if rounding == "stochastic" else torch.tensor([256])
    got = (halves(points)[:, None] + up) >> 9
    # The specification: steps of 0.5 below 2, of 1 below 4, of 2 above.
    exponent = torch.floor(torch.log2(points.clamp(min=1.0).double())).int()
    exponent = exponent.clamp(max=2)[:, None].expand(got.shape)
    scaled = torch.ldexp(points[:, None].expand(got.shape), 1 - exponent)
    dither = ((up - 1) // 2 + 0.5) / 256
    whole = round_steps(scaled, rounding, scaled, dither.float().expand(got.shape))
    assert torch.equal(got, whole.int() + 2 * exponent)
    assert got.min() == 0
    assert got.max() == 7
