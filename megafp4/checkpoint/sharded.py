"""Checkpoints of tensors that no process holds whole; see :mod:`megafp4.checkpoint.layout`.

Every rank writes what it holds, as boxes, to safetensors files of its own, and rank 0 writes which
box lies where::

    step_00000100/
      rank_00000_00000.safetensors    boxes "0", "1", ... of many tensors, 2 GiB and a little more
      rank_00000_00001.safetensors
      rank_00001_00000.safetensors
      state.json                by group and tensor: shape, dtype, and (file, box) of every part
      checksums.json

A reader asks for any boxes, whatever boxes were written: a run goes on with another number of
ranks, or another mesh. torch.distributed.checkpoint would keep the table and every tensor as
pickles, which can run code when they are loaded and are refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megafp4.checkpoint import layout
from megafp4.checkpoint.boxes import Box, Parts
from megafp4.checkpoint.integrity import read_json, refuse_pickles, sha256
from megafp4.errors import CheckpointError

SHARDED_VERSION = 2
"""Format version of checkpoints that consist of boxes."""

_FILE_BYTES = 1 << 31
"""Bytes after which a file is closed: a rank holds that much of a checkpoint on the host."""

Groups = Mapping[str, Mapping[str, Parts]]
"""Parts by group (``model``, ``optimizer``, ...) and name of the tensor."""
Share = Callable[[Any], Sequence[Any]]
"""Hands a value of plain Python objects to all ranks: what every rank gave, in rank order."""


def save_sharded(
    folder: str | Path,
    step: int,
    groups: Groups,
    meta: Mapping[str, Any],
    rank: int,
    share: Share,
    keep: int,
) -> Path:
    """Save a checkpoint together; when this returns on any rank, all of it is on disk.

    Args:
        folder: Folder of the run's checkpoints, on a file system that all ranks see.
        step: Optimizer steps done.
        groups: What this rank holds; every element of a tensor must be held by exactly one rank.
        meta: JSON data, that of rank 0 counts.
        rank: Number of this process.
        share: Every rank calls it equally often.
        keep: Checkpoints that stay, this one included.

    Returns:
        Folder of this checkpoint.

    Raises:
        CheckpointError: A rank could not write its part, or parts overlap or are missing; the
            previous checkpoint is as it was.
    """
    folder = Path(folder)
    unfinished = layout.unfinished_folder(folder, step)
    _together(share, lambda: _begin(folder, unfinished) if rank == 0 else None)
    entries = _together(share, lambda: write_part(unfinished, rank, groups))
    _together(share, lambda: _finish(folder, step, entries, meta, keep) if rank == 0 else None)
    return folder / layout.step_name(step)


def write_part(unfinished: Path, rank: int, groups: Groups) -> dict[str, Any]:
    """Write what one rank holds to its files.

    Returns:
        What ``state.json`` says of it, and size and checksum of the files.

    Raises:
        CheckpointError: It cannot be written.
    """
    table: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        if waiting:
            files[name_of(len(files))] = _write_file(unfinished / name_of(len(files)), waiting)
            waiting.clear()

    def name_of(number: int) -> str:
        return f"rank_{rank:05d}_{number:05d}{layout.TENSORS_SUFFIX}"

    for group, tensors in groups.items():
        for label, parts in tensors.items():
            boxes = []
            for box, tensor in parts.held:
                if sum(one.nbytes for one in waiting.values()) > _FILE_BYTES:
                    flush()
                key = str(len(waiting))
                # A copy: views of one memory are refused by the format.
                waiting[key] = tensor.detach().to("cpu", copy=True).contiguous().view(box.sizes)
                boxes.append([name_of(len(files)), key, box.offsets, box.sizes])
            dtype = str(parts.dtype).removeprefix("torch.")
            table.setdefault(group, {})[label] = {
                "shape": parts.shape, "dtype": dtype, "parts": boxes,
            }  # fmt: skip
    flush()
    return {"groups": table, "files": files}


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        layout.sync(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room or choose another --out"
        ) from error
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def is_sharded(folder: Path) -> bool:
    """Whether several ranks wrote the checkpoint of one step, going by its files' names."""
    return any(folder.glob(f"rank_*{layout.TENSORS_SUFFIX}"))


