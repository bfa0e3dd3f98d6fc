"""The command line: precedence, help, and one red line with exit code 2 for every mistake."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megafp4 import settings
from megafp4.cli import main
from megafp4.config import RunConfig
from megafp4.errors import ConfigError
from megafp4.models.presets import get_preset, preset_names
from megafp4.recipes import recipe_names
from megafp4.train import loop
from megafp4.train.build import build
from megafp4.train.loop import train
from megafp4.train.metrics import read_rows
from tests.train.tiny import rows, summary, tiny, write_corpus

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def file(corpus: str, tmp_path: Path) -> Path:
    """A configuration file of a tiny run in the folder ``out``."""
    path = tmp_path / "run.json"
    settings.write_config(tiny(corpus, tmp_path / "out", steps=2), path)
    return path


def errors_of(argv: list[str], captured: Captured) -> str:
    """Run a command that must fail, and return its one line."""
    assert main(argv) == 2
    output = captured.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_train_then_train_again(file: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"finished: everything about the run is in {tmp_path / 'out'}"
    assert sum("validation loss" in line for line in lines) == 1
    assert main(["train", "--config", str(file)]) == 0
    assert "is finished after 2 steps" in capsys.readouterr().out
    # The folder's own configuration names the same run.
    assert main(["train", "--config", str(tmp_path / "out" / "config.json")]) == 0
    assert "is finished after 2 steps" in capsys.readouterr().out


def test_quiet_is_silent(file: Path, capsys: Captured) -> None:
    assert main(["train", "--config", str(file), "--quiet"]) == 0
    assert main(["train", "--config", str(file), "--quiet"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_precedence_is_preset_then_file_then_option(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'out = "{tmp_path / "out"}"\n[data]\ntrain = ["{corpus}"]\n'
        "[train]\nsteps = 7\nseed = 5\n[optim]\nwarmup_steps = 3\n"
    )
    seen: list[RunConfig] = []

    def stop(config: RunConfig, *_: Any, **__: Any) -> None:
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("megafp4.train.build.build", stop)
    argv = ["train", "gpt-tiny", "--train.seed", "6", "--recipe", "fp4", "--config", str(file)]
    assert main([*argv, "--data.train", "0.25", corpus, "0.75", corpus]) == 2
    preset = get_preset("gpt-tiny")
    assert seen == [
        dataclasses.replace(
            preset,
            recipe="fp4",
            out=str(tmp_path / "out"),
            data=dataclasses.replace(preset.data, train=("0.25", corpus, "0.75", corpus)),
            train=dataclasses.replace(preset.train, steps=7, seed=6),
            optim=dataclasses.replace(preset.optim, warmup_steps=3),
        )
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train"], "neither a preset nor a --config file"),
        (["train", "gpt-tinny"], "unknown preset 'gpt-tinny': did you mean 'gpt-tiny'?"),
        (["train", "gpt-tiny", "--recipe", "mxpf4"], "'mxpf4': did you mean 'mxfp4'?"),
        (["train", "gpt-tiny", "--train.steps", "0"], "train.steps is 0: give a positive integer"),
        (["train", "gpt-tiny", "--model.hidden", "130"], "not divisible by model.heads 4"),
        (["train", "gpt-tiny", "--model.hidden", "72", "--recipe", "mxfp4"],
         "dgrad of 'blocks.0.attention.qkv' contracts over 216 output features"),
        (["train", "gpt-tiny", "--model.seq-len", "24", "--train.micro-batch", "1", "--recipe",
          "mxfp4"], "contracts over 24 tokens"),
        (["train", "gpt-tiny", "--optim.warmup-steps", "9999"], "optim.warmup_steps 9999"),
        (["train", "gpt-tiny", "--precision-schedule", "mxfp4:0.5"], "shares"),
        (["train", "gpt-tiny", "--model.vocab-size", "200"], "smaller than the 257 ids"),
        (["train", "gpt-345m"], "data.train is empty and tokenizer 'gpt2' has no built-in text"),
        (["train", "gpt-345m", "--data.tokenizer", "bytes"], "larger than the 257 ids of tokeniz"),
        (["train", "gpt-tiny", "--data.tokenizer", "byte"], "byte"),
        (["train", "gpt-tiny", "--device", "cdua"], "device 'cdua' cannot be used"),
        (["train", "gpt-tiny", "--data.train", "nowhere"], "nowhere"),
        (["train", "gpt-tiny", "--config", "gone.toml"], "gone.toml cannot be read"),
        (["train", "--recipe", "fp4", "gpt-tiny"], "put it directly after train"),
        (["compare", "gpt-tiny", "--recipes", "bf16,mxpf4"], "did you mean 'mxfp4'?"),
        (["compare", "gpt-tiny", "--recipe", "fp4"], "list what to compare with --recipes"),
        (["recipes", "mxpf4"], "did you mean 'mxfp4'?"),
        (["presets", "gtp-tiny"], "did you mean 'gpt-tiny'?"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "gpt-tiny", "--jobs", "0"], "jobs is 0"),
        (["compare", "gpt-tiny", "--recipes", "bf16,bf16"], "bf16 are given twice"),
        (["compare", "gpt-tiny", "--data.train", "nowhere"], "cannot read nowhere.idx"),
        (["train", "gpt-tiny", "--train.eval-interval", "-1"], "train.eval_interval is -1"),
        (["train", "gpt-tiny", "--out", ""], "out is empty"),
        (["data"], "choose one of corpus, preprocess"),
        (["data", "preprocess", "--input", "gone.txt", "--output", "x"], "gone.txt"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_work(
    argv: list[str],
    message: str,
    capsys: Captured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in errors_of(argv, capsys)
    assert list(tmp_path.rglob("*")) == []


def test_a_misspelt_field_in_a_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nstep = 3\n")
    line = errors_of(["train", "gpt-tiny", "--config", str(file)], capsys)
    assert f"unknown field of table [train] in {file} 'step': did you mean 'steps'?" in line


def test_a_misspelt_option_is_explained_by_the_parser(capsys: Captured) -> None:
    assert main(["train", "gpt-tiny", "--train.stepz", "3"]) == 2
    error = capsys.readouterr().err
    assert "--train.stepz" in error
    assert "--train.steps" in error


def test_another_run_in_the_folder(file: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "--config", str(file), "--quiet"]) == 0
    line = errors_of(["train", "--config", str(file), "--recipe", "fp4"], capsys)
    assert "holds a run with another configuration (recipe 'bf16' -> 'fp4')" in line
    assert "choose another --out" in line


def test_divergence_is_one_line(
    file: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "accumulate_gradients", lambda *_: float("nan"))
    assert main(["train", "--config", str(file), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: the loss at step 1 is nan")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), 2, "error: memory ran"),
        (MemoryError(), 2, "error: memory ran out: lower train.micro_batch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_memory_and_ctrl_c_are_one_line(
    file: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("megafp4.train.build.build", fail)
    assert main(["train", "--config", str(file)]) == code
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1
    assert found[0].startswith(line)


def test_other_runtime_errors_are_bugs_and_keep_their_traceback(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("megafp4.train.build.build", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["train", "--config", str(file)])


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_summary_is_named(file: Path, capsys: Captured, content: str) -> None:
    assert main(["train", "--config", str(file), "--quiet"]) == 0
    path = file.parent / "out" / "summary.json"
    path.write_text(content)
    for argv in (["train", "--config", str(file)], ["report", str(path.parent)]):
        assert str(path) in errors_of(argv, capsys)


def test_a_signal_says_how_to_continue(
    file: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.take_step

    def interrupted(run: Any, step: int) -> loop.StepResult:
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", interrupted)
        assert main(["train", "--config", str(file)]) == 128 + signal.SIGTERM
    assert "stopped after step 1: the same command continues" in capsys.readouterr().out
    assert main(["train", "--config", str(file)]) == 0
    assert "continuing after step 1" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "out", "train")] == [1, 2]


def test_kill_9_and_the_same_command(corpus: str, tmp_path: Path, capsys: Captured) -> None:
    """The promise itself: a real process, a real SIGKILL, the same bits."""
    changes = {"steps": 40, "dropout": 0.1, "checkpoint_interval": 3, "eval_interval": 20}
    killed = tiny(corpus, tmp_path / "killed", "bf16", **changes)
    once = tiny(corpus, tmp_path / "once", "bf16", **changes)
    settings.write_config(killed, tmp_path / "run.json")
    command = [sys.executable, "-m", "megafp4", "train", "--config", str(tmp_path / "run.json")]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not any(row["step"] >= 8 for row in read_rows(metrics)):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(command[3:]) == 0
    assert "continuing after step" in capsys.readouterr().out
    train(build(once, quiet=True))
    mine, theirs = summary(tmp_path / "killed"), summary(tmp_path / "once")
    for key in ("valid_loss", "train_loss", "ledger", "steps"):
        assert mine[key] == theirs[key]
    for kind in ("train", "eval"):
        found = [[(row["step"], row["loss"]) for row in rows(tmp_path / n, kind)] for n in
                 ("killed", "once")]  # fmt: skip
        assert found[0] == found[1]


def test_errors_of_a_process_have_exit_code_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "megafp4", "train", "gpt-tinny"]
    root = str(Path(__file__).resolve().parents[1])
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: unknown preset 'gpt-tinny'")
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["train --help", "presets gpt-tiny", "presets", "--help"])
def test_a_reader_that_has_enough_is_no_error(command: str) -> None:
    """As in ``megafp4 train --help | head``: the pipe is closed before anything is read."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "megafp4", *command.split()],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.stderr == ""
    assert done.returncode in (1, 128 + signal.SIGPIPE)  # 1 is what rich ends with


