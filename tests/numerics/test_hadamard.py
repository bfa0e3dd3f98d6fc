"""The blockwise random Hadamard transform: matrix, identity in the GEMM, order of its sums."""

import numpy as np
import pytest
import torch

from megafp4 import numerics
from megafp4.errors import ConfigError
from megafp4.numerics import Key
from tests import tolerances
from tests.numerics import oracle

KEY = Key(11, 3, 5, "wgrad", "signs")
SIZES = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("g", [1, 2, 4, *SIZES])
def test_the_transform_is_sylvesters_matrix(g: int) -> None:
    matrix = numerics.hadamard(torch.eye(g), g)
    assert matrix.dtype == torch.float32
    np.testing.assert_array_equal(matrix.numpy(), oracle.hadamard_matrix(g))


@pytest.mark.parametrize("g", SIZES)
def test_against_float64(g: int, generator: torch.Generator) -> None:
    x = torch.randn(7, 2 * 256, generator=generator)
    signs = numerics.hadamard_signs(KEY, g)
    matrix = np.diag(signs.double().numpy()) @ oracle.hadamard_matrix(g)
    expected = (x.double().numpy().reshape(7, -1, g) @ matrix).reshape(7, -1)
    got = numerics.hadamard(x, g, signs=signs).double().numpy()
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < tolerances.FP32_SUM


@pytest.mark.parametrize("g", SIZES)
def test_the_product_of_two_operands_is_kept(g: int, generator: torch.Generator) -> None:
    a = torch.randn(24, 512, generator=generator)
    b = torch.randn(40, 512, generator=generator)
    a[:, 3] *= 100.0
    signs = numerics.hadamard_signs(KEY, g)
    spread_a, spread_b = (numerics.hadamard(x, g, signs=signs).double() for x in (a, b))
    exact = a.double() @ b.double().T
    error = (spread_a @ spread_b.T / g - exact).norm() / exact.norm()
    assert error.item() < tolerances.FP32_SUM
    other = numerics.hadamard(b, g, signs=-signs.roll(1)).double()
    assert (spread_a @ other.T / g - exact).norm() / exact.norm() > 0.1  # signs must agree


def test_signs_are_fair_and_keyed() -> None:
    draws = torch.cat([numerics.hadamard_signs(KEY._replace(step=s), 256) for s in range(400)])
    assert set(draws.tolist()) == {-1.0, 1.0}
    assert abs(draws.mean().item()) < 4 / len(draws) ** 0.5
    assert torch.equal(numerics.hadamard_signs(KEY, 64), numerics.hadamard_signs(KEY, 64))
    for other in (KEY._replace(gemm="dgrad"), KEY._replace(layer=6), KEY._replace(seed=12)):
        assert not torch.equal(numerics.hadamard_signs(KEY, 64), numerics.hadamard_signs(other, 64))


def test_signs_follow_their_written_layout() -> None:
    words = [
        word
        for call in range(2)
        for word in oracle.philox4x32((call, 0, KEY.step, KEY.layer * 256 + 2 * 16 + 2), (11, 0))
    ]
    expected = [-1.0 if words[i // 32] >> (i % 32) & 1 else 1.0 for i in range(256)]
    assert numerics.hadamard_signs(KEY, 256).tolist() == expected


def test_signs_are_drawn_on_the_device_that_is_named() -> None:
    """On the CPU unless told otherwise, whatever torch's default device is."""
    expected = numerics.hadamard_signs(KEY, 64)
    with torch.device("meta"):
        assert torch.equal(numerics.hadamard_signs(KEY, 64), expected)
        assert torch.equal(numerics.hadamard_signs(KEY, 64, torch.device("cpu")), expected)
    assert numerics.hadamard_signs(KEY, 64, "meta").device.type == "meta"


@pytest.mark.parametrize("g", [16, 64])
def test_rows_do_not_change_when_split(g: int, generator: torch.Generator) -> None:
    x = torch.randn(1300, 256, generator=generator).bfloat16()
    signs = numerics.hadamard_signs(KEY, g)
    whole = numerics.hadamard(x, g, signs=signs)
    for cut in (1, 7, 128, 650, 1299):
        parts = [numerics.hadamard(p, g, signs=signs) for p in (x[:cut], x[cut:])]
        assert torch.equal(torch.cat(parts), whole)
    columns = [numerics.hadamard(p, g, signs=signs) for p in (x[:, :64], x[:, 64:])]
    assert torch.equal(torch.cat(columns, dim=1), whole)


def test_order_of_the_sums(generator: torch.Generator) -> None:
    # Pairs at distance 1, 2, 4, ... in FP32: written with numpy scalars, so nothing can reorder.
    x = torch.randn(3, 64, generator=generator)
    rows = x.numpy().copy()
    for row in rows:
        distance = 1
        while distance < 64:
            for i in range(64):
                if not i & distance:
                    low, high = row[i], row[i + distance]
                    row[i], row[i + distance] = low + high, low - high
            distance *= 2
    assert np.array_equal(numerics.hadamard(x, 64).numpy(), rows)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis_of_a_3d_tensor(axis: int, generator: torch.Generator) -> None:
    x = torch.randn(64, 96, 128, generator=generator)
    signs = numerics.hadamard_signs(KEY, 32)
    expected = numerics.hadamard(x.movedim(axis, -1).contiguous(), 32, signs=signs)
    assert torch.equal(numerics.hadamard(x, 32, axis=axis, signs=signs).movedim(axis, -1), expected)


def test_small_integers_in_bf16_are_summed_exactly(generator: torch.Generator) -> None:
    x = torch.randint(-128, 129, (16, 256), generator=generator).bfloat16()
    expected = x.double().numpy() @ oracle.hadamard_matrix(256)
    np.testing.assert_array_equal(numerics.hadamard(x, 256).numpy(), expected)


def test_a_lone_outlier_is_spread_over_its_chunk_only() -> None:
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    spread = numerics.hadamard(x, 64)
    assert not spread[0, :64].any()
    assert (spread[0, 64:].abs() == 8.0).all()


def test_input_is_left_alone_and_may_be_empty(generator: torch.Generator) -> None:
    x = torch.randn(4, 64, generator=generator)
    copy = x.clone()
    numerics.hadamard(x, 64, signs=numerics.hadamard_signs(KEY, 64))
    assert torch.equal(x, copy)
    assert numerics.hadamard(x[:0], 64).shape == (0, 64)
    assert numerics.hadamard(x[:, :0], 64).shape == (4, 0)


def test_non_contiguous_input(generator: torch.Generator) -> None:
    x = torch.randn(128, 6, generator=generator).T
    assert torch.equal(numerics.hadamard(x, 64), numerics.hadamard(x.contiguous(), 64))


@pytest.mark.parametrize("length", [96, 32, 65])
def test_a_block_that_does_not_divide_the_axis_is_refused(length: int) -> None:
    # 2 rows of 96 hold 3 blocks of 64: a flat reshape would mix rows without complaint.
    with pytest.raises(ConfigError, match=f"{length} is not divisible by the Hadamard block 64"):
        numerics.hadamard(torch.zeros(2, length), 64)


@pytest.mark.parametrize("g", [0, -4, 3, 48])
def test_a_block_that_is_no_power_of_two_is_refused(g: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        numerics.hadamard(torch.zeros(2, 96), g)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 64, 1), (2, 128)])
def test_the_input_is_left_alone(shape: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator)
    axis = shape.index(max(shape))
    before = x.clone()
    numerics.hadamard(x, 64, axis)
    assert torch.equal(x, before)
