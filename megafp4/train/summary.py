"""What a finished run leaves for reports: ``ledger.json`` and, last of all, ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megafp4 import __version__
from megafp4.optim import memory_report

if TYPE_CHECKING:
    from megafp4.train.build import Run
    from megafp4.train.state import Progress

SUMMARY = "summary.json"
"""A run folder that holds this file is finished."""


def write_summary(run: Run, progress: Progress) -> None:
    """Write the precision ledger and the summary of a run that took its last step."""
    ledger = run.precision.ledger
    _write(run.folder / "ledger.json", ledger.to_json())
    steps_per_s = run.clock.mean_steps_per_s()
    tokens_per_s = None if steps_per_s is None else steps_per_s * run.data.tokens_per_step
    summary = {
        "name": run.name,
        "recipe": run.recipe_name,
        "steps": progress.done,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "valid_loss": progress.valid_loss,
        "train_loss": progress.train_loss,
        "bytes_per_parameter": memory_report(run.model.named_parameters(), run.optimizer),
        "ledger": ledger.by_gemm(),
        "raised_blocks": sum(run.backend.raised_blocks().values()),
        "spikes": run.guard.spikes,
        "wall_s": run.clock.wall_s,
        "tokens_per_s": tokens_per_s,
        "torch": torch.__version__,
        "megafp4": __version__,
        "threads": torch.get_num_threads(),
    }
    _write(run.folder / SUMMARY, json.dumps(summary, indent=2))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
