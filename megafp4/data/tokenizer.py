"""Text to token ids: bytes, GPT-2 BPE, any ``tokenizer.json``, SentencePiece.

The byte tokenizer needs nothing. The others import their library when they are built and read
their vocabulary from local files; only plain ``gpt2`` may load it from tiktoken's cache or the
network, and not before text is encoded, so that training on token files needs neither.

Text is never searched for special tokens: a document that contains ``<|endoftext|>`` gets the
characters, not the end-of-document id.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megafp4.data.files import file_errors, read_json
from megafp4.errors import ConfigError, DataError, UnsupportedError

GPT2_VOCABULARY = 50257
GPT2_RANKS_SHA256 = "d6eafc9c4e864b82073cdfe088157f5447dbdf12dfcc165653a9ca5eb92dce19"
"""Digest of GPT-2's tokens as hexadecimal bytes, by rank, separated by spaces."""
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
"""Tried in this order where no tokenizer_config.json names the token."""


class Tokenizer(Protocol):
    """What the rest of megafp4 needs of a tokenizer.

    Attributes:
        name: How it was asked for.
        identity: Equal for two tokenizers exactly if they map text to the same ids.
        vocab_size: Number of ids, special ones included.
        eod: Id that ends a document.
    """

    name: str
    identity: str
    vocab_size: int
    eod: int

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of ``text``, int32 [tokens], without an end-of-document id."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of ``ids``."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    identity = "bytes"
    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the UTF-8 bytes of ``text``."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text; the end of a document is dropped, broken UTF-8 is marked."""
        array = np.asarray(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class Gpt2Tokenizer:
    """GPT-2's byte-level BPE through tiktoken.

    Args:
        folder: Folder of ``encoder.json`` and ``vocab.bpe`` (or ``vocab.json`` and ``merges.txt``);
            None takes GPT-2's own, from tiktoken's cache or the network, when first needed.

    Raises:
        DataError: The files are missing or damaged.
        UnsupportedError: tiktoken is not installed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.name = self.identity = "gpt2"
        self.vocab_size, self.eod = GPT2_VOCABULARY, GPT2_VOCABULARY - 1
        self._encoding: Any = None
        if folder is not None:
            self.name = str(folder)
            self._load_files(*_gpt2_files(folder))

    def _load_files(self, encoder: Path, merges: Path) -> None:
        advice = "give a folder with encoder.json and vocab.bpe that belong together"
        tiktoken, load = _library("tiktoken"), _library("tiktoken.load")
        vocabulary = read_json(encoder, advice)
        try:
            # tiktoken keeps copies of local files too, by path: the digests keep it from old ones.
            ranks = load.data_gym_to_mergeable_bpe_ranks(
                str(merges), str(encoder), _sha256(merges, advice), _sha256(encoder, advice)
            )
        # It asserts that the two files agree.
        except (ValueError, AssertionError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{encoder} and {merges} are not one byte-level BPE vocabulary: {advice}"
            ) from error
        self.eod = int(vocabulary.get("<|endoftext|>", len(ranks)))
        self.vocab_size = max(self.eod + 1, len(ranks))
        # By rank, not by file: Hugging Face's vocab.json holds GPT-2's vocabulary in other bytes.
        spelled = b" ".join(token.hex().encode() for token in sorted(ranks, key=ranks.__getitem__))
        digest = hashlib.sha256(spelled).hexdigest()
        if digest != GPT2_RANKS_SHA256 or self.eod != GPT2_VOCABULARY - 1:
            self.identity = f"bpe-{digest[:16]}"
        self._encoding = tiktoken.Encoding(
            name=self.identity,
            pat_str=_library("tiktoken_ext.openai_public").r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eod},
        )

    def _bpe(self) -> Any:
        if self._encoding is None:
            tiktoken = _library("tiktoken")
            advice = "set data.tokenizer to a folder with encoder.json and vocab.bpe, or go online"
            # The download goes through requests, whose errors are OSErrors.
            with file_errors("load", "GPT-2's vocabulary", advice):
                self._encoding = tiktoken.get_encoding("gpt2")
        return self._encoding

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the BPE ids of ``text``."""
        _utf8(text)
        return np.asarray(self._bpe().encode_ordinary(text), np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of ``ids``."""
        return str(self._bpe().decode(_known_ids(ids, self)))


class JsonTokenizer:
    """Any ``tokenizer.json`` through Hugging Face's tokenizers.

    The end of a document is ``eos_token`` of a ``tokenizer_config.json`` beside the file, else the
    first of :data:`END_OF_DOCUMENT` that the vocabulary has.

    Args:
        path: The ``tokenizer.json``.

    Raises:
        DataError: The file is missing, damaged, or has no end-of-document token.
        UnsupportedError: tokenizers is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        advice = "give a tokenizer.json as Hugging Face's tokenizers writes it"
        self.identity = f"json-{_sha256(path, advice)[:16]}"
        library = _library("tokenizers")
        read_json(path, advice)
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every fault in a file
            raise DataError(f"{path} is not a tokenizer ({error}): {advice}") from error
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path} has an empty vocabulary: {advice}")
        # Not the number of entries: ids may have holes.
        self.vocab_size = max(vocabulary.values()) + 1
        wanted = _configured_eos(path.with_name("tokenizer_config.json"))
        found = [token for token in wanted or END_OF_DOCUMENT if token in vocabulary]
        if not found:
            raise DataError(
                f"{path} has no end-of-document token: name one as eos_token in a "
                "tokenizer_config.json beside it"
            )
        self.eod = vocabulary[found[0]]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of ``text``, without the special tokens of a template."""
        _utf8(text)
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode(_known_ids(ids, self), skip_special_tokens=False))


class SentencePieceTokenizer:
    """A SentencePiece ``.model``; its ``</s>`` ends documents.

    Args:
        path: The model file.

    Raises:
        DataError: The file is missing, damaged, or has no ``</s>``.
        UnsupportedError: sentencepiece is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        advice = "give a model file as SentencePiece writes it"
        self.identity = f"sentencepiece-{_sha256(path, advice)[:16]}"
        library = _library("sentencepiece")
        self._processor = library.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model: {advice}") from error
        self.vocab_size = int(self._processor.GetPieceSize())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise DataError(
                f"{path} was trained without an </s> piece: choose one with eos_id >= 0"
            )

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of ``text``, without ``<s>`` and ``</s>``."""
        _utf8(text)
        return np.asarray(self._processor.EncodeAsIds(text), np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of ``ids``."""
        return str(self._processor.DecodeIds(_known_ids(ids, self)))


def get_tokenizer(name: str) -> Tokenizer:
    """Build the tokenizer that ``data.tokenizer`` names.

    Args:
        name: ``bytes``, ``gpt2``, or a path: a ``tokenizer.json``, a SentencePiece ``.model``, or a
            folder with one of them or with GPT-2's ``encoder.json`` and ``vocab.bpe``.

    Raises:
        ConfigError: Neither a built-in name nor an existing path.
        DataError: The files cannot be used.
        UnsupportedError: The library that reads them is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return Gpt2Tokenizer()
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"unknown tokenizer {name!r}: choose bytes, gpt2, or the path of an existing "
            "tokenizer.json, SentencePiece .model or folder with GPT-2's encoder.json and vocab.bpe"
        )
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return JsonTokenizer(path / "tokenizer.json")
        if (path / "tokenizer.model").is_file():
            return SentencePieceTokenizer(path / "tokenizer.model")
        return Gpt2Tokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.name in ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt"):
        return Gpt2Tokenizer(path.parent)
    return JsonTokenizer(path)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"this tokenizer needs the package {module.partition('.')[0]}, which is not installed: "
            "run pip install 'megafp4[data]'"
        ) from error


def _sha256(path: Path, advice: str) -> str:
    with file_errors("read", path, advice):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    for encoder, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / encoder).is_file() and (folder / merges).is_file():
            return folder / encoder, folder / merges
    raise DataError(
        f"{folder} holds no tokenizer: it needs tokenizer.json, tokenizer.model, encoder.json with "
        "vocab.bpe, or vocab.json with merges.txt"
    )


def _configured_eos(path: Path) -> list[str]:
    if not path.is_file():
        return []
    token = read_json(path, "repair or remove it").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return [token] if isinstance(token, str) else []


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds half a surrogate pair at character {error.start}, which no encoding can "
            "represent: repair or drop the document"
        ) from error


def _known_ids(ids: ArrayLike, tokenizer: Tokenizer) -> list[int]:
    array = np.asarray(ids).reshape(-1)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < tokenizer.vocab_size:
        raise DataError(
            f"ids from {array.min()} to {array.max()} cannot be decoded: {tokenizer.name} has "
            f"{tokenizer.vocab_size}"
        )
    return [int(token) for token in array]
