"""Every kind of input through several processes, and the bar that shows how far they are."""

import filecmp
import json

from megafp4.data import preprocess as module
from megafp4.data.indexed import IndexedDataset
from megafp4.data.preprocess import preprocess
from megafp4.data.tokenizer import ByteTokenizer


def test_all_sources_with_two_workers_equal_one(tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("from a text file")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "from json lines"}) + "\n")
    parquet.write_table(pyarrow.table({"text": ["from parquet"]}), tmp_path / "c.parquet")
    saved = datasets.Dataset.from_dict({"text": ["from a data set"]})
    saved.save_to_disk(str(tmp_path / "d"))
    inputs = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet", "d")]
    for workers in (1, 2):
        preprocess(inputs, tmp_path / f"out{workers}", workers=workers, progress=False)
    for suffix in (".bin", ".idx", ".meta.json"):
        one, two = (tmp_path / f"out{workers}{suffix}" for workers in (1, 2))
        assert filecmp.cmp(one, two, shallow=False)
    found = IndexedDataset(tmp_path / "out2")
    texts = [ByteTokenizer().decode(found[number]) for number in range(len(found))]
    assert texts == [
        "from a text file",
        "from json lines",
        "from parquet",
        "from a data set",
    ]


def test_progress_counts_the_bytes_of_all_files(tmp_path, monkeypatch):
    seen = []

    class Bar(module._Bar):
        def __init__(self, total, shown):
            super().__init__(total, shown=False)
            seen.append((total, shown))
            self.done = 0
            bars.append(self)

        def advance(self, count):
            super().advance(count)
            self.done += count

    bars = []
    monkeypatch.setattr(module, "_Bar", Bar)
    (tmp_path / "a.txt").write_text("x" * 1000)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y"}) + "\n")
    size = sum((tmp_path / name).stat().st_size for name in ("a.txt", "b.jsonl"))
    preprocess([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", progress=True)
    assert seen == [(size, True)]
    assert bars[0].done == size
