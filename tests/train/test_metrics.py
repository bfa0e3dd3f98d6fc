"""Metrics: files survive kills, rates count what they say, terminals and pipes get their share."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megafp4.errors import DataError
from megafp4.train.metrics import (
    Clock,
    JsonLines,
    Metrics,
    Screen,
    Workload,
    describe,
    peak_flops,
    read_rows,
)

WORK = Workload(
    steps=40,
    tokens_per_step=100,
    flops_per_token_half=2e9,
    flops_per_token_full=3e9,
    peak_flops=None,
)


def test_resuming_drops_later_rows_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = JsonLines(path, done=0)
    for step in (10, 20, 30):
        file.write({"step": step})
    file.close()
    with path.open("a") as tail:
        tail.write('{"step": 4')
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    file = JsonLines(path, done=20)
    file.write({"step": 30, "again": True})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10},
        {"step": 20},
        {"step": 30, "again": True},
    ]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(DataError, match=r"m\.jsonl line 2 is not a JSON object"):
        JsonLines(path, done=1)


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    JsonLines(path, done=0).close()
    assert path.read_text() == ""


def test_rows_are_visible_at_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl", done=0)
    file.write({"step": 1})
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1}]
    file.close()


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: now is ``ticking[0]``."""
    now = [1000.0]
    monkeypatch.setattr("megafp4.train.metrics.time.perf_counter", lambda: now[0])
    return now


def take_steps(clock: Clock, now: list[float], seconds: list[float]) -> None:
    for duration in seconds:
        with clock.step():
            now[0] += duration
        now[0] += 50.0  # an evaluation, say


def test_rates_leave_out_everything_but_steps(ticking: list[float]) -> None:
    clock = Clock()
    take_steps(clock, ticking, [9.0, 1.0, 1.0])
    assert clock.steps_per_s() == pytest.approx(3 / 11)
    take_steps(clock, ticking, [2.0, 2.0])
    assert clock.steps_per_s() == pytest.approx(1 / 2)
    # The mean also leaves out the first step, which pays for start-up.
    assert clock.mean_steps_per_s() == pytest.approx(4 / 6)
    assert clock.wall_s == pytest.approx(15 + 5 * 50)


def test_the_clock_counts_on_after_a_resume(ticking: list[float]) -> None:
    clock = Clock()
    take_steps(clock, ticking, [9.0, 1.0])
    saved = json.loads(json.dumps(clock.state_dict()))
    ticking[0] += 1e6
    clock = Clock()
    clock.load_state_dict(saved)
    take_steps(clock, ticking, [9.0, 3.0])
    assert clock.mean_steps_per_s() == pytest.approx(2 / 4)
    assert clock.wall_s == pytest.approx(22 + 4 * 50)


def test_a_single_step_has_no_mean_rate() -> None:
    assert Clock().mean_steps_per_s() is None
    assert Clock().steps_per_s() == 0.0


def record(folder: Path, work: Workload, now: list[float]) -> Metrics:
    clock = Clock()
    metrics = Metrics(folder, work, Screen("run", work, quiet=False), clock)
    metrics.open(0)
    take_steps(clock, now, [0.5, 0.5])
    metrics.train(2, loss=3.0, grad_norm=0.5, lr=1e-3, spikes=0)
    metrics.evaluation(2, 3.25)
    metrics.statistics(
        [
            {"step": 2, "layer": "l", "gemm": "dgrad", "operand": "a", "format": "mxfp4",
             "snr_db": float("inf"), "clip_rate": 0.25}
        ]
    )  # fmt: skip
    metrics.close()
    return metrics


def test_rows_have_rates_in_both_conventions(
    tmp_path: Path, ticking: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, WORK, ticking)
    train, evaluation = read_rows(tmp_path / "metrics.jsonl")
    assert train == {
        "kind": "train", "step": 2, "loss": 3.0, "grad_norm": 0.5, "lr": 1e-3, "tokens": 200,
        "tokens_per_s": pytest.approx(200.0), "tflops": pytest.approx(0.4),
        "tflops_full": pytest.approx(0.6), "mfu_half": None, "mfu_full": None, "spikes": 0,
        "time_s": pytest.approx(101.0),
    }  # fmt: skip
    assert evaluation["kind"] == "eval"
    assert evaluation["loss"] == 3.25
    assert read_rows(tmp_path / "stats.jsonl")[0]["snr_db"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step  2/40  loss 3.0000  grad 0.5  lr 1.00e-03  200 tokens/s")
    assert lines[1].endswith("0.4/0.6 TFLOP/s  MFU n/a  ETA 0:00:19")
    assert lines[2] == "step  2/40  validation loss 3.2500"
    assert not any("\x1b" in line for line in lines)


def test_utilisation_needs_a_known_peak(tmp_path: Path, ticking: list[float]) -> None:
    work = Workload(
        steps=40,
        tokens_per_step=100,
        flops_per_token_half=2e9,
        flops_per_token_full=3e9,
        peak_flops=4e12,
    )
    record(tmp_path, work, ticking)
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["mfu_half"] == pytest.approx(0.1)
    assert row["mfu_full"] == pytest.approx(0.15)
    assert "MFU 10.0/15.0 %" in describe(row)
    assert peak_flops(torch.device("cpu")) is None


def test_a_terminal_of_80_columns_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen("llama-1.3b", WORK, quiet=False)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80, soft_wrap=True)
    monkeypatch.setattr("megafp4.train.metrics.RichConsole", lambda **_: terminal)
    screen = Screen("llama-1.3b", WORK, quiet=False)
    screen.start(0)
    screen.advance(7)
    screen.show(
        {"kind": "train", "step": 7, "loss": 2.3456, "tokens_per_s": 123456.0, "tflops": 412.3,
         "tflops_full": 445.1, "mfu_half": 0.412, "mfu_full": 0.445}
    )  # fmt: skip
    screen.close()
    last = terminal.file.getvalue().splitlines()[-3:]  # type: ignore[attr-defined]
    assert any("llama-1.3b" in line and "7/40" in line for line in last)
    numbers = "loss 2.3456  123,456 tokens/s  412/445 TFLOP/s  MFU 41.2/44.5 %"
    assert any(numbers in line for line in last)


def test_quiet_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ticking: list[float]
) -> None:
    screen = Screen("run", WORK, quiet=True)
    screen.start(0)
    screen.advance(1)
    screen.say("hello")
    screen.close()
    assert capsys.readouterr().out == ""


def test_tensorboard_holds_the_same_numbers(tmp_path: Path, ticking: list[float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, WORK, ticking)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 3.25)]
    assert [(e.step, e.value) for e in events.Scalars("clip_rate/l/dgrad.a")] == [(2, 0.25)]
