"""Validation loss on a fixed set of batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megafp4.backends.ledger import Ledger
from megafp4.precision import Precision


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> float:
    """Mean loss per target token, dropout off, leaving no trace in training.

    The training ledger and statistics do not see these GEMMs, and no random generator moves:
    evaluating more often changes nothing else.

    Args:
        model: Returns the mean loss over the targets that are not -1.
        batches: (tokens, targets), each [batch, sequence]; the same ones each time.
        precision: What the layers of ``model`` record to.
    """
    ledger, probe, was_training = precision.ledger, precision.probe, model.training
    precision.ledger, precision.probe = Ledger(), None
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.int64)
    try:
        with torch.no_grad():
            for number, (tokens, targets) in enumerate(batches):
                precision.first_token = number * tokens.numel()
                predicted = (targets != -1).sum()
                # On the device, which need not be waited for between batches.
                total = total.to(tokens.device) + model(tokens, targets).double() * predicted
                count = count.to(tokens.device) + predicted
    finally:
        precision.ledger, precision.probe = ledger, probe
        model.train(was_training)
    return float(total / count)
