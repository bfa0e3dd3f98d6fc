"""Steps whose numbers the host reads one step late, so that the device never waits for it.

Reading a loss stops the host until the device has caught up, and then the device until the host has
launched new work. Here the guard's verdict on a step is reached on the device, which skips the
update by itself. The host reads loss and norm while the *next* step computes its gradient, and
before that one's update: so, as without this, nothing moves after a step that ends the run, and no
checkpoint is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megafp4.train.batches import MicroBatch
from megafp4.train.guard import RUNNING_MEAN_DECAY, LossGuard


@dataclass(frozen=True)
class Flight:
    """A step that was launched and whose numbers the host has not read."""

    step: int
    """Its index, counted from 0."""
    lr: float
    """Its learning rate."""
    batches: list[MicroBatch]
    """What it was trained on, to find a culprit."""
    numbers: Tensor
    """FP64 [3] on the host: loss, gradient norm, and how many new values of weights on a grid were
    not finite; valid once ``arrived``."""
    arrived: torch.cuda.Event | None
    """Recorded behind the copy; None on a CPU."""

    def read(self) -> tuple[float, float, int]:
        """The numbers; waits for the device if they are not there yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, broken = self.numbers.tolist()
        return loss, norm, int(broken)


class DeviceGuard:
    """The verdicts of :class:`~megafp4.train.guard.LossGuard`, reached on the device.

    FP64 in the same order of operations, so that both always agree; the host's guard remains the
    one that counts, ends the run and is saved.

    Args:
        guard: The host's guard; its running mean is where this one starts.
        device: Where losses are.
    """

    def __init__(self, guard: LossGuard, device: torch.device) -> None:
        mean = float("nan") if guard.running_mean is None else guard.running_mean
        self._factor = guard.spike_factor
        self._mean = torch.full((), mean, dtype=torch.float64, device=device)

    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge one step; FP32 0-dim, 1 if its update must be skipped, else 0.

        Args:
            loss: Mean loss of the step, 0-dim.
            norm: Global gradient norm, 0-dim.
        """
        found = loss.double()
        mean = torch.where(self._mean.isnan(), found, self._mean)
        limit = mean * self._factor
        spike = (limit > 0) & (limit < found)
        moved = mean * RUNNING_MEAN_DECAY + found * (1 - RUNNING_MEAN_DECAY)
        self._mean = torch.where(spike, mean, moved)
        return (spike | ~found.isfinite() | ~norm.isfinite()).float()


def launch(
    step: int,
    lr: float,
    batches: list[MicroBatch],
    loss: Tensor,
    norm: Tensor,
    broken: Tensor | None,
) -> Flight:
    """Send what a step has found on its way to the host."""
    broken = torch.zeros_like(norm) if broken is None else broken
    numbers = torch.stack((loss.double(), norm.double(), broken.double()))
    if not numbers.is_cuda:
        return Flight(step, lr, batches, numbers, None)
    host = torch.empty(3, dtype=torch.float64, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Flight(step, lr, batches, host, arrived)
