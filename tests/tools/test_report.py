"""What tools/bench.py writes: tables, JSON, plots, comparisons, and what it refuses to say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

# Imports the kernels, and so Triton.
bench = pytest.importorskip("bench", exc_type=ImportError)

from benchmarks import compare, environment  # noqa: E402
from benchmarks.ceilings import Point  # noqa: E402
from benchmarks.report import FAILED, Report, text  # noqa: E402
from benchmarks.timing import Time, relative  # noqa: E402

from tests.tools.fakes import CEILINGS, session  # noqa: E402

COLUMNS = ("thing", "ms", "x BF16")


def report(folder: Path | None = None) -> Report:
    command = ("python", "tools/bench.py", "linear", "--out", "a b")
    return Report("Things", COLUMNS, "x BF16", {"copy TB/s": 4.2}, folder, command)


def test_a_row_that_fails_its_check_shows_no_speed() -> None:
    found = report()
    found.add("good", 1.0, 2.0, error=1e-6, limit=1e-5, quartiles=[0.9, 1.1])
    found.add("bad", 0.5, 4.0, error=1e-4, limit=1e-5, quartiles=[0.4, 0.6])
    found.add("ugly", 0.1, 9.0, error=math.nan, limit=1.0)
    assert found.failed
    assert [row["ms"] for row in found.rows] == [1.0, FAILED, FAILED]
    assert "quartiles" not in found.rows[1]
    assert "4.0" not in found.markdown()


def test_a_row_whose_check_fails_is_not_even_timed() -> None:
    here, timed = session(), []
    found = here.report("Things", COLUMNS, "ms")

    def rows() -> dict[str, Any]:
        timed.append(True)
        return {"own": lambda: None}

    assert here.checked(found, "bad", 1e-3, lambda: math.nan, rows, 1) is None
    assert timed == []
    assert found.rows[0]["ms"] == FAILED
    assert found.failed
    result = here.checked(found, "good", 1e-3, lambda: 0.0, rows, 1)
    assert result is not None
    assert result[1]["own"].median == 1


@pytest.mark.parametrize("peer", [False, True])
def test_a_refusal_is_noted_and_fails_the_run_if_it_is_ours(peer: bool) -> None:
    here = session()
    found = here.report("Things", COLUMNS, "ms")

    def refuse() -> float:
        raise ValueError("K is 7: give a multiple of 16\nand so on")

    assert here.checked(found, "odd", 1.0, refuse, dict, 1, peer=peer) is None
    reason = "ValueError: K is 7: give a multiple of 16"
    assert found.left_out == [{"row": "odd", "reason": reason}]
    assert found.failed is not peer
    assert f"- odd: {reason}" in found.markdown()


def test_a_run_that_is_killed_leaves_valid_results(tmp_path: Path) -> None:
    found = report(tmp_path)
    found.add("first", 1.0, 1.8, error=0.0, limit=0.0)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["complete"] is False
    assert written["rows"][0]["x BF16"] == 1.8
    assert not (tmp_path / "table.md").exists()
    found.add("second", 2.0, 0.9, error=0.0, limit=0.0)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_results_are_written(tmp_path: Path) -> None:
    found = report(tmp_path)
    found.ceilings = dict(CEILINGS)
    point = Point("8 bits", 1e12, 1e9, 1.0, "fp8")
    found.add("mxfp4", 1.0, 1.8, error=0.0, limit=0.0, roofline=point._asdict())
    found.add("peer", "", "", error=0.0, limit=0.0)
    found.finish()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["command"] == "python tools/bench.py linear --out 'a b'"
    assert written["complete"] is True
    assert written["rows"][0]["roofline"]["bytes"] == 1e9
    names = {"date", "python", "torch", "cuda", "triton", "cuda-bindings", "torchao", "commit"}
    assert names <= written["environment"].keys()
    assert "| mxfp4 | 1 | 1.8 | 0 |" in (tmp_path / "table.md").read_text()
    for name in ("plot.png", "roofline.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_roofline_is_the_higher_of_two_floors() -> None:
    # 4 TB/s: 1e9 bytes take 0.25 ms. 1500 TFLOP/s: 1.5e12 operations take 1 ms.
    assert Point("a", 1.5e12, 1e9, 2.0, "fp8").fraction(CEILINGS) == pytest.approx(0.5)
    assert Point("a", 1.5e12, 1e9, 0.5).fraction(CEILINGS) == pytest.approx(0.5)
    assert Point("a", 1e9, 8e9, 2.0, "int8").fraction(CEILINGS) == pytest.approx(1.0)


def result(folder: Path, gpu: str, speed: float, rows: int = 2) -> Path:
    found = report(folder)
    found.environment = {"gpu": gpu, "commit": folder.name}
    found.ceilings = dict(CEILINGS)
    for index in range(rows):
        point = Point("8 bits", 1e12 * (index + 1), 1e9, 1.0, "fp8")
        name = f"row {index}"
        found.add(name, speed, "", error=0.0, limit=0.0, roofline=point._asdict())
    found.finish()
    return folder


def test_two_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result(tmp_path / "a", "NVIDIA H200", 2.0, rows=3)
    after = result(tmp_path / "b", "NVIDIA H200", 1.0)
    assert bench.main(["compare", str(before), str(after / "results.json")]) == 0
    shown = capsys.readouterr().out
    assert "2 -> 1 (0.500)" in shown
    assert "commit: a -> b" in shown
    assert "only before: row 2" in shown
    pairs = compare.ratios(compare.load(before), compare.load(after))
    assert pairs == [("row 0", {"ms": (2.0, 1.0)}), ("row 1", {"ms": (2.0, 1.0)})]


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps({"title": "", "environment": {}, "rows": [{"a": "x", "ms": 1.0}]}))
    other.write_text(json.dumps({"title": "", "environment": {}, "rows": [{"b": "x", "ms": 1.0}]}))
    assert bench.main(["compare", str(one), str(other)]) == 2
    assert "results of the same command" in capsys.readouterr().err
    other.write_text("[]")
    assert bench.main(["compare", str(one), str(other)]) == 2
    assert "is not a result of this tool" in capsys.readouterr().err
    assert bench.main(["compare", str(one), str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_results_share_a_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [result(tmp_path / name, "NVIDIA H200", 1.0) for name in "ab"]
    png = tmp_path / "both.png"
    assert bench.main(["roofline", *map(str, folders), "--out", str(png)]) == 0
    assert png.read_bytes()[:4] == b"\x89PNG"
    strange = result(tmp_path / "c", "NVIDIA H100", 1.0)
    assert bench.main(["roofline", str(strange), str(folders[0]), "--out", str(png)]) == 2
    assert "results of one kind of GPU" in capsys.readouterr().err
    empty = result(tmp_path / "d", "NVIDIA H200", 1.0, rows=0)
    assert bench.main(["roofline", str(empty), "--out", str(png)]) == 2
    assert "no row has a point" in capsys.readouterr().err


def test_figures_without_a_commit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("abc1234-dirty", "unknown"):
        monkeypatch.setattr(environment, "commit", lambda found=found: found)
        with pytest.raises(RuntimeError, match=f"'{found}'.*--allow-dirty"):
            environment.refuse_dirty_tree()
    monkeypatch.setattr(environment, "commit", lambda: "abc1234")
    environment.refuse_dirty_tree()


def test_samples_of_the_sensors() -> None:
    lines = "1980, 3201, 400.5, 60\n1900, 3201, 690.0, 71\n1700, 3201, [N/A], 60\n1755, 3201, 7"
    assert environment.summarize_samples(lines) == {
        "SM MHz": 1940,
        "memory MHz": 3201,
        "W": 545.25,
        "hottest C": 71,
        "samples": 2,
    }
    assert environment.summarize_samples("") == {}


def test_sensors_are_read_while_work_runs() -> None:
    with environment.Sensors(("echo", "1980, 3201, 400.5, 60")) as sensors:
        assert sensors._process is not None
        sensors._process.wait()
    assert sensors.found["SM MHz"] == 1980
    with environment.Sensors(("no-such-program-anywhere",)) as sensors:
        pass
    assert sensors.found == {}


def test_times_are_quartiles() -> None:
    assert Time.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Time(3.0, 2.0, 4.0)
    assert Time.of([7.0]) == Time(7.0, 7.0, 7.0)
    assert Time(1.0, 1.0, 1.0, eager=True).as_json()["eager"] is True


def test_relative_difference() -> None:
    import torch

    expected = torch.randn(3000, 8)
    assert relative(expected * 1.5, expected) == pytest.approx(0.5, rel=1e-5)
    found = expected.clone()
    found[2999, 7] = math.nan
    assert math.isnan(relative(found, expected))


def test_cells() -> None:
    assert [text(1234.5678), text(0.00012), text(0.0), text("")] == ["1,235", "1.2e-04", "0", ""]
