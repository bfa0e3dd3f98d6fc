"""Several token files as one, in given proportions.

Megatron's greedy rule: sample ``n`` comes from the file that is furthest behind its share,
``argmax_i(w_i * max(n, 1) - count_i)``, ties to the first. It is deterministic, and after any
number of samples each file's count is within a few of its share.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megafp4.data.cache import Arrays, cached_arrays
from megafp4.data.gpt_dataset import GPTDataset
from megafp4.errors import DataError

SURPLUS = 0.005
"""Megatron asks each file for this share of samples more than it will use."""


def parse_blend(entries: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Read what ``data.train`` and ``data.valid`` may hold.

    The rule: all entries, joined by spaces, are cut at spaces into items (a path that holds spaces
    is quoted, as in a shell). An item that reads as a number is a weight and belongs to the prefix
    that follows it. Either every prefix has a weight or none has. So ``("0.7 a 0.3 b",)``,
    ``("0.7 a", "0.3 b")`` and ``("0.7", "a", "0.3", "b")`` mean the same, and ``("a", "b")`` or
    ``("a b",)`` mixes both in proportion to their sizes. A prefix that is itself a number is
    written ``./5``.

    Returns:
        The prefixes, and their weights as given, or None.

    Raises:
        DataError: No prefix, a weight without one, some weights missing, or an impossible weight.
    """
    given = " ".join(entries)
    prefixes: list[str] = []
    weights: list[float] = []
    pending: float | None = None
    for item in _items(given):
        weight = _number(item)
        if weight is None:
            prefixes.append(item)
            if pending is not None:
                weights.append(pending)
            pending = None
        elif pending is not None:
            break
        else:
            pending = weight
    if not prefixes or pending is not None or len(weights) not in (0, len(prefixes)):
        raise DataError(
            f"cannot read the data blend {given!r}: give prefixes of .bin/.idx pairs, either each "
            "preceded by its weight, such as '0.7 a 0.3 b', or all without"
        )
    if weights:
        normalize(weights)
    return tuple(prefixes), tuple(weights) or None


def _items(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.escape = ""
    try:
        return list(lexer)
    except ValueError as error:
        raise DataError(f"cannot read the data blend {text!r}: a quote is not closed") from error


def _number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def normalize(weights: Sequence[float]) -> NDArray[np.float64]:
    """Return float64 weights [n] that sum to one.

    Raises:
        DataError: A weight is zero, negative or not finite.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.size == 0 or not np.all(np.isfinite(shares)) or not np.all(shares > 0):
        raise DataError(
            f"blend weights are {', '.join(map(str, weights))}: each must be a positive finite "
            "number, drop the files that are not wanted"
        )
    return shares / np.sum(shares)


def build_blend(weights: NDArray[np.float64], size: int) -> Arrays:
    """Choose the file of every sample by the greedy rule.

    Each choice depends on all before it: a loop over samples, about two microseconds each, that
    compares all files at once.

    Args:
        weights: Shares [files] that sum to one.
        size: Number of samples.

    Returns:
        ``dataset_index``, the file of each sample, int16 [size], and ``dataset_sample_index``, its
        number among that file's samples, int64 [size].
    """
    chosen = np.zeros(size, np.int16)
    counts, behind = np.zeros(len(weights)), np.empty(len(weights))
    for sample in range(size if len(weights) > 1 else 0):
        np.multiply(weights, sample or 1, out=behind)
        np.subtract(behind, counts, out=behind)
        first = behind.argmax()
        counts[first] += 1.0
        chosen[sample] = first
    within = np.empty(size, np.int64)
    for file in range(len(weights)):
        mine = chosen == file
        within[mine] = np.arange(np.count_nonzero(mine))
    return {"dataset_index": chosen, "dataset_sample_index": within}


class BlendedDataset:
    """Samples of several files, interleaved by :func:`build_blend`.

    Args:
        prepare: ``prepare(file, num_samples)`` returns file number ``file`` as a dataset of at
            least so many samples, or of one epoch if ``num_samples`` is None.
        prefixes: Names of the files.
        weights: Their shares; None mixes them in proportion to the samples each one has.
        num_samples: Samples wanted; None reads every file once and needs ``weights`` None.
        name: ``train``, ``valid`` or ``test``; part of the cache's file names.
        cache: Folder of the cached arrays; None means ``<first prefix>/cache/GPTDataset_indices``.

    Raises:
        DataError: Bad weights, too many files, or files of less than a sample.
    """

    def __init__(
        self,
        prepare: Callable[[int, int | None], GPTDataset],
        prefixes: Sequence[str],
        weights: Sequence[float] | None,
        num_samples: int | None,
        *,
        name: str = "train",
        cache: str | Path | None = None,
    ) -> None:
        if len(prefixes) > np.iinfo(np.int16).max:
            raise DataError(
                f"{len(prefixes)} files cannot be blended: at most 32767 can, merge some"
            )
        once: list[GPTDataset] = []
        if weights is None:
            once = [prepare(file, None) for file in range(len(prefixes))]
            weights = _sizes(prefixes, once)
            num_samples = sum(map(len, once)) if num_samples is None else num_samples
        elif len(weights) != len(prefixes):
            raise DataError(
                f"{len(prefixes)} files have {len(weights)} weights: give one weight per file"
            )
        elif num_samples is None:
            raise DataError("a weighted blend has no natural end: say how many samples are wanted")
        shares = normalize(weights)
        requests = [math.ceil(num_samples * share) for share in shares.tolist()]
        size = num_samples if once else sum(requests)
        arrays = cached_arrays(
            Path(prefixes[0], "cache", "GPTDataset_indices") if cache is None else cache,
            {
                "class": "BlendedDataset",
                "index_split": name,
                "datasets": [Path(prefix).name for prefix in prefixes],
                "weights": shares.tolist(),
                "size": size,
            },
            {"dataset_index": (size,), "dataset_sample_index": (size,)},
            lambda: build_blend(shares, size),
        )
        self.dataset_index = arrays["dataset_index"]
        self.dataset_sample_index = arrays["dataset_sample_index"]
        used = np.bincount(self.dataset_index, minlength=len(prefixes)).tolist()
        self.datasets = [
            once[file]
            if once and count <= len(once[file])
            # Megatron's request; with very uneven weights the greedy rule can need more than that.
            else prepare(file, max(math.ceil(requests[file] * (1 + SURPLUS)), count))
            for file, count in enumerate(used)
        ]
        self.seq_len = self.datasets[0].seq_len

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return sample ``index``, int64 [seq_len + 1].

        Raises:
            DataError: There are fewer samples.
        """
        if not 0 <= index < len(self):
            raise DataError(
                f"sample {index} of a blend was asked for but only {len(self)} were prepared: "
                "prepare more samples"
            )
        return self.datasets[int(self.dataset_index[index])][int(self.dataset_sample_index[index])]


def _sizes(prefixes: Sequence[str], datasets: Sequence[GPTDataset]) -> list[float]:
    """Samples of one epoch of each file, which must not be zero."""
    for prefix, dataset in zip(prefixes, datasets, strict=True):
        if not len(dataset):
            raise DataError(
                f"{prefix} holds less than one sample of {dataset.seq_len} tokens: drop it from "
                "the blend, weigh the files, or shorten the sequences"
            )
    return [float(len(dataset)) for dataset in datasets]
