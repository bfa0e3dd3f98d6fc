"""Batches depend on the seed and the samples consumed, and on nothing else."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from megafp4.config import DataConfig
from megafp4.data.gpt_dataset import GPTDataset
from megafp4.data.indexed import IndexedDataset
from megafp4.data.loader import BatchSource, build_datasets
from megafp4.data.preprocess import preprocess
from megafp4.errors import ConfigError, DataError
from tests.data.pairs import numbered, write_pair


def build(settings, **options):
    defaults = {"seq_len": 4, "train_samples": 20, "valid_samples": 5, "seed": 1, "vocab_size": 257}
    return build_datasets(settings, **{**defaults, **options})


@pytest.fixture
def data(tmp_path):
    for name, lengths in (("a", [7, 0, 30, 5, 20]), ("b", [40, 3, 11, 2])):
        write_pair(tmp_path / name, numbered(lengths))
    return tmp_path


def settings(data, *train, **options):
    return DataConfig(train=train, split="60,40", cache=str(data / "cache"), **options)


def test_targets_follow_tokens(data):
    train, _ = build(settings(data, str(data / "a")))
    tokens, targets = train.batch(0, 20)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (20, 4)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert targets.is_contiguous()
    samples = np.stack([train.dataset[index] for index in range(20)])
    np.testing.assert_array_equal(np.concatenate([tokens[:, :1], targets], axis=1), samples)


@given(
    micro=st.sampled_from([1, 2, 3, 4, 6, 12]),
    dp_size=st.sampled_from([1, 2, 3, 4]),
    consumed=st.integers(0, 7),
)
def test_cuts_do_not_change_the_order(tmp_path_factory, micro, dp_size, consumed):
    folder = tmp_path_factory.mktemp("loader")
    pair = write_pair(folder / "x", numbered([9, 30, 4]))
    source = BatchSource(GPTDataset(pair, seq_len=3, num_samples=7 + 48))
    whole = source.batch(consumed, 48)
    step = micro * dp_size
    parts = [
        source.batch(consumed + first, micro, rank, dp_size)
        for first in range(0, 48 - step + 1, step)
        for rank in range(dp_size)
    ]
    for cut, uncut in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(cut), uncut[: len(parts) * micro])


def test_resume_gives_the_same_batches(data):
    blend = settings(data, f"0.7 {data / 'a'} 0.3 {data / 'b'}")
    first, _ = build(blend)
    before = [first.batch(consumed, 4) for consumed in range(0, 20, 4)]
    again, _ = build(blend)
    for number in (3, 1, 4):
        tokens, targets = again.batch(4 * number, 4)
        assert torch.equal(tokens, before[number][0])
        assert torch.equal(targets, before[number][1])


def test_seeds_differ(data):
    one, two = (build(settings(data, str(data / "a")), seed=seed)[0] for seed in (1, 2))
    assert not torch.equal(one.batch(0, 20)[0], two.batch(0, 20)[0])


def test_split_keeps_documents_apart(data):
    """Documents 0 to 2 of 5 train (tokens 0 to 36), 3 and 4 validate (37 to 61)."""
    train, valid = build(settings(data, str(data / "a")), train_samples=50, valid_samples=30)
    assert train.batch(0, 50)[0].max() <= 36
    assert valid.batch(0, 30)[0].min() >= 37


def test_separate_validation_files_are_used_whole(data):
    config = settings(data, str(data / "a"), valid=(str(data / "b"),))
    train, valid = build(config, train_samples=200, valid_samples=200)
    for source, tokens in ((train, 62), (valid, 56)):
        batch = source.batch(0, 200)
        assert set(torch.cat(batch).flatten().tolist()) == set(range(tokens))


def test_no_validation(data):
    assert build(settings(data, str(data / "a")), valid_samples=0)[1] is None
    config = DataConfig(train=(str(data / "a"),), split="1", cache=str(data / "cache"))
    with pytest.raises(DataError, match="leaves nothing for the valid data"):
        build(config)


def test_blend_proportions(data):
    write_pair(data / "high", [[200 + number for number in range(50)]] * 2)
    train, _ = build(
        settings(data, f"3 {data / 'a'} 1 {data / 'high'}"), train_samples=400, valid_samples=0
    )
    tokens = train.batch(0, 400)[0]
    assert int((tokens[:, 0] >= 200).sum()) == 100


def test_padding_of_a_partial_sample(tmp_path):
    pair = write_pair(tmp_path / "x", numbered([6]))
    source = BatchSource(GPTDataset(pair, seq_len=4, keep_partial=True))
    rows = sorted(zip(*(part.tolist() for part in source.batch(0, 2)), strict=True))
    assert rows == [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 0, 0], [5, -1, -1, -1])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "batch of 0"),
        ((-1, 1), "after -1 samples"),
        ((0, 1, 1, 1), "rank 1 of 1"),
        ((0, 1, -1, 2), "rank -1 of 2"),
        ((20, 9), "the train data holds 22 samples of 4 tokens but sample 28 was asked"),
    ],
)
def test_impossible_batches(data, arguments, message):
    source = BatchSource(
        GPTDataset(write_pair(data / "c", numbered([89])), seq_len=4, cache=data), "train"
    )
    with pytest.raises(DataError, match=message):
        source.batch(*arguments)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (
            256,
            "model.vocab_size 256 is smaller than the 257 ids of tokenizer 'bytes': choose 257 to",
        ),
        (1025, "model.vocab_size 1025 is larger than the 257 ids of tokenizer 'bytes'"),
        (50304, "model.vocab_size 50304 is larger than the 257 ids"),
    ],
)
def test_model_vocabulary_must_fit_the_tokenizer(data, vocab_size, message):
    with pytest.raises(DataError, match=message):
        build(settings(data, str(data / "a")), vocab_size=vocab_size)


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("bytes", 1024), ("gpt2", 50304)])
def test_padded_vocabularies_are_accepted(data, tokenizer, vocab_size):
    train, _ = build(settings(data, str(data / "a"), tokenizer=tokenizer), vocab_size=vocab_size)
    assert train.batch(0, 2)[0].max() < vocab_size


@pytest.mark.parametrize(
    ("token", "dtype"), [(257, "uint16"), (50256, "uint16"), (-1, "int32"), (2**40, "int64")]
)
def test_tokens_of_another_vocabulary(data, token, dtype):
    write_pair(data / "foreign", [[1, 2, 3] * 9, [4, token] * 9], dtype)
    for _ in range(2):  # scanned, then remembered
        with pytest.raises(DataError, match=f"holds token id {token}, outside the vocabulary"):
            build(settings(data, str(data / "foreign")))
    write_pair(data / "foreign", [[1, 2, 3] * 9, [4, 5, 6, 7] * 9], dtype)
    build(settings(data, str(data / "foreign")))


def test_files_are_opened_and_checked_once(data, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "megafp4.data.loader.IndexedDataset",
        lambda prefix: opened.append(prefix) or IndexedDataset(prefix),
    )
    build(settings(data, str(data / "a"), str(data / "b")))
    assert sorted(opened) == [str(data / "a"), str(data / "b")]


def test_the_tokenizer_of_the_file_must_be_the_configured_one(data):
    (data / "t.txt").write_text("some text " * 50)
    preprocess([data / "t.txt"], data / "t", separator=" ", progress=False)
    build(settings(data, str(data / "t")))
    with pytest.raises(DataError, match="was tokenized with 'bytes', not with 'gpt2'"):
        build(settings(data, str(data / "t"), tokenizer="gpt2"), vocab_size=50257)


def test_a_stale_sidecar_is_noticed(data):
    (data / "t.txt").write_text("some text " * 50)
    preprocess([data / "t.txt"], data / "t", progress=False)
    write_pair(data / "t", numbered([9, 9]))
    with pytest.raises(DataError, match=r"t.meta.json describes 1002 bytes .* holds 36"):
        build(settings(data, str(data / "t")))
    (data / "t.meta.json").write_text("{}")
    with pytest.raises(DataError, match=r"t.meta.json has the fields .*delete it"):
        build(settings(data, str(data / "t")))


def test_bad_settings(data):
    with pytest.raises(DataError, match=r"data.train names no files"):
        build(DataConfig())
    with pytest.raises(ConfigError, match="unknown tokenizer 'byte'"):
        build(settings(data, str(data / "a"), tokenizer="byte"))
    with pytest.raises(DataError, match=r"cannot read .*missing.idx"):
        build(settings(data, str(data / "missing")))
    with pytest.raises(DataError, match="cannot read the data blend"):
        build(settings(data, "0.5"))
