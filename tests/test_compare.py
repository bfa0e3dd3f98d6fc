"""Comparisons: processes, progress, failures, interruptions; the trainer is a stand-in."""

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from megafp4 import settings
from megafp4.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megafp4.data.indexed_writer import IndexedWriter
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.train import compare
from megafp4.train.compare import Job, MetricsTail, failure, run_compare
from megafp4.train.compare_display import LiveDisplay, PlainDisplay, Watched, state_text

TRAINER = """
import json, os, pathlib, signal, sys, time
config = json.loads(pathlib.Path(sys.argv[2]).read_text())
out = pathlib.Path(config["out"])
out.mkdir(exist_ok=True)
with (out / "starts").open("a") as file:
    file.write(os.environ["OMP_NUM_THREADS"] + "\\n")
if config["recipe"] == "fp4":
    sys.exit("some warning\\nerror: the data is empty.")
(out / "config.json").write_text(json.dumps(config))
def stop(number, frame):
    (out / "stopped").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
with (out / "metrics.jsonl").open("a") as file:
    for step in range(10, config["train"]["steps"] + 1, 10):
        print(json.dumps({"kind": "train", "step": step, "loss": 3.0}), file=file, flush=True)
        while config["recipe"] == "dqt8" and step == 50:
            time.sleep(0.01)
(out / "summary.json").write_text(json.dumps({"steps": step, "valid_loss": 2.5}))
"""


REAL_TRAIN_COMMAND = compare.train_command


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(
        compare,
        "train_command",
        lambda request: [sys.executable, "-S", str(script), "--config", str(request)],
    )
    monkeypatch.setattr(compare, "POLL_S", 0.02)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


CONFIG = RunConfig(name="tiny", train=TrainConfig(steps=100))


def go(
    out: Path, *recipes: str, config: RunConfig = CONFIG, jobs: int = 2, width: int = 100
) -> tuple[int, str]:
    """Compare and return (exit code, what was printed)."""
    console = Console(file=io.StringIO(), width=width)
    code = run_compare(config, recipes, out=out, jobs=jobs, console=console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


def test_each_recipe_gets_a_run_and_all_of_them_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = go(out, "mxfp4", "bf16")
    assert code == 0
    assert "Stopping" not in text
    for name in ("mxfp4", "bf16"):
        config = settings.read_config(out / name / "config.json")
        assert (config.recipe, config.name, config.out) == (name, f"tiny-{name}", str(out / name))
        assert config.train == CONFIG.train
        assert f"{name}: step 100 of 100, loss 3.000, done" in text
    assert str(out / "report.html") in text
    assert (out / "report.html").exists()
    assert [row["recipe"] for row in json.loads((out / "compare.json").read_text())] == [
        "bf16",
        "mxfp4",
    ]
    assert re.search(r"mxfp4 +2\.5000 +\+0\.00 %", text)


def test_finished_runs_are_not_repeated_and_other_configurations_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(out, "bf16")
    assert go(out, "bf16", "mxfp4")[0] == 0
    assert (starts(out / "bf16"), starts(out / "mxfp4")) == (1, 1)
    with pytest.raises(ConfigError, match=r"another configuration \(train.steps 100 -> 200\)"):
        go(out, "bf16", "dqt4", config=RunConfig(name="tiny", train=TrainConfig(steps=200)))
    assert starts(out / "bf16") == 1
    assert not (out / "dqt4").exists()


def test_a_failing_recipe_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = go(out, "fp4", "bf16", jobs=1)
    assert code == 1
    log = out / "logs" / "fp4.log"
    assert f"fp4 failed: the data is empty (log: {log})" in text
    assert "bf16: step 100 of 100, loss 3.000, done" in text
    assert (out / "report.html").exists()


def test_nothing_but_failures_makes_no_report(tmp_path: Path) -> None:
    code, text = go(tmp_path / "out", "fp4")
    assert code == 1
    assert "Report" not in text


class Interrupting(PlainDisplay):
    """Interrupts once dqt8 is in its endless step."""

    how: Callable[[], None]

    def show(self, runs: Iterable[Watched]) -> None:
        if any(run.name == "dqt8" and run.step == 50 for run in runs):
            self.how()


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # the handler runs before this ends


@pytest.mark.parametrize("how", [raise_interrupt, terminate])
def test_an_interruption_stops_the_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]
) -> None:
    display = Interrupting(Console(file=io.StringIO()))
    display.how = how
    monkeypatch.setattr(compare, "open_display", lambda console: display)
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    code, text = go(out, "dqt8", "bf16", "mxfp4", jobs=2)
    assert code == 130
    waiting, stopped = text.splitlines()[-2:]
    assert re.match(r"Stopping: [12] running, each finishes its step and saves first\.", waiting)
    assert "the same command continues" in stopped
    assert (out / "dqt8" / "stopped").exists()
    assert not (out / "dqt8" / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compare,
        "train_command",
        lambda request: [
            sys.executable,
            "-S",
            "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "print('deaf', flush=True); time.sleep(600)",
        ],
    )
    (tmp_path / "logs").mkdir()
    job = Job("bf16", CONFIG, tmp_path / "logs" / "bf16.log")
    job.start(dict(os.environ))
    while "deaf" not in job.log.read_text():
        time.sleep(0.01)
    job.stop()
    job.wait(0.05)
    job.poll()
    assert job.state == "failed"
    assert job.error is not None
    assert "it was ended by SIGKILL" in job.error


