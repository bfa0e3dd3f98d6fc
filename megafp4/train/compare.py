"""Training the same model under several recipes, side by side, and comparing the results.

Each recipe is a process of its own (``python -m megafp4 train``) with the same seed, hence the
same initial weights and the same batches, in a run folder of its own below one output folder. The
runs are watched through the metrics that they write anyway, so this file knows nothing about
training, and a comparison continues where it was interrupted because each run does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megafp4 import report, settings
from megafp4.config import RunConfig
from megafp4.errors import ConfigError
from megafp4.recipes import get_recipe
from megafp4.train.compare_display import open_display
from megafp4.train.folder import check_folder
from megafp4.train.summary import SUMMARY

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.2
GRACE_S = 60.0
"""How long a stopped run may take to finish its step and write its checkpoint."""


class MetricsTail:
    """Reads the lines that were appended to a JSONL file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_id = 0
        self._position = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows that were completed since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            # A resumed run replaces the file by one without the rows after its checkpoint.
            file_id = os.fstat(file.fileno()).st_ino
            if file_id != self._file_id:
                self._file_id, self._position = file_id, 0
            file.seek(self._position)
            complete, _, _ = file.read().rpartition(b"\n")
        if not complete:
            return []
        self._position += len(complete) + 1
        return [json.loads(line) for line in complete.splitlines()]


