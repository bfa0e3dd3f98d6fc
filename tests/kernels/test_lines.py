"""Scaling and casting rows at once gives the bits of the two kernels that do it one by one."""

import pytest
import torch

from megafp4 import numerics
from tests.kernels.triton_device import DEVICE, adversarial, gpu_only, same_bits

from megafp4_kernels import amax, casts, lines  # isort: skip

NEAREST = ("nearest-even", "nearest-away", "nearest-up")


def check(x: torch.Tensor, fmt: str, rounding: str, prescale: float) -> None:
    x = torch.where(x.isfinite(), x, 1.0)
    x[1] = 0.0
    x[2, 3], x[3, 1] = torch.nan, -torch.inf
    peaks = casts.DTYPES[fmt] == torch.float8_e4m3fn
    found = lines.cast_lines(x, fmt, rounding=rounding, prescale=prescale, peak=peaks)
    scale = amax.scale(x, fmt, 1)
    assert same_bits(found.scale, scale)
    assert found.scale.isnan().nonzero().flatten().tolist() == [2, 3]
    data, _ = casts.cast(x, fmt, scale, rounding=rounding, prescale=prescale, scale_axis=0)
    assert data is not None
    assert found.data.dtype == data.dtype
    assert torch.equal(found.data.view(torch.uint8), data.view(torch.uint8))
    assert data.view(torch.uint8).unique().numel() > 2
    if peaks:
        assert found.peak is not None
        assert same_bits(found.peak, data.float().abs().amax(1) * scale)
    else:
        assert found.peak is None


@pytest.mark.parametrize("rounding", NEAREST)
@pytest.mark.parametrize("fmt", casts.DTYPES)
def test_rows(fmt: str, rounding: str) -> None:
    check(adversarial(13, 30, torch.float32), fmt, rounding, 1.0)
    check(adversarial(70, 134, torch.bfloat16), fmt, rounding, 0.75)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("rounding", NEAREST)
@pytest.mark.parametrize("fmt", casts.DTYPES)
def test_rows_of_large_matrices(fmt: str, rounding: str) -> None:
    check(adversarial(1031, 4104, torch.bfloat16), fmt, rounding, 1.0)
    check(adversarial(2048, 999, torch.float32), fmt, rounding, 1.0)
    check(adversarial(9, lines.MAX_COLS, torch.float32), fmt, rounding, 1.0)


def test_the_specification() -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    q = numerics.quantize(x, "fp4-vector", 1, "nearest-up")
    found = lines.cast_lines(x, "fp4-vector", rounding="nearest-up", peak=True)
    assert torch.equal(found.scale, q.scales[:, 0])
    assert torch.equal(found.data.float(), q.values())
    assert found.peak is not None
    assert torch.equal(found.peak, q.dequantize().abs().amax(1))


def test_empty() -> None:
    found = lines.cast_lines(torch.zeros(3, 0, device=DEVICE), "fp4-vector", peak=True)
    assert found.data.shape == (3, 0)
    assert found.scale.tolist() == [amax.MIN_SCALE] * 3
    assert found.peak is not None
    assert found.peak.tolist() == [0.0] * 3


def test_operator_is_well_defined() -> None:
    operator = torch.ops.megafp4.cast_lines.default
    x = torch.randn(24, 48, device=DEVICE)
    torch.library.opcheck(operator, (x, "fp4-vector", "nearest-up", 1.0, True))


@pytest.mark.parametrize(
    ("cols", "options", "message"),
    [
        (4, {"fmt": "fp6"}, "format is 'fp6'"),
        (4, {"fmt": "int8", "rounding": "stochastic"}, "choose one to the nearest"),
        (40000, {"fmt": "int8"}, "at most 32768"),
        (4, {"fmt": "int8", "peak": True}, "only those of E4M3 bytes"),
    ],
)
def test_refusals(cols: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines.cast_lines(torch.zeros(2, cols, device=DEVICE), **options)