def test_help_and_version(capsys: Captured) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "megafp4 COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megafp4 0.")
    assert main(["data", "--help"]) == 0
    assert "megafp4 data {corpus,preprocess}" in capsys.readouterr().out
    assert main(["train", "gpt-tiny", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Sequences per optimizer step" in text
    assert f"(default: {get_preset('gpt-tiny').train.steps})" in text


def test_lists_name_everything(capsys: Captured) -> None:
    assert main(["recipes"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in recipe_names())
    assert main(["recipes", "mxfp4"]) == 0
    assert "2502.20586" in capsys.readouterr().out
    assert main(["presets"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in preset_names())
    assert main(["formats"]) == 0
    assert "e2m1" in capsys.readouterr().out.lower()


def test_a_printed_preset_is_a_configuration_file(tmp_path: Path, capsys: Captured) -> None:
    assert main(["presets", "gpt-1.3b"]) == 0
    (tmp_path / "p.json").write_text(capsys.readouterr().out)
    assert settings.read_config(tmp_path / "p.json") == get_preset("gpt-1.3b")


def test_preprocessed_text_trains(file: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} " * 30}) + "\n" for i in range(40)))
    prefix = str(tmp_path / "tokens")
    argv = ["data", "preprocess", "--input", str(text), "--output", prefix, "--no-progress"]
    assert main([*argv, "--workers", "1"]) == 0
    assert "40 documents" in capsys.readouterr().out
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {prefix}.bin exists already")
    assert error.count("\n") == 1
    assert main([*argv, "--overwrite", "--workers", "1"]) == 0
    assert main(["train", "--config", str(file), "--quiet", "--data.train", prefix]) == 0
    assert summary(tmp_path / "out")["steps"] == 2


def test_compare_makes_the_data_once_and_passes_everything_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    calls: list[tuple[Any, ...]] = []

    def prepare(folder: str) -> tuple[str, str]:
        made.append(folder)
        return "a", "b"

    def run_compare(config: RunConfig, names: list[str], **options: Any) -> int:
        calls.append((config.data, config.train.seed, names, options))
        return 1

    monkeypatch.setattr("megafp4.data.corpus.prepare", prepare)
    monkeypatch.setattr("megafp4.train.compare.run_compare", run_compare)
    opened: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "megafp4.train.build.open_batches", lambda config, *_: opened.append(config.data.train)
    )
    out = str(tmp_path / "out")
    argv = ["compare", "gpt-tiny", "--recipes", "bf16, fp4", "--jobs", "3", "--train.seed", "8"]
    assert main([*argv, "--out", out]) == 1
    assert main([*argv, "--out", out, "--data.train", "mine"]) == 1
    assert made == [f"{out}/data"]
    assert opened == [(), ("mine",)]
    preset = get_preset("gpt-tiny").data
    expected = (8, ["bf16", "fp4"], {"out": out, "jobs": 3})
    assert calls == [
        (dataclasses.replace(preset, cache=f"{out}/data"), *expected),
        (dataclasses.replace(preset, train=("mine",)), *expected),
    ]
