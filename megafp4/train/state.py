"""What a checkpoint of a run holds, and how a run goes on from it.

Tensors: the model's as they are stored (grid codes for DQT), the optimizer's moments, the state of
the generators that dropout draws from, and what the backend carries from call to call. JSON: how
far the run is, the guard's running mean, the precision ledger, the clock. Data needs nothing:
batches follow from the step.

What belongs to ranks and not to the model, a backend's state and the scales of gradients on
FP8-LM's wire, goes on where the mesh is the same and starts anew elsewhere.

Several ranks save what each holds, and any number of ranks goes on from it: tensors are found by
their place in the whole model, whatever mesh had them. Only scales of optimizer state that belong
to a tp rank's part stay that rank's: such a run keeps its tp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megafp4 import checkpoint
from megafp4.backends.ledger import Ledger
from megafp4.checkpoint import Parts, Signature
from megafp4.checkpoint.layout import complete_steps
from megafp4.errors import CheckpointError
from megafp4.optim import Optimizer
from megafp4.optim.deepspeed import DeepSpeedOptimizer
from megafp4.optim.optimizer import check_kept_as
from megafp4.optim.sharded import ShardedOptimizer
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.parallel.mesh import MeshSizes
from megafp4.parallel.shared_scale import SharedScaleReducer
from megafp4.train.ledger import run_ledger
from megafp4.train.parallel import TIED, first_then_others, gather_objects
from megafp4.train.parts import expected_names, model_parts, optimizer_parts, row_parts

if TYPE_CHECKING:
    from megafp4.train.build import Run

_BACKEND = "backend"  # group of tensors, where the backend carries any
_REDUCER = "reducer"  # the same of what sums gradients


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
    earlier: Ledger = field(default_factory=Ledger)
    """GEMMs of all ranks up to the checkpoint that this process began from."""


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of the run as it is after ``progress.done`` steps; all ranks must call.

    Raises:
        CheckpointError: A rank could not write.
    """
    run.wait_for_weights()
    folder, keep = run.folder / "checkpoints", run.train.keep_checkpoints
    carried = _carried(run)
    rng = checkpoint.capture_rng(run.device)
    meta = _meta(run, progress)
    if isinstance(run.optimizer, ShardedOptimizer):
        share = partial(gather_objects, run.mesh.world)
        groups = {
            **_parts(run, run.optimizer, writing=True),
            # Generators do not matter to several ranks, which refuse dropout; to one they do.
            "rng": {name: _first_rank(run, tensor) for name, tensor in rng.items()},
            **{
                f"{group}-{run.mesh.rank}": {name: Parts.whole(t) for name, t in state.items()}
                for group, state in carried.items()
            },
        }
        checkpoint.save_sharded(folder, progress.done, groups, meta, run.mesh.rank, share, keep)
    else:
        engine = run.optimizer if isinstance(run.optimizer, DeepSpeedOptimizer) else None
        model = run.model.state_dict() if engine is None else engine.weights()
        tensors = {"model": model, "optimizer": run.optimizer.state_dict(), "rng": rng, **carried}
        write = partial(checkpoint.save, folder, progress.done, tensors, meta, keep)
        first_then_others(run.mesh, lambda: write() if run.writes else None)
    progress.saved = progress.done


def _meta(run: Run, progress: Progress) -> dict[str, Any]:
    return {
        "train_loss": progress.train_loss,
        "valid_loss": progress.valid_loss,
        "guard": run.guard.state_dict(),
        "ledger": run_ledger(run, progress.earlier).to_json(),
        "clock": run.clock.state_dict(),
        "threads": torch.get_num_threads(),
        "data": run.data.fingerprint(),
        "mesh": str(run.mesh.sizes),
    }


def _carried(run: Run) -> dict[str, dict[str, Tensor]]:
    """What this rank carries from step to step, by group of tensors; none of them is empty."""
    found = {_BACKEND: run.backend.state_dict(run.device)}
    reducer = _scaling_reducer(run)
    if reducer is not None:
        found[_REDUCER] = reducer.state_dict()
    return {group: state for group, state in found.items() if state}


def _carry_on(run: Run, reader: checkpoint.ShardedReader) -> None:
    """Take over what this rank carried, if its mesh is the one that saved it."""
    if reader.meta["mesh"] != str(run.mesh.sizes):
        return
    rank, groups = run.mesh.rank, reader.groups()
    if f"{_BACKEND}-{rank}" in groups:
        run.backend.load_state_dict(reader.whole(f"{_BACKEND}-{rank}"), run.device)
    reducer = _scaling_reducer(run)
    if reducer is not None and f"{_REDUCER}-{rank}" in groups:
        scales = reader.whole(f"{_REDUCER}-{rank}")
        reducer.load_state_dict({name: mu.to(run.device) for name, mu in scales.items()})


def _scaling_reducer(run: Run) -> SharedScaleReducer | None:
    reducer = run.optimizer.reducer if isinstance(run.optimizer, ShardedOptimizer) else None
    return reducer if isinstance(reducer, SharedScaleReducer) else None


def _parts(run: Run, optimizer: ShardedOptimizer, *, writing: bool) -> dict[str, dict[str, Parts]]:
    """What this rank holds, or, ``writing``, what it is to write, of model and optimizer."""
    mesh = run.mesh
    # The table that two stages hold is written by the first.
    skip = frozenset({TIED} if mesh.pp.rank > 0 else ())
    if isinstance(optimizer, Zero3Optimizer):
        model = row_parts(optimizer.owned_weights())
    else:
        model = model_parts(run.model, mesh.tp, mesh.replicas, writing=writing, skip=skip)
    owned = optimizer.owned_states()
    states = optimizer_parts(owned, run.model, mesh.tp, writing=writing, skip=skip)
    return {"model": model, "optimizer": states}


