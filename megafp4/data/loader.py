"""Batches as a pure function of the seed and the number of samples consumed.

Sample ``n`` of a run is fixed by the data configuration and the seed. A batch is a stretch of
that sequence, so micro-batches, data-parallel ranks and resumed runs only cut it differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megafp4.data.blend import BlendedDataset, parse_blend
from megafp4.data.gpt_dataset import GPTDataset, parse_split, split_documents
from megafp4.data.indexed import IndexedDataset
from megafp4.data.sidecar import check_tokens, check_vocabulary
from megafp4.data.tokenizer import Tokenizer, get_tokenizer
from megafp4.errors import DataError

WHOLE = (0.0, 1.0)


class DataSettings(Protocol):
    """The fields of :class:`megafp4.config.DataConfig` that are read here."""

    @property
    def train(self) -> tuple[str, ...]:
        """Blend to train on."""
        ...

    @property
    def valid(self) -> tuple[str, ...]:
        """Blend to validate on, or nothing."""
        ...

    @property
    def split(self) -> str:
        """Shares of the training files if ``valid`` is empty."""
        ...

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer."""
        ...

    @property
    def cache(self) -> str | None:
        """Folder of cached indices."""
        ...


class SampleSequence(Protocol):
    """Samples of ``seq_len + 1`` ids, int64; -1 fills a partial one."""

    seq_len: int

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return one sample."""
        ...


class BatchSource:
    """Cuts a sequence of samples into batches.

    Args:
        dataset: A :class:`GPTDataset`, a :class:`BlendedDataset` or anything alike.
        name: What it is called in error messages.
    """

    def __init__(self, dataset: SampleSequence, name: str = "train") -> None:
        self.dataset = dataset
        self.name = name
        self.seq_len = dataset.seq_len

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def batch(
        self, consumed_samples: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets of one rank.

        Samples ``consumed_samples`` to ``consumed_samples + batch_size * dp_size`` are dealt to the
        ranks in stretches: rank ``r`` gets the ``batch_size`` that start at
        ``consumed_samples + r * batch_size``. The caller adds ``batch_size * dp_size`` after each
        call.

        Args:
            consumed_samples: Samples that the whole run has used before.
            batch_size: Sequences for this rank, at least 1.
            dp_rank: This rank's place among ``dp_size``.
            dp_size: Number of data-parallel ranks.

        Returns:
            Tokens and targets, int64 [batch_size, seq_len]; ``targets[:, i]`` follows
            ``tokens[:, i]``, and is -1 where a sample has ended.

        Raises:
            DataError: The samples do not exist, or the arguments make no sense.
        """
        if batch_size < 1 or not 0 <= dp_rank < dp_size or consumed_samples < 0:
            raise DataError(
                f"a batch of {batch_size} after {consumed_samples} samples for rank {dp_rank} of "
                f"{dp_size} cannot be made: give a positive size and a rank below the ranks' number"
            )
        first = consumed_samples + dp_rank * batch_size
        if first + batch_size > len(self):
            raise DataError(
                f"the {self.name} data holds {len(self)} samples of {self.seq_len} tokens but "
                f"sample {first + batch_size - 1} was asked for: prepare as many as will be used"
            )
        rows = np.stack([self.dataset[index] for index in range(first, first + batch_size)])
        samples = torch.from_numpy(rows)
        tokens, targets = samples[:, :-1], samples[:, 1:].contiguous()
        # An embedding has no row for the padding; its targets are ignored by the loss.
        return tokens.clamp(min=0), targets


def build_datasets(
    settings: DataSettings,
    *,
    seq_len: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    vocab_size: int,
) -> tuple[BatchSource, BatchSource | None]:
    """Build what a run reads.

    ``settings.train`` and ``settings.valid`` are blends, read by
    :func:`megafp4.data.blend.parse_blend`. Without ``valid``, each training file is split
    by documents into the shares of ``settings.split``; with it, all of every file is used.

    Args:
        settings: The data part of a run's configuration.
        seq_len: Tokens per sample.
        train_samples: Samples the run will train on; files are repeated as needed.
        valid_samples: Samples it will validate on; 0 for none.
        seed: Seed of the order.
        vocab_size: Rows of the model's embedding.

    Returns:
        The training and the validation source; None for the latter without ``valid_samples``.

    Raises:
        ConfigError: Unknown tokenizer.
        DataError: Files, blend, split or vocabulary cannot be used.
    """
    if not settings.train:
        raise DataError("data.train names no files: give prefixes of .bin/.idx pairs")
    tokenizer = get_tokenizer(settings.tokenizer)
    check_vocabulary(tokenizer, vocab_size)
    opened = cache(partial(_open_checked, tokenizer=tokenizer, folder=settings.cache))
    ranges = parse_split(settings.split) if not settings.valid else (WHOLE, WHOLE, None)

    def source(name: str, entries: Sequence[str], samples: int, share: int) -> BatchSource:
        bounds = ranges[share]
        if bounds is None:
            raise DataError(
                f"data.split {settings.split!r} leaves nothing for the {name} data: give it a "
                "share, or name files in data.valid"
            )
        prefixes, weights = parse_blend(entries)

        def prepare(file: int, num_samples: int | None) -> GPTDataset:
            indexed = opened(prefixes[file])
            return GPTDataset(
                indexed,
                seq_len=seq_len,
                num_samples=num_samples,
                documents=split_documents(len(indexed), bounds),
                seed=seed,
                name=name,
                cache=settings.cache,
            )

        if len(prefixes) == 1:
            return BatchSource(prepare(0, samples), name)
        return BatchSource(
            BlendedDataset(prepare, prefixes, weights, samples, name=name, cache=settings.cache),
            name,
        )

    train = source("train", settings.train, train_samples, 0)
    if valid_samples == 0:
        return train, None
    return train, source("valid", settings.valid or settings.train, valid_samples, 1)


def _open_checked(prefix: str, tokenizer: Tokenizer, folder: str | Path | None) -> IndexedDataset:
    indexed = IndexedDataset(prefix)
    check_tokens(indexed, tokenizer, folder)
    return indexed
