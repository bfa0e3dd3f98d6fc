"""The batches of a run: which samples belong to which step, cut into micro-batches.

Nothing here has state. Training batch ``step`` is samples ``step * global_batch`` onwards of the
run's one order; the validation batches are the first samples of the validation data, every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megafp4.config import DataConfig, ModelConfig, TrainConfig
from megafp4.data.loader import BatchSource, build_datasets
from megafp4.errors import DataError
from megafp4.parallel.collectives import Group

MicroBatch = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [micro-batch, sequence]; targets that hold -1 are ignored."""


class Batches:
    """Reads the batches of a run.

    Args:
        data: What is read.
        model: Sequence length and vocabulary.
        train: Sizes of batches, number of steps, seed.
        device: Where the batches go.
        dp: Ranks that share the micro-batches: rank r takes numbers r, r + ranks, ... of each step
            and of the validation data. None for one rank that takes them all.

    Raises:
        ConfigError: Unknown tokenizer.
        DataError: The files are missing, damaged, too small, or do not fit tokenizer and model.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        train: TrainConfig,
        device: torch.device,
        dp: Group | None = None,
    ) -> None:
        dp = Group("dp") if dp is None else dp
        self._first, self._stride = dp.rank, dp.size
        self.tokens_per_step = train.global_batch * model.seq_len
        self._order = train
        self._vocab_size = model.vocab_size
        self._device = device
        self._next: tuple[int, list[MicroBatch]] | None = None
        self._train, self._valid = build_datasets(
            data,
            seq_len=model.seq_len,
            train_samples=train.steps * train.global_batch,
            valid_samples=train.eval_batches * train.micro_batch,
            seed=train.seed,
            vocab_size=model.vocab_size,
        )

    def training(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step ``step``, counted from 0."""
        if self._next is not None and self._next[0] == step:
            found, self._next = self._next[1], None
            return found
        numbers = range(self._first, self._order.micro_batches, self._stride)
        return [self._training(step, number) for number in numbers]

    def prefetch(self, step: int) -> None:
        """Read a training batch now, while a GPU is busy; does nothing where there is none to hide.

        Raises:
            DataError: As :meth:`training`.
        """
        if self._device.type == "cuda" and step < self._order.steps:
            self._next = step, self.training(step)

    def validation(self) -> Iterator[MicroBatch]:
        """This rank's fixed validation batches, one by one; none if the run does not evaluate."""
        for index in range(self._first, self._order.eval_batches, self._stride):
            yield from self._validation(index)

    def fingerprint(self) -> str:
        """Digest of the first and the last training batch and of one validation batch, all ranks'.

        A run that is continued on other token files would end anywhere; this tells them apart.
        """
        numbers = range(self._order.micro_batches)
        steps = (0, self._order.steps - 1)
        batches = [self._training(step, number) for step in steps for number in numbers]
        batches += self._validation(0) if self._order.eval_batches else []
        digest = hashlib.sha256()
        for tokens, targets in batches:
            digest.update(tokens.cpu().numpy().tobytes() + targets.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _training(self, step: int, number: int) -> MicroBatch:
        """Micro-batch ``number`` of a step, whoever takes it."""
        order = self._order
        return self._read(self._train, step * order.global_batch + number * order.micro_batch)

    def _validation(self, number: int) -> list[MicroBatch]:
        """Validation batch ``number`` alone, or nothing if the run does not evaluate."""
        if self._valid is None:
            return []
        return [self._read(self._valid, number * self._order.micro_batch)]

    def _read(self, source: BatchSource, consumed: int) -> MicroBatch:
        tokens, targets = source.batch(consumed, self._order.micro_batch)
        # Files are checked when they are opened, but not every byte of them: an id without a row in
        # the embedding would end the run with an error that names neither.
        largest = max(int(tokens.max()), int(targets.max()))
        if largest >= self._vocab_size or int(targets.min()) < -1:
            raise DataError(
                f"the {source.name} data holds token id {largest} in the samples from {consumed} "
                f"on, but model.vocab_size is {self._vocab_size}: restore or preprocess the token "
                "files again"
            )
        return self._send(tokens), self._send(targets)

    def _send(self, ids: Tensor) -> Tensor:
        """Copy to the device without waiting for it, which takes memory that stays in place."""
        if self._device.type != "cuda":
            return ids.to(self._device)
        return ids.pin_memory().to(self._device, non_blocking=True)
