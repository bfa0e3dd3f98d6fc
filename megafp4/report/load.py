"""Reading run folders: the only thing a report knows about training is what training wrote down."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafp4.errors import DataError

BASELINE = "bf16"
"""Recipe that the others are measured against."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder holds. Files that do not exist yet are empty here, not errors."""

    folder: Path
    """The run folder."""
    config: dict[str, Any]
    """config.json: the resolved RunConfig."""
    summary: dict[str, Any]
    """summary.json; empty while the run is unfinished."""
    train: list[dict[str, Any]]
    """Rows of metrics.jsonl of kind ``train``, by step, each step once."""
    evals: list[dict[str, Any]]
    """Rows of metrics.jsonl of kind ``eval``, by step, each step once."""
    stats: list[dict[str, Any]]
    """Rows of stats.jsonl: one per step, layer, GEMM and operand."""
    ledger: Any
    """ledger.json as it was written, or None."""

    @property
    def label(self) -> str:
        """The recipe's name, or the precision schedule where there is one."""
        schedule = str(self.config.get("precision_schedule") or "")
        # With @, the recipe is in force before the schedule's first step.
        if "@" in schedule:
            return f"{self.config.get('recipe')}, {schedule}"
        return schedule or str(self.config.get("recipe", self.folder.name))

    @property
    def is_baseline(self) -> bool:
        """Whether the others are measured against this run."""
        return self.label == BASELINE

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def steps(self) -> int:
        """Optimizer steps that were asked for; 0 where the configuration does not say."""
        return int(self.config.get("train", {}).get("steps", 0))

    @property
    def last_step(self) -> int:
        """Last step that left a trace in metrics.jsonl."""
        return max((int(row["step"]) for row in self.train[-1:] + self.evals[-1:]), default=0)

    @property
    def valid_loss(self) -> float:
        """Final validation loss, or the latest one of an unfinished run; NaN if there is none."""
        if self.summary.get("valid_loss") is not None:
            return number(self.summary["valid_loss"])
        return number(self.evals[-1]["loss"]) if self.evals else math.nan


def number(value: Any) -> float:
    """Return ``value`` as a float, with JSON's null as NaN."""
    return math.nan if value is None else float(value)


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        DataError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not valid JSON ({error}): remove it or run again in another folder"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        DataError: The file is not JSON, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds a JSON {type(value).__name__}, not an object: remove it or run again in "
            "another folder"
        )
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a last line without line end is not there yet.

    Raises:
        DataError: Another line is not a JSON object.
    """
    rows = []
    for index, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {index} is not a JSON object: the file is damaged, remove that line"
            )
        rows.append(row)
    return rows


def load_run(folder: Path | str) -> Run:
    """Read one run folder.

    Raises:
        DataError: ``folder`` is no run folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} is not a run folder (it has no config.json): "
            "give the folder that megafp4 train or megafp4 compare wrote"
        )
    metrics = _rows(folder / "metrics.jsonl")
    summary = folder / "summary.json"
    return Run(
        folder=folder,
        config=read_object(folder / "config.json"),
        summary=read_object(summary) if summary.is_file() else {},
        train=_by_step(metrics, "train"),
        evals=_by_step(metrics, "eval"),
        stats=_rows(folder / "stats.jsonl"),
        ledger=_optional(folder / "ledger.json"),
    )


def load_runs(folder: Path | str) -> list[Run]:
    """Read a run folder, or a folder of run folders; the baseline comes first, then by name.

    Raises:
        DataError: Neither ``folder`` nor any folder in it is a run folder.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return [load_run(folder)]
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise DataError(
            f"{folder} holds no runs (no config.json in it or one level below): "
            "give the folder that megafp4 train or megafp4 compare wrote"
        )
    runs = [load_run(path) for path in found]
    order = _optional(folder / "order.json") or []
    rank = {name: index for index, name in enumerate(order)}
    return sorted(
        runs,
        key=lambda run: (
            not run.is_baseline,
            rank.get(run.folder.name, len(rank)),
            run.folder.name,
        ),
    )


def baseline_of(runs: list[Run]) -> Run | None:
    """Return the run that the others are measured against, if it is among ``runs``."""
    return next((run for run in runs if run.is_baseline), None)


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _by_step(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    # A run that was killed repeats the steps after its last checkpoint: the later row counts.
    latest = {int(row["step"]): row for row in rows if row.get("kind") == kind}
    return [latest[step] for step in sorted(latest)]
