"""Reading run folders, whole, unfinished and damaged."""

import json
import math
from pathlib import Path

import pytest

from megafp4.errors import DataError
from megafp4.report import load_run, load_runs
from megafp4.report.load import baseline_of
from tests.report.conftest import MakeRun, write_jsonl


def test_a_finished_run(make_run: MakeRun) -> None:
    run = load_run(make_run("mxfp4"))
    assert (run.label, run.finished, run.steps, run.last_step) == ("mxfp4", True, 100, 100)
    assert run.valid_loss == run.evals[-1]["loss"]
    assert [row["step"] for row in run.train] == list(range(5, 101, 5))
    assert not run.is_baseline


def test_an_unfinished_run_counts_with_its_latest_evaluation(make_run: MakeRun) -> None:
    run = load_run(make_run("mxfp4", steps=50, finished=False))
    assert (run.finished, run.last_step, run.steps) == (False, 50, 100)
    assert run.valid_loss == run.evals[-1]["loss"]
    assert run.evals[-1]["step"] == 40


def test_a_run_that_has_only_begun(make_run: MakeRun) -> None:
    folder = make_run("mxfp4", steps=0, finished=False)
    (folder / "metrics.jsonl").unlink()
    run = load_run(folder)
    assert (run.train, run.evals, run.stats, run.last_step) == ([], [], [], 0)
    assert math.isnan(run.valid_loss)


def test_repeated_steps_count_once_and_the_later_row_wins(make_run: MakeRun) -> None:
    folder = make_run("bf16")
    rows = [{"kind": "train", "step": s, "loss": v} for s, v in ((1, 9.0), (2, 8.0), (1, 7.0))]
    write_jsonl(folder / "metrics.jsonl", rows)
    assert [(row["step"], row["loss"]) for row in load_run(folder).train] == [(1, 7.0), (2, 8.0)]


def test_a_line_that_is_still_being_written_is_not_there_yet(make_run: MakeRun) -> None:
    folder = make_run("bf16")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 105, "lo')
    assert load_run(folder).last_step == 100


def test_damage_is_named(make_run: MakeRun) -> None:
    folder = make_run("bf16")
    path = folder / "metrics.jsonl"
    path.write_text('{"kind": "eval", "step": 1, "loss": 2.0}\n[3]\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        load_run(folder)
    path.unlink()
    (folder / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json is not valid JSON"):
        load_run(folder)


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        load_run(tmp_path)
    with pytest.raises(DataError, match="holds no runs"):
        load_runs(tmp_path)
    with pytest.raises(DataError, match="holds no runs"):
        load_runs(tmp_path / "missing")


def test_the_baseline_comes_first_then_the_given_order(make_run: MakeRun) -> None:
    for name in ("a", "bf16", "z", "m"):
        folder = make_run(name)
    runs = load_runs(folder.parent)
    assert [run.label for run in runs] == ["bf16", "a", "m", "z"]
    (folder.parent / "order.json").write_text(json.dumps(["z", "m"]))
    runs = load_runs(folder.parent)
    assert [run.label for run in runs] == ["bf16", "z", "m", "a"]
    assert baseline_of(runs) is runs[0]
    assert baseline_of(runs[1:]) is None


def test_a_run_folder_is_a_comparison_of_one(make_run: MakeRun) -> None:
    assert [run.label for run in load_runs(make_run("mxfp4"))] == ["mxfp4"]


@pytest.mark.parametrize(
    ("schedule", "label"),
    [
        ("", "bf16"),
        ("mxfp4:0.9,bf16:0.1", "mxfp4:0.9,bf16:0.1"),
        ("fprop=mxfp4@90", "bf16, fprop=mxfp4@90"),
    ],
)
def test_a_scheduled_run_is_not_the_baseline(make_run: MakeRun, schedule: str, label: str) -> None:
    run = load_run(make_run("bf16", precision_schedule=schedule))
    assert run.label == label
    assert run.is_baseline == (schedule == "")
