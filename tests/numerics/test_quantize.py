"""What holds for every format: shapes, axes, packing, odd input, and refusals in one sentence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import megafp4
from megafp4 import numerics
from megafp4.errors import ConfigError

NAMES = ("mxfp4", "nvfp4", "fp4-vector", "fp8-e4m3", "fp8-e5m2", "int8", "int4", "int3", "ternary")
BLOCK = {"mxfp4": 32, "nvfp4": 16}
PER_BYTE = {"fp8-e4m3": 1, "fp8-e5m2": 1, "int8": 1, "ternary": 4}
KEY = (1, 2, 3, "wgrad", "a")


def test_the_public_names() -> None:
    assert megafp4.formats() == NAMES
    assert megafp4.quantize is numerics.quantize
    for name in NAMES:
        fmt = numerics.get_format(name)
        assert fmt.name == name
        assert len(fmt.table) == 2**fmt.bits
        assert fmt.summary


@pytest.mark.parametrize("name", NAMES)
def test_tables_do_not_follow_a_default_device(name: str) -> None:
    """They are kept for the life of the process."""
    known = numerics.get_format(name)
    fresh = dataclasses.replace(known, element=dataclasses.replace(known.element))
    with torch.device("meta"):
        assert fresh.table.device.type == "cpu"
        if isinstance(fresh.element, numerics.Minifloat):
            assert fresh.element.max_code == known.element.max_code
    torch.testing.assert_close(fresh.table, known.table, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_tables_hold_every_code_once(name: str) -> None:
    fmt = numerics.get_format(name)
    finite = fmt.table[fmt.table.isfinite()]
    assert finite.abs().max() >= fmt.max_value
    distinct = len(finite.unique())
    has_signed_zero = bool((finite[finite == 0].signbit()).any())
    assert distinct == len(finite) - has_signed_zero


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shapes_and_dtypes(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(2, 48, 64, generator=generator).to(dtype)
    q = numerics.quantize(x, name)
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == q.shape == x.shape
    assert q.axis == 2
    assert q.format.name == name
    expected = {
        "block": (2, 48, 64 // BLOCK.get(name, 1)), "vector": (2, 48, 1), "tensor": (1, 1, 1)
    }[q.scaling]  # fmt: skip
    assert q.scales.shape == expected
    assert q.scales.dtype == (torch.uint8 if name in BLOCK else torch.float32)
    assert (q.tensor_scale is not None) == (name == "nvfp4")
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.codes, numerics.quantize(x.float(), name).codes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
def test_any_axis_of_any_layout(
    name: str, rounding: numerics.Rounding, generator: torch.Generator
) -> None:
    x = torch.randn(64, 32, 96, generator=generator)
    for axis in (0, 1, 2, -1, -2, -3):
        q = numerics.quantize(x, name, axis, rounding, KEY)
        moved = x.movedim(axis, -1)
        for view in (moved, moved.contiguous()):
            last = numerics.quantize(view, name, -1, rounding, KEY)
            assert torch.equal(q.codes.movedim(axis, -1), last.codes)
            assert torch.equal(q.scales.movedim(axis, -1), last.scales)
            assert torch.equal(q.dequantize().movedim(axis, -1), last.dequantize())
        assert torch.equal(q.pack().movedim(axis, -1), last.pack())


@pytest.mark.parametrize("name", NAMES)
def test_one_dim_and_input_left_alone(name: str, generator: torch.Generator) -> None:
    x = torch.randn(64, generator=generator)
    copy = x.clone()
    q = numerics.quantize(x, name, rounding="stochastic", key=KEY)
    assert torch.equal(x, copy)
    assert torch.equal(
        q.codes, numerics.quantize(x[None], name, rounding="stochastic", key=KEY).codes[0]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (2, 0, 64), (0,)])
@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
def test_empty_tensors(name: str, shape: tuple[int, ...], rounding: numerics.Rounding) -> None:
    q = numerics.quantize(torch.zeros(shape), name, rounding=rounding, key=KEY)
    assert q.codes.shape == q.dequantize().shape == shape
    packed = q.pack()
    assert packed.numel() == 0
    assert numerics.unpack(packed, name).shape == shape


@pytest.mark.parametrize("scaling", ["block", "tile"])
def test_empty_nvfp4(scaling: numerics.Scaling) -> None:
    q = numerics.quantize(torch.zeros(16, 0), "nvfp4", scaling=scaling)
    assert q.dequantize().shape == (16, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_packing_round_trip(name: str, axis: int, generator: torch.Generator) -> None:
    q = numerics.quantize(torch.randn(32, 64, 32, generator=generator), name, axis)
    packed = q.pack()
    expected = list(q.shape)
    expected[axis] //= PER_BYTE.get(name, 2)
    assert list(packed.shape) == expected
    assert packed.dtype == torch.uint8
    assert torch.equal(numerics.unpack(packed, name, axis), q.codes)


def test_nibble_order() -> None:
    values = torch.tensor([[0.5, 1.0, -1.5, 6.0] * 8])
    q = numerics.quantize(values, "mxfp4")
    assert q.codes[0, :4].tolist() == [1, 2, 11, 7]
    assert q.pack()[0, :2].tolist() == [0x21, 0x7B]  # even index in the low nibble
    int4 = numerics.encode(
        torch.tensor([[-1.0, 7.0, -8.0, 3.0]]), "int4", torch.ones(1, 1), scaling="tensor"
    )
    assert int4.pack().tolist() == [[0x7F, 0x38]]
    int3 = numerics.encode(
        torch.tensor([[-1.0, 3.0, -4.0, 1.0]]), "int3", torch.ones(1, 1), scaling="tensor"
    )
    assert int3.pack().tolist() == [[0x37, 0x14]]
    ternary = numerics.encode(
        torch.tensor([[1.0, 0.0, -1.0, 1.0]]), "ternary", torch.ones(1, 1), scaling="tensor"
    )
    assert ternary.pack().tolist() == [[0b01_11_00_01]]


def test_an_odd_length_cannot_be_packed(generator: torch.Generator) -> None:
    q = numerics.quantize(torch.randn(3, 5, generator=generator), "fp4-vector")
    with pytest.raises(ConfigError, match="multiple of 2"):
        q.pack()


@pytest.mark.parametrize("name", NAMES)
def test_amax_scales_encode_equal_quantize(name: str, generator: torch.Generator) -> None:
    x = torch.randn(64, 64, generator=generator)
    stat = numerics.amax(x, name)
    scales, tensor_scale = numerics.scales_from_amax(stat, name)
    q = numerics.encode(x, name, scales, tensor_scale=tensor_scale)
    whole = numerics.quantize(x, name)
    assert torch.equal(q.codes, whole.codes)
    assert torch.equal(q.scales, whole.scales)


@pytest.mark.parametrize("name", ["fp4-vector", "int8", "fp8-e4m3"])
def test_shards_of_the_contraction_axis_agree_once_amax_is_reduced(
    name: str, generator: torch.Generator
) -> None:
    x = torch.randn(16, 64, generator=generator)
    whole = numerics.quantize(x, name, scaling="vector")
    shards = x.chunk(2, dim=1)
    stats = [numerics.amax(s, name, scaling="vector") for s in shards]
    scales, _ = numerics.scales_from_amax(torch.maximum(*stats), name)
    codes = [numerics.encode(s, name, scales, scaling="vector").codes for s in shards]
    assert torch.equal(torch.cat(codes, dim=1), whole.codes)


@pytest.mark.parametrize("rounding", ["nearest-even", "stochastic"])
def test_mxfp4_column_shards_equal_the_whole(
    rounding: numerics.Rounding, generator: torch.Generator
) -> None:
    x = torch.randn(8, 128, generator=generator)
    whole = numerics.quantize(x, "mxfp4", -1, rounding, KEY).codes
    parts = [
        numerics.quantize(s, "mxfp4", -1, rounding, KEY, origin=(0, 64 * i)).codes
        for i, s in enumerate(x.chunk(2, dim=1))
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@given(
    rows=st.integers(0, 5),
    blocks=st.integers(0, 3),
    name=st.sampled_from(NAMES),
    rounding=st.sampled_from(["nearest-even", "nearest-away", "nearest-up", "stochastic"]),
    octave=st.integers(-40, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_quantizing_twice_changes_nothing(
    rows: int, blocks: int, name: str, rounding: numerics.Rounding, octave: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    x = torch.randn(rows, 32 * blocks, generator=generator) * 2.0**octave
    key = (seed, 1, 2, "fprop", "a")
    q = numerics.quantize(x, name, rounding=rounding, key=key)
    decoded = q.dequantize()
    again = numerics.encode(
        decoded, name, q.scales, rounding="nearest-even", tensor_scale=q.tensor_scale
    )
    assert torch.equal(again.dequantize(), decoded)
    assert ((decoded == 0) | (decoded.sign() == x.sign())).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_recorded_for_autograd(name: str, generator: torch.Generator) -> None:
    x = torch.randn(4, 32, generator=generator, requires_grad=True)
    q = numerics.quantize(x, name)
    assert not q.scales.requires_grad
    assert not q.dequantize().requires_grad


def test_huge_values_stay_finite() -> None:
    x = torch.full((2, 32), torch.finfo(torch.bfloat16).max)
    x[1] *= -1
    for name in NAMES:
        decoded = numerics.quantize(x, name).dequantize()
        assert decoded.isfinite().all()
        assert torch.equal(decoded.sign(), x.sign())


BAD_CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "misspelt format": (
        lambda: numerics.quantize(torch.zeros(1, 32), "mxpf4"),
        "did you mean 'mxfp4'",
    ),
    "length": (lambda: numerics.quantize(torch.zeros(2, 48), "mxfp4"), "not divisible.*32"),
    "nvfp4 length": (lambda: numerics.quantize(torch.zeros(2, 24), "nvfp4"), "not divisible.*16"),
    "tile rows": (
        lambda: numerics.quantize(torch.zeros(8, 32), "nvfp4", scaling="tile"),
        "not divisible.*16",
    ),
    "tile in 1-D": (
        lambda: numerics.quantize(torch.zeros(32), "nvfp4", scaling="tile"),
        "2 dims",
    ),
    "length along axis 0": (
        lambda: numerics.quantize(torch.zeros(48, 32), "mxfp4", axis=0),
        "dim 0.*not divisible",
    ),
    "no key": (
        lambda: numerics.quantize(torch.zeros(1, 32), "mxfp4", rounding="stochastic"),
        "needs key",
    ),
    "scaling": (
        lambda: numerics.quantize(torch.zeros(1, 32), "mxfp4", scaling="vector"),
        "'mxfp4' has no 'vector' scaling",
    ),
    "rounding": (
        lambda: numerics.quantize(torch.zeros(1, 32), "mxfp4", rounding="nearest"),  # type: ignore[arg-type]
        "unknown rounding 'nearest'",
    ),
    "statistic": (
        lambda: numerics.quantize(torch.zeros(1, 32), "int8", statistic="median"),  # type: ignore[arg-type]
        "unknown statistic 'median'",
    ),
    "integers": (
        lambda: numerics.quantize(torch.zeros(1, 32, dtype=torch.int32), "mxfp4"),
        "floating-point",
    ),
    "axis": (lambda: numerics.quantize(torch.zeros(1, 32), "mxfp4", axis=2), "axis 2"),
    "0-dim": (lambda: numerics.quantize(torch.tensor(1.0), "int8"), "axis"),
    "dither": (
        lambda: numerics.quantize(
            torch.zeros(1, 32), "mxfp4", rounding="stochastic", key=KEY, dither_bits=4
        ),
        "dither_bits is 4",
    ),
    "short key": (
        lambda: numerics.quantize(torch.zeros(1, 32), "mxfp4", rounding="stochastic", key=(1, 2)),
        "key",
    ),
    "scales of another shape": (
        lambda: numerics.encode(
            torch.zeros(2, 64), "mxfp4", torch.zeros(2, 1, dtype=torch.uint8)
        ),
        r"scales have shape \(2, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_in_one_sentence(case: str) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


class DivisionsByNumbers(TorchDispatchMode):
    """Counts them: on CUDA they are products with a rounded reciprocal, a bit off the CPU's."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.count += not isinstance(args[1], torch.Tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_correctly_rounded_quotients_on_every_device(name: str) -> None:
    x = torch.linspace(-3, 5, 1024).view(8, 128)
    with DivisionsByNumbers() as divisions:
        numerics.quantize(x, name)
        assert divisions.count == 0
        assert (x / 3).any()
    assert divisions.count == 1
