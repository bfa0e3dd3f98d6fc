"""Document, sample and shuffle index against slow, literal readings of Megatron's rules."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from megafp4.data.gpt_dataset import (
    Epochs,
    GPTDataset,
    build_sample_index,
    build_shuffle_index,
    parse_split,
    shuffle_dtype,
    split_documents,
)
from megafp4.errors import DataError
from tests.data.pairs import numbered, walk_samples, write_pair

LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=20).filter(any)


def literal_indices(lengths, seq_len, num_samples, seed):
    """The three arrays, step by step with one RandomState."""
    tokens = sum(lengths)
    epochs = 1
    while epochs * tokens < num_samples * seq_len + 1:
        epochs += 1
    separate = False
    if epochs > 1:
        before = ((epochs - 1) * tokens - 1) // seq_len
        separate = num_samples - before < int(0.80 * ((tokens - 1) // seq_len))
    random = np.random.RandomState(seed)
    documents = np.arange(len(lengths), dtype=np.int32)
    if separate:
        first = np.concatenate([documents] * (epochs - 1))
        random.shuffle(first)
        last = documents.copy()
        random.shuffle(last)
        document_index = np.concatenate([first, last])
    else:
        document_index = np.concatenate([documents] * epochs)
        random.shuffle(document_index)
    samples = (epochs * tokens - 1) // seq_len
    sample_index = walk_samples(lengths, document_index, seq_len, samples)
    if separate:
        head, tail = np.arange(before, dtype=np.uint32), np.arange(before, samples, dtype=np.uint32)
        random.shuffle(head)
        random.shuffle(tail)
        shuffle_index = np.concatenate([head, tail])
    else:
        shuffle_index = np.arange(samples, dtype=np.uint32)
        random.shuffle(shuffle_index)
    return document_index, sample_index, shuffle_index


@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 30),
    num_samples=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_indices_equal_the_literal_rules(tmp_path_factory, lengths, seq_len, num_samples, seed):
    folder = tmp_path_factory.mktemp("gpt")
    indexed = write_pair(folder / "x", numbered(lengths))
    dataset = GPTDataset(indexed, seq_len=seq_len, num_samples=num_samples, seed=seed)
    expected = literal_indices(lengths, seq_len, num_samples, seed)
    found = dataset.document_index, dataset.sample_index, dataset.shuffle_index
    for array, literal in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, literal)
    assert [array.dtype for array in found] == [np.int32, np.int32, np.uint32]
    assert len(dataset) >= num_samples


def test_shuffles_are_numpy_legacy_and_pinned():
    """RandomState's stream is frozen by NumPy: these numbers must never change."""
    epochs = Epochs(1, 8, 0, False)
    found = build_shuffle_index(epochs, np.random.RandomState(1234))
    assert found.tolist() == [2, 1, 6, 0, 4, 5, 3, 7]


@given(
    lengths=LENGTHS,
    seq_len=st.integers(1, 30),
    num_samples=st.integers(1, 40) | st.none(),
    keep_partial=st.booleans(),
)
def test_every_token_of_every_epoch_is_a_target_once(
    tmp_path_factory, lengths, seq_len, num_samples, keep_partial
):
    """Inputs and targets cover the stream; only its tail may be missing, and nothing if kept."""
    folder = tmp_path_factory.mktemp("gpt")
    dataset = GPTDataset(
        write_pair(folder / "x", numbered(lengths)),
        seq_len=seq_len,
        num_samples=num_samples,
        keep_partial=keep_partial,
    )
    inverse = np.argsort(dataset.shuffle_index)
    samples = [dataset[int(index)] for index in inverse]
    starts = np.cumsum([0, *lengths[:-1]])
    stream = np.concatenate(
        [np.arange(starts[d], starts[d] + lengths[d]) for d in dataset.document_index]
    )
    assert len(stream) == dataset.epochs.count * sum(lengths)
    assert Counter(stream.tolist()) == dict.fromkeys(range(sum(lengths)), dataset.epochs.count)
    for number, sample in enumerate(samples):
        expected = stream[number * seq_len : (number + 1) * seq_len + 1]
        assert sample[: len(expected)].tolist() == expected.tolist()
        assert (sample[len(expected) :] == -1).all()
        assert len(expected) == seq_len + 1 or (keep_partial and number == len(samples) - 1)
    left_out = len(stream) - 1 - len(samples) * seq_len
    assert left_out <= 0 if keep_partial else 0 <= left_out < seq_len


