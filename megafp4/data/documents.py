"""Documents out of text, JSON lines, parquet and Hugging Face data sets, in batches.

Batches hold raw lines or strings with their place in the source; JSON is parsed by whoever
tokenizes, so that the reading process only reads.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from megafp4.data.files import file_errors
from megafp4.errors import DataError, UnsupportedError

BATCH_BYTES = 1 << 19
"""A batch is closed when it has so many bytes: enough to outweigh moving it to another process."""
TEXT = (".txt", ".text", ".md", ".rst")
LINES = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet", ".pq")
ADVICE = "give a readable .txt, .jsonl, .parquet file or a folder of them"

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """Some documents of one source.

    Attributes:
        source: File or folder they come from.
        first: Number of the first, counted from 1 (a line for JSON lines, else a row or piece).
        items: Raw JSON lines, or texts.
    """

    source: str
    first: int
    items: list[Any]

    def texts(self, key: str) -> Iterator[tuple[str, str]]:
        """Yield the place and text of every document; blank JSON lines have none.

        Args:
            key: Field of a JSON line that holds the text.

        Raises:
            DataError: A line is not JSON, or has no text under ``key``.
        """
        for number, item in enumerate(self.items, self.first):
            if isinstance(item, bytes):
                place = f"{self.source} line {number}"
                if item.strip():
                    yield place, _text_of_line(item, key, place)
            elif item is None or isinstance(item, str):
                yield f"{self.source} document {number}", item or ""
            else:
                raise DataError(
                    f"{self.source} document {number} holds {type(item).__name__} under {key!r}: "
                    "name a field that holds text"
                )


def _text_of_line(line: bytes, key: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise DataError(f"{place} is not JSON ({reason}): repair or remove the line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place} holds a JSON {type(value).__name__}: give one object per line")
    if key not in value:
        raise DataError(
            f"{place} has no field {key!r} but {', '.join(sorted(value)) or 'none'}: "
            "name the field that holds the text"
        )
    text = value[key]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{place} holds {type(text).__name__} under {key!r}: name a field that holds text"
        )
    return text or ""


def find_sources(inputs: Sequence[str | Path]) -> list[Path]:
    """List the sources behind files and folders; the files of a folder are sorted by name.

    Raises:
        DataError: A path is missing, of unknown kind, or a folder without data.
    """
    sources: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir() and not _is_saved_dataset(path):
            found = sorted(
                file for file in path.rglob("*") if file.is_file() and _kind(file) is not None
            )
            if not found:
                raise DataError(f"folder {path} holds no text to read: {ADVICE}")
            sources.extend(found)
        elif not path.exists():
            raise DataError(f"input {path} does not exist: {ADVICE}")
        elif path.is_file() and _kind(path) is None:
            raise DataError(f"input {path} has an unknown suffix {path.suffix!r}: {ADVICE}")
        else:
            sources.append(path)
    if not sources:
        raise DataError(f"no input was given: {ADVICE}")
    return sources


def size_of(source: Path) -> int:
    """Bytes of a source on disk, the unit of progress."""
    files = source.rglob("*") if source.is_dir() else [source]
    with file_errors("read", source, ADVICE):
        return sum(file.stat().st_size for file in files if file.is_file())


def read_batches(
    source: Path, key: str, *, separator: str | None, split: str, advance: Advance
) -> Iterator[Batch]:
    """Read the documents of a source.

    Args:
        source: One of :func:`find_sources`.
        key: Field or column that holds the text.
        separator: Cuts text files into documents; None makes each file one.
        split: Which part of a saved ``DatasetDict`` to read.
        advance: Called with the number of bytes read since the last call.

    Raises:
        DataError: The source cannot be read.
    """
    with file_errors("read", source, ADVICE):
        if source.is_dir():
            yield from _saved_dataset(source, key, split, advance)
        elif _kind(source) == "parquet":
            yield from _parquet(source, key, advance)
        elif _kind(source) == "lines":
            yield from _grouped(str(source), _counted(source, advance, whole_lines=True))
        else:
            yield from _grouped(str(source), _pieces(source, separator, advance))


def _kind(path: Path) -> str | None:
    if path.name.endswith(".meta.json"):
        return None  # what megafp4 itself writes beside token files
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    for kind, known in (("text", TEXT), ("lines", LINES)):
        if last in known:
            return kind
    return "parquet" if path.suffix.lower() in PARQUET else None


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _grouped(source: str, items: Iterator[Any]) -> Iterator[Batch]:
    """Group documents into batches of about :data:`BATCH_BYTES`, whatever reads them."""
    batch: list[Any] = []
    first, size = 1, 0
    for item in items:
        batch.append(item)
        size += len(item) if isinstance(item, (bytes, str)) else 1
        if size >= BATCH_BYTES:
            yield Batch(source, first, batch)
            first, size, batch = first + len(batch), 0, []
    if batch:
        yield Batch(source, first, batch)


def _opened(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    """Return the file on disk and a reader of its content."""
    raw = open(path, "rb")  # noqa: SIM115 - closed by the callers
    if path.suffix.lower() != ".gz":
        return raw, raw
    return raw, io.BufferedReader(gzip.GzipFile(fileobj=raw))


def _counted(path: Path, advance: Advance, whole_lines: bool) -> Iterator[bytes]:
    """Yield the lines of a file, or blocks of :data:`BATCH_BYTES`."""
    raw, content = _opened(path)
    seen = 0
    with raw, content:
        try:
            for part in content if whole_lines else iter(partial(content.read, BATCH_BYTES), b""):
                yield part
                # A gzip stream is read ahead, so this counts bytes on disk in steps.
                if (now := raw.tell()) - seen >= BATCH_BYTES:
                    advance(now - seen)
                    seen = now
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip stream: copy or write it again") from error
        advance(raw.tell() - seen)


def _pieces(path: Path, separator: str | None, advance: Advance) -> Iterator[str]:
    """Yield the documents of a text file; with a separator, only those under way are in memory."""
    blocks = _counted(path, advance, whole_lines=False)
    if separator is None:
        yield _decoded(b"".join(blocks), path)
        return
    if separator == "":
        raise DataError("the document separator is empty: leave it out or give some characters")
    tail = b""
    for block in blocks:
        *documents, tail = (tail + block).split(separator.encode())
        yield from (_decoded(document, path) for document in documents)
    if tail:
        yield _decoded(tail, path)


def _decoded(text: bytes, path: Path) -> str:
    try:
        return text.decode("utf-8-sig" if text.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {text[error.start]:#04x} is out of place): convert it"
        ) from error


def _parquet(path: Path, key: str, advance: Advance) -> Iterator[Batch]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", path) from error
    try:
        with parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise _no_column(path, key, file.schema_arrow.names)
            yield from _grouped(str(path), _rows(file, key, size_of(path), advance))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: write or copy it again") from error


def _rows(file: Any, key: str, size: int, advance: Advance) -> Iterator[Any]:
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(1024, row_groups=[group], columns=[key]):
            yield from batch.column(0).to_pylist()
        advance(size // file.num_row_groups)


def _saved_dataset(path: Path, key: str, split: str, advance: Advance) -> Iterator[Batch]:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", path) from error
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{path} has the splits {', '.join(sorted(loaded))} but not {split!r}: name one"
            )
        loaded = loaded[split]
    if key not in loaded.column_names:
        raise _no_column(path, key, loaded.column_names)
    column = loaded.select_columns([key]).with_format(None)
    step, total = 1024, size_of(path)

    def rows() -> Iterator[Any]:
        for first in range(0, len(column), step):
            values = column[first : first + step][key]
            yield from values
            advance(total * len(values) // len(column))

    yield from _grouped(str(path), rows())


def _no_column(path: Path, key: str, names: Sequence[str]) -> DataError:
    return DataError(
        f"{path} has no column {key!r} but {', '.join(sorted(names)) or 'none'}: "
        "name the column that holds the text"
    )


def _missing(package: str, path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"reading {path} needs the package {package}, which is not installed: "
        "run pip install 'megafp4[data]'"
    )
