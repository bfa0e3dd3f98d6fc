"""Range statistics equal the specification's, bit for bit."""

import pytest
import torch

from megafp4 import numerics
from tests.kernels.triton_device import DEVICE, adversarial, gpu_only, same_bits

from megafp4_kernels import amax as module  # isort: skip

DTYPES = [torch.bfloat16, torch.float32]


def expected(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    scaling = "tensor" if axis is None else "vector"
    return numerics.amax(x, "fp8-e4m3", 1 if axis is None else axis, scaling).flatten()


def check(x: torch.Tensor, axis: int | None) -> None:
    largest = expected(x, axis)
    assert same_bits(module.amax(x, axis), largest)
    for fmt in module.MAX_VALUES:
        assert same_bits(module.scale(x, fmt, axis), numerics.scales_from_amax(largest, fmt)[0]), (
            fmt
        )


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (130, 257), (3, 600)])
def test_amax_and_scale(shape: tuple[int, int], dtype: torch.dtype, axis: int | None) -> None:
    check(torch.randn(shape, dtype=dtype).to(DEVICE), axis)
    check(adversarial(*shape, dtype), axis)
    check(torch.zeros(shape, dtype=dtype, device=DEVICE), axis)
    check(torch.full(shape, -3e-38, dtype=dtype, device=DEVICE), axis)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(16384, 4096), (4099, 12289), (1, 1 << 20), (1 << 20, 3)])
def test_large(shape: tuple[int, int], axis: int | None) -> None:
    check(torch.randn(shape, device=DEVICE).bfloat16(), axis)
    x = torch.randn(shape, device=DEVICE)
    x[-1, -1] = torch.nan
    check(x, axis)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    for axis in (None, 0, 1):
        check(x, axis)


def test_operator_is_well_defined() -> None:
    x = torch.randn(40, 24, device=DEVICE)
    torch.library.opcheck(torch.ops.megafp4.line_statistic.default, (x, 0, 448.0))


@pytest.mark.parametrize(
    ("x", "axis", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.float16), 0, "bfloat16 or float32"),
        (torch.zeros(4, 4, 4), 0, "matrix"),
        (torch.zeros(4, 8).T, 0, "contiguous"),
        (torch.zeros(4, 4), 2, "choose 0, 1 or None"),
    ],
)
def test_refusals(x: torch.Tensor, axis: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.amax(x.to(DEVICE), axis)


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="mxfp4"):
        module.scale(torch.zeros(4, 4, device=DEVICE), "mxfp4", 0)
