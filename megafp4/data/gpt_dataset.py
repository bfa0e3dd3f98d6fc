"""Samples of fixed length out of one token file, in Megatron's order.

Three arrays say which tokens a sample holds:

- the *document index*, int32 [epochs * documents]: the documents, every epoch, shuffled;
- the *sample index* [samples + 1, 2]: where in that stream of documents sample ``i`` starts, as a
  position in the document index and a token offset;
- the *shuffle index* [samples]: the order in which the samples are visited.

The stream is cut every ``seq_len`` tokens and a sample takes ``seq_len + 1``, so that neighbours
share one token: each token but the first is a target exactly once per epoch. All randomness
is one ``numpy.random.RandomState(seed)`` used in a fixed order, so the arrays equal Megatron-LM's
``GPTDataset`` for the same seed, and are cached beside the data.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megafp4.data.cache import Arrays, cached_arrays, digest
from megafp4.data.indexed import IndexedDataset
from megafp4.errors import DataError

PADDING = -1
"""Fills the end of a partial sample; never a token id."""
SEPARATE_BELOW = 0.80
"""A last epoch used by less than this share is shuffled on its own."""


@dataclass(frozen=True)
class Epochs:
    """How often the documents are read to fill a number of samples.

    Attributes:
        count: Passes over the documents, at least one.
        samples: Samples of all passes.
        samples_before_last: Samples that lie wholly in front of the last pass.
        separate_last: Whether documents and samples of the last pass are shuffled on their own.
    """

    count: int
    samples: int
    samples_before_last: int
    separate_last: bool

    @classmethod
    def plan(
        cls, tokens: int, num_samples: int | None, seq_len: int, keep_partial: bool = False
    ) -> Epochs:
        """Plan the epochs.

        If only a small part of the last epoch is used, shuffling it together with the others would
        make some documents seen once more than the rest from the start of training on; therefore
        it is kept at the end then.

        Args:
            tokens: Tokens of one epoch, at least 1.
            num_samples: Samples wanted; None asks for one epoch.
            seq_len: Tokens per sample, without the overlap.
            keep_partial: Keep a shorter, padded sample at the end.
        """
        needed = 0 if num_samples is None else num_samples * seq_len + 1
        count = max(1, -(-needed // tokens))
        last_target = count * tokens - 1
        samples = -(-last_target // seq_len) if keep_partial else last_target // seq_len
        if count == 1 or num_samples is None:
            return cls(1, samples, 0, False)
        before = ((count - 1) * tokens - 1) // seq_len
        per_epoch = (tokens - 1) // seq_len
        separate = num_samples - before < int(SEPARATE_BELOW * per_epoch)
        return cls(count, samples, before, separate)


def build_document_index(
    documents: NDArray[np.int32], epochs: Epochs, random: np.random.RandomState
) -> NDArray[np.int32]:
    """Return the shuffled documents of all epochs, int32 [epochs * documents]."""
    parts = (epochs.count - 1, 1) if epochs.separate_last else (epochs.count,)
    shuffled = [np.tile(documents.astype(np.int32), part) for part in parts]
    for part in shuffled:
        random.shuffle(part)
    return np.concatenate(shuffled)


def build_sample_index(
    lengths: NDArray[Any], document_index: NDArray[np.int32], seq_len: int, samples: int
) -> NDArray[Any]:
    """Return where each sample starts, and where the last one ends.

    Boundary ``i`` lies at token ``i * seq_len`` of the stream of documents: found for all samples
    at once by a binary search in the running total of document lengths.

    Args:
        lengths: Tokens of every sequence of the file.
        document_index: Sequences in the order they are read.
        seq_len: Tokens per sample.
        samples: Number of samples.

    Returns:
        int32 or, if a number does not fit, int64 [samples + 1, 2].
    """
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    # Only a padded last sample reaches past the stream; it ends at the last token.
    starts = np.minimum(np.arange(samples + 1, dtype=np.int64) * seq_len, int(ends[-1]) - 1)
    position = np.searchsorted(ends, starts, side="right")
    offset = starts - (ends[position] - lengths[document_index[position]])
    # Megatron's walk starts at the first document even if it is empty.
    position[0] = 0
    largest = max(len(document_index), int(lengths.max()))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    return np.stack([position, offset], axis=1).astype(dtype)


def shuffle_dtype(samples: int) -> np.dtype[Any]:
    """Type of the shuffle index: uint32, or int64 from 2^32 - 2 samples on, as in Megatron."""
    return np.dtype(np.int64 if samples >= np.iinfo(np.uint32).max - 1 else np.uint32)


def build_shuffle_index(epochs: Epochs, random: np.random.RandomState) -> NDArray[Any]:
    """Return the order of the samples, :func:`shuffle_dtype` [samples]."""
    dtype = shuffle_dtype(epochs.samples)
    middle = epochs.samples_before_last if epochs.separate_last else epochs.samples
    parts = [np.arange(middle, dtype=dtype), np.arange(middle, epochs.samples, dtype=dtype)]
    for part in parts[: 2 if epochs.separate_last else 1]:
        random.shuffle(part)
    return np.concatenate(parts)


def parse_split(split: str) -> tuple[tuple[float, float] | None, ...]:
    """Turn ``"949,50,1"`` into the ranges of train, valid and test: bounds in [0, 1], or None.

    Raises:
        DataError: Not one to three non-negative numbers with a positive sum.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    # Not sum(): from Python 3.12 on it rounds differently, and a document could change sides.
    total = float(np.sum(shares))
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < total < float("inf"):
        raise DataError(
            f"data.split is {split!r}: give up to three non-negative shares for training, "
            "validation and test, such as 949,50,1"
        )
    bounds = [0.0]
    for share in [*shares, 0.0, 0.0][:3]:
        bounds.append(bounds[-1] + share / total)
    pairs = itertools.pairwise(bounds)
    return tuple((low, high) if high > low else None for low, high in pairs)


