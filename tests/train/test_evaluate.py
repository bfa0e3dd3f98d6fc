"""Evaluation: the right mean, and no trace in training."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafp4.linear import Linear
from megafp4.precision import Precision
from megafp4.train.evaluate import evaluate


class Model(nn.Module):
    """An embedding, a quantized linear, dropout and a loss over targets that are not -1."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.linear = Linear(32, 10, recipe="fp4", precision=precision)
        self.dropout = nn.Dropout(0.5)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.linear(self.embedding(tokens)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def batches() -> list[tuple[Tensor, Tensor]]:
    tokens, targets = torch.randint(10, (3, 2, 8)), torch.randint(10, (3, 2, 8))
    targets[1, :, 3:] = -1
    return list(zip(tokens, targets, strict=True))


def test_the_loss_is_the_mean_over_targets_not_over_batches() -> None:
    precision = Precision()
    model, data = Model(precision), batches()
    loss = evaluate(model, data, precision)
    model.eval()
    with torch.no_grad():
        each = [
            F.cross_entropy(
                model.logits(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum"
            )
            for x, y in data
        ]
        unweighted = sum(float(model(x, y)) for x, y in data) / 3
    count = sum(int((y != -1).sum()) for _, y in data)
    assert loss == pytest.approx(float(sum(each)) / count, rel=1e-5)
    assert loss != pytest.approx(unweighted, rel=1e-5)


def test_training_does_not_notice() -> None:
    precision = Precision()
    seen: list[str] = []
    precision.probe = lambda layer, *_: seen.append(layer)
    model, data = Model(precision), batches()
    model.train()
    probe, ledger, generator = precision.probe, precision.ledger, torch.get_rng_state()
    assert evaluate(model, data, precision) == evaluate(model, data, precision)
    assert model.training
    assert model.dropout.training
    assert precision.probe is probe
    assert seen == []
    assert precision.ledger is ledger
    assert ledger.total() == 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_ledger_comes_back_after_an_error() -> None:
    precision = Precision()
    ledger = precision.ledger
    model = Model(precision)
    with pytest.raises(IndexError):
        evaluate(model, [(torch.tensor([[11]]), torch.tensor([[0]]))], precision)
    assert precision.ledger is ledger
    assert model.training
