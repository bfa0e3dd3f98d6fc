"""``<prefix>.meta.json``: what a token file was made with, and checks against a model's vocabulary.

Megatron's files do not say which tokenizer wrote them. megafp4 adds a small JSON file
beside the pair that does; pairs without one, from other tools, are scanned once for their range of
ids instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megafp4.data.cache import ADVICE, digest
from megafp4.data.files import file_errors, read_json, write_json
from megafp4.data.indexed import IndexedDataset, index_path, token_path
from megafp4.data.tokenizer import Tokenizer
from megafp4.errors import DataError

VOCABULARY_MULTIPLE = 1024
"""Models may pad the vocabulary up to a multiple of this (128 rows on each of 8 ranks)."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Content of ``<prefix>.meta.json``.

    Attributes:
        tokenizer: Identity of the tokenizer.
        vocab_size: Its number of ids.
        eod: Id that ends every document, or None.
        documents: Number of documents.
        tokens: Number of token ids.
        smallest_id: Lower bound of the ids.
        largest_id: Largest id.
        bin_bytes: Size of the ``.bin`` file it belongs to.
    """

    tokenizer: str
    vocab_size: int
    eod: int | None
    documents: int
    tokens: int
    smallest_id: int
    largest_id: int
    bin_bytes: int

    def write(self, prefix: str | Path) -> None:
        """Write it beside the pair."""
        write_json(sidecar_path(prefix), dataclasses.asdict(self))


def sidecar_path(prefix: str | Path) -> Path:
    """Path of the sidecar."""
    return Path(f"{prefix}.meta.json")


def remove_sidecar(prefix: str | Path) -> None:
    """Remove the sidecar of a pair that is about to be replaced."""
    with file_errors("replace", sidecar_path(prefix), "choose a writable folder"):
        sidecar_path(prefix).unlink(missing_ok=True)


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """Read the sidecar of a pair; None if it has none.

    Raises:
        DataError: It is damaged or describes another ``.bin``.
    """
    path = sidecar_path(prefix)
    advice = f"delete it if {token_path(prefix).name} was written by another tool"
    if not path.is_file():
        return None
    values = read_json(path, advice)
    if set(values) != {field.name for field in dataclasses.fields(Sidecar)}:
        raise DataError(f"{path} has the fields {', '.join(sorted(values))}: {advice}")
    sidecar = Sidecar(**values)
    with file_errors("read", token_path(prefix), "restore it"):
        actual = token_path(prefix).stat().st_size
    if sidecar.bin_bytes != actual:
        raise DataError(
            f"{path} describes {sidecar.bin_bytes} bytes of tokens where "
            f"{token_path(prefix).name} holds {actual}: {advice}"
        )
    return sidecar


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check a model's vocabulary against the tokenizer's.

    Args:
        tokenizer: What the data is made with.
        vocab_size: Rows of the model's embedding.

    Raises:
        DataError: The model has fewer ids than the tokenizer, or more than padding explains.
    """
    needed = tokenizer.vocab_size
    padded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if not needed <= vocab_size <= padded:
        side = "smaller" if vocab_size < needed else "larger"
        raise DataError(
            f"model.vocab_size {vocab_size} is {side} than the {needed} ids of tokenizer "
            f"{tokenizer.name!r}: choose {needed} to {padded}, or the tokenizer of the data"
        )


def check_tokens(
    indexed: IndexedDataset, tokenizer: Tokenizer, cache: str | Path | None = None
) -> None:
    """Check that a token file was made with the tokenizer, as far as can be known.

    Args:
        indexed: The token file.
        tokenizer: What it should be made with.
        cache: Folder that keeps the result of a scan; None means ``<prefix>/cache``.

    Raises:
        DataError: The sidecar names another tokenizer, or an id is outside its vocabulary.
    """
    sidecar = read_sidecar(indexed.prefix)
    if sidecar is not None:
        if sidecar.tokenizer != tokenizer.identity:
            raise DataError(
                f"{indexed.prefix} was tokenized with {sidecar.tokenizer!r}, not with "
                f"{tokenizer.identity!r} ({tokenizer.name}): set data.tokenizer accordingly or "
                "tokenize the text again"
            )
        low, high = sidecar.smallest_id, sidecar.largest_id
    else:
        low, high = _scanned_range(indexed, cache)
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(
            f"{indexed.prefix} holds token id {low if low < 0 else high}, outside the vocabulary "
            f"of tokenizer {tokenizer.name!r} (0 to {tokenizer.vocab_size - 1}): set "
            "data.tokenizer to the one that wrote the file"
        )


def _scanned_range(indexed: IndexedDataset, cache: str | Path | None) -> tuple[int, int]:
    """Range of the ids, remembered for the unchanged file: a scan reads all of ``.bin``."""
    stamps = []
    for path in (token_path(indexed.prefix), index_path(indexed.prefix)):
        with file_errors("read", path, "restore it"):
            status = path.stat()
        stamps.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    folder = Path(indexed.prefix, "cache") if cache is None else Path(cache)
    path = folder / f"{digest(' '.join(stamps).encode())}-token-range.json"
    advice = "delete it and the file is scanned again"
    if path.is_file():
        values = read_json(path, advice)
        low, high = values.get("low"), values.get("high")
        if not isinstance(low, int) or not isinstance(high, int):
            raise DataError(f"{path} does not hold a range of ids: {advice}")
        return low, high
    low, high = indexed.token_range()
    write_json(path, {"low": low, "high": high}, ADVICE)
    return low, high
