"""The corpus that every machine has."""

import json

import numpy as np
import pytest

from megafp4.data import corpus
from megafp4.data.corpus import (
    Document,
    collect,
    divide,
    prepare,
    python_corpus,
    select,
    separate_docstrings,
    without_repeats,
)
from megafp4.data.indexed import IndexedDataset
from megafp4.data.tokenizer import ByteTokenizer
from megafp4.errors import DataError

LONG = "A sentence that is long enough to be kept as prose, because it has over eighty letters."


@pytest.fixture(scope="module")
def documents():
    """The corpus of every third file of the library: all of it takes seconds to parse."""
    everything = corpus._library_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_library_files", lambda library: list(everything(library))[::3])
        return collect()


@pytest.fixture
def quick(documents, monkeypatch):
    """Collect once for all tests."""
    monkeypatch.setattr(corpus, "collect", lambda: documents)


def words(document):
    return {" ".join(part.split()) for part in document.text.split("\n\n") if len(part) >= 200}


def test_prose_comes_first_and_nothing_twice(documents):
    kinds = [document.kind for document in documents]
    assert kinds == sorted(kinds, key=corpus.KINDS.index)
    assert {"topics", "docstrings", "source"} <= set(kinds)
    names = {(document.kind, document.name) for document in documents}
    assert len(names) == len(documents)
    prose = sum(
        document.size for document in documents if document.kind in ("topics", "docstrings")
    )
    assert prose > 500_000
    seen = set()
    for document in documents:
        assert not words(document) & seen, document.name
        seen |= words(document)
    assert "conditional execution" in next(d.text for d in documents if d.name == "if")


def test_no_text_of_this_machine(documents):
    names = [document.name for document in documents]
    assert not [name for name in names if "site-packages" in name or "_sysconfigdata" in name]
    assert not [name for name in names if name.startswith("/")]


def test_docstrings_are_separated():
    source = (
        f'"""{LONG}"""\nimport os\n\nclass A:\n    """{LONG} 2\n\n    more.\n    """\n'
        f'    def f(self):\n        "short"\n        return """{LONG} 3"""\n\n'
        f'if os:\n    "{LONG} 4"\n    async def g():\n        """{LONG} 5"""\n'
    )
    prose, code = separate_docstrings(source)
    assert prose == f"{LONG}\n\n{LONG} 2\n\nmore.\n\n{LONG} 5"
    expected = (
        "import os\n\nclass A:\n    def f(self):\n"
        f'        return """{LONG} 3"""\n\nif os:\n    "{LONG} 4"\n    async def g():\n'
    )
    assert code == expected


def test_repeats_are_dropped():
    found = list(
        without_repeats(
            [
                Document("topics", "a", f"{LONG}\n\nshort"),
                Document("source", "b", f"first\n\n{LONG.replace(' ', '  ')}\n\nshort\n\n{LONG} x"),
                Document("source", "c", f"{LONG}\n\nshort"),
            ]
        )
    )
    assert [document.name for document in found] == ["a", "b"]
    assert found[1].text == f"first\n\nshort\n\n{LONG} x\n"


def test_select_skips_what_does_not_fit():
    documents = [Document("source", str(size), "x" * size) for size in (40, 90, 30, 31)]
    assert [document.name for document in select(documents, 100)] == ["40", "30"]


def test_divide_keeps_proportions():
    documents = [Document("topics", f"t{n}", "x" * 100) for n in range(100)]
    documents += [Document("source", f"s{n}", "x" * (5000 if n == 0 else 50)) for n in range(100)]
    train, valid = divide(documents, 0.1, seed=3)
    assert sorted(document.name for document in train + valid) == sorted(d.name for d in documents)
    sizes = {kind: sum(d.size for d in valid if d.kind == kind) for kind in ("topics", "source")}
    assert sizes == {"topics": 1000, "source": 950}
    assert valid != divide(documents, 0.1, seed=4)[1]
    assert len(divide(documents[:3], 0.01, seed=0)[1]) == 1


def test_files(quick, tmp_path):
    report = python_corpus(tmp_path / "one", seed=5, max_bytes=300_000)
    again = python_corpus(tmp_path / "two", seed=5, max_bytes=300_000)
    train, valid = IndexedDataset(report.train), IndexedDataset(report.valid)
    assert (train.documents, valid.documents) == (report.train_documents, report.valid_documents)
    assert (train.tokens, valid.tokens) == (report.train_tokens, report.valid_tokens)
    total = sum(report.bytes_by_kind.values())
    assert 290_000 < total <= 300_000
    assert total + train.documents + valid.documents == train.tokens + valid.tokens
    assert 0.03 * total < valid.tokens <= 0.051 * total
    for part in ("train", "valid"):
        for suffix in (".bin", ".idx"):
            first = (tmp_path / "one" / f"{part}{suffix}").read_bytes()
            assert first == (tmp_path / "two" / f"{part}{suffix}").read_bytes()
    assert again.bytes_by_kind == report.bytes_by_kind
    text = ByteTokenizer().decode(np.concatenate([train[n] for n in range(len(train))]))
    assert text.count(" the ") > 1000
    assert "\ufffd" not in text


def test_prepare_writes_once(quick, tmp_path, monkeypatch):
    prefixes = prepare(tmp_path, max_bytes=100_000)
    assert prefixes == (str(tmp_path / "train"), str(tmp_path / "valid"))
    stamp = (tmp_path / "train.bin").stat().st_mtime_ns
    assert prepare(tmp_path, max_bytes=100_000) == prefixes
    assert (tmp_path / "train.bin").stat().st_mtime_ns == stamp
    small = IndexedDataset(prefixes[0]).tokens
    prepare(tmp_path, max_bytes=150_000)
    assert IndexedDataset(prefixes[0]).tokens > small
    request = json.loads((tmp_path / "corpus.json").read_text())["request"]
    assert request["max_bytes"] == 150_000
    (tmp_path / "valid.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*valid.bin"):
        prepare(tmp_path, max_bytes=150_000)


def test_errors(quick, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"valid_fraction is 1.5"):
        python_corpus(tmp_path, valid_fraction=1.5)
    with pytest.raises(DataError, match="max_bytes 10 leaves 0 documents"):
        python_corpus(tmp_path, max_bytes=10)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        python_corpus(tmp_path / "file", max_bytes=100_000)
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no Python sources lie under"):
        collect()
