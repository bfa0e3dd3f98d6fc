"""Where the numbers of a run go: the console, JSON lines, TensorBoard.

One row is one flat dictionary with a ``kind`` and a ``step`` (optimizer steps done so far). Rates
count optimizer steps only, not evaluation and checkpoints; the mean of the run also leaves out the
first step of each process, which pays for start-up. TFLOP/s and MFU come in both conventions in
use, causal attention counted at half the square (Megatron since 2025) and in full (PaLM,
torchtitan); neither counts recomputation, and both compare with the dense BF16 peak whatever the
recipe.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from megafp4.report.load import read_jsonl

Row = dict[str, Any]

DENSE_BF16_PEAK = {"H100 80GB HBM3": 989.4e12, "H100 SXM": 989.4e12, "H200": 989.4e12}
"""FLOP/s without sparsity, by a part of the device's name; PCIe and NVL boards are slower."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run computes, to turn seconds into rates."""

    steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: int
    """Tokens of one global batch."""
    flops_per_token_half: float
    """Forward and backward FLOPs per token, causal attention counted at half."""
    flops_per_token_full: float
    """The same with the full attention square."""
    peak_flops: float | None
    """Dense BF16 FLOP/s of all devices, or None where it is not known (any CPU)."""
    ranks: int = 1
    """Processes that share the work, with a device each."""


def peak_flops(device: torch.device) -> float | None:
    """Dense BF16 peak of a device in FLOP/s, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_BF16_PEAK.items() if part in name), None)


class Clock:
    """Seconds of training, across interruptions.

    Used as ``with clock.step(): ...`` around each optimizer step.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._earlier_s = 0.0
        self._warm = False
        self._window_s, self._window_steps = 0.0, 0
        self._total_s, self._total_steps = 0.0, 0

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, everything included; time between processes is not."""
        return self._earlier_s + time.perf_counter() - self._started

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._window_s += elapsed
        self._window_steps += 1
        if self._warm:
            self._total_s += elapsed
            self._total_steps += 1
        self._warm = True

    def steps_per_s(self) -> float:
        """Optimizer steps per second since the last call."""
        rate = self._window_steps / self._window_s if self._window_s else 0.0
        self._window_s, self._window_steps = 0.0, 0
        return rate

    def mean_steps_per_s(self) -> float | None:
        """Optimizer steps per second over the run, or None after a single step."""
        return self._total_steps / self._total_s if self._total_steps else None

    def state_dict(self) -> dict[str, float]:
        """What a resumed run adds its own seconds to."""
        return {"wall_s": self.wall_s, "step_s": self._total_s, "steps": self._total_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Count on from an interrupted run."""
        self._earlier_s = state["wall_s"]
        self._total_s, self._total_steps = state["step_s"], int(state["steps"])


