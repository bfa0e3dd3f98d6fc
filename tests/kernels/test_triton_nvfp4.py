"""NVFP4 operands equal the specification's, bit for bit, Hadamard transform included."""

import pytest
import torch

from megafp4 import numerics
from megafp4.numerics import Key
from megafp4.numerics.formats import E4M3
from tests.kernels.triton_device import DEVICE, gpu_only, position, runs, same_bits

from megafp4_kernels.amax import amax  # isort: skip
from megafp4_kernels.nvfp4 import quantize_nvfp4  # isort: skip
from megafp4_kernels.nvfp4_amax import block_magnitudes  # isort: skip

KEY = Key(0xDEADBEEF12345678, 77, 3, "wgrad", "b")
SIGNS = KEY._replace(operand="signs").stream
FIRST_TOKEN = 32


def data(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, cols) * torch.logspace(-12, 3, cols)
    x[:16, :32], x[3, 17] = 0.0, -0.0
    return x.to(dtype).to(DEVICE)


def check(x: torch.Tensor, axis: int, tile: bool, rounding: str, g: int, prescale: float) -> None:
    found = quantize_nvfp4(
        x, axis, tile=tile, rounding=rounding, prescale=prescale, hadamard=g, sign_stream=SIGNS,
        position=position(KEY.seed, KEY.step, FIRST_TOKEN), stream=KEY.stream,
    )  # fmt: skip
    signs = numerics.hadamard_signs(KEY, 16, x.device)
    q = numerics.quantize(
        numerics.hadamard(x, g, axis, signs) if g else x,
        "nvfp4", axis, rounding, KEY, scaling="tile" if tile else "block", prescale=prescale,
        origin=(FIRST_TOKEN, 0) if axis == 1 else (0, FIRST_TOKEN),
    )  # fmt: skip
    turn = (lambda t: t) if axis == 1 else (lambda t: t.T.contiguous())
    assert same_bits(found.tensor_scale, q.tensor_scale.view(1))
    assert torch.equal(found.scales, turn(q.scales))
    assert torch.equal(found.codes, turn(q.pack()))
    block = E4M3.magnitudes().to(DEVICE)[found.scales.int()]
    for dim in (0, 1) if tile else (1,):
        block = block.repeat_interleave(16, dim)
    assert found.values.dtype == torch.bfloat16
    assert same_bits(found.values.float(), turn(q.values()) * block)


@pytest.mark.parametrize("g", [0, 16])
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_operand(axis: int, tile: bool, rounding: str, g: int) -> None:
    check(data(48, 160, torch.bfloat16), axis, tile, rounding, g, 1.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_prescale_and_odd_lines(axis: int) -> None:
    shape = (21, 32) if axis == 1 else (32, 21)
    check(data(*shape, torch.float32), axis, False, "nearest-even", 16, 0.75)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(value: float) -> None:
    x = data(16, 48, torch.float32)
    x[5, 20] = value
    check(x, 1, False, "nearest-even", 0, 1.0)
    assert quantize_nvfp4(x).values.isnan().all()


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("g", [0, 16])
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_large_operand(axis: int, tile: bool, rounding: str, g: int) -> None:
    check(data(2064, 1136, torch.bfloat16), axis, tile, rounding, g, 1.0)
    check(data(528, 4112, torch.float32), axis, tile, rounding, g, 1.0)


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_slices_are_those_of_the_whole(axis: int, tile: bool) -> None:
    whole = data(64, 96, torch.bfloat16)
    whole[20] *= 100
    rotation = {"tile": tile, "hadamard": 16, "sign_stream": SIGNS}
    draw = {"rounding": "stochastic", "stream": KEY.stream}
    where = position(KEY.seed, KEY.step, FIRST_TOKEN)
    expected = quantize_nvfp4(whole, axis, position=where, **rotation, **draw)
    blocks = block_magnitudes(whole, axis, position=where, **rotation)
    rows, cols = [*range(16), *range(32, 64)], [*range(32, 96)]
    x = whole[rows][:, cols].contiguous()
    found = quantize_nvfp4(
        x, axis, **rotation, **draw, position=position(KEY.seed, KEY.step, FIRST_TOKEN, 32),
        row_runs=runs([0, 32, 48]), largest=amax(blocks, None),
        block_amax=block_magnitudes(x, axis, position=where, **rotation),
    )  # fmt: skip
    lines, ks = (rows, cols) if axis == 1 else (cols, rows)
    assert same_bits(found.tensor_scale, expected.tensor_scale)
    assert same_bits(found.values.float(), expected.values[lines][:, ks].float())
    alone = quantize_nvfp4(x, axis, **rotation, position=where)
    assert not torch.equal(found.tensor_scale, alone.tensor_scale)


def test_parts_that_are_not_wanted() -> None:
    x = data(16, 32, torch.float32)
    found = quantize_nvfp4(x, codes=False)
    assert found.codes is None
    assert torch.equal(found.values, quantize_nvfp4(x).values)
    assert quantize_nvfp4(x, values=False).values is None


def test_operator_is_well_defined() -> None:
    x = data(16, 32, torch.float32)
    draw = (position(1, 2, 0), None, runs([0, 64]), 3, 16, 4, -1, None, None, True, True)
    torch.library.opcheck(
        torch.ops.megafp4.quantize_nvfp4.default, (x, 1, False, "stochastic", 1.0, *draw)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 1}, "multiple of 16"),
        ({"axis": 0, "tile": True}, "number of lines"),
        ({"axis": 0, "hadamard": 32}, "hadamard is 32"),
        ({"axis": 0, "hadamard": 16}, "position"),
        ({"axis": 0, "rounding": "stochastic"}, "position"),
        ({"axis": 2}, "choose 0 or 1"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(torch.zeros(32, 24, device=DEVICE), **options)