class ShardedReader:
    """Reads boxes of a checkpoint's tensors, whichever way they were cut when it was saved.

    Args:
        folder: Folder of one step.

    Raises:
        CheckpointError: It is damaged, of a newer format, or holds pickles.
    """

    def __init__(self, folder: Path) -> None:
        refuse_pickles(folder)
        self.folder = folder
        state = read_json(folder / layout.STATE)
        if not isinstance(state, dict) or state.get("format_version") != SHARDED_VERSION:
            raise CheckpointError(
                f"{folder / layout.STATE} is not of a sharded checkpoint: load one that several "
                "ranks saved"
            )
        self.step: int = state["step"]
        self.meta: dict[str, Any] = state["meta"]
        self._groups: dict[str, dict[str, Any]] = state["groups"]
        self._open: dict[str, Any] = {}

    def groups(self) -> list[str]:
        """Names of the groups."""
        return list(self._groups)

    def shapes(self, group: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the whole tensors of a group, by name; empty if there is none."""
        return {
            name: (torch.Size(entry["shape"]), getattr(torch, entry["dtype"]))
            for name, entry in self._groups.get(group, {}).items()
        }

    def fill(self, group: str, name: str, parts: Parts) -> None:
        """Write what was saved into the memory of ``parts``.

        Raises:
            CheckpointError: There is no such tensor, or it has another shape or dtype.
        """
        found = self.shapes(group).get(name)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no {name!r} in {group!r}: load another one")
        if found != (torch.Size(parts.shape), parts.dtype):
            raise CheckpointError(
                f"{name!r} of {self.folder} is {found[1]} {list(found[0])}, expected {parts.dtype} "
                f"{list(parts.shape)}: load a checkpoint of the same configuration"
            )
        saved = self._groups[group][name]["parts"]
        for wanted, tensor in parts.held:
            missing = wanted.numel
            for file, key, offsets, sizes in saved:
                stored = Box(tuple(offsets), tuple(sizes))
                common = wanted.overlap(stored)
                if common is not None:
                    piece = self._read(file, key, common.within(stored))
                    common.within(wanted).of(tensor.detach()).copy_(piece)
                    missing -= common.numel
            if missing:
                raise CheckpointError(
                    f"{missing} elements of {name!r} are missing in {self.folder}: load another "
                    "checkpoint"
                )

    def whole(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, put together on the CPU."""
        found = {}
        for name, (shape, dtype) in self.shapes(group).items():
            found[name] = torch.empty(shape, dtype=dtype)
            self.fill(group, name, Parts.whole(found[name]))
        return found

    def check(self, rank: int, share: Share) -> None:
        """Compare every file with its checksum, each rank some of them.

        Raises:
            CheckpointError: One is missing or damaged, on all ranks alike.
        """
        expected = read_json(self.folder / layout.CHECKSUMS)
        if not isinstance(expected, dict) or layout.STATE not in expected:
            raise CheckpointError(
                f"{self.folder / layout.CHECKSUMS} does not list {layout.STATE}: load another "
                "checkpoint"
            )
        size = len(share(None))
        _together(share, lambda: self._check_files(expected, sorted(expected)[rank::size]))

    def _check_files(self, expected: Mapping[str, Any], names: Sequence[str]) -> None:
        for name in names:
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(f"{path} is missing: restore it or load another checkpoint")
            entry = expected[name]
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                raise CheckpointError(
                    f"{path} is damaged, its size or SHA-256 is not the one that was saved: "
                    f"restore it or delete {self.folder} to go on from an earlier checkpoint"
                )

    def _read(self, file: str, key: str, box: Box) -> Tensor:
        path = self.folder / file
        if Path(file).name != file:
            raise CheckpointError(f"{self.folder} names {file!r}, which is not a file of its own")
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, "pt", "cpu")
            if not box.sizes:
                scalar: Tensor = self._open[file].get_tensor(key)
                return scalar
            places = zip(box.offsets, box.sizes, strict=True)
            found: Tensor = self._open[file].get_slice(key)[
                tuple(slice(first, first + count) for first, count in places)
            ]
            return found
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): restore it or load another checkpoint"
            ) from error


def _begin(folder: Path, unfinished: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        layout.clean_up(folder)
        unfinished.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{unfinished} cannot be made ({error}): make room or choose another --out"
        ) from error


def _finish(
    folder: Path, step: int, entries: Sequence[Any], meta: Mapping[str, Any], keep: int
) -> None:
    """Write the table of all parts and give the folder its name."""
    groups: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for entry in entries:
        files |= entry["files"]
        for group, tensors in entry["groups"].items():
            for name, parts in tensors.items():
                known = groups.setdefault(group, {}).setdefault(name, {**parts, "parts": []})
                known["parts"] += parts["parts"]
    for group, tensors in groups.items():
        for name, found in tensors.items():
            _check_complete(f"{group}/{name}", found)
    unfinished = layout.unfinished_folder(folder, step)
    state = {
        "format_version": SHARDED_VERSION,
        "step": step,
        "groups": groups,
        "meta": dict(meta),
    }
    layout.write_text(unfinished / layout.STATE, json.dumps(state))
    written = unfinished / layout.STATE
    files[layout.STATE] = {"bytes": written.stat().st_size, "sha256": sha256(written)}
    layout.write_text(unfinished / layout.CHECKSUMS, json.dumps(files, indent=1))
    layout.sync(unfinished)
    layout.publish(unfinished, folder / layout.step_name(step))
    layout.write_latest(folder, step)
    layout.retain(folder, step, keep)


def _check_complete(name: str, found: Mapping[str, Any]) -> None:
    """Every element once: the numbers add up, and no two boxes overlap."""
    boxes = [Box(tuple(offsets), tuple(sizes)) for _, _, offsets, sizes in found["parts"]]
    boxes.sort(key=lambda box: box.offsets)
    wanted = Box.whole(found["shape"]).numel
    if _overlap(boxes) or sum(box.numel for box in boxes) != wanted:
        raise CheckpointError(
            f"{name!r} was saved as {len(boxes)} parts that do not add up to {found['shape']}: "
            "report this as a bug, nothing was written"
        )


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether any two boxes, sorted by their offsets, have an element in common."""
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if box.offsets and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break  # so do all that follow
            if box.overlap(other) is not None:
                return True
    return False


def _together(share: Share, act: Callable[[], Any]) -> list[Any]:
    """Do something on every rank; what each returned, or the first rank's error on all of them.

    Raises:
        CheckpointError: It failed on some rank.
    """
    try:
        outcome: tuple[bool, Any] = True, act()
    except CheckpointError as error:
        outcome = False, str(error)
    outcomes = share(outcome)
    for fine, result in outcomes:
        if not fine:
            raise CheckpointError(result)
    return [result for _, result in outcomes]
