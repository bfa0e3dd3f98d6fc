"""What training refuses to go on with: NaN, infinity, and losses that jump.

A step with a non-finite loss or gradient norm ends the run, because every later step would be
lost as well; the error says where the first bad value appeared. A finite loss far above its
running mean is a *spike*: that step's update is skipped, so that one poisonous batch cannot wreck
the weights, and several spikes in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megafp4.errors import DivergenceError

RUNNING_MEAN_DECAY = 0.9
"""Weight of the past in the running mean of the loss: about the last ten healthy steps."""

MicroBatch = tuple[Tensor, Tensor]
"""Tokens and targets."""

ADVICE = "lower optim.lr or choose a recipe of higher precision"


class LossGuard:
    """Watches the loss of every step.

    Args:
        spike_factor: A loss above this multiple of the running mean is a spike; 0 switches the
            check off.
        max_spikes: Consecutive spikes that end the run.
    """

    def __init__(self, spike_factor: float, max_spikes: int) -> None:
        self.spike_factor = spike_factor
        self.max_spikes = max_spikes
        self.running_mean: float | None = None
        self.spikes_in_a_row = 0
        self.spikes = 0

    def is_spike(self, step: int, loss: float) -> bool:
        """Judge one finite loss; True means that this step's update must be skipped.

        Raises:
            DivergenceError: ``max_spikes`` steps in a row were spikes.
        """
        if self.running_mean is None:
            self.running_mean = loss
        if 0 < self.spike_factor * self.running_mean < loss:
            self.spikes += 1
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row >= self.max_spikes:
                raise DivergenceError(
                    f"the loss at step {step} is {loss:.4g}, spike number "
                    f"{self.spikes_in_a_row} in a row above {self.spike_factor:g} x its running "
                    f"mean {self.running_mean:.4g}: {ADVICE}"
                )
            return True
        self.spikes_in_a_row = 0
        decay = RUNNING_MEAN_DECAY
        self.running_mean = decay * self.running_mean + (1 - decay) * loss
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the guard to judge the same after a resume."""
        return {
            "running_mean": self.running_mean,
            "spikes_in_a_row": self.spikes_in_a_row,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.running_mean = state["running_mean"]
        self.spikes_in_a_row = state["spikes_in_a_row"]
        self.spikes = state["spikes"]


def check_finite_loss(
    step: int,
    loss: float,
    model: nn.Module,
    batches: Iterable[MicroBatch] | None,
    what: str = "loss",
) -> None:
    """End the run if a loss is NaN or infinite.

    Args:
        step: Number of the step, counted from 1 as in the metrics.
        loss: The loss.
        model: Run once more on ``batches``, only in case of failure, to find the culprit.
        batches: What the loss was computed on; None, of several ranks that each have some, does not
            look for the culprit.
        what: Name of the loss in the message.

    Raises:
        DivergenceError: Naming the step and the first layer with a non-finite output.
    """
    if math.isfinite(loss):
        return
    if batches is None:
        raise DivergenceError(f"the {what} at step {step} is {loss}: {ADVICE}")
    bad = [name for name, finite in _watch(model, batches) if not finite and name]
    where = f"first in the output of {bad[0]}" if bad else "in the loss itself"
    raise DivergenceError(f"the {what} at step {step} is {loss}, {where}: {ADVICE}")


def check_finite_gradients(
    step: int, norm: float, model: nn.Module, batches: Iterable[MicroBatch] | None
) -> None:
    """End the run if the gradient norm is NaN or infinite.

    Args:
        step: Number of the step, counted from 1 as in the metrics.
        norm: Its global gradient norm.
        model: Holds the gradients; run once more, only in case of failure, to find the culprit.
        batches: The batches of the step; None as for :func:`check_finite_loss`.

    Raises:
        DivergenceError: Naming the step and the parameter where backward first went wrong.
    """
    if math.isfinite(norm):
        return
    if batches is None:
        raise DivergenceError(f"the gradient norm at step {step} is {norm}: {ADVICE}")
    bad = {
        name.rpartition(".")[0]: name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    }
    # Backward walks the model from its end, so the layer that ran last went wrong first.
    ran = [name for name, _ in _watch(model, batches) if name in bad]
    where = f"first in the gradient of {bad[ran[-1]]}" if ran else "by overflow of the norm itself"
    raise DivergenceError(f"the gradient norm at step {step} is {norm}, {where}: {ADVICE}")


def _watch(model: nn.Module, batches: Iterable[MicroBatch]) -> list[tuple[str, bool]]:
    """Run forward until something is not finite; name each module that ran, and whether it was.

    Modules are in the order in which they returned, hence innermost first.
    """
    seen: list[tuple[str, bool]] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            finite = not isinstance(output, Tensor) or bool(torch.isfinite(output).all())
            seen.append((name, finite))

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for tokens, targets in batches:
                model(tokens, targets)
                if not all(finite for _, finite in seen):
                    break
    finally:
        for handle in handles:
            handle.remove()
    return seen
