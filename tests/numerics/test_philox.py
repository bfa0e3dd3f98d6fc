"""Philox4x32-10 against Random123's published answers, and dithers against their written layout."""

import random

import numpy as np
import pytest
import torch

from megafp4 import numerics
from megafp4.errors import ConfigError
from megafp4.numerics import Key
from tests.numerics import oracle

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert oracle.philox4x32(counter, key) == answer
    assert tuple(int(word) for word in numerics.philox4x32(counter, key)) == answer
    tensors = tuple(torch.tensor([c, 0]) for c in counter)
    assert tuple(int(word[0]) for word in numerics.philox4x32(tensors, key)) == answer


def test_random_inputs_against_plain_python() -> None:
    source = random.Random(7)
    counters = [[source.getrandbits(32) for _ in range(4)] for _ in range(500)]
    columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    key = (source.getrandbits(32), source.getrandbits(32))
    words = torch.stack(numerics.philox4x32(columns, key), dim=1).tolist()
    expected = [list(oracle.philox4x32(tuple(counter), key)) for counter in counters]
    assert words == expected


def test_counter_words_broadcast() -> None:
    words = numerics.philox4x32((torch.arange(3)[:, None], torch.arange(2), 5, 6), (7, 8))
    assert all(word.shape == (3, 2) for word in words)
    assert tuple(int(w[2, 1]) for w in words) == oracle.philox4x32((2, 1, 5, 6), (7, 8))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_dither_follows_its_written_layout(bits: int) -> None:
    key = Key(0x1234_5678_9ABC_DEF0, 41, 1000, "wgrad", "b")
    got = numerics.dither(key, 5, 70, bits=bits).squeeze(-1).numpy()
    ids = (key.seed, key.step, key.layer, 2, 1)
    expected = oracle.dither((5, 70), ids, bits)
    np.testing.assert_array_equal(got, expected)  # exact: FP32 must hold every dither


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_dither_is_centred_uniform_and_inside_the_unit_interval(bits: int) -> None:
    u = numerics.dither(Key(3, 1, 4, "dgrad", "a"), 1 << 10, 1 << 10, bits=bits).double()
    assert 0.0 < u.min() < 0.002
    assert 0.998 < u.max() < 1.0
    standard_error = (1 / 12) ** 0.5 / 2**10
    assert abs(u.mean().item() - 0.5) < 4 * standard_error
    counts = torch.histc(u.float(), bins=256, min=0.0, max=1.0).double()
    chi_square = ((counts - 4096) ** 2 / 4096).sum().item()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("origin", [(0, 0), (7, 0), (0, 16), (3, 5), (2, 37)])
def test_dither_of_a_slice_is_a_slice_of_the_dither(bits: int, origin: tuple[int, int]) -> None:
    key = Key(9, 2, 0, "fprop", "a")
    whole = numerics.dither(key, 12, 100, bits=bits)
    line, k = origin
    part = numerics.dither(key, 4, 50, bits=bits, origin=origin)
    assert torch.equal(part, whole[line : line + 4, k : k + 50])


@pytest.mark.parametrize("bits", [8, 32])
def test_dither_of_runs_is_that_of_their_places(bits: int) -> None:
    key = Key(9, 2, 0, "fprop", "a")
    whole = numerics.dither(key, 12, 100, bits=bits)[..., 0]
    lines, k = ((9, 2), (1, 3)), ((64, 16), (3, 20))
    picked = whole[[9, 10, 1, 2, 3]][:, [*range(64, 80), *range(3, 23)]]
    rows = numerics.dither(key, 5, 36, bits=bits, origin=(lines, k))
    assert torch.equal(rows[..., 0], picked)
    columns = numerics.dither(key, 1, 36, inner=5, bits=bits, origin=(lines, k))
    assert torch.equal(columns[0], picked.t())


@pytest.mark.parametrize("origin", [(((0, 3),), 0), (0, ((0, 16), (32, 8)))])
def test_runs_that_do_not_fill_the_slice_are_refused(origin: numerics.Origin) -> None:
    with pytest.raises(ConfigError, match="runs that add up"):
        numerics.dither(Key(9, 2, 0, "fprop", "a"), 4, 32, origin=origin)


def test_dither_lines_count_over_all_other_dims() -> None:
    key = Key(9, 2, 0, "fprop", "a")
    flat = numerics.dither(key, 12, 40).view(3, 4, 40)
    inner = numerics.dither(key, 3, 40, inner=4)
    assert torch.equal(inner, flat.transpose(1, 2))


def test_every_field_of_the_key_gives_another_stream() -> None:
    base = Key(5, 10, 20, "dgrad", "a")
    others = [
        base._replace(seed=6), base._replace(seed=5 + (1 << 32)), base._replace(step=11),
        base._replace(layer=21), base._replace(gemm="wgrad"), base._replace(operand="b"),
        base._replace(operand="signs"), base._replace(gemm="fprop"), base._replace(gemm="update"),
    ]  # fmt: skip
    streams = [numerics.dither(key, 64, 1024).flatten().double() for key in [base, *others]]
    table = torch.corrcoef(torch.stack(streams))
    off_diagonal = table - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 5 / 2**8  # five standard errors of 2^16 draws
    assert torch.equal(streams[0], numerics.dither(base, 64, 1024).flatten().double())


def test_neighbouring_draws_are_independent() -> None:
    u = numerics.dither(Key(5, 10, 20, "dgrad", "a"), 512, 512).squeeze(-1).double() - 0.5
    for lag in (1, 2, 4, 15, 16, 17, 32, 64):
        for first, second in ((u[:, lag:], u[:, :-lag]), (u[lag:], u[:-lag])):
            correlation = (first * second).mean().item() * 12
            assert abs(correlation) < 5 / first.numel() ** 0.5


def test_names_and_ids_are_the_same_key() -> None:
    named = numerics.dither(Key(1, 2, 3, "wgrad", "b"), 2, 32)
    assert torch.equal(named, numerics.dither(Key(1, 2, 3, 2, 1), 2, 32))


@pytest.mark.parametrize(
    "key",
    [
        Key(1, 0, 0, "forward", "a"),
        Key(1, 0, 0, "fprop", "c"),
        Key(1, 0, 0, 16, "a"),
        Key(1, 0, 0, "fprop", -1),
        Key(1, 1 << 32, 0, "fprop", "a"),
        Key(1, -1, 0, "fprop", "a"),
        Key(1, 0, 1 << 24, "fprop", "a"),
        Key(1, 0, -1, "fprop", "a"),
    ],
)
def test_keys_that_could_collide_are_refused(key: Key) -> None:
    with pytest.raises(ConfigError, match="random key"):
        numerics.dither(key, 1, 16)


def test_unknown_dither_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="dither_bits is 12"):
        numerics.dither(Key(1, 0, 0, "fprop", "a"), 1, 16, bits=12)
