"""Text to token files: one ``.bin``/``.idx`` pair, the same for any number of workers.

The parent reads batches of documents and hands them to worker processes; results are written in
the order of reading, with a bounded number of batches under way.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megafp4.data.documents import Batch, find_sources, read_batches, size_of
from megafp4.data.indexed import index_path, smallest_dtype, token_path
from megafp4.data.indexed_writer import IndexedWriter
from megafp4.data.sidecar import Sidecar, remove_sidecar
from megafp4.data.tokenizer import Tokenizer, get_tokenizer
from megafp4.errors import DataError

BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessReport:
    """What was written.

    Attributes:
        prefix: Path of the pair without its suffix.
        documents: Documents written.
        tokens: Token ids written, end-of-document ids included.
        empty: Documents left out because they hold no text.
    """

    prefix: str
    documents: int
    tokens: int
    empty: int


@dataclass(frozen=True)
class Encoded:
    """The tokens of one batch: ids back to back, ids per document, empty documents left out."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    empty: int


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "bytes",
    key: str = "text",
    append_eod: bool = True,
    separator: str | None = None,
    split: str = "train",
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> PreprocessReport:
    """Tokenize files into ``<output>.bin``, ``<output>.idx`` and ``<output>.meta.json``.

    Every document becomes one sequence. The pair appears only if all went well.

    Args:
        inputs: ``.txt``, ``.jsonl`` (both also ``.gz``) and ``.parquet`` files, folders of them,
            and folders written by a Hugging Face data set's ``save_to_disk``; read in this order.
        output: Prefix of the pair.
        tokenizer: See :func:`megafp4.data.tokenizer.get_tokenizer`.
        key: JSON field or column that holds the text.
        append_eod: End each document with the tokenizer's end-of-document id.
        separator: Cuts ``.txt`` files into documents; None makes each file one document.
        split: Part of a saved ``DatasetDict`` to read.
        overwrite: Replace a pair of this name.
        workers: Processes that tokenize; 1 works in this process. More are started by "spawn", so a
            script that asks for them needs the usual ``if __name__ == "__main__"``.
        progress: Show a progress bar.

    Raises:
        DataError: The pair exists already, an input cannot be read (with file and line), nothing is
            in it, or the output cannot be written.
        ConfigError: Unknown tokenizer.
        UnsupportedError: A package that the input or tokenizer needs is not installed.
    """
    if workers < 1:
        raise DataError(f"{workers} workers cannot tokenize: give at least 1")
    there = [path for path in (token_path(output), index_path(output)) if path.exists()]
    if there and not overwrite:
        raise DataError(
            f"{there[0]} exists already: choose another --output, or give --overwrite to replace it"
        )
    sources = find_sources(inputs)
    encoder = get_tokenizer(tokenizer)
    with ExitStack() as stack:
        bar = stack.enter_context(_Bar(sum(map(size_of, sources)), progress))
        batches = (
            batch
            for source in sources
            for batch in read_batches(
                source, key, separator=separator, split=split, advance=bar.advance
            )
        )
        encoded = _encode_all(batches, tokenizer, encoder, key, append_eod, workers)
        return write_tokens(output, encoder, encoded, append_eod=append_eod)


def write_tokens(
    output: str | Path, tokenizer: Tokenizer, parts: Iterable[Encoded], *, append_eod: bool
) -> PreprocessReport:
    """Write tokenized documents as a pair with its sidecar.

    Raises:
        DataError: There is no document, or the files cannot be written.
    """
    empty = 0
    with IndexedWriter(output, smallest_dtype(tokenizer.vocab_size)) as writer:
        for part in parts:
            writer.add_many(part.tokens, part.lengths)
            empty += part.empty
        if not writer.sequences:
            raise DataError(
                f"no document with text was found for {output}, {empty} were empty: check the input"
            )
        remove_sidecar(output)
    Sidecar(
        tokenizer=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod if append_eod else None,
        documents=writer.sequences,
        tokens=writer.tokens,
        smallest_id=writer.low,
        largest_id=writer.high,
        bin_bytes=writer.tokens * writer.dtype.itemsize,
    ).write(output)
    return PreprocessReport(str(output), writer.sequences, writer.tokens, empty)


def encode_texts(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, *, append_eod: bool = True
) -> Encoded:
    """Tokenize documents.

    Args:
        texts: Place (for error messages) and text of each document.
        tokenizer: Maps text to ids.
        append_eod: End each document with the tokenizer's end-of-document id.

    Raises:
        DataError: A text cannot be encoded; the message names its place.
    """
    eod = np.array([tokenizer.eod], np.int32)
    parts: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    empty = 0
    for place, text in texts:
        try:
            ids = tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if not len(ids):
            empty += 1
            continue
        parts.extend((ids, eod) if append_eod else (ids,))
        lengths.append(len(ids) + append_eod)
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return Encoded(tokens, np.array(lengths, np.int64), empty)


def _encode_all(
    batches: Iterator[Batch],
    name: str,
    tokenizer: Tokenizer,
    key: str,
    append_eod: bool,
    workers: int,
) -> Iterator[Encoded]:
    """Tokenize batches, in their order."""
    if workers == 1:
        for batch in batches:
            yield encode_texts(batch.texts(key), tokenizer, append_eod=append_eod)
        return
    # Forking would copy the threads of the progress bar and of the tokenizers mid-flight.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            # Not pool.map, which would read the whole input into its queue.
            for batch in batches:
                waiting.append(pool.submit(_encode_in_worker, batch, name, key, append_eod))
                if len(waiting) >= workers * BATCHES_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, probably for lack of memory: use fewer workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


_worker_tokenizer = lru_cache(maxsize=1)(get_tokenizer)
"""Builds a worker's tokenizer with its first batch."""


def _encode_in_worker(batch: Batch, name: str, key: str, append_eod: bool) -> Encoded:
    return encode_texts(batch.texts(key), _worker_tokenizer(name), append_eod=append_eod)


class _Bar:
    """A progress bar over bytes read."""

    def __init__(self, total_bytes: int, shown: bool) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("tokenizing"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self._task = self._progress.add_task("tokenizing", total=total_bytes)

    def advance(self, count: int) -> None:
        """Add bytes that were read."""
        self._progress.advance(self._task, count)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()
