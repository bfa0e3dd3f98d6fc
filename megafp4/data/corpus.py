"""Real English text that every machine has: the documentation and sources of its Python.

Nothing is downloaded and nothing is imported: docstrings are read out of the source files. Prose
comes first (the language reference behind ``help("topics")``, docstrings, the licence), then
source code without its docstrings, so that no sentence is in both. About 2 MB are prose.

Another Python version gives another corpus: compare losses only between runs on one.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megafp4.data.files import file_errors, read_json, write_json
from megafp4.data.indexed import IndexedDataset
from megafp4.data.preprocess import encode_texts, write_tokens
from megafp4.data.tokenizer import get_tokenizer
from megafp4.errors import DataError

KINDS = ("topics", "docstrings", "license", "source")
"""In order of preference."""
SKIPPED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib",
           "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data")  # fmt: skip
"""Folders that are not the library itself, generated tables, or text that is taken elsewhere."""
MACHINE_FILES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
"""Start of names that differ between installations of one version."""
SHORTEST_DOCSTRING = 80
SHORTEST_REPEAT = 80
"""A paragraph of so many characters is kept only where it occurs first."""
LIBRARY_ADVICE = "use a Python whose standard library is installed as .py files"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    kind: str
    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class CorpusReport:
    """What a corpus holds.

    Attributes:
        train: Prefix of the training pair.
        valid: Prefix of the validation pair.
        train_documents: Documents to train on.
        valid_documents: Documents to validate on.
        train_tokens: Token ids to train on.
        valid_tokens: Token ids to validate on.
        bytes_by_kind: UTF-8 bytes of both parts by kind of text.
        python: Version of the Python it was taken from.
    """

    train: str
    valid: str
    train_documents: int
    valid_documents: int
    train_tokens: int
    valid_tokens: int
    bytes_by_kind: dict[str, int]
    python: str


def python_corpus(
    folder: str | Path,
    seed: int = 1234,
    *,
    max_bytes: int = 4_000_000,
    valid_fraction: float = 0.05,
    tokenizer: str = "bytes",
) -> CorpusReport:
    """Write the corpus as two ``.bin``/``.idx`` pairs, ``<folder>/train`` and ``<folder>/valid``.

    Args:
        folder: Where the pairs and ``corpus.json`` go; created if needed.
        seed: Decides which documents are for validation.
        max_bytes: Upper bound of the text, in UTF-8 bytes; documents that do not fit are left out.
        valid_fraction: Share of the bytes of each kind for validation.
        tokenizer: See :func:`megafp4.data.tokenizer.get_tokenizer`.

    Raises:
        DataError: The sizes leave a part empty, the library has no sources, or the folder cannot be
            written.
    """
    if not 0 < valid_fraction < 1:
        raise DataError(f"valid_fraction is {valid_fraction}: give a share between 0 and 1")
    documents = select(collect(), max_bytes)
    train, valid = divide(documents, valid_fraction, seed)
    if not train or not valid:
        raise DataError(
            f"max_bytes {max_bytes} leaves {len(documents)} documents, too few for training and "
            "validation: allow at least 100000"
        )
    encoder = get_tokenizer(tokenizer)
    reports = []
    for name, part in (("train", train), ("valid", valid)):
        encoded = encode_texts(((document.name, document.text) for document in part), encoder)
        reports.append(write_tokens(Path(folder, name), encoder, [encoded], append_eod=True))
    report = CorpusReport(
        train=reports[0].prefix,
        valid=reports[1].prefix,
        train_documents=reports[0].documents,
        valid_documents=reports[1].documents,
        train_tokens=reports[0].tokens,
        valid_tokens=reports[1].tokens,
        bytes_by_kind={
            kind: sum(document.size for document in documents if document.kind == kind)
            for kind in KINDS
        },
        python=platform.python_version(),
    )
    request = _request(seed, max_bytes, valid_fraction, tokenizer)
    write_json(Path(folder, "corpus.json"), {"request": request, "report": asdict(report)})
    return report


def prepare(
    folder: str | Path,
    seed: int = 1234,
    *,
    max_bytes: int = 4_000_000,
    valid_fraction: float = 0.05,
    tokenizer: str = "bytes",
) -> tuple[str, str]:
    """Return the prefixes of the training and validation pair, writing them if they are not there.

    Takes the arguments of :func:`python_corpus`; a corpus of other arguments, or of another Python
    version, is replaced.
    """
    manifest = Path(folder, "corpus.json")
    request = _request(seed, max_bytes, valid_fraction, tokenizer)
    if manifest.is_file():
        found = read_json(manifest, "delete the folder and prepare it again")
        if found.get("request") == request:
            prefixes = str(Path(folder, "train")), str(Path(folder, "valid"))
            for prefix in prefixes:
                IndexedDataset(prefix)
            return prefixes
    report = python_corpus(
        folder, seed, max_bytes=max_bytes, valid_fraction=valid_fraction, tokenizer=tokenizer
    )
    return report.train, report.valid


def _request(seed: int, max_bytes: int, valid_fraction: float, tokenizer: str) -> dict[str, Any]:
    return {
        "seed": seed,
        "max_bytes": max_bytes,
        "valid_fraction": valid_fraction,
        "tokenizer": get_tokenizer(tokenizer).identity,
        "python": platform.python_version(),
    }


def collect() -> list[Document]:
    """Return every document of the installed Python, in a fixed order, without repetitions.

    Raises:
        DataError: The standard library has no source files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    docstrings, sources = [], []
    for path in _library_files(library):
        name = path.relative_to(library).as_posix()
        try:
            with file_errors("read", path, LIBRARY_ADVICE), tokenize.open(path) as file:
                prose, code = separate_docstrings(file.read())
        except (SyntaxError, UnicodeDecodeError):
            # Some installations carry files that are templates or for another version.
            continue
        docstrings.append(Document("docstrings", name, prose))
        sources.append(Document("source", name, code))
    if not sources:
        raise DataError(f"no Python sources lie under {library}: {LIBRARY_ADVICE}")
    license_file = library / "LICENSE.txt"
    licenses = []
    if license_file.is_file():
        with file_errors("read", license_file, LIBRARY_ADVICE):
            licenses = [Document("license", "LICENSE.txt", license_file.read_text("utf-8"))]
    return list(without_repeats([*_topics(), *docstrings, *licenses, *sources]))


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"this Python has no pydoc_data, the text of its reference: {LIBRARY_ADVICE}"
        ) from error
    return [Document("topics", name, topics[name].strip() + "\n") for name in sorted(topics)]