@pytest.mark.parametrize(
    ("tokens", "num_samples", "seq_len", "expected"),
    [
        (101, 10, 10, Epochs(1, 10, 0, False)),  # exactly one epoch
        (100, 10, 10, Epochs(2, 19, 9, True)),  # one token short; 1 of 9 samples used
        (101, 17, 10, Epochs(2, 20, 10, True)),  # 7 < int(0.8 * 10)
        (101, 18, 10, Epochs(2, 20, 10, False)),  # 8 is not
        (1000, None, 10, Epochs(1, 99, 0, False)),
        (5, None, 10, Epochs(1, 0, 0, False)),
        (1, 3, 4, Epochs(13, 3, 2, False)),
        (10**15, 2 * 10**12, 1000, Epochs(3, 2999999999999, 1999999999999, True)),
    ],
)
def test_epochs(tokens, num_samples, seq_len, expected):
    assert Epochs.plan(tokens, num_samples, seq_len) == expected


def test_huge_files_do_not_overflow():
    """Ten documents of 2^31 - 1 tokens: stream positions need 35 bits, offsets 31."""
    longest = 2**31 - 1
    lengths = np.full(10, longest, np.int32)
    document_index = np.arange(10, dtype=np.int32)
    seq_len = 2**24
    samples = (10 * longest - 1) // seq_len
    index = build_sample_index(lengths, document_index, seq_len, samples)
    for sample in (0, 1, 127, 128, samples // 2, samples):
        assert index[sample].tolist() == list(divmod(sample * seq_len, longest))


def test_many_samples_need_wider_numbers():
    assert shuffle_dtype(2**32 - 3) == np.uint32
    assert shuffle_dtype(2**32 - 2) == np.int64


def test_empty_documents_at_every_place(tmp_path):
    lengths = [0, 0, 5, 0, 7, 0, 0]
    order = np.arange(7, dtype=np.int32)
    index = build_sample_index(np.array(lengths, np.int32), order, 3, 3)
    np.testing.assert_array_equal(index, walk_samples(lengths, order, 3, 3))
    padded = build_sample_index(np.array(lengths, np.int32), order, 3, 4)
    assert padded[-1].tolist() == [4, 6]  # the last token, not the empty documents behind it


def test_cache_is_used_and_follows_the_content(tmp_path):
    cache = tmp_path / "cache"
    indexed = write_pair(tmp_path / "x", numbered([5, 9, 3]))
    options = {"seq_len": 4, "num_samples": 6, "cache": cache}
    first = GPTDataset(indexed, **options)
    names = sorted(path.name for path in cache.iterdir())
    assert [name.split("-", 1)[1] for name in names] == [
        "GPTDataset-train-description.txt",
        "GPTDataset-train-document_index.npy",
        "GPTDataset-train-sample_index.npy",
        "GPTDataset-train-shuffle_index.npy",
    ]
    shuffle = next(cache.glob("*shuffle_index.npy"))
    np.save(shuffle, np.load(shuffle)[::-1])
    again = GPTDataset(indexed, **options)
    np.testing.assert_array_equal(again.shuffle_index, first.shuffle_index[::-1])
    changed = GPTDataset(write_pair(tmp_path / "x", numbered([5, 3, 9])), **options)
    np.testing.assert_array_equal(changed.shuffle_index, first.shuffle_index)
    for option in ({"seq_len": 5}, {"num_samples": 7}, {"seed": 1}, {"name": "valid"}):
        GPTDataset(indexed, **{**options, **option})
    assert len(list(cache.glob("*description.txt"))) == 6


def test_default_cache_lies_beside_the_data(tmp_path):
    GPTDataset(write_pair(tmp_path / "x", numbered([9])), seq_len=2)
    assert len(list((tmp_path / "x" / "cache" / "GPTDataset_indices").glob("*.npy"))) == 3


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_damaged_cache(tmp_path, content):
    indexed = write_pair(tmp_path / "x", numbered([9, 9]))
    GPTDataset(indexed, seq_len=2, cache=tmp_path)
    next(tmp_path.glob("*sample_index.npy")).write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged .*delete it and it is built again"):
        GPTDataset(indexed, seq_len=2, cache=tmp_path)


def test_a_pickle_in_the_cache_is_refused(tmp_path):
    indexed = write_pair(tmp_path / "x", numbered([9, 9]))
    GPTDataset(indexed, seq_len=2, cache=tmp_path)
    path = next(tmp_path.glob("*shuffle_index.npy"))
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is damaged"):
        GPTDataset(indexed, seq_len=2, cache=tmp_path)


def test_cache_of_another_shape(tmp_path):
    indexed = write_pair(tmp_path / "x", numbered([9, 9]))
    GPTDataset(indexed, seq_len=2, cache=tmp_path)
    np.save(next(tmp_path.glob("*shuffle_index.npy")), np.arange(3))
    with pytest.raises(DataError, match=r"is int64 \[3\], not integers \[8\]"):
        GPTDataset(indexed, seq_len=2, cache=tmp_path)


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    indexed = write_pair(tmp_path / "x", numbered([9, 9]))
    with pytest.raises(DataError, match=r"set data.cache to a writable folder"):
        GPTDataset(indexed, seq_len=2, cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("949,50,1", [(0, 949), (949, 999), (999, 1000)]),
        ("1,1", [(0, 500), (500, 1000), None]),
        ("100", [(0, 1000), None, None]),
        ("0,0,2.5", [None, None, (0, 1000)]),
        ("1,1,1", [(0, 333), (333, 667), (667, 1000)]),
    ],
)
def test_split(split, expected):
    found = [
        None if bounds is None else (split_documents(1000, bounds)) for bounds in parse_split(split)
    ]
    assert found == [None if pair is None else range(*pair) for pair in expected]


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1", "1,,2"])
def test_bad_split(split):
    with pytest.raises(DataError, match="give up to three non-negative shares"):
        parse_split(split)


