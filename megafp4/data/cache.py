"""Arrays that are built once and memory-mapped from then on.

A description, as JSON, says all that the arrays depend on; its MD5 names the files. The files
are written whole, the description last, so that several runs may build the same arrays at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megafp4.data.files import file_errors, written_whole
from megafp4.errors import DataError

ADVICE = "set data.cache to a writable folder"

Arrays = dict[str, NDArray[Any]]


def digest(data: bytes | memoryview) -> str:
    """MD5 of ``data`` in hexadecimal: a name, not a safeguard."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def cached_arrays(
    folder: str | Path,
    description: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    build: Callable[[], Arrays],
) -> Arrays:
    """Load integer arrays from ``folder``, or build and store them.

    Files are ``<md5>-<class>-<split>-<array>.npy`` and ``...-description.txt``, Megatron's names.

    Args:
        folder: Where the files lie; created if needed.
        description: What the arrays depend on; ``class`` and ``index_split`` are part of the names.
        shapes: Shape of each array, by name.
        build: Returns the arrays.

    Raises:
        DataError: A stored array is damaged, or the folder cannot be written.
    """
    text = json.dumps(description, indent=4)
    stem = f"{digest(text.encode())}-{description['class']}-{description['index_split']}"
    paths = {name: Path(folder, f"{stem}-{name}.npy") for name in shapes}
    done = Path(folder, f"{stem}-description.txt")
    if done.is_file() and all(path.is_file() for path in paths.values()):
        return {name: _load(path, shapes[name]) for name, path in paths.items()}
    arrays = build()
    for name, path in paths.items():
        with written_whole(path, ADVICE) as file:
            np.save(file, arrays[name], allow_pickle=False)
    with written_whole(done, ADVICE) as file:
        file.write(text.encode())
    return arrays


def _load(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    advice = "delete it and it is built again"
    with file_errors("read", path, advice):
        try:
            array = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"cached index {path} is damaged ({error}): {advice}") from error
    if array.shape != shape or array.dtype.kind not in "iu":
        raise DataError(
            f"cached index {path} is {array.dtype} {list(array.shape)}, not integers "
            f"{list(shape)}: {advice}"
        )
    return np.asarray(array)