class Job:
    """One recipe's run: its process and what is known about its progress."""

    def __init__(self, name: str, config: RunConfig, log: Path) -> None:
        self.name = name
        self.config = config
        self.folder = Path(config.out)
        self.log = log
        self.state = "waiting"
        self.step = 0
        self.steps = config.train.steps
        self.loss: float | None = None
        self.eta_s: float | None = None
        self.error: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tail = MetricsTail(self.folder / "metrics.jsonl")
        self._first: tuple[int, float] | None = None

    def is_finished(self) -> bool:
        """Whether the run folder holds the result."""
        return (self.folder / SUMMARY).is_file()

    def start(self, environment: dict[str, str]) -> None:
        """Start, or continue, the run; it reads its configuration from beside its log."""
        request = self.log.with_suffix(".json")
        settings.write_config(self.config, request)
        # What an earlier attempt wrote says nothing about this one's speed.
        self._see(self._tail.new_rows())
        self._first = None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                train_command(request),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.state = "running"

    def poll(self) -> None:
        """Update the progress, and the state once the process has ended."""
        assert self._process is not None
        code = self._process.poll()
        self._see(self._tail.new_rows())
        if code is None:
            return
        if code == 0:
            self.finish()
        else:
            self.state = "failed"
            self.error = failure(self.log, code)

    def finish(self) -> None:
        """Show the run as complete."""
        self._see(self._tail.new_rows())
        self.step = self.steps
        self.state = "done"

    def stop(self) -> None:
        """Ask a running process to end between two steps."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Wait for a stopped process; end it the hard way when it takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _see(self, rows: list[dict[str, Any]]) -> None:
        now = time.monotonic()
        for row in rows:
            if row.get("kind") != "train":
                continue
            self.step, self.loss = row["step"], row["loss"]
        if not rows or not self.step:
            return
        if self._first is None:
            self._first = (self.step, now)
        elif self.step > self._first[0]:
            step, then = self._first
            self.eta_s = (self.steps - self.step) * (now - then) / (self.step - step)


def run_compare(
    config: RunConfig,
    recipes: Sequence[str],
    *,
    out: Path | str,
    jobs: int = 2,
    console: Console | None = None,
) -> int:
    """Train ``config`` under each recipe, then print the table and write the report.

    Runs that ``out`` already holds complete are not repeated, interrupted ones are continued. A
    recipe that fails does not stop the others.

    Args:
        config: The run that all recipes share; its ``recipe``, ``name`` and ``out`` are replaced.
        recipes: Names of recipes, each once.
        out: Folder that receives one run folder per recipe and the report.
        jobs: Runs at a time; they share the processor's cores evenly.
        console: Where to print; standard output if None.

    Returns:
        The process exit code: 0, 1 if a recipe failed, or 130 if the user interrupted.

    Raises:
        ConfigError: What :func:`check_comparison` finds, ``out`` holds runs of another
            configuration, or it cannot be written.
        UnsupportedError: The report's packages are not installed.
    """
    from rich.console import Console

    console = console or Console()
    out = Path(out)
    check_comparison(config, recipes, jobs, out)
    report.require_packages()
    runs = _plan(config, recipes, out)
    environment = _environment(min(jobs, len(runs)))
    console.print(
        f"{len(runs)} runs of {config.train.steps} steps, {jobs} at a time with "
        f"{environment['OMP_NUM_THREADS']} threads each, in {out}",
        soft_wrap=True,
        highlight=False,
    )
    try:
        with _terminate_as_interrupt(), open_display(console) as display:
            for _ in _progress(runs, jobs, environment, console):
                display.show(runs)
            display.show(runs)
    except KeyboardInterrupt:
        console.print("Interrupted: the same command continues where the runs stopped.")
        return 130
    failed = [run for run in runs if run.error]
    for run in failed:
        console.print(f"[red]{run.name} failed:[/red] ", end="")
        console.print(run.error, markup=False, highlight=False, soft_wrap=True)
    if len(failed) < len(runs):
        _present(out, console)
    return 1 if failed else 0


def train_command(request: Path) -> list[str]:
    """Return the command that trains the configuration in the file ``request``."""
    return [sys.executable, "-m", "megafp4", "train", "--config", str(request)]


def failure(log: Path, code: int) -> str:
    """Say in one sentence why a process ended: its own last words, and where to read the rest."""
    lines = log.read_text(errors="replace").strip().splitlines()
    words = lines[-1].strip().removeprefix("error: ").rstrip(".") if lines else "it said nothing"
    if code < 0:
        words = f"it was ended by {signal.Signals(-code).name}"
    return f"{words} (log: {log})"


def check_comparison(config: RunConfig, recipes: Sequence[str], jobs: int, out: Path) -> None:
    """Find what makes a comparison impossible; nothing is written.

    Raises:
        ConfigError: Unknown, repeated or no recipes, a precision schedule, no jobs, or ``out`` is
            a run folder itself.
    """
    if not recipes:
        raise ConfigError("no recipes were given: name at least one, e.g. --recipes bf16,mxfp4")
    for name in recipes:
        get_recipe(name)
    repeated = sorted({name for name in recipes if list(recipes).count(name) > 1})
    if repeated:
        raise ConfigError(f"recipes {', '.join(repeated)} are given twice: name each once")
    if config.precision_schedule:
        raise ConfigError(
            f"precision_schedule is {config.precision_schedule!r}, but compare trains whole runs "
            "under each recipe: train scheduled runs with megafp4 train, into the same folder"
        )
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}: give a positive integer")
    if (out / "config.json").exists():
        raise ConfigError(f"out is {out}, the folder of a single run: choose another folder")


def _plan(config: RunConfig, recipes: Sequence[str], out: Path) -> list[Job]:
    runs = [
        Job(
            name,
            dataclasses.replace(
                config, recipe=name, name=f"{config.name}-{name}", out=str(out / name)
            ),
            out / "logs" / f"{name}.log",
        )
        for name in recipes
    ]
    for run in runs:
        check_folder(run.config)
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "order.json").write_text(json.dumps(list(recipes)) + "\n")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}): choose another --out") from error
    return runs


def _progress(
    runs: Sequence[Job], jobs: int, environment: dict[str, str], console: Console
) -> Iterator[None]:
    """Run everything, at most ``jobs`` at a time, yielding after each look at the processes."""
    waiting = list(runs)
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if run.is_finished():
                    run.finish()
                else:
                    run.start(environment)
                    running.append(run)
            for run in running:
                run.poll()
            running = [run for run in running if run.state == "running"]
            yield
            if running:
                time.sleep(POLL_S)
    finally:
        if running:
            console.print(
                f"Stopping: {len(running)} running, each finishes its step and saves first.",
                soft_wrap=True,
                highlight=False,
            )
        for run in running:
            run.stop()
        for run in running:
            run.wait(GRACE_S)


def _present(out: Path, console: Console) -> None:
    page = report.write_report(out)
    console.print(report.to_rich(report.table_rows(report.load_runs(out))))
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    console.print(f"Plots:  {page.parent / 'plots'}", soft_wrap=True, highlight=False)


def _environment(share: int) -> dict[str, str]:
    environment = dict(os.environ)
    # Two runs that each use all cores are slower than two that use half.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // share)))
    return environment


def _cores() -> int:
    # The affinity mask is what a job scheduler grants; not every system has one.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the comparison as Ctrl-C does, so that no child outlives it."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