def _first_rank(run: Run, tensor: Tensor) -> Parts:
    return Parts.whole(tensor) if run.writes else Parts.none(tensor.shape, tensor.dtype)


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
    path = checkpoint.find(folder)
    if isinstance(run.optimizer, ShardedOptimizer) and checkpoint.is_sharded(path):
        step, meta = _restore_parts(run, run.optimizer, path)
    else:
        step, meta = _restore_whole(run, folder)
    run.guard.load_state_dict(meta["guard"])
    run.clock.load_state_dict(meta["clock"])
    mesh = meta.get("mesh", str(MeshSizes()))
    if mesh != str(run.mesh.sizes):
        run.metrics.screen.say(
            f"saved on {mesh}, continuing on {run.mesh.sizes}: sums run in another order"
        )
    if meta["threads"] != torch.get_num_threads():
        run.metrics.screen.say(
            f"saved by a process with {meta['threads']} threads, continuing with "
            f"{torch.get_num_threads()}: sums run in another order, so set OMP_NUM_THREADS="
            f"{meta['threads']} if the result must be the same bit for bit"
        )
    earlier = Ledger.from_json(meta["ledger"])
    return Progress(step, meta["train_loss"], meta["valid_loss"], saved=step, earlier=earlier)


def _restore_parts(run: Run, optimizer: ShardedOptimizer, path: Path) -> tuple[int, dict[str, Any]]:
    """Read what this rank holds of a checkpoint that several ranks saved."""
    reader = checkpoint.ShardedReader(path)
    reader.check(run.mesh.rank, partial(gather_objects, run.mesh.world))
    _check_data(run, path, reader.meta)
    parts = _parts(run, optimizer, writing=False)
    model = reader.shapes("model")
    if run.mesh.pp.size > 1:  # it holds other stages' tensors as well
        model = {name: entry for name, entry in model.items() if name in parts["model"]}
    checkpoint.check_compatible(expected_names(parts["model"]), model)
    _check_states(run, expected_names(parts["optimizer"]), reader.shapes("optimizer"))
    for name, part in parts["model"].items():
        reader.fill("model", name, part)
    for name, part in parts["optimizer"].items():
        reader.fill("optimizer", name, part)
    optimizer.weights_loaded()
    _carry_on(run, reader)
    return reader.step, reader.meta


def _restore_whole(run: Run, folder: Path) -> tuple[int, dict[str, Any]]:
    """Read the whole of a checkpoint and keep this rank's part."""
    saved = checkpoint.load(folder)
    _check_data(run, saved.path, saved.meta)
    model, optimizer = saved.tensors["model"], saved.tensors["optimizer"]
    if isinstance(run.optimizer, DeepSpeedOptimizer):
        run.optimizer.load_weights(model)
        run.optimizer.load_state_dict(optimizer, saved.step)
    else:
        _load_whole(run, run.optimizer, model, optimizer)
    checkpoint.restore_rng(saved.tensors["rng"], run.device)
    run.backend.load_state_dict(saved.tensors.get(_BACKEND, {}), run.device)
    return saved.step, saved.meta


def _load_whole(
    run: Run,
    optimizer: Optimizer | ShardedOptimizer,
    model: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
) -> None:
    found = checkpoint.signature(model)
    if isinstance(optimizer, Optimizer):
        if any("@tp" in name for name in states):
            mine = checkpoint.signature(optimizer.state_dict())
            _check_states(run, mine, checkpoint.signature(states))
        checkpoint.check_compatible(checkpoint.signature(run.model.state_dict()), found)
        run.model.load_state_dict(model)
        optimizer.load_state_dict(states)
        return
    parts = _parts(run, optimizer, writing=False)
    _check_states(run, expected_names(parts["optimizer"]), checkpoint.signature(states))
    if run.mesh.pp.size > 1:
        found = {name: entry for name, entry in found.items() if name in parts["model"]}
    checkpoint.check_compatible(expected_names(parts["model"]), found)
    for name, part in parts["model"].items():
        for box, memory in part.held:
            memory.copy_(box.of(model[name]))
    for name, part in parts["optimizer"].items():
        for box, memory in part.held:
            memory.copy_(box.of(states[name]))
    optimizer.weights_loaded()


def _check_states(run: Run, wanted: Signature, saved: Signature) -> None:
    """Refuse optimizer state that this run cannot find its own in."""
    dtypes = {name: dtype for name, (_, dtype) in saved.items()}
    check_kept_as(run.optimizer.params, run.optim, dtypes)
    missing = sorted(name for name in wanted if name not in saved)
    if not missing:
        # A pipeline's rank finds other stages' state as well.
        found = {name: saved[name] for name in wanted}
        checkpoint.check_compatible(wanted, found, "optimizer")
        return
    base = missing[0].partition("@tp")[0]
    marked = [name for name in saved if name.startswith(f"{base}@tp")]
    if marked:
        raise CheckpointError(
            f"{base!r} of the saved optimizer has scales of tp {marked[0].rpartition('of')[2]} and "
            f"this run has tp {run.mesh.tp.size}: continue with the tp that saved it"
        )
    raise CheckpointError(
        f"the saved optimizer lacks {base!r} ({len(missing)} names): load the optimizer of the "
        "same model, recipe and optim.states, and with the tp that saved it"
    )


def _check_data(run: Run, path: Path, meta: Mapping[str, Any]) -> None:
    if meta["data"] != run.data.fingerprint():
        raise CheckpointError(
            f"{path} was trained on other tokens than data.train and data.valid hold now: "
            "restore the token files, or choose another --out"
        )
