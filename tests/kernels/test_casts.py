"""Casts equal ``numerics.encode``, bit for bit: every format, rounding, scaling and output."""

import pytest
import torch

from megafp4 import numerics
from megafp4.numerics import Key
from tests.kernels.triton_device import DEVICE, adversarial, gpu_only, position, runs

from megafp4_kernels import casts  # isort: skip

KEY = Key(0xDEADBEEF12345678, 77, 3, "dgrad", "b")
FIRST_TOKEN = 48
NEAREST = ("nearest-even", "nearest-away", "nearest-up")
ROUNDINGS = (*NEAREST, "stochastic")


def expected(
    x: torch.Tensor, fmt: str, scale: torch.Tensor, axis: int | None, contraction: int, **options
) -> torch.Tensor:
    """Return the specification's codes in the lay-out of the kernel, as bytes."""
    if axis is None:
        options |= {"scales": scale.view(1, 1), "scaling": "tensor", "axis": contraction}
    else:
        # One scale a line is the specification's name for one a row or column; only a random
        # draw depends on which of the two is contracted.
        scales = scale[:, None] if axis == 0 else scale[None, :]
        options |= {"scales": scales, "scaling": "vector", "axis": 1 - axis}
    q = numerics.encode(x, fmt, **options)
    codes = q.values().to(torch.float8_e4m3fn).view(torch.uint8) if fmt == "fp4-vector" else q.codes
    if fmt == "ternary":
        codes = q.values().to(torch.int8).view(torch.uint8)
    return codes if contraction == 1 else codes.T.contiguous()