def split_documents(count: int, bounds: tuple[float, float]) -> range:
    """Return the documents of a share of ``count``, contiguous and in file order."""
    return range(round(bounds[0] * count), round(bounds[1] * count))


class GPTDataset:
    """Samples of ``seq_len + 1`` token ids out of one token file.

    Args:
        indexed: The token file.
        documents: The part of its sequences to use; None means all.
        num_samples: Samples wanted; the documents are repeated until there are at least so many.
            None reads them once.
        seq_len: Tokens per sample, without the overlap of one.
        seed: Seed of the two shuffles, in [0, 2^32).
        name: ``train``, ``valid`` or ``test``; part of the cache's file names.
        cache: Folder of the cached arrays; None means ``<prefix>/cache/GPTDataset_indices``.
        keep_partial: Keep a last, shorter sample, padded with :data:`PADDING`.

    Raises:
        DataError: No tokens, an impossible size, or a cache that cannot be read or written.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        *,
        seq_len: int,
        num_samples: int | None = None,
        documents: range | None = None,
        seed: int = 1234,
        name: str = "train",
        cache: str | Path | None = None,
        keep_partial: bool = False,
    ) -> None:
        documents = range(len(indexed)) if documents is None else documents
        _check_request(indexed, documents, num_samples, seq_len, seed, name)
        self.indexed, self.seq_len = indexed, seq_len
        lengths = indexed.lengths[documents.start : documents.stop]
        tokens = int(np.sum(lengths, dtype=np.int64))
        if tokens == 0:
            raise DataError(
                f"the {name} share of {indexed.prefix}, {len(documents)} of {len(indexed)} "
                "documents, holds no tokens: change data.split or give more data"
            )
        self.epochs = Epochs.plan(tokens, num_samples, seq_len, keep_partial)
        arrays = cached_arrays(
            Path(indexed.prefix, "cache", "GPTDataset_indices") if cache is None else cache,
            {
                "class": "GPTDataset",
                "dataset_path": Path(indexed.prefix).name,
                "num_samples": num_samples,
                "index_split": name,
                "random_seed": seed,
                "sequence_length": seq_len,
                "keep_partial": keep_partial,
                "documents": [documents.start, documents.stop],
                # All that the arrays know of the file: the key follows content, not age.
                "document_lengths_md5": digest(np.ascontiguousarray(lengths).data),
            },
            {
                "document_index": (self.epochs.count * len(documents),),
                "sample_index": (self.epochs.samples + 1, 2),
                "shuffle_index": (self.epochs.samples,),
            },
            lambda: self._build(documents, seed),
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def _build(self, documents: range, seed: int) -> Arrays:
        random = np.random.RandomState(seed)
        selected = np.arange(documents.start, documents.stop, dtype=np.int32)
        order = build_document_index(selected, self.epochs, random)
        lengths, samples = self.indexed.lengths, self.epochs.samples
        return {
            "document_index": order,
            "sample_index": build_sample_index(lengths, order, self.seq_len, samples),
            "shuffle_index": build_shuffle_index(self.epochs, random),
        }

    def __len__(self) -> int:
        return self.epochs.samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return sample ``index`` of the shuffled order, int64 [seq_len + 1].

        Raises:
            DataError: There are fewer samples.
        """
        if not 0 <= index < len(self):
            raise DataError(
                f"sample {index} of {self.indexed.prefix} was asked for but only {len(self)} were "
                "prepared: prepare more samples"
            )
        place = int(self.shuffle_index[index])
        first, first_offset = map(int, self.sample_index[place])
        last, last_offset = map(int, self.sample_index[place + 1])
        sample = np.full(self.seq_len + 1, PADDING, dtype=np.int64)
        filled = 0
        for position in range(first, last + 1):
            start = first_offset if position == first else 0
            stop = last_offset + 1 if position == last else None
            part = self.indexed.get(
                int(self.document_index[position]), start, None if stop is None else stop - start
            )
            sample[filled : filled + len(part)] = part
            filled += len(part)
        return sample


def _check_request(
    indexed: IndexedDataset,
    documents: range,
    num_samples: int | None,
    seq_len: int,
    seed: int,
    name: str,
) -> None:
    if seq_len < 1 or (num_samples is not None and num_samples < 1):
        raise DataError(
            f"{num_samples} samples of {seq_len} tokens were asked for: both must be positive"
        )
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} cannot shuffle data: choose one in [0, 2^32)")
    if documents.step != 1 or not 0 <= documents.start <= documents.stop <= len(indexed):
        raise DataError(
            f"{indexed.prefix} has {len(indexed)} documents: {documents} are not of them"
        )
    if len(indexed) > np.iinfo(np.int32).max:
        raise DataError(
            f"{indexed.prefix} has {len(indexed)} documents, more than the int32 document index "
            "can name: split the file in two and blend them"
        )
    if name not in ("train", "valid", "test"):
        raise DataError(f"split name {name!r}: choose train, valid or test")
