"""What a checkpoint of a run holds, and how a run goes on from it.

Tensors: the model's as they are stored (grid codes for DQT), the optimizer's moments, the state of
the generators that dropout draws from, and what the backend carries from call to call. JSON: how
far the run is, the guard's running mean, the precision ledger, the clock. Data needs nothing:
batches follow from the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megafp4 import checkpoint
from megafp4.backends.ledger import Ledger
from megafp4.checkpoint.layout import complete_steps
from megafp4.errors import CheckpointError

if TYPE_CHECKING:
    from megafp4.train.build import Run

_BACKEND = "backend"  # group of tensors, where the backend carries any


@dataclass
class Progress:
    """How far a run is."""

    done: int = 0
    """Optimizer steps behind it."""
    train_loss: float | None = None
    """Loss of the last step."""
    valid_loss: float | None = None
    """Latest validation loss."""
    saved: int = 0
    """Step of the newest checkpoint; 0 if there is none."""
    stopped_by: int | None = None
    """Number of the signal that ended this process early."""


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of the run as it is after ``progress.done`` steps."""
    carried = run.backend.state_dict(run.device)
    losses = {"train_loss": progress.train_loss, "valid_loss": progress.valid_loss}
    checkpoint.save(
        run.folder / "checkpoints",
        progress.done,
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "rng": checkpoint.capture_rng(run.device),
            **({_BACKEND: carried} if carried else {}),
        },
        {
            **losses,
            "guard": run.guard.state_dict(),
            "ledger": run.precision.ledger.to_json(),
            "clock": run.clock.state_dict(),
            "threads": torch.get_num_threads(),
            "data": run.data.fingerprint(),
        },
        keep=run.train.keep_checkpoints,
    )
    progress.saved = progress.done


def restore(run: Run) -> Progress:
    """Bring a freshly built run to its latest checkpoint, if there is one.

    Raises:
        CheckpointError: The checkpoint is damaged, holds pickles, is of another model or backend,
            or was trained on other data.
    """
    folder = run.folder / "checkpoints"
    if not complete_steps(folder):
        # A folder of pickles is not "no checkpoint": starting over would hide that it was ignored.
        checkpoint.refuse_pickles(folder)
        return Progress()
    saved = checkpoint.load(folder)
    model = run.model.state_dict()
    checkpoint.check_compatible(
        checkpoint.signature(model), checkpoint.signature(saved.tensors["model"])
    )
    if saved.meta["data"] != run.data.fingerprint():
        raise CheckpointError(
            f"{saved.path} was trained on other tokens than data.train and data.valid hold now: "
            "restore the token files, or choose another --out"
        )
    run.model.load_state_dict(saved.tensors["model"])
    run.optimizer.load_state_dict(saved.tensors["optimizer"])
    checkpoint.restore_rng(saved.tensors["rng"], run.device)
    run.backend.load_state_dict(saved.tensors.get(_BACKEND, {}), run.device)
    run.guard.load_state_dict(saved.meta["guard"])
    run.clock.load_state_dict(saved.meta["clock"])
    run.precision.ledger = Ledger.from_json(saved.meta["ledger"])
    if saved.meta["threads"] != torch.get_num_threads():
        run.metrics.screen.say(
            f"saved by a process with {saved.meta['threads']} threads, continuing with "
            f"{torch.get_num_threads()}: sums run in another order, so set OMP_NUM_THREADS="
            f"{saved.meta['threads']} if the result must be the same bit for bit"
        )
    losses = saved.meta["train_loss"], saved.meta["valid_loss"]
    return Progress(saved.step, *losses, saved=saved.step)
