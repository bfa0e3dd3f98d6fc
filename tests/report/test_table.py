"""The comparison table in its three forms."""

import io
import json
import math

import pytest
from rich.console import Console

from megafp4.report import load_runs, table_rows, to_markdown, to_rich
from megafp4.report.table import gemm_lines
from tests.report.conftest import MakeRun


def test_rows_hold_the_gap_and_are_json(make_run: MakeRun) -> None:
    make_run("bf16")
    folder = make_run("mxfp4", excess=0.0125)
    baseline, row = table_rows(load_runs(folder.parent))
    assert baseline["gap_percent"] == 0
    assert row["gap_percent"] == pytest.approx(1.25)
    assert row["valid_loss"] == pytest.approx(1.0125 * (2 + 3 * math.exp(-100 / 30)))
    assert row["bytes_per_parameter"]["total"] == 12.0
    assert row["gemms"]["dgrad"] == {"mxfp4 x mxfp4": 1600, "bf16 x bf16": 7}
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_without_a_baseline_or_a_loss_there_is_no_gap(make_run: MakeRun) -> None:
    folder = make_run("mxfp4", steps=10, finished=False)
    (row,) = table_rows(load_runs(folder))
    assert (row["valid_loss"], row["gap_percent"]) == (None, None)
    assert (row["step"], row["steps"], row["finished"]) == (10, 100, False)


def test_a_diverged_run_is_a_dash_not_a_nan(make_run: MakeRun) -> None:
    make_run("bf16")
    folder = make_run("fp4")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "valid_loss": math.nan}))
    _, row = table_rows(load_runs(folder.parent))
    assert (row["valid_loss"], row["gap_percent"]) == (None, None)


def test_markdown(make_run: MakeRun) -> None:
    make_run("bf16")
    folder = make_run("mxfp4", excess=-0.02)
    lines = to_markdown(table_rows(load_runs(folder.parent))).splitlines()
    assert lines[0] == ("| Recipe | Loss | To BF16 | Bytes/param | GEMMs run | Tokens/s |")
    assert lines[3] == (
        "| mxfp4 | 2.0649 | -2.00 % | 12.00<br>4.00 + 8.00 | fprop bf16 800<br>"
        "dgrad mxfp4 1,600<br>dgrad bf16 7<br>wgrad mxfp4 x bf16 1,600 | 4,322 |"
    )


@pytest.mark.parametrize("width", [80, 200])
def test_terminal(make_run: MakeRun, width: int) -> None:
    make_run("bf16")
    folder = make_run("mxfp4", steps=40, finished=False)
    rows = table_rows(load_runs(folder.parent))
    console = Console(file=io.StringIO(), width=width)
    console.print(to_rich(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(step 40 of 100)" in text
    # A narrow terminal may wrap a cell, but breaks no word.
    assert {"wgrad", "mxfp4", "bf16", "1,600"} <= set(text.split())
    assert "wgrad mxfp4 x bf16 1,600" in text or width == 80
    assert "4.00 + 8.00" in text


@pytest.mark.parametrize(
    ("ledger", "lines"),
    [
        ({}, []),
        ({"fprop": {}}, []),
        (
            {"new": {"c": 1}, "wgrad": {"a x a": 1}, "fprop": {"a x b": 1, "b x b": 2000}},
            ["fprop b 2,000", "fprop a x b 1", "wgrad a 1", "new c 1"],
        ),
    ],
)
def test_gemm_lines(ledger: dict[str, dict[str, int]], lines: list[str]) -> None:
    assert gemm_lines(ledger) == lines
