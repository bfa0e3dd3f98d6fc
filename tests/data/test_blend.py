"""Reading a blend, and the greedy rule against a literal loop."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from megafp4.data.blend import BlendedDataset, build_blend, normalize, parse_blend
from megafp4.data.gpt_dataset import GPTDataset
from megafp4.errors import DataError
from tests.data.pairs import write_pair


@pytest.mark.parametrize(
    ("entries", "prefixes", "weights"),
    [
        (["a"], ("a",), None),
        (["a", "b"], ("a", "b"), None),
        (["a b"], ("a", "b"), None),
        (["0.7 a 0.3 b"], ("a", "b"), (0.7, 0.3)),
        (["0.7 a", "0.3 b"], ("a", "b"), (0.7, 0.3)),
        (["7", "a", "3", "b"], ("a", "b"), (7.0, 3.0)),
        (["1 'my data/a' 1e-3 \"b c\""], ("my data/a", "b c"), (1.0, 0.001)),
        ([r"C:\data\a"], (r"C:\data\a",), None),
        (["./5", "#b"], ("./5", "#b"), None),
        (["0.5 a"], ("a",), (0.5,)),
    ],
)
def test_parse(entries, prefixes, weights):
    assert parse_blend(entries) == (prefixes, weights)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "give prefixes"),
        ([""], "give prefixes"),
        (["0.7"], "give prefixes"),
        (["0.7 a b"], "give prefixes"),
        (["a 0.3 b"], "give prefixes"),
        (["a 0.3"], "give prefixes"),
        (["0.7 0.3 a"], "give prefixes"),
        (["0 a 1 b"], "positive finite"),
        (["-1 a 2 b"], "positive finite"),
        (["nan a 1 b"], "positive finite"),
        (["inf a 1 b"], "positive finite"),
        (["'a"], "a quote is not closed"),
    ],
)
def test_bad_blends(entries, message):
    with pytest.raises(DataError, match=message):
        parse_blend(entries)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), size=st.integers(0, 150))
def test_greedy_rule(weights, size):
    shares = normalize(weights)
    counts = [0] * len(weights)
    files, numbers = [], []
    for sample in range(size):
        behind = [
            share * max(sample, 1) - count for share, count in zip(shares, counts, strict=True)
        ]
        file = behind.index(max(behind))
        files.append(file)
        numbers.append(counts[file])
        counts[file] += 1
    blend = build_blend(shares, size)
    assert blend["dataset_index"].tolist() == files
    assert blend["dataset_sample_index"].tolist() == numbers


def test_known_order():
    """Worked by hand for 0.5, 0.3, 0.2."""
    found = build_blend(np.array([0.5, 0.3, 0.2]), 6)["dataset_index"]
    assert found.tolist() == [0, 1, 2, 0, 1, 0]


def open_files(folder, lengths, seq_len=2):
    indexed = [
        write_pair(folder / f"file{number}", [[number] * length])
        for number, length in enumerate(lengths)
    ]
    asked = []

    def prepare(file, num_samples):
        asked.append((file, num_samples))
        return GPTDataset(indexed[file], seq_len=seq_len, num_samples=num_samples, cache=folder)

    return prepare, [dataset.prefix for dataset in indexed], asked


def test_proportions_and_requests(tmp_path):
    prepare, prefixes, asked = open_files(tmp_path, [2001, 21])
    blend = BlendedDataset(prepare, prefixes, [3, 1], 1000, cache=tmp_path)
    drawn = [int(blend[index][0]) for index in range(len(blend))]
    assert (drawn.count(0), drawn.count(1)) == (750, 250)
    assert asked == [(0, 754), (1, 252)]  # ceil(750 * 1.005), ceil(250 * 1.005)
    assert len(blend.datasets[1]) >= 252  # the short file is repeated


@pytest.mark.parametrize("weights", [[1e-6, 1.0, 1e-6], [1.0, 1e-9], [1.0] * 7, [0.999, 0.001]])
@pytest.mark.parametrize("size", [1, 2, 13])
def test_extreme_weights_never_run_out(tmp_path, weights, size):
    prepare, prefixes, _ = open_files(tmp_path, [9] * len(weights))
    blend = BlendedDataset(prepare, prefixes, weights, size, cache=tmp_path)
    assert len(blend) >= size
    assert [blend[index].shape for index in range(len(blend))] == [(3,)] * len(blend)


def test_without_weights_files_count_by_size(tmp_path):
    prepare, prefixes, asked = open_files(tmp_path, [61, 21])
    blend = BlendedDataset(prepare, prefixes, None, None, cache=tmp_path)
    drawn = [int(blend[index][0]) for index in range(len(blend))]
    assert (len(blend), drawn.count(0), drawn.count(1)) == (40, 30, 10)
    assert asked[:2] == [(0, None), (1, None)]


def test_without_weights_more_than_an_epoch(tmp_path):
    prepare, prefixes, _ = open_files(tmp_path, [61, 21])
    blend = BlendedDataset(prepare, prefixes, None, 100, cache=tmp_path)
    drawn = [int(blend[index][0]) for index in range(100)]
    assert (len(blend), drawn.count(0), drawn.count(1)) == (100, 75, 25)


def test_the_blend_is_cached(tmp_path):
    prepare, prefixes, _ = open_files(tmp_path, [61, 21])
    first = BlendedDataset(prepare, prefixes, [2, 1], 30, cache=tmp_path)
    path = next(tmp_path.glob("*-BlendedDataset-train-dataset_index.npy"))
    np.save(path, np.zeros(30, np.int16))
    again = BlendedDataset(prepare, prefixes, [2, 1], 30, cache=tmp_path)
    assert first.dataset_index.any()
    assert not again.dataset_index.any()


def test_errors(tmp_path):
    prepare, prefixes, _ = open_files(tmp_path, [61, 2])
    with pytest.raises(DataError, match="2 files have 1 weights"):
        BlendedDataset(prepare, prefixes, [1.0], 10, cache=tmp_path)
    with pytest.raises(DataError, match="no natural end"):
        BlendedDataset(prepare, prefixes, [1.0, 2.0], None, cache=tmp_path)
    with pytest.raises(DataError, match="file1 holds less than one sample of 2 tokens"):
        BlendedDataset(prepare, prefixes, None, 10, cache=tmp_path)
    with pytest.raises(DataError, match="at most 32767"):
        BlendedDataset(prepare, ["x"] * 32768, None, 10, cache=tmp_path)
    blend = BlendedDataset(prepare, prefixes, [1.0, 1.0], 10, cache=tmp_path)
    with pytest.raises(DataError, match="sample 10 of a blend"):
        blend[10]
