"""Refuse what must not be loaded: pickles, which can run code, and damaged files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megafp4.checkpoint.layout import CHECKSUMS
from megafp4.errors import CheckpointError

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".distcp"})
"""Suffixes under which PyTorch and its relatives keep pickles."""

_MAX_SAFETENSORS_HEADER = 100_000_000
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_PROTOCOL = 0x80


def refuse_pickle(path: Path) -> None:
    """Raise if a file is a pickle, by its suffix or by its first bytes.

    Args:
        path: A file; it is never unpickled.

    Raises:
        CheckpointError: The file is, or may be, a pickle.
    """
    if path.suffix.lower() not in PICKLE_SUFFIXES and not _starts_like_pickle(path):
        return
    raise CheckpointError(
        f"{path} is a pickle, which can run any code when it is loaded: convert it to safetensors "
        "on a machine that trusts it, or delete it"
    )


def refuse_pickles(folder: Path) -> None:
    """Raise if a file in a folder, which may be missing, is a pickle.

    Raises:
        CheckpointError: A file is, or may be, a pickle.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file():
            refuse_pickle(path)


def _starts_like_pickle(path: Path) -> bool:
    """Whether the first bytes are those of a zip archive (torch.save) or of a binary pickle."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(_ZIP_MAGIC):
        return True
    if len(head) < 2 or head[0] != _PICKLE_PROTOCOL or not 2 <= head[1] <= 5:
        return False
    # A safetensors file opens with the length of its JSON header, which can be the same two bytes.
    length = int.from_bytes(head[:8], "little")
    return not (length <= _MAX_SAFETENSORS_HEADER and head[8:9] == b"{")


def checksums(folder: Path) -> dict[str, Any]:
    """SHA-256 and size of every file in a folder, as ``checksums.json`` keeps them."""
    files = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> frozenset[str]:
    """Check every file of a checkpoint against its checksum.

    Args:
        folder: Folder of one step.

    Returns:
        Names of the files that were checked.

    Raises:
        CheckpointError: A file is a pickle, missing or damaged; the message names it.
    """
    refuse_pickles(folder)
    expected = read_json(folder / CHECKSUMS)
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / CHECKSUMS} holds no table: load another checkpoint")
    for name, entry in expected.items():
        path = folder / name
        if name in {"", ".."} or Path(name).name != name or not isinstance(entry, dict):
            raise CheckpointError(
                f"{folder / CHECKSUMS} lists {name!r}, which is not a file of its folder: load "
                "another checkpoint"
            )
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: restore it or load another checkpoint")
        if path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
            raise CheckpointError(
                f"{path} is damaged, its size or SHA-256 is not the one that was saved: restore it "
                f"or delete {folder} to go on from an earlier checkpoint"
            )
    return frozenset(expected)


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): restore it or load another checkpoint"
        ) from error