@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=3).filter(any), n=st.integers(0, 999)
)
def test_split_ranges_are_disjoint_and_cover(shares, n):
    bounds = [pair for pair in parse_split(",".join(map(repr, shares))) if pair is not None]
    ranges = [split_documents(n, pair) for pair in bounds]
    assert [number for part in ranges for number in part] == list(range(n))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "both must be positive"),
        ({"num_samples": 0}, "both must be positive"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"documents": range(1, 4)}, "are not of them"),
        ({"documents": range(0, 2, 2)}, "are not of them"),
        ({"documents": range(1, 1)}, "0 of 2 documents, holds no tokens"),
        ({"name": "training"}, "choose train, valid or test"),
    ],
)
def test_impossible_requests(tmp_path, options, message):
    indexed = write_pair(tmp_path / "x", numbered([9, 9]))
    with pytest.raises(DataError, match=message):
        GPTDataset(indexed, **{"seq_len": 2, "cache": tmp_path, **options})


def test_files_without_tokens(tmp_path):
    with pytest.raises(DataError, match="holds no tokens"):
        GPTDataset(write_pair(tmp_path / "x", [[], []]), seq_len=2)


@pytest.mark.parametrize("index", [-1, 8])
def test_samples_that_do_not_exist(tmp_path, index):
    dataset = GPTDataset(write_pair(tmp_path / "x", numbered([9, 8])), seq_len=2)
    with pytest.raises(DataError, match=f"sample {index} of .* only 8 were prepared"):
        dataset[index]
