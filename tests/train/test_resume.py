"""Exact resume: kill a run anywhere, give the same command, get the same bits."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafp4 import checkpoint
from megafp4.config import RunConfig
from megafp4.errors import CheckpointError, ConfigError
from megafp4.optim import Optimizer
from megafp4.train import loop, state
from megafp4.train.build import build
from megafp4.train.evaluate import evaluate
from megafp4.train.folder import finished_summary
from megafp4.train.loop import train
from megafp4.train.metrics import read_rows
from tests.train.tiny import rows, summary, tiny

TIMES = {"time_s", "tokens_per_s", "tflops", "tflops_full", "mfu_half", "mfu_full"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def outcome(out: Path) -> tuple[Any, ...]:
    """Everything a run leaves that does not depend on the time of day."""
    saved = checkpoint.load(out / "checkpoints")
    found = summary(out)
    return (
        [
            {k: v for k, v in row.items() if k not in TIMES}
            for row in read_rows(out / "metrics.jsonl")
        ],
        read_rows(out / "stats.jsonl"),
        found["train_loss"],
        found["valid_loss"],
        found["ledger"],
        (out / "ledger.json").read_text(),
        {k: v for k, v in saved.meta.items() if k != "clock"},
        saved.tensors,
    )


def assert_same(one: Path, other: Path) -> None:
    *figures, tensors = outcome(one)
    *other_figures, other_tensors = outcome(other)
    assert figures == other_figures
    torch.testing.assert_close(tensors, other_tensors, rtol=0, atol=0)


def run_killed_at(config: RunConfig, step: int, where: str, patch: pytest.MonkeyPatch) -> None:
    """Start or continue a run, and kill it around optimizer step ``step`` (counted from 0)."""
    step_of_optimizer, save = Optimizer.step, state.save

    def killed_step(self: Optimizer, at: int, lr: float, **options: Any) -> None:
        if at == step and where == "before":
            raise Killed
        step_of_optimizer(self, at, lr, **options)
        if at == step and where == "after":
            raise Killed

    def killed_save(run: Any, progress: state.Progress) -> None:
        if progress.done == step + 1 and where == "save":
            raise Killed
        save(run, progress)
        if progress.done == step + 1 and where == "saved":
            raise Killed

    with patch.context() as patched:
        patched.setattr(Optimizer, "step", killed_step)
        patched.setattr(loop.state, "save", killed_save)
        with pytest.raises(Killed):
            train(build(config, quiet=True))


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "dqt8"])
def test_three_kills_do_not_change_a_bit(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """With dropout, stochastic rounding and Hadamard signs, and kills between all kinds of work."""
    changes = {"layers": 1, "dropout": 0.1, "checkpoint_interval": 2, "stats_interval": 3}
    once = tiny(corpus, tmp_path / "once", recipe, **changes)
    train(build(once, quiet=True))
    often = tiny(corpus, tmp_path / "often", recipe, **changes)
    run_killed_at(often, 1, "before", monkeypatch)
    torch.manual_seed(99)  # a new process does not start from this one's generator
    run_killed_at(often, 3, "saved", monkeypatch)
    torch.manual_seed(98)
    run_killed_at(often, 5, "save", monkeypatch)
    progress = train(build(often, quiet=True))
    assert progress.done == 6
    assert_same(tmp_path / "once", tmp_path / "often")
    steps = [row["step"] for row in rows(tmp_path / "often", "train")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_states_move_to_the_host_between_two_starts(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"layers": 1, "checkpoint_interval": 2}
    once, often = (tiny(corpus, tmp_path / name, "mxfp4", **changes) for name in ("once", "often"))
    train(build(once, quiet=True))
    offloaded = dataclasses.replace(often, optim=dataclasses.replace(often.optim, offload=True))
    run_killed_at(often, 1, "saved", monkeypatch)
    run_killed_at(offloaded, 3, "saved", monkeypatch)
    train(build(often, quiet=True))
    assert_same(tmp_path / "once", tmp_path / "often")


def test_without_checkpoints_a_kill_costs_work_but_not_the_result(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, often = (tiny(corpus, tmp_path / name, "fp4", dropout=0.1) for name in ("once", "often"))
    train(build(once, quiet=True))
    run_killed_at(often, 4, "after", monkeypatch)
    assert not (tmp_path / "often" / "checkpoints").exists()
    train(build(often, quiet=True))
    assert_same(tmp_path / "once", tmp_path / "often")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_step_boundary(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    once, stopped = (tiny(corpus, tmp_path / name) for name in ("once", "stopped"))
    train(build(once, quiet=True))
    real = loop.take_step

    def interrupted(run: Any, step: int) -> loop.StepResult:
        if step == 2:
            os.kill(os.getpid(), number)
        return real(run, step)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", interrupted)
        progress = train(build(stopped, quiet=True))
    assert (progress.done, progress.stopped_by) == (3, number)
    assert checkpoint.load(tmp_path / "stopped" / "checkpoints").step == 3
    assert not (tmp_path / "stopped" / "summary.json").exists()
    assert finished_summary(stopped) is None
    progress = train(build(stopped, quiet=True))
    assert (progress.done, progress.stopped_by) == (6, None)
    assert_same(tmp_path / "once", tmp_path / "stopped")


def test_a_schedule_resumes_under_the_recipe_of_its_step(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"layers": 1, "checkpoint_interval": 4, "precision_schedule": "fp4@0,bf16@3"}
    once, often = (tiny(corpus, tmp_path / n, "fp4", **changes) for n in ("once", "often"))
    train(build(once, quiet=True))
    run_killed_at(often, 4, "after", monkeypatch)
    train(build(often, quiet=True))
    assert_same(tmp_path / "once", tmp_path / "often")


@pytest.mark.parametrize("recipe", ["fp4", "dqt8"])
def test_a_restored_model_evaluates_to_the_recorded_loss(
    corpus: str, tmp_path: Path, recipe: str
) -> None:
    """Also shows that evaluation sees the weights after the update, not what was cached before."""
    config = tiny(corpus, tmp_path, recipe, steps=2)
    progress = train(build(config, quiet=True))
    run = build(config, quiet=True)
    fresh = evaluate(run.model, run.data.validation(), run.precision)
    state.restore(run)
    assert evaluate(run.model, run.data.validation(), run.precision) == progress.valid_loss != fresh


def test_a_finished_run_is_recognised(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path, steps=1)
    assert finished_summary(config) is None
    train(build(config, quiet=True))
    found = finished_summary(config)
    assert found == summary(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.steps 1 -> 2"):
        finished_summary(tiny(corpus, tmp_path, steps=2))


def test_another_configuration_is_refused_with_its_differences(corpus: str, tmp_path: Path) -> None:
    build(tiny(corpus, tmp_path, "bf16"), quiet=True)
    with pytest.raises(ConfigError) as caught:
        build(tiny(corpus, tmp_path, "fp4", steps=9), quiet=True)
    message = str(caught.value)
    assert "recipe 'bf16' -> 'fp4'" in message
    assert "train.steps 6 -> 9" in message
    assert "choose another --out, or delete the folder" in message
    # What does not influence a number may change.
    build(tiny(corpus, tmp_path, "bf16", checkpoint_interval=3, keep_checkpoints=9), quiet=True)


def test_another_number_of_threads_is_pointed_out(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums over other stretches round differently, so the promise of equal bits would be false."""
    config = tiny(corpus, tmp_path, steps=1)
    train(build(config))
    state.restore(build(config))
    assert "threads" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        state.restore(build(config))
    finally:
        torch.set_num_threads(1)
    assert "set OMP_NUM_THREADS=1 if the result must be the same" in capsys.readouterr().out