def scales(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Return scales that leave some values beyond the largest code and others subnormal."""
    count = 1 if axis is None else x.shape[axis]
    scale = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.01
    scale[::3] = 1.0  # so that the ties stay ties
    if count > 8:
        scale[4], scale[5], scale[7] = torch.nan, 2.0**-126, 1e30
    return scale.to(x.device)


def check(x: torch.Tensor, fmt: str, rounding: str, axis: int | None, prescale: float) -> None:
    scale = scales(x, axis)
    options = {"rounding": rounding, "prescale": prescale}
    if rounding == "stochastic":
        for contraction in (0, 1):
            if axis is not None and axis == contraction:
                continue
            origin = (FIRST_TOKEN, 0) if contraction == 1 else (0, FIRST_TOKEN)
            found = casts.cast(
                x, fmt, scale, row=contraction == 1, col=contraction == 0, scale_axis=axis,
                position=position(KEY.seed, KEY.step, FIRST_TOKEN), stream=KEY.stream, **options,
            )  # fmt: skip
            want = expected(x, fmt, scale, axis, contraction, key=KEY, origin=origin, **options)
            assert found[contraction] is None
            assert torch.equal(found[1 - contraction].view(torch.uint8), want)
        return
    row, col = casts.cast(x, fmt, scale, row=True, col=True, scale_axis=axis, **options)
    assert row.dtype == col.dtype == casts.DTYPES[fmt]
    assert torch.equal(row.view(torch.uint8), expected(x, fmt, scale, axis, 1, **options))
    assert torch.equal(col.view(torch.uint8), row.view(torch.uint8).T)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", casts.DTYPES)
def test_codes(fmt: str, rounding: str, axis: int | None) -> None:
    check(adversarial(70, 134, torch.bfloat16), fmt, rounding, axis, 1.0)
    check(adversarial(13, 30, torch.float32), fmt, rounding, axis, 0.75)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", casts.DTYPES)
def test_codes_of_large_matrices(fmt: str, rounding: str, axis: int | None) -> None:
    check(adversarial(1031, 4104, torch.bfloat16), fmt, rounding, axis, 1.0)
    check(adversarial(2048, 999, torch.float32), fmt, rounding, axis, 1.0)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("fmt", ["fp8-e4m3", "fp8-e5m2"])
def test_instructions_and_integer_arithmetic_agree(
    fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All FP32 numbers whose low 12 bits are zero, one or ones: 3 x 2^20."""
    high = torch.arange(1 << 20, device=DEVICE) << 12
    bits = torch.stack([high, high | 1, high | 0xFFF]).to(torch.int32)
    x, scale = bits.view(torch.float32), torch.ones(1, device=DEVICE)
    fast = casts.cast(x, fmt, scale)[0]
    monkeypatch.setattr(casts, "has_fp8_conversions", lambda device: False)
    assert torch.equal(fast.view(torch.uint8), casts.cast(x, fmt, scale)[0].view(torch.uint8))


def test_one_output_equals_both() -> None:
    x, scale = adversarial(70, 134, torch.bfloat16), torch.ones(1, device=DEVICE)
    both = casts.cast(x, "fp8-e5m2", scale, row=True, col=True)
    row, none = casts.cast(x, "fp8-e5m2", scale)
    assert none is None
    assert torch.equal(row.view(torch.uint8), both[0].view(torch.uint8))
    none, col = casts.cast(x, "fp8-e5m2", scale, row=False, col=True)
    assert none is None
    assert torch.equal(col.view(torch.uint8), both[1].view(torch.uint8))


@pytest.mark.parametrize("rounding", ["nearest-even", "nearest-up"])
def test_packed(rounding: str) -> None:
    x = adversarial(70, 134, torch.bfloat16)
    scale = scales(x, 0)
    row, col = casts.cast(
        x, "fp4-vector", scale, row=True, col=True, rounding=rounding, scale_axis=0, packed=True
    )
    q = numerics.encode(x, "fp4-vector", scale[:, None], 1, rounding)
    assert torch.equal(row, q.pack())
    codes = q.codes.T.reshape(134, 35, 2)
    assert torch.equal(col, codes[..., 0] | codes[..., 1] << 4)


def test_first_token_moves_the_draw_alone() -> None:
    x, scale = torch.randn(96, 64).to(DEVICE), torch.ones(1, device=DEVICE)
    options = {"rounding": "stochastic", "stream": KEY.stream}
    whole = casts.cast(x, "int8", scale, position=position(7, 1, 0), **options)[0]
    part = casts.cast(x[32:], "int8", scale, position=position(7, 1, 32), **options)[0]
    assert torch.equal(part, whole[32:])
    moved = casts.cast(x[32:], "int8", scale, position=position(7, 1, 0), **options)[0]
    assert not torch.equal(moved, part)


@pytest.mark.parametrize("contraction", [0, 1])
def test_slices_draw_by_their_place_in_the_whole(contraction: int) -> None:
    whole, scale = torch.randn(96, 160).to(DEVICE), torch.ones(1, device=DEVICE)
    options = {
        "row": contraction == 1, "col": contraction == 0, "rounding": "stochastic",
        "stream": KEY.stream,
    }  # fmt: skip

    def codes(x: torch.Tensor, first_row: int, first_col: int, **more) -> torch.Tensor:
        where = position(7, 1, 32 + first_row, first_col)
        found = casts.cast(x.contiguous(), "int8", scale, position=where, **options, **more)
        return found[0] if contraction == 1 else found[1].T

    expected = codes(whole, 0, 0)
    assert torch.equal(codes(whole[48:, 112:], 48, 112), expected[48:, 112:])
    rows = [*range(16, 48), *range(64, 80)]
    some = codes(whole[rows], 0, 0, row_runs=runs([16, 32, 64]))
    assert torch.equal(some, expected[rows])
    assert not torch.equal(codes(whole[rows], 16, 0), expected[rows])
    cols = [*range(32), *range(96, 144)]
    some = codes(whole[:, cols], 0, 0, col_runs=runs([0, 16, 96, 112, 128]))
    assert torch.equal(some, expected[:, cols])


def test_operator_is_well_defined() -> None:
    x, scale = torch.randn(24, 48, device=DEVICE), torch.ones(1, device=DEVICE)
    draw = (position(1, 2, 0), runs([0, 32]), None, 3, -1, False)
    operator = torch.ops.megafp4.cast.default
    torch.library.opcheck(operator, (x, "int8", scale, True, True, "nearest-even", 1.0, *draw))
    torch.library.opcheck(operator, (x, "int8", scale, False, True, "stochastic", 1.0, *draw))


def test_empty() -> None:
    x, scale = torch.zeros(0, 8, device=DEVICE), torch.ones(1, device=DEVICE)
    row, col = casts.cast(x, "fp8-e4m3", scale, row=True, col=True)
    assert (row.shape, col.shape) == ((0, 8), (8, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmt": "fp6"}, "format is 'fp6'"),
        ({"row": False}, "at least one output"),
        ({"col": True, "rounding": "stochastic"}, "stochastic one alone"),
        ({"rounding": "stochastic"}, "give int64"),
        ({"rounding": "floor"}, "choose one of nearest-even"),
        ({"position": position(1, 2, 0)[:3]}, r"position is torch\.int64 \[3\]"),
        ({"row_runs": runs([0] * 16)}, r"row_runs is torch\.int32 \[16\]"),
        ({"scale_axis": 0}, r"give float32 \[6\]"),
        ({"packed": True}, "pack fp4-vector"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    arguments = {"fmt": "fp8-e4m3", "scale": torch.ones(1, device=DEVICE), **options}
    with pytest.raises(ValueError, match=message):
        casts.cast(torch.zeros(6, 5, device=DEVICE), **arguments)
