"""Jobs as a user starts them: processes of their own, found by torchrun's variables."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megafp4 import settings
from megafp4.config import ParallelConfig
from tests.train.tiny import rows, tiny, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def command(corpus: str, folder: Path, steps: int, **parallel: object) -> list[str]:
    config = tiny(corpus, folder / "out", steps=steps, vocab_size=258, eval_interval=0)
    config = dataclasses.replace(config, parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    settings.write_config(config, folder / "run.json")
    return ["-m", "megafp4", "train", "--config", str(folder / "run.json")]


def start(arguments: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """Start ranks as torchrun does, without what ends them all when one has ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **shared, **each},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in own
    ]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_rank_ends_the_job_with_a_message(corpus: str, tmp_path: Path) -> None:
    first, second = start(command(corpus, tmp_path, 10_000))
    wait_until(lambda: len(rows(tmp_path / "out", "train")) > 2)
    second.kill()
    _, text = first.communicate(timeout=60)
    assert first.returncode == 2
    assert "error: rank 0 of 2 in group" in text
    assert "lost the others" in text
    second.communicate()


def test_a_signal_to_one_rank_saves_and_the_same_command_continues(
    corpus: str, tmp_path: Path
) -> None:
    once, often = tmp_path / "once", tmp_path / "often"
    for folder in (once, often):
        folder.mkdir()
    steps = 40
    for each in start(command(corpus, once, steps, tp=2)):
        assert each.wait(60) == 0
    again = command(corpus, often, steps, tp=2)
    ranks = start(again)
    wait_until(lambda: len(rows(often / "out", "train")) > 2)
    ranks[1].send_signal(signal.SIGTERM)
    answers = [each.communicate(timeout=60) for each in ranks]
    assert [each.returncode for each in ranks] == [128 + signal.SIGTERM] * 2
    assert "the same command continues" in answers[0][0]
    assert answers[1][0] == ""
    assert len(rows(often / "out", "train")) < steps
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *again],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: everything about the run is in") == 1
    curves = [[row["loss"] for row in rows(each / "out", "train")] for each in (once, often)]
    assert len(curves[0]) == steps
    assert curves[0] == curves[1]


def test_a_bad_mesh_is_one_sentence_of_the_first_rank(corpus: str, tmp_path: Path) -> None:
    first, second = start(command(corpus, tmp_path, 5, tp=3))
    out, text = first.communicate(timeout=60)
    # The others wait for a launcher to end them.
    second.terminate()
    other = second.communicate(timeout=60)
    assert first.returncode == 2
    assert out == ""
    assert text.splitlines() == [
        "error: pp 1 x cp 1 x tp 3 needs a multiple of 3 ranks, and the job has 2: change a size "
        "or the number of ranks"
    ]
    assert other == ("", "")
    assert not (tmp_path / "out").exists()
