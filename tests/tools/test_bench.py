"""tools/bench.py: what can be shown without a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

# Imports the kernels, and so Triton.
bench = pytest.importorskip("bench", exc_type=ImportError)

from benchmarks.report import FAILED, Report, text  # noqa: E402
from benchmarks.timing import Time, relative  # noqa: E402


def report() -> Report:
    return Report("Things", ("thing", "ms", "x BF16"), "x BF16", {"copy TB/s": 4.2})


def test_a_row_that_fails_its_check_shows_no_speed() -> None:
    found = report()
    found.add("good", 1.0, 2.0, error=1e-6, limit=1e-5, quartiles=[0.9, 1.1])
    found.add("bad", 0.5, 4.0, error=1e-4, limit=1e-5, quartiles=[0.4, 0.6])
    found.add("ugly", 0.1, 9.0, error=math.nan, limit=1.0)
    assert found.failed
    assert [row["ms"] for row in found.rows] == [1.0, FAILED, FAILED]
    assert "quartiles" not in found.rows[1]
    assert "4.0" not in found.markdown()


def test_results_are_written(tmp_path: Path) -> None:
    found = report()
    found.add("mxfp4", 1.0, 1.8, error=0.0, limit=0.0)
    found.add("peer", "", "", error=0.0, limit=0.0)
    found.write(tmp_path, ["python", "tools/bench.py", "linear", "--out", "a b"])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["command"] == "python tools/bench.py linear --out 'a b'"
    assert written["rows"][0]["x BF16"] == 1.8
    assert {"torch", "commit", "date"} <= written["environment"].keys()
    assert "| mxfp4 | 1 | 1.8 | 0 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_times_are_quartiles() -> None:
    assert Time.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Time(3.0, 2.0, 4.0)
    assert Time.of([7.0]) == Time(7.0, 7.0, 7.0)


def test_relative_difference() -> None:
    expected = torch.randn(3000, 8)
    assert relative(expected * 1.5, expected) == pytest.approx(0.5, rel=1e-5)
    found = expected.clone()
    found[2999, 7] = math.nan
    assert math.isnan(relative(found, expected))


def test_cells() -> None:
    assert [text(1234.5678), text(0.00012), text(0.0), text("")] == ["1,235", "1.2e-04", "0", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["quantize"]) == 2
    assert capsys.readouterr().err == (
        "error: no CUDA GPU is visible to torch: run this on an H100 or H200\n"
    )
