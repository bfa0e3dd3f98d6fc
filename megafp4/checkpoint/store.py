"""Save and load checkpoints; :mod:`megafp4.checkpoint.layout` shows the folder.

A kill at any moment leaves the previous checkpoint loadable, and a checkpoint that loads is the
one that was saved, byte for byte.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megafp4.checkpoint import layout
from megafp4.checkpoint.integrity import (
    checksums,
    read_json,
    refuse_pickle,
    refuse_pickles,
    verify,
)
from megafp4.checkpoint.sharded import ShardedReader, is_sharded
from megafp4.checkpoint.tensors import read_tensors, write_tensors
from megafp4.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)
_GROUP = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    step: int
    """Optimizer steps done when it was saved."""
    tensors: dict[str, dict[str, Tensor]]
    """CPU tensors by group (``model``, ``optimizer``, ...) and name."""
    meta: dict[str, Any]
    """The caller's JSON data."""
    path: Path
    """Folder it was loaded from."""


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Save a checkpoint; when this returns, it is on disk.

    Args:
        folder: Folder of the run's checkpoints, created if need be.
        step: Optimizer steps done.
        tensors: Groups of tensors; each becomes a file ``<group>.safetensors``.
        meta: JSON data: configuration, consumed samples, running means. Floats come back bit for
            bit; tuples come back as lists and integer keys as strings.
        keep: Checkpoints that stay, this one included; the oldest go. None keeps all.

    Returns:
        Folder of this checkpoint.

    Raises:
        ConfigError: ``keep`` is below 1, ``step`` is negative, or a group has no proper name.
        CheckpointError: The data cannot be stored.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"cannot keep {keep} checkpoints: keep at least 1")
    if step < 0:
        raise ConfigError(f"cannot save a checkpoint of step {step}: count steps from 0")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise ConfigError(
                f"{group!r} cannot name a file of tensors: use letters, digits, _ and -"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layout.clean_up(folder)
    unfinished = layout.unfinished_folder(folder, step)
    unfinished.mkdir()
    _write(unfinished, step, tensors, meta)
    final = folder / layout.step_name(step)
    layout.publish(unfinished, final)
    layout.write_latest(folder, step)
    if keep is not None:
        layout.retain(folder, step, keep)
    return final


def load(folder: str | Path, step: int | Literal["latest"] = "latest") -> Checkpoint:
    """Load a checkpoint after checking every byte of it; nothing in it can run code.

    Args:
        folder: Folder of the run's checkpoints.
        step: Which one; ``latest`` is the one last saved. If the file ``latest`` is gone or names
            a checkpoint that is gone, the newest complete one is taken, and a warning says so. A
            damaged checkpoint is an error, never a reason to take an older one silently.

    Raises:
        CheckpointError: There is none, or it is damaged, a pickle, or of a newer format.
    """
    path = find(folder, step)
    if is_sharded(path):
        verify(path)
        reader = ShardedReader(path)
        tensors = {group: reader.whole(group) for group in reader.groups()}
        return Checkpoint(reader.step, tensors, reader.meta, path)
    return _read(path, layout.step_of(path))


def find(folder: str | Path, step: int | Literal["latest"] = "latest") -> Path:
    """Folder of a checkpoint; arguments and errors as :func:`load`'s, its files are not read."""
    folder = Path(folder)
    if folder.is_file():
        refuse_pickle(folder)
        raise CheckpointError(f"{folder} is a file: give the folder that holds step_... folders")
    found = layout.complete(folder)
    if not found:
        raise _nothing_there(folder)
    if step == "latest":
        step = _latest(folder, list(found))
    elif step not in found:
        known = ", ".join(map(str, found))
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}: choose one of {known}")
    return found[step]


def _write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> None:
    groups = {}
    for group, named in tensors.items():
        path = folder / f"{group}{layout.TENSORS_SUFFIX}"
        groups[group] = write_tensors(path, named)
        layout.sync(path)
    state = {
        "format_version": layout.FORMAT_VERSION,
        "step": step,
        "groups": groups,
        "meta": dict(meta),
    }
    try:
        text = json.dumps(state, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's data cannot be written as JSON ({error}): give numbers, strings, "
            "lists and tables only"
        ) from error
    layout.write_text(folder / layout.STATE, text)
    layout.write_text(folder / layout.CHECKSUMS, json.dumps(checksums(folder), indent=1))
    layout.sync(folder)


def _read(folder: Path, step: int) -> Checkpoint:
    verified = verify(folder)
    state = read_json(folder / layout.STATE)
    version = state.get("format_version") if isinstance(state, dict) else None
    if not isinstance(version, int) or layout.STATE not in verified:
        raise CheckpointError(
            f"{folder / layout.STATE} has no format version or checksum: load a checkpoint of "
            "megafp4"
        )
    if version > layout.FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, this megafp4 reads up to "
            f"{layout.FORMAT_VERSION}: upgrade megafp4"
        )
    if state["step"] != step:
        raise CheckpointError(
            f"{folder} was saved as step {state['step']}: give the folder its name back"
        )
    tensors = {}
    for group, kept in state["groups"].items():
        name = f"{group}{layout.TENSORS_SUFFIX}"
        if name not in verified:
            raise CheckpointError(f"{folder / name} is missing: load another checkpoint")
        tensors[group] = read_tensors(folder / name, kept)
    return Checkpoint(step, tensors, state["meta"], folder)


def _latest(folder: Path, steps: list[int]) -> int:
    named = layout.read_latest(folder)
    if named in steps:
        return named
    reason = "names a checkpoint that is gone" if named is not None else "is missing or unreadable"
    _log.warning(
        "%s %s: taking the newest complete checkpoint, step %d",
        folder / layout.LATEST,
        reason,
        steps[-1],
    )
    return steps[-1]


def _nothing_there(folder: Path) -> CheckpointError:
    """Say why a folder has no checkpoint; a folder of pickles is told apart."""
    refuse_pickles(folder)
    if (folder / layout.STATE).is_file():
        return CheckpointError(
            f"{folder} is a single checkpoint: give the folder that holds it, and its step"
        )
    return CheckpointError(
        f"{folder} holds no checkpoint (no step_... folder): check the path or start a new run"
    )
