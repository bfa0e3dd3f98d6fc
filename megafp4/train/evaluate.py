"""Validation loss on a fixed set of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from megafp4.numerics import Runs
from megafp4.parallel.collectives import Group
from megafp4.parallel.context import ContextParallel
from megafp4.parallel.pipeline import Pipeline
from megafp4.precision import Precision
from megafp4.train.parallel import in_order


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    dp: Group | None = None,
    context: ContextParallel | None = None,
    pipeline: Pipeline | None = None,
    pads_to: tuple[int, int] | None = None,
) -> float:
    """Mean loss per target token, dropout off, leaving no trace in training.

    The training ledger and statistics do not see these GEMMs, and no random generator moves:
    evaluating more often changes nothing else.

    Args:
        model: Returns the mean loss over the targets that are not -1.
        batches: (tokens, targets), each [batch, sequence]; the same ones each time.
        precision: What the layers of ``model`` record to.
        dp: Ranks that share the batches, number ``i * ranks + r`` being the i-th of rank r; every
            rank returns the mean over all of them, to the bit that of one rank.
        context: Which tokens of each sequence are this rank's.
        pipeline: Runs the model, if its blocks lie on several ranks.
        pads_to: (batches, length of a sequence): run the model that often, on nothing where there
            is no batch left, because it gathers its weights from ranks that have one.
    """
    dp = Group("dp") if dp is None else dp
    context = ContextParallel(Group("cp")) if context is None else context
    counts: list[Tensor] = []

    def parts() -> Iterator[tuple[Tensor, Tensor, int | Runs]]:
        for index, (tokens, targets) in enumerate(batches):
            part = context.cut(tokens, targets, (index * dp.size + dp.rank) * tokens.numel())
            counts.append((part[1] != -1).sum())
            yield part

    losses = _forward(model, parts(), precision) if pipeline is None else pipeline.evaluate(parts())
    device = next(model.parameters()).device
    if pads_to is not None:
        nothing = torch.zeros(1, pads_to[1], dtype=torch.int64, device=device)
        _forward(model, [(nothing, nothing, 0)] * (pads_to[0] - len(counts)), precision)
    # The first rank has one batch more where they do not come out even.
    rounds = int(dp.all_reduce(torch.tensor([len(counts)]), "validation", "max"))
    own = torch.zeros(2, rounds, dtype=torch.float64, device=device)
    if counts:
        predicted = torch.stack(counts)
        # The mean over no targets is not a number.
        own[0, : len(counts)] = torch.where(predicted > 0, losses.double() * predicted, 0.0)
        own[1, : len(counts)] = predicted
    if context.group.size > 1:
        own = context.group.all_reduce(own, "validation")
    sums, targets_of = (in_order(dp, each, "validation").tolist() for each in own)
    total = 0.0
    for loss in sums:  # not sum(), which is another sum on newer Pythons
        total += loss
    return float(total / sum(targets_of))


@torch.no_grad()
def _forward(
    model: nn.Module,
    parts: Iterable[tuple[Tensor, Tensor, int | Runs]],
    precision: Precision,
) -> Tensor:
    """Loss of each batch, on the device, which need not be waited for between batches."""
    losses = [torch.zeros(0)]
    was_training = model.training
    model.eval()
    try:
        with precision.unrecorded():
            for tokens, targets, place in parts:
                precision.first_token = place
                losses.append(model(tokens, targets).view(1))
                losses[0] = losses[0].to(losses[-1].device)
    finally:
        model.train(was_training)
    return torch.cat(losses)
