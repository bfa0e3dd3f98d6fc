"""Text files to token files: every source, any number of workers, every fault with its place."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megafp4.data.documents import BATCH_BYTES
from megafp4.data.indexed import IndexedDataset
from megafp4.data.preprocess import preprocess
from megafp4.data.sidecar import read_sidecar
from megafp4.data.tokenizer import ByteTokenizer
from megafp4.errors import DataError, UnsupportedError

REPOSITORY = Path(__file__).parents[2]


def run(inputs, output, **options):
    return preprocess(inputs, output, progress=False, **options)


def texts(prefix):
    dataset = IndexedDataset(prefix)
    tokenizer = ByteTokenizer()
    return [tokenizer.decode(dataset[number]) for number in range(len(dataset))]


def write_jsonl(path, values):
    content = "".join(json.dumps(value) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xc3\xa9\n")
    report = run([tmp_path / "a.txt"], tmp_path / "out")
    assert texts(tmp_path / "out") == ["one\ntwo \u00e9\n"]
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset[0][-1] == 256
    assert (report.documents, report.tokens, report.empty) == (1, 12, 0)


def test_end_of_document_can_be_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    run([tmp_path / "a.txt"], tmp_path / "out", append_eod=False)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == [97, 98]
    assert read_sidecar(tmp_path / "out").eod is None


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("\n", ["one", "two", "three<|eot|>", "four"]),
        ("\n\n", ["one\ntwo", "three<|eot|>\nfour\n"]),
        ("<|eot|>\n", ["one\ntwo\n\nthree", "four\n"]),
        ("ee<", ["one\ntwo\n\nthr", "|eot|>\nfour\n"]),
        ("absent", ["one\ntwo\n\nthree<|eot|>\nfour\n"]),
    ],
)
@pytest.mark.parametrize("block", [1, 3, BATCH_BYTES])
def test_separators(tmp_path, monkeypatch, separator, expected, block):
    monkeypatch.setattr("megafp4.data.documents.BATCH_BYTES", block)
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree<|eot|>\nfour\n")
    run([tmp_path / "a.txt"], tmp_path / "out", separator=separator)
    assert texts(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines(tmp_path, name):
    values = [{"text": "one", "id": 1}, {"text": ""}, {"text": None}, {"text": "\u65e5\n"}]
    path = write_jsonl(tmp_path / name, values)
    report = run([path], tmp_path / "out")
    assert texts(tmp_path / "out") == ["one", "\u65e5\n"]
    assert report.empty == 2


def test_blank_lines_and_other_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"body": "x"}\n   \n{"body": "y"}')
    report = run([tmp_path / "a.jsonl"], tmp_path / "out", key="body")
    assert texts(tmp_path / "out") == ["x", "y"]
    assert report.empty == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3 is not JSON .*repair or remove the line"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b'{"body": "x", "id": 1}', "line 3 has no field 'text' but body, id"),
        (b"{}", "line 3 has no field 'text' but none"),
        (b"[1]", "line 3 holds a JSON list"),
        (b'{"text": 7}', "line 3 holds int under 'text'"),
        (b'{"text": "\\ud800"}', "line 3: text holds half a surrogate pair"),
        (b"[" * 100_000, "line 3 is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=rf"a.jsonl {message}"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_line_numbers_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("megafp4.data.documents.BATCH_BYTES", 30)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 20 + "broken\n")
    with pytest.raises(DataError, match=r"a.jsonl line 21 is not JSON"):
        run([tmp_path / "a.jsonl"], tmp_path / "out")


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    column = [f"document {number}" for number in range(3000)] + [None, ""]
    table = pyarrow.table({"text": column, "other": list(range(3002))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    report = run([tmp_path / "a.parquet"], tmp_path / "out")
    assert texts(tmp_path / "out") == column[:3000]
    assert report.empty == 2
    with pytest.raises(DataError, match="no column 'body' but other, text"):
        run([tmp_path / "a.parquet"], tmp_path / "other", key="body")
    with pytest.raises(DataError, match="document 1 holds int under 'other'"):
        run([tmp_path / "a.parquet"], tmp_path / "other", key="other")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable parquet file"):
        run([tmp_path / "b.parquet"], tmp_path / "other")


def test_saved_datasets(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "", "b"]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert run([tmp_path / "one"], tmp_path / "out").empty == 1
    assert texts(tmp_path / "out") == ["a", "b"]
    run([tmp_path / "two"], tmp_path / "out", split="test", overwrite=True)
    assert texts(tmp_path / "out") == ["b"]
    with pytest.raises(DataError, match="has the splits test, train but not 'valid'"):
        run([tmp_path / "two"], tmp_path / "other", split="valid")
    with pytest.raises(DataError, match="no column 'body' but text"):
        run([tmp_path / "one"], tmp_path / "other", key="body")


def test_folders_are_read_in_order(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "b.txt").write_text("b")
    (source / "a.jsonl").write_text('{"text": "a"}')
    (source / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    (source / "image.png").write_bytes(b"\x89PNG")
    for _ in range(2):  # the second time the first output lies in the folder
        run([source / "deep", source], source / "out", overwrite=True)
        assert texts(source / "out") == ["c", "a", "b", "c"]


def test_output_does_not_depend_on_workers_or_batches(tmp_path, monkeypatch):
    values = [{"text": f"document {number} " * (number % 17)} for number in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", values)
    run([path], tmp_path / "one")
    monkeypatch.setattr("megafp4.data.documents.BATCH_BYTES", 700)
    run([path], tmp_path / "small")
    report = run([path], tmp_path / "two", workers=2)
    assert report.empty == len([value for value in values if not value["text"]])
    for suffix in (".bin", ".idx", ".meta.json"):
        first = (tmp_path / f"one{suffix}").read_bytes()
        assert first == (tmp_path / f"small{suffix}").read_bytes()
        assert first == (tmp_path / f"two{suffix}").read_bytes()


def test_errors_come_back_from_workers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(DataError, match=r"a.jsonl line 2 is not JSON"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("left", [".bin", ".idx"])
def test_a_pair_is_replaced_only_when_asked(tmp_path, left):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b.txt").write_text("new")
    run([tmp_path / "a.txt"], tmp_path / "out")
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(DataError, match=r"out.bin exists already: .* --overwrite to replace it"):
        run([tmp_path / "b.txt"], tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == before
    for suffix in {".bin", ".idx"} - {left}:
        (tmp_path / f"out{suffix}").unlink()
    with pytest.raises(DataError, match=rf"out{left} exists already"):
        run([tmp_path / "b.txt"], tmp_path / "out")
    run([tmp_path / "b.txt"], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["new"]


def test_sidecar(tmp_path):
    (tmp_path / "a.txt").write_text("az")
    run([tmp_path / "a.txt"], tmp_path / "out")
    sidecar = read_sidecar(tmp_path / "out")
    assert (sidecar.tokenizer, sidecar.vocab_size, sidecar.eod) == ("bytes", 257, 256)
    assert (sidecar.documents, sidecar.tokens, sidecar.largest_id) == (1, 3, 256)
    assert sidecar.bin_bytes == (tmp_path / "out.bin").stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        ("a.txt", b"", "no document with text was found for .*out, 1 were empty"),
        ("a.pdf", b"%PDF", "unknown suffix '.pdf'"),
        ("a.jsonl.gz", b"plain", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:12] + b"\xff" * 30, "damaged gzip"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run([tmp_path / name], tmp_path / "out")


def test_bad_requests(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"missing.txt does not exist"):
        run([tmp_path / "missing.txt"], tmp_path / "out")
    with pytest.raises(DataError, match="no input was given"):
        run([], tmp_path / "out")
    with pytest.raises(DataError, match="empty holds no text to read"):
        run([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match="0 workers"):
        run([tmp_path / "a.txt"], tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="separator is empty"):
        run([tmp_path / "a.txt"], tmp_path / "out", separator="")
    with pytest.raises(DataError, match="cannot write"):
        run([tmp_path / "a.txt"], tmp_path / "a.txt" / "out")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UnsupportedError, match=r"pyarrow, which is not installed: .*megafp4\[data\]"
    ):
        run([tmp_path / "a.parquet"], tmp_path / "out")


def call_tool(*arguments):
    return subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "preprocess_data.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
    )


def test_tool(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    result = call_tool(
        "--input",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "out",
        "--workers",
        1,
        "--no-append-eod",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 documents, 5 tokens, 0 empty" in result.stdout
    assert texts(tmp_path / "out") == ["hello"]
    result = call_tool("--input", tmp_path / "b.txt", "--output", tmp_path / "other")
    assert result.returncode == 2
    assert result.stderr.startswith("error: input ")
    assert result.stderr.count("\n") == 1
