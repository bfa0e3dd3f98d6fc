"""Writing and merging ``.bin``/``.idx`` pairs; :mod:`megafp4.data.indexed` describes the format."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megafp4.data.files import file_errors, temporary_beside
from megafp4.data.indexed import (
    DTYPES,
    MAGIC,
    VERSION,
    IndexedDataset,
    Tokens,
    dtype_code,
    index_path,
    token_path,
)
from megafp4.errors import DataError

COPY_BYTES = 1 << 24


class IndexedWriter:
    """Writes a ``.bin``/``.idx`` pair that appears when its ``with`` block ends without an error.

    Args:
        prefix: Path of the pair without its suffix; the folder is created.
        dtype: Token type, e.g. :func:`smallest_dtype` of the vocabulary.

    Raises:
        DataError: The folder cannot be written, or the dtype has no code.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike = np.uint16) -> None:
        self._code = dtype_code(dtype)
        self.dtype = np.dtype(DTYPES[self._code])
        self._paths = token_path(prefix), index_path(prefix)
        self._temporary = temporary_beside(self._paths[0]), temporary_beside(self._paths[1])
        self._lengths: list[NDArray[np.int32]] = []
        self._boundaries: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self.sequences = 0
        self.tokens = 0
        self.low, self.high = 0, -1
        with self._errors():
            self._paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(self._temporary[0], "xb")  # noqa: SIM115 - closed in __exit__

    def _errors(self) -> AbstractContextManager[None]:
        return file_errors("write", self._paths[0], "choose a writable folder with free space")

    def add(self, tokens: ArrayLike) -> None:
        """Append one document of one sequence."""
        array = np.asarray(tokens)
        self.add_many(array, [array.size])

    def add_many(
        self, tokens: ArrayLike, lengths: ArrayLike, documents: ArrayLike | None = None
    ) -> None:
        """Append sequences that lie back to back in ``tokens``.

        Args:
            tokens: Integers [sum of lengths].
            lengths: Tokens per sequence [sequences].
            documents: Sequences per document; None makes each sequence a document.

        Raises:
            DataError: A token does not fit the dtype, or the counts do not add up.
        """
        flat = np.asarray(tokens).reshape(-1)
        sizes = np.asarray(lengths, np.int64).reshape(-1)
        per_document = np.ones_like(sizes) if documents is None else np.asarray(documents, np.int64)
        if int(sizes.sum()) != flat.size or int(per_document.sum()) != sizes.size:
            raise DataError(
                f"{flat.size} tokens, {sizes.size} sequences of {int(sizes.sum())} tokens, "
                f"documents of {int(per_document.sum())} sequences: the counts must agree"
            )
        if sizes.size and (sizes.min() < 0 or sizes.max() > np.iinfo(np.int32).max):
            raise DataError(
                f"a sequence of {int(sizes.max())} tokens does not fit the .idx format, which "
                "counts tokens in int32: split the document"
            )
        if flat.size:
            self._check_range(flat)
        with self._errors():
            self._file.write(np.ascontiguousarray(flat, self.dtype).tobytes())
        self._lengths.append(sizes.astype(np.int32))
        self._boundaries.append(self.sequences + np.cumsum(per_document))
        self.sequences += sizes.size
        self.tokens += flat.size

    def _check_range(self, flat: Tokens) -> None:
        if flat.dtype.kind not in "iu":
            raise DataError(f"tokens of type {flat.dtype} cannot be written: give integers")
        low, high, limits = int(flat.min()), int(flat.max()), np.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise DataError(
                f"token id {low if low < limits.min else high} does not fit {self.dtype.name}: "
                "choose a wider dtype"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def add_pair(self, dataset: IndexedDataset) -> None:
        """Append a whole pair, its documents and sequences unchanged.

        Raises:
            DataError: The token types differ.
        """
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name} tokens, not {self.dtype.name}: "
                "merge pairs of one token type"
            )
        sizes = dataset.lengths.astype(np.int64)
        packed = np.cumsum(sizes) * self.dtype.itemsize - sizes * self.dtype.itemsize
        if dataset.modes is not None or not np.array_equal(packed, dataset.offsets):
            raise DataError(
                f"{dataset.prefix} is multimodal or not stored back to back: "
                "only plain token pairs can be merged"
            )
        with self._errors(), open(token_path(dataset.prefix), "rb") as source:
            for first in range(0, dataset.token_bytes, COPY_BYTES):
                self._file.write(source.read(min(COPY_BYTES, dataset.token_bytes - first)))
        self._lengths.append(dataset.lengths.copy())
        self._boundaries.append(self.sequences + dataset.document_index[1:])
        self.sequences += len(dataset)
        self.tokens += dataset.tokens

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._errors():
                self._file.close()
                if error is None:
                    self._write_index(self._temporary[1])
                    # Without its index a new .bin is invisible; a stale .idx must not describe it.
                    self._paths[1].unlink(missing_ok=True)
                    os.replace(self._temporary[0], self._paths[0])
                    os.replace(self._temporary[1], self._paths[1])
        finally:
            for path in self._temporary:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _write_index(self, path: Path) -> None:
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)]).astype("<i4")
        boundaries = np.concatenate(self._boundaries).astype("<i8")
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        offsets = (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8")
        with open(path, "xb") as file:
            file.write(MAGIC)
            file.write(struct.pack("<QBQQ", VERSION, self._code, len(lengths), len(boundaries)))
            for array in (lengths, offsets, boundaries):
                file.write(array.tobytes())


def merge(prefixes: Iterable[str | Path], output: str | Path) -> None:
    """Concatenate pairs, in the order given, into one.

    Args:
        prefixes: Pairs of one token type.
        output: Prefix of the new pair.

    Raises:
        DataError: Nothing to merge, or token types differ.
    """
    pairs = [IndexedDataset(prefix) for prefix in prefixes]
    if not pairs:
        raise DataError("no prefixes to merge were given: name at least one .bin/.idx pair")
    with IndexedWriter(output, pairs[0].dtype) as writer:
        for pair in pairs:
            writer.add_pair(pair)
