"""Megatron's token files: ``<prefix>.bin`` with the ids, ``<prefix>.idx`` with what lies where.

``.bin`` is nothing but little-endian token ids, sequence after sequence. ``.idx``, little-endian
and unaligned (``n`` sequences, ``d`` documents)::

    bytes 0-8    b"MMIDIDX\\0\\0"
    bytes 9-16   u64 version, 1
    byte  17     u8 dtype code, the keys of DTYPES
    bytes 18-25  u64 n
    bytes 26-33  u64 d + 1
    i32[n]       tokens per sequence
    i64[n]       byte offset of each sequence in .bin
    i64[d + 1]   first sequence of each document, then n
    i8[n]        mode per sequence, multimodal files only

A document of a GPT corpus is one sequence. Files are read through memory maps: opening costs a
pass over the index, never one over the tokens.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megafp4.data.files import file_errors
from megafp4.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Dtype codes of token files."""
FLOAT_CODES = (6, 7)
"""float32 and float64; Megatron and gpt-neox disagree on which is which, and neither is a token."""

Tokens = NDArray[Any]


def index_path(prefix: str | Path) -> Path:
    """Path of the ``.idx`` file."""
    return Path(f"{prefix}.idx")


def token_path(prefix: str | Path) -> Path:
    """Path of the ``.bin`` file."""
    return Path(f"{prefix}.bin")


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Token dtype that Megatron's writer picks: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def dtype_code(dtype: DTypeLike) -> int:
    """Code of a token dtype in the ``.idx`` header.

    Raises:
        DataError: The format has no code for it, or it is not an integer type.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    for code, name in DTYPES.items():
        if np.dtype(name) == wanted:
            return code
    raise DataError(
        f"token dtype {np.dtype(dtype).name} has no code in the .idx format: "
        "choose uint8, int8, uint16, int16, int32 or int64"
    )


def _looks_like(head: bytes) -> str:
    """Name the format that a file starting with ``head`` seems to have."""
    known = {
        b"TNTIDX\x00\x00": "a fairseq or gpt-neox TNTIDX index (its lazy and cached formats)",
        b"PK\x03\x04": "a zip archive, as torch.save writes",
        b"\x93NUMPY": "a NumPy .npy array",
        b"\x1f\x8b": "gzip-compressed",
        b"PAR1": "a parquet file",
    }
    for magic, name in known.items():
        if head.startswith(magic):
            return name
    if len(head) >= 2 and head[0] == 0x80 and head[1] <= 5:
        return "a Python pickle"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text"
    return f"something that starts with the bytes {head[:9].hex(' ')}" if head else "empty"


class IndexedDataset:
    """A ``.bin``/``.idx`` pair, memory mapped; ``dataset[i]`` is sequence ``i``.

    Args:
        prefix: Path of the pair without its suffix.

    Attributes:
        lengths: int32 [sequences], tokens per sequence.
        offsets: int64 [sequences], byte offset of each sequence in ``.bin``.
        document_index: int64 [documents + 1], first sequence of each document.
        modes: int8 [sequences] of a multimodal file, else None.
        dtype: Token type.

    Raises:
        DataError: A file is missing, truncated, foreign, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._read_index(index_path(prefix))
        self._map_tokens(token_path(prefix))

    def _read_index(self, path: Path) -> None:
        with file_errors("read", path, _missing_advice(self.prefix)):
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(HEADER_BYTES)
        if not head.startswith(MAGIC):
            raise DataError(
                f"{path} is not a Megatron index but {_looks_like(head)}: "
                "give the prefix of a .bin/.idx pair or write one with tools/preprocess_data.py"
            )
        if size < HEADER_BYTES:
            raise _truncated(path, size, HEADER_BYTES)
        version, code, sequences, boundaries = struct.unpack_from("<QBQQ", head, len(MAGIC))
        if version != VERSION:
            raise DataError(f"{path} has format version {version}: only version 1 can be read")
        self.dtype = _token_dtype(path, code)
        plain = HEADER_BYTES + 12 * sequences + 8 * boundaries
        if size < plain:
            raise _truncated(path, size, plain)
        if size not in (plain, plain + sequences):
            raise DataError(
                f"{path} holds {size} bytes where its header says {plain} (or "
                f"{plain + sequences} with modes): it is damaged, copy or write it again"
            )
        raw = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)
        ends = np.cumsum([HEADER_BYTES, 4 * sequences, 8 * sequences, 8 * boundaries]).tolist()
        self.lengths: NDArray[np.int32] = raw[ends[0] : ends[1]].view("<i4")
        self.offsets: NDArray[np.int64] = raw[ends[1] : ends[2]].view("<i8")
        self.document_index: NDArray[np.int64] = raw[ends[2] : ends[3]].view("<i8")
        self.modes = raw[ends[3] :].view(np.int8) if size > plain else None
        documents = self.document_index
        if (
            boundaries < 1
            or documents[0] != 0
            or documents[-1] != sequences
            or np.any(documents[1:] < documents[:-1])
        ):
            raise DataError(
                f"{path} has document boundaries that do not run from 0 to its {sequences} "
                "sequences: it is damaged, copy or write it again"
            )

    def _map_tokens(self, path: Path) -> None:
        with file_errors("read", path, _missing_advice(self.prefix)):
            size = path.stat().st_size
            with open(path, "rb"):
                pass
        used = self.lengths.astype(np.int64) * self.dtype.itemsize
        if np.any(used < 0) or np.any(self.offsets < 0):
            raise DataError(
                f"{index_path(self.prefix)} has a sequence of negative length or offset: "
                "it is damaged, copy or write it again"
            )
        # Compared without adding: a damaged offset near 2^63 must not wrap around.
        if np.any(self.offsets > size - used):
            worst = int(np.argmax(self.offsets - (size - used)))
            raise DataError(
                f"{path} holds {size} bytes but its index puts sequence {worst} at bytes "
                f"{self.offsets[worst]} to {int(self.offsets[worst]) + int(used[worst])}: "
                "the file is truncated or belongs to another .idx, copy or write it again"
            )
        self.token_bytes = int((self.offsets + used).max()) if len(self.lengths) else 0
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        if size:
            self._bytes = np.memmap(path, mode="r", dtype=np.uint8).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> Tokens:
        return self.get(sequence)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Return tokens [length] of one sequence from ``offset`` on, as a read-only view.

        Raises:
            DataError: There is no such sequence, or it is shorter.
        """
        if not 0 <= sequence < len(self):
            raise DataError(f"{self.prefix} has {len(self)} sequences: {sequence} is not one")
        available = int(self.lengths[sequence]) - offset
        if length is None:
            length = available
        if offset < 0 or not 0 <= length <= available:
            raise DataError(
                f"sequence {sequence} of {self.prefix} holds {self.lengths[sequence]} tokens: "
                f"{length} tokens from offset {offset} do not lie in it"
            )
        first = int(self.offsets[sequence]) + offset * self.dtype.itemsize
        return self._bytes[first : first + length * self.dtype.itemsize].view(self.dtype)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_index) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(np.sum(self.lengths, dtype=np.int64))

    def token_range(self) -> tuple[int, int]:
        """Smallest and largest token id, from one pass over ``.bin``; (0, -1) without tokens."""
        low, high, step = 0, -1, 1 << 24
        for first in range(0, self.token_bytes, step):
            stop = min(first + step, self.token_bytes)
            part = self._bytes[first : stop - (stop - first) % self.dtype.itemsize].view(self.dtype)
            if len(part):
                low, high = min(low, int(part.min())), max(high, int(part.max()))
        return low, high


def _token_dtype(path: Path, code: int) -> np.dtype[Any]:
    if code in DTYPES:
        return np.dtype(DTYPES[code])
    kind = "floating-point numbers" if code in FLOAT_CODES else "an unknown type"
    raise DataError(
        f"{path} has dtype code {code}, {kind}: token files have "
        "1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)"
    )


def _truncated(path: Path, size: int, expected: int) -> DataError:
    return DataError(
        f"{path} is truncated: it holds {size} bytes of {expected}, copy or write it again"
    )


def _missing_advice(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"give the prefix without its suffix, {prefix[:-4]!r}"
    return "give the prefix of an existing .bin/.idx pair (quote it if it holds spaces)"
