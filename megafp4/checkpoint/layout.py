"""Names and files of a checkpoint folder::

    checkpoints/
      latest                    "step_00000100", written last
      step_00000100/
        model.safetensors       one file for each group of tensors
        optimizer.safetensors
        state.json              format version, step, caller's data, how tensors are laid out
        checksums.json          SHA-256 and size of every other file

A step's folder is written under a temporary name and renamed when every byte is on disk, so a
folder that bears a step's name is complete. Nothing here can hold code: JSON and safetensors only.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

FORMAT_VERSION = 1
"""Version written; a reader refuses newer ones."""

LATEST = "latest"
STATE = "state.json"
CHECKSUMS = "checksums.json"
TENSORS_SUFFIX = ".safetensors"
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint's folder."""
    match = _STEP.fullmatch(checkpoint.name.removeprefix(_REPLACED))
    assert match is not None, checkpoint
    return int(match[1])


def complete(folder: Path) -> dict[int, Path]:
    """Folders of the complete checkpoints by step, in ascending order.

    One that was moved aside to be replaced counts if its replacement never arrived.
    """
    found: dict[int, Path] = {}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in entries:
        match = _STEP.fullmatch(entry.name.removeprefix(_REPLACED))
        # Names with the prefix sort first, so a replacement takes its place.
        if match and entry.is_dir():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a complete checkpoint, in ascending order."""
    return list(complete(folder))


def read_latest(folder: Path) -> int | None:
    """Step that the file ``latest`` names, or None if it is missing or names none."""
    path = folder / LATEST
    if not path.is_file():
        return None
    match = _STEP.fullmatch(path.read_text(encoding="utf-8", errors="replace").strip())
    return int(match[1]) if match else None


def unfinished_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder / f"{_UNFINISHED}{step_name(step)}"


def clean_up(folder: Path) -> None:
    """Bring the folder back to order after a save that was killed.

    Unfinished folders and files go. A folder that was moved aside to be replaced comes back if its
    replacement never arrived.
    """
    for entry in list(folder.iterdir()):
        if entry.name.startswith(_UNFINISHED):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        elif entry.name.startswith(_REPLACED):
            original = folder / entry.name.removeprefix(_REPLACED)
            if original.exists():
                shutil.rmtree(entry)
            else:
                entry.rename(original)


def publish(unfinished: Path, final: Path) -> None:
    """Give a written folder its final name, replacing an older checkpoint of the same step."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        # A folder cannot be renamed over a full one; clean_up() undoes this if we die in between.
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one never bears it."""
    nameless = checkpoint.rename(checkpoint.with_name(f"{_UNFINISHED}{checkpoint.name}"))
    shutil.rmtree(nameless)


def retain(folder: Path, step: int, keep: int) -> None:
    """Delete the oldest checkpoints until ``keep`` are left, never the one just saved."""
    others = [other for other in complete_steps(folder) if other != step]
    for old in others[: max(0, len(others) - (keep - 1))]:
        discard(folder / step_name(old))


def write_latest(folder: Path, step: int) -> None:
    """Point ``latest`` at a step, atomically."""
    path = folder / f"{_UNFINISHED}{LATEST}"
    write_text(path, step_name(step) + "\n")
    path.replace(folder / LATEST)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
