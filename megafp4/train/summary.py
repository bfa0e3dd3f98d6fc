"""What a finished run leaves for reports: ``ledger.json`` and, last of all, ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from megafp4 import __version__
from megafp4.optim import Optimizer, memory_report
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.train.ledger import run_ledger

if TYPE_CHECKING:
    from megafp4.train.build import Run
    from megafp4.train.state import Progress

SUMMARY = "summary.json"
"""A run folder that holds this file is finished."""


def write_summary(run: Run, progress: Progress) -> None:
    """Write the precision ledger and the summary of a run that took its last step.

    All ranks call it and the first one writes: its memory, and what all have counted.
    """
    counted = torch.tensor([sum(run.backend.raised_blocks().values())])
    raised = int(run.mesh.world.all_reduce(counted, "raised blocks"))
    ledger = run_ledger(run, progress.earlier)
    if not run.writes:
        return
    _write(run.folder / "ledger.json", ledger.to_json())
    steps_per_s = run.clock.mean_steps_per_s()
    tokens_per_s = None if steps_per_s is None else steps_per_s * run.data.tokens_per_step
    summary = {
        "name": run.name,
        "recipe": run.recipe_name,
        "steps": progress.done,
        "parameters": run.parameters,
        "valid_loss": progress.valid_loss,
        "train_loss": progress.train_loss,
        "bytes_per_parameter": _bytes_per_parameter(run),
        "ledger": ledger.by_gemm(),
        "raised_blocks": raised,
        "spikes": run.guard.spikes,
        "wall_s": run.clock.wall_s,
        "tokens_per_s": tokens_per_s,
        "mesh": str(run.mesh.sizes),
        "ranks": run.mesh.world.size,
        "torch": torch.__version__,
        "megafp4": __version__,
        "threads": torch.get_num_threads(),
    }
    _write(run.folder / SUMMARY, json.dumps(summary, indent=2))


def _bytes_per_parameter(run: Run) -> dict[str, float]:
    """Bytes that this rank keeps between steps, per parameter of its part of the model."""
    if not isinstance(run.optimizer, Zero3Optimizer):
        # Which is only asked for its bytes.
        return memory_report(run.model.named_parameters(), cast(Optimizer, run.optimizer))
    weights, states = run.optimizer.weight_bytes(), run.optimizer.state_bytes()
    parts = {"weights": weights, "optimizer": states, "total": weights + states}
    return {name: count / run.parameters for name, count in parts.items()}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
