"""Batches follow from the step alone, however they are cut."""

from pathlib import Path

import torch
from torch import Tensor

from megafp4.data.loader import build_datasets
from megafp4.train.batches import Batches, MicroBatch
from tests.train.tiny import tiny


def batches(corpus: str, **changes: int) -> Batches:
    config = tiny(corpus, Path("unused"), **changes)
    return Batches(config.data, config.model, config.train, torch.device("cpu"))


def joined(micro_batches: list[MicroBatch]) -> Tensor:
    return torch.stack([torch.cat(part) for part in zip(*micro_batches, strict=True)])


def test_steps_walk_through_the_samples(corpus: str) -> None:
    config = tiny(corpus, Path("unused"))
    source, _ = build_datasets(
        config.data, seq_len=32, train_samples=24, valid_samples=2, seed=1234, vocab_size=257
    )
    data = batches(corpus)
    assert data.tokens_per_step == 4 * 32
    for step in (0, 3, 5, 1):
        found = data.training(step)
        assert [tokens.shape for tokens, _ in found] == [(2, 32), (2, 32)]
        assert torch.equal(joined(found), torch.stack(source.batch(4 * step, 4)))
    assert not torch.equal(joined(data.training(0)), joined(data.training(1)))


def test_micro_batches_only_cut(corpus: str) -> None:
    whole, cut = (batches(corpus, micro_batch=size) for size in (4, 1))
    assert len(cut.training(2)) == 4
    assert torch.equal(joined(whole.training(2)), joined(cut.training(2)))


def test_targets_are_the_next_tokens(corpus: str) -> None:
    for tokens, targets in batches(corpus).training(0):
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_validation_is_fixed_and_may_be_empty(corpus: str) -> None:
    data = batches(corpus, eval_batches=2)
    assert len(list(data.validation())) == 2
    assert torch.equal(joined([*data.validation()]), joined([*data.validation()]))
    assert list(batches(corpus, eval_batches=0).validation()) == []