def _library_files(library: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(library):
        folders[:] = sorted(
            name for name in folders if name not in SKIPPED and not name.startswith(MACHINE_FILES)
        )
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(MACHINE_FILES):
                yield Path(root, name)


def separate_docstrings(source: str) -> tuple[str, str]:
    """Split Python source into its longer docstrings and the rest.

    Returns:
        The docstrings of at least 80 characters, cleaned, with blank lines between; and the source
        without the lines of any docstring.
    """
    found = []
    dropped: set[int] = set()
    blocks: list[list[ast.stmt]] = [ast.parse(source).body]
    is_scope = [True]
    while blocks:
        body, scope = blocks.pop(), is_scope.pop()
        first = body[0] if body else None
        if (
            scope
            and isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
            found.append((first.lineno, inspect.cleandoc(first.value.value)))
        for statement in body:
            named = isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            for field in ("body", "orelse", "finalbody"):
                inner = getattr(statement, field, None)
                if isinstance(inner, list) and inner:
                    blocks.append(inner)
                    is_scope.append(named)
    prose = [text for _, text in sorted(found) if len(text) >= SHORTEST_DOCSTRING]
    lines = source.split("\n")
    code = [line for number, line in enumerate(lines, 1) if number not in dropped]
    return "\n\n".join(prose), "\n".join(code)


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop paragraphs that occurred before, and documents of which nothing is left."""
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= SHORTEST_REPEAT:
                mark = hashlib.blake2b(words.encode(), digest_size=12).digest()
                if mark in seen:
                    continue
                seen.add(mark)
            kept.append(paragraph)
        text = "\n\n".join(kept).strip()
        if len(text) >= SHORTEST_REPEAT:
            yield Document(document.kind, document.name, text + "\n")


def select(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Take documents in order as long as they fit into ``max_bytes`` together."""
    taken, used = [], 0
    for document in documents:
        if used + document.size <= max_bytes:
            taken.append(document)
            used += document.size
    return taken


def divide(
    documents: list[Document], valid_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into training and validation documents, each kind in the same proportion.

    In a seeded random order, documents go to validation as long as their kind's share holds them,
    so that one long file cannot be all of it. At least one does.
    """
    order = np.random.RandomState(seed % 2**32).permutation(len(documents)).tolist()
    room = {
        kind: valid_fraction * sum(item.size for item in documents if item.kind == kind)
        for kind in KINDS
    }
    chosen: set[int] = set()
    for index in order:
        document = documents[index]
        if document.size <= room[document.kind]:
            room[document.kind] -= document.size
            chosen.add(index)
    if not chosen and documents:
        chosen.add(min(order, key=lambda index: documents[index].size))
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]