def test_jobs_share_the_cores_unless_the_user_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_cores", lambda: 8)
    go(tmp_path / "a", "bf16", "mxfp4", jobs=3)
    assert (tmp_path / "a" / "bf16" / "starts").read_text() == "4\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    go(tmp_path / "b", "bf16", jobs=3)
    assert (tmp_path / "b" / "bf16" / "starts").read_text() == "7\n"


@pytest.mark.parametrize(
    ("recipes", "changes", "message"),
    [
        ((), {}, "no recipes were given"),
        (("mxfp5",), {}, "unknown recipe 'mxfp5': did you mean 'mxfp"),
        (("bf16", "mxfp4", "bf16"), {}, "recipes bf16 are given twice"),
        (("bf16",), {"precision_schedule": "mxfp4:0.9,bf16:0.1"}, "precision_schedule is"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, recipes: tuple[str, ...], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        go(tmp_path / "out", *recipes, config=RunConfig(**changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs is 0"):
        go(tmp_path / "out", "bf16", jobs=0)


def test_a_run_folder_cannot_receive_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the folder of a single run"):
        go(tmp_path, "bf16")


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file cannot be written .*: choose another --out"):
        go(tmp_path / "file", "bf16")


def test_missing_matplotlib_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=re.escape("megafp4[report]")):
        go(tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_tail_reads_whole_lines_once_and_notices_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.new_rows() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.new_rows() == [{"step": 1}, {"step": 2}]
    assert tail.new_rows() == []
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.new_rows() == [{"step": 3}]
    replacement = tmp_path / "new"
    replacement.write_text('{"step": 1}\n{"step": 2, "note": "longer than what was there"}\n')
    replacement.replace(path)
    assert [row["step"] for row in tail.new_rows()] == [1, 2]


def test_eta_follows_the_rate_of_this_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("bf16", CONFIG, tmp_path / "log")
    clock = iter([1000.0, 1010.0, 1030.0])
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    etas = []
    for step in (50, 60, 80):
        job._see([{"kind": "train", "step": step, "loss": 2.0}])
        etas.append(job.eta_s)
    assert etas == [None, 40.0, 20.0]


@pytest.mark.parametrize(
    ("state", "eta_s", "text"),
    [
        ("waiting", None, "waiting"),
        ("running", None, "starting"),
        ("running", 59.6, "1:00 left"),
        ("running", 3600 * 3 + 61, "3:01:01 left"),
        ("failed", 10.0, "failed"),
    ],
)
def test_state_text(tmp_path: Path, state: str, eta_s: float | None, text: str) -> None:
    job = Job("bf16", CONFIG, tmp_path / "log")
    job.state, job.eta_s = state, eta_s
    assert state_text(job) == text


def test_live_display_shows_every_run(tmp_path: Path) -> None:
    jobs = [Job(name, CONFIG, tmp_path / name) for name in ("bf16", "mxfp4")]
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with LiveDisplay(console) as display:
        display.show(jobs)
        jobs[1].state, jobs[1].step, jobs[1].loss = "running", 40, 3.25
        display.show(jobs)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("bf16", "waiting", "mxfp4", " 40/100", "loss 3.250", "starting"):
        assert part in text


def test_plain_display_prints_each_tenth_once(tmp_path: Path) -> None:
    job = Job("bf16", CONFIG, tmp_path / "log")
    console = Console(file=io.StringIO())
    display = PlainDisplay(console)
    display.show([job])
    job.state = "running"
    for step in range(0, 31):
        job.step = step
        display.show([job])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split(",")[0] for line in lines] == [
        f"bf16: step {step} of 100" for step in (0, 10, 20, 30)
    ]


def test_the_real_trainer_understands_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_command", REAL_TRAIN_COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with IndexedWriter(tmp_path / "text") as writer:
        for document in range(40):
            writer.add([(7 * document + 3 * place) % 256 for place in range(100)])
    config = RunConfig(
        name="tiny",
        model=ModelConfig(layers=1, hidden=64, heads=2, vocab_size=384, seq_len=32),
        data=DataConfig(train=(str(tmp_path / "text"),), split="50,50,0"),
        train=TrainConfig(steps=2, global_batch=2, micro_batch=2, eval_batches=1),
    )
    code, text = go(tmp_path / "out", "mxfp4", config=config)
    assert code == 0, text
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert row["step"] == 2
    # One block of four linears, two steps.
    assert row["gemms"] == {
        "fprop": {"bf16 x bf16": 8},
        "dgrad": {"mxfp4 x mxfp4": 8},
        "wgrad": {"mxfp4 x mxfp4": 8},
    }


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("noise\nerror: no such file.\n\n")
    assert failure(log, 2) == f"no such file (log: {log})"
    assert failure(log, -signal.SIGKILL) == f"it was ended by SIGKILL (log: {log})"
    log.write_text("")
    assert failure(log, 1) == f"it said nothing (log: {log})"