class JsonLines:
    """A file with one JSON object a line, cut back to a step when a run is resumed.

    Args:
        path: The file; created if missing.
        done: Steps that the resumed run has behind it. Rows of later steps, and a last line that
            a kill cut short, are dropped, so that no step appears twice.
    """

    def __init__(self, path: Path, done: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= done]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append one row, visible to readers at once."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines that may be missing, or still be written to."""
    return read_jsonl(path) if path.exists() else []


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class Screen:
    """The user's terminal: a live bar there, plain lines in a file or pipe, nothing if quiet."""

    def __init__(self, label: str, work: Workload, *, quiet: bool) -> None:
        self._console = RichConsole(quiet=quiet, highlight=False, soft_wrap=True)
        self._work = work
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, expand=True)
            self._task = self._bar.add_task(label, total=work.steps)
            # A line of their own: beside the bar they leave no room for it in 80 columns.
            self._numbers = Text(no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._numbers), console=self._console)

    def start(self, done: int) -> None:
        """Begin, with ``done`` steps behind."""
        self.say("TFLOP/s and MFU count causal attention half / full, against the BF16 peak")
        if self._live is not None:
            self._bar.reset(self._task, completed=done)
            self._live.start()

    def advance(self, done: int) -> None:
        """Move the bar."""
        if self._live is not None:
            self._bar.update(self._task, completed=done)

    def show(self, row: Row) -> None:
        """Show a row of metrics."""
        width = len(str(self._work.steps))
        head = f"step {row['step']:>{width}}/{self._work.steps}"
        if row["kind"] == "eval":
            self.say(f"{head}  validation loss {row['loss']:.4f}")
        elif self._live is None:
            left_s = (self._work.steps - row["step"]) * self._work.tokens_per_step
            eta = _duration(left_s / row["tokens_per_s"]) if row["tokens_per_s"] else "?"
            self.say(f"{head}  {describe(row)}  ETA {eta}")
        else:
            self._numbers.plain = describe(row, brief=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def describe(row: Row, *, brief: bool = False) -> str:
    """One line for the numbers of a training row; ``brief`` fits into 80 columns."""
    mfu = "n/a"
    if row["mfu_half"] is not None:
        mfu = f"{100 * row['mfu_half']:.1f}/{100 * row['mfu_full']:.1f} %"
    optimizer = "" if brief else f"grad {row['grad_norm']:.3g}  lr {row['lr']:.2e}  "
    return (
        f"loss {row['loss']:.4f}  {optimizer}{row['tokens_per_s']:,.0f} tokens/s  "
        f"{row['tflops']:.3g}/{row['tflops_full']:.3g} TFLOP/s  MFU {mfu}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Metrics:
    """The run's one outlet for numbers.

    Args:
        folder: Run folder; gets metrics.jsonl, stats.jsonl and tensorboard/.
        work: What a step computes.
        screen: Where the user looks.
        clock: What times the steps.
        raised: Counts raised blocks by layer, GEMM and operand; asked where statistics are
            recorded, for it may wait for the device.
    """

    def __init__(
        self,
        folder: Path,
        work: Workload,
        screen: Screen,
        clock: Clock,
        raised: Callable[[], Mapping[tuple[str, str, str], int]] = dict,
    ) -> None:
        self.screen = screen
        self.clock = clock
        self._folder = folder
        self._work = work
        self._raised = raised

    def open(self, done: int) -> None:
        """Start writing behind step ``done``, dropping what an interrupted run wrote after it."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs need it

        self._rows = JsonLines(self._folder / "metrics.jsonl", done)
        self._stats = JsonLines(self._folder / "stats.jsonl", done)
        # Events after a kill stay in the old file; purge_step tells TensorBoard to ignore them.
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=done + 1)
        self.screen.start(done)

    def train(
        self, done: int, *, loss: float, grad_norm: float, lr: float, **others: float
    ) -> None:
        """Record training progress after step ``done``; rates cover the steps since the last row.

        Args:
            done: Optimizer steps so far.
            loss: Mean loss of the step's global batch, before its update.
            grad_norm: Global gradient norm before clipping.
            lr: Learning rate of the step.
            others: Further numbers to record under their names.
        """
        tokens_per_s = self.clock.steps_per_s() * self._work.tokens_per_step
        flops = tokens_per_s * self._work.flops_per_token_half
        flops_full = tokens_per_s * self._work.flops_per_token_full
        peak, ranks = self._work.peak_flops, self._work.ranks
        each = {"tokens_per_s_per_rank": tokens_per_s / ranks} if ranks > 1 else {}
        self._write(
            {
                "kind": "train",
                "step": done,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "tokens": done * self._work.tokens_per_step,
                "tokens_per_s": tokens_per_s,
                **each,
                "tflops": flops / 1e12,
                "tflops_full": flops_full / 1e12,
                "mfu_half": flops / peak if peak else None,
                "mfu_full": flops_full / peak if peak else None,
                "time_s": self.clock.wall_s,
                **others,
            }
        )

    def evaluation(self, done: int, loss: float) -> None:
        """Record a validation loss after step ``done``."""
        self._write({"kind": "eval", "step": done, "loss": loss, "time_s": self.clock.wall_s})

    def statistics(self, rows: list[Row]) -> None:
        """Record quantization statistics, one row per layer, GEMM and operand.

        Operands that can have raised blocks also get their number since the run began.
        """
        raised = self._raised()
        for row in rows:
            count = raised.get((row["layer"], row["gemm"], row["operand"]))
            row |= {} if count is None else {"raised_blocks": count}
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            self._stats.write(finite)
            where = f"{row['layer']}/{row['gemm']}.{row['operand']}"
            for key, value in finite.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{key}/{where}", value, row["step"])

    def close(self) -> None:
        """Flush and close everything."""
        self.screen.close()
        for sink in (self._rows, self._stats, self._board):
            sink.close()

    def _write(self, row: Row) -> None:
        self._rows.write(row)
        self.screen.show(row)
        for key, value in row.items():
            if key not in ("kind", "step") and value is not None:
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])


class MutedMetrics(Metrics):
    """Takes the numbers of a rank that writes none."""

    def open(self, done: int) -> None:
        """Write nothing."""

    def statistics(self, rows: list[Row]) -> None:
        """Record nothing; counts what all ranks count together."""
        self._raised()

    def close(self) -> None:
        """Close nothing."""

    def _write(self, row: Row) -> None:
        pass
