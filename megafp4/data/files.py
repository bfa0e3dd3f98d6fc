"""File access whose failures are one sentence, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megafp4.errors import DataError


@contextmanager
def file_errors(doing: str, path: str | Path, advice: str) -> Iterator[None]:
    """Turn any ``OSError`` of the body into a :class:`DataError`.

    Args:
        doing: What is tried, e.g. ``"read"``.
        path: The file or folder it is tried on.
        advice: What the user can do about it, as the end of the sentence.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else type(error).__name__
        raise DataError(f"cannot {doing} {path} ({reason}): {advice}") from error


def temporary_beside(path: Path) -> Path:
    """Return an unused hidden name in the folder of ``path``.

    Not ``tempfile``: its files are readable by their owner only, and stay so after the rename.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextmanager
def written_whole(
    path: str | Path, advice: str = "choose a writable folder"
) -> Iterator[IO[bytes]]:
    """Open a binary file that takes its name only when the body ends without an error.

    The folder is created. Writers that race for one name each leave a complete file; the last wins.

    Raises:
        DataError: The folder or file cannot be written.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with file_errors("write", path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(
    path: str | Path, value: dict[str, Any], advice: str = "choose a writable folder"
) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with written_whole(path, advice) as file:
        file.write((json.dumps(value, indent=4) + "\n").encode())


def read_json(path: str | Path, advice: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: The file is missing, unreadable, or holds something else.
    """
    with file_errors("read", path, advice):
        raw = Path(path).read_bytes()
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not an object: {advice}")
    return value