def test_a_kill_before_the_summary_leaves_only_the_summary_to_write(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, killed = (tiny(corpus, tmp_path / name, steps=2) for name in ("once", "killed"))
    train(build(once, quiet=True))

    def kill(*_: Any) -> None:
        raise Killed

    run = build(killed, quiet=True)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_summary", kill)
        with pytest.raises(Killed):
            train(run)
    assert finished_summary(killed) is None
    train(build(killed, quiet=True))
    assert_same(tmp_path / "once", tmp_path / "killed")


def test_other_tokens_under_the_same_name_are_refused(corpus: str, tmp_path: Path) -> None:
    """The folder of the data is outside the run folder: anyone may write it anew."""
    prefix = str(tmp_path / "tokens")
    for suffix in (".bin", ".idx", ".meta.json"):
        Path(prefix + suffix).write_bytes(Path(corpus + suffix).read_bytes())
    config = tiny(prefix, tmp_path / "out", steps=2)
    train(build(config, quiet=True))
    assert state.restore(build(config, quiet=True)).done == 2
    # Same size, same range of ids, other text.
    tokens = np.fromfile(prefix + ".bin", np.uint16)
    tokens[tokens < 256] ^= 1
    tokens.tofile(prefix + ".bin")
    with pytest.raises(CheckpointError, match="was trained on other tokens"):
        state.restore(build(config, quiet=True))


def test_a_run_folder_may_move(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the built-in text, which lies in the run folder and so has another path afterwards."""
    monkeypatch.setattr("megafp4.data.corpus.prepare", lambda _: (corpus, corpus))

    def config(folder: str) -> RunConfig:
        found = tiny(corpus, tmp_path / folder, steps=3, checkpoint_interval=1)
        return dataclasses.replace(found, data=dataclasses.replace(found.data, train=()))

    run_killed_at(config("before"), 1, "after", monkeypatch)
    (tmp_path / "before").rename(tmp_path / "after")
    assert train(build(config("after"), quiet=True)).done == 3


def test_a_folder_of_pickles_is_refused_and_not_ignored(corpus: str, tmp_path: Path) -> None:
    run = build(tiny(corpus, tmp_path, steps=1), quiet=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.pt").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        train(run)


def test_a_checkpoint_of_another_model_is_refused(corpus: str, tmp_path: Path) -> None:
    train(build(tiny(corpus, tmp_path / "a", steps=1), quiet=True))
    other = build(tiny(corpus, tmp_path / "b", steps=1, layers=1), quiet=True)
    (tmp_path / "a" / "checkpoints").rename(tmp_path / "b" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"'blocks\.1\..* is not part of it"):
        train(other)
