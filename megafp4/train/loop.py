"""The training loop: read this file to know in what order things happen.

One optimizer step is::

    for each micro-batch:   loss = model(tokens, targets)      three quantized GEMMs per linear,
                            loss.backward()                    gradients accumulate in FP32
    clip by the global norm -> guard -> optimizer.step

Everything random is a function of what it is for, not of when it runs: batches of the samples
consumed, stochastic rounding and Hadamard signs of (seed, step, layer, GEMM, operand). What is left
(weights, moments, dropout's generator) is in the checkpoint. So a run that is killed at any moment
and started again ends in the same bits as one that was not.

On a GPU the host does not wait for a step (:mod:`megafp4.train.ahead`): it reads a step's numbers
just before the next update, or at once where they are logged or saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megafp4.optim import clip_grad_norm, clip_grad_norm_on_device, learning_rate
from megafp4.train import state
from megafp4.train.ahead import DeviceGuard, Flight, launch
from megafp4.train.batches import MicroBatch
from megafp4.train.build import Run
from megafp4.train.evaluate import evaluate
from megafp4.train.guard import check_finite_gradients, check_finite_loss
from megafp4.train.hooks import StopRequest, is_due
from megafp4.train.memory import report_activations
from megafp4.train.quant_stats import Collector, grid_rates
from megafp4.train.state import Progress
from megafp4.train.summary import write_summary


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured."""

    loss: float
    """Mean over the targets of the global batch, before the update."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate."""


def train(run: Run) -> Progress:
    """Train to the last step, or until SIGINT or SIGTERM; continue where a checkpoint ends.

    Returns:
        How far the run came. If a signal stopped it, a checkpoint of its last step was written.

    Raises:
        DivergenceError: NaN, infinity, or too many loss spikes in a row.
        CheckpointError: The run folder's checkpoint is damaged or of another model.
    """
    progress = state.restore(run)
    run.metrics.open(progress.done)
    if progress.done:
        run.metrics.screen.say(f"continuing after step {progress.done}")
    if run.runs_ahead:
        run.device_guard = DeviceGuard(run.guard, run.device)
    try:
        if run.train.memory_report and progress.done < run.steps:
            report_activations(run, progress.done)
        with StopRequest() as stop:
            while progress.done < run.steps and not stop:
                advance(run, progress)
            progress.train_loss = land(run, progress.train_loss)
            if progress.saved < progress.done:
                state.save(run, progress)
        if progress.done == run.steps:
            write_summary(run, progress)
        else:
            progress.stopped_by = stop.number
    finally:
        run.metrics.close()
    return progress


def advance(run: Run, progress: Progress) -> None:
    """Take one step, then do whatever is due after it: log, evaluate, save."""
    step = progress.done
    done = step + 1
    every = run.train

    # A precision schedule may change the recipe in mid-run, e.g. to finish in BF16.
    run.follow_schedule(step)
    collect = every.stats_interval > 0 and is_due(done, every.stats_interval, run.steps)
    collector = run.precision.probe = Collector() if collect else None

    logs = is_due(done, every.log_interval, run.steps)
    evaluates = every.eval_batches > 0 and is_due(done, every.eval_interval, run.steps)
    saves = is_due(done, every.checkpoint_interval, run.steps)

    with run.clock.step():
        result = take_step(run, step)
        if isinstance(result, Flight) and (logs or evaluates or saves or collect):
            result = read(run)
    progress.done = done
    if isinstance(result, StepResult):
        progress.train_loss = result.loss

    run.metrics.screen.advance(done)
    if logs and isinstance(result, StepResult):
        run.metrics.train(
            done,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            spikes=run.guard.spikes,
            **grid_rates(run.optimizer),
        )
    if collector is not None:
        run.metrics.statistics(collector.rows(done))
    if evaluates:
        progress.valid_loss = validate(run, done)
    if saves:
        state.save(run, progress)


def validate(run: Run, done: int) -> float:
    """Measure and record the validation loss after step ``done``."""
    loss = evaluate(run.model, run.data.validation(), run.precision)
    check_finite_loss(done, loss, run.model, run.data.validation(), "validation loss")
    run.metrics.evaluation(done, loss)
    return loss


def take_step(run: Run, step: int) -> StepResult | Flight:
    """Accumulate the gradient of one global batch and update the weights.

    Args:
        run: What is trained.
        step: Index of the step, counted from 0; part of every random key.

    Returns:
        What it measured or, if the run does not wait for its device, the step under way, which is
        then also ``run.flight``.

    Raises:
        DivergenceError: As :func:`train`; under way, about the step before, and nothing has moved.
    """
    lr = learning_rate(step, run.optim, run.steps)
    batches = run.data.training(step)
    if run.device_guard is not None:
        return _take_step_ahead(run, run.device_guard, step, lr, batches)

    loss = float(accumulate_gradients(run, step, batches))
    check_finite_loss(step + 1, loss, run.model, batches)
    norm, scale = clip_grad_norm(run.model.parameters(), run.optim.clip_grad)
    check_finite_gradients(step + 1, norm, run.model, batches)

    if not _is_spike(run, step, loss):
        run.optimizer.step(step, lr, grad_scale=scale)
        run.note_magnitudes()
    run.optimizer.zero_grad()
    return StepResult(loss, norm, lr)


def _take_step_ahead(
    run: Run, guard: DeviceGuard, step: int, lr: float, batches: list[MicroBatch]
) -> Flight:
    """Launch a step; the device decides whether its update is skipped."""
    loss = accumulate_gradients(run, step, batches)
    norm, scale = clip_grad_norm_on_device(
        run.model.parameters(), run.optim.clip_grad, run.precision.squares.of
    )
    skip = guard.refuses(loss, norm)
    land(run, None)  # after a step that ends the run nothing may move
    run.optimizer.step(step, lr, grad_scale=scale, skip=skip)
    run.note_magnitudes()
    run.optimizer.zero_grad()
    run.flight = launch(step, lr, batches, loss, norm)
    run.data.prefetch(step + 1)
    return run.flight


def land(run: Run, loss: float | None) -> float | None:
    """Read the step under way, if there is one, and return its loss; else return ``loss``.

    Raises:
        DivergenceError: The step ends the run.
    """
    return loss if run.flight is None else read(run).loss


def read(run: Run) -> StepResult:
    """Wait for the step under way and judge it as the device has.

    Raises:
        DivergenceError: The step ends the run; its update was skipped.
    """
    assert run.flight is not None
    flight, run.flight = run.flight, None
    loss, norm = flight.read()
    check_finite_loss(flight.step + 1, loss, run.model, flight.batches)
    if not math.isfinite(norm):
        # The gradients are gone, or another step's: no weight has moved, so they come again.
        run.optimizer.zero_grad()
        accumulate_gradients(run, flight.step, flight.batches)
        check_finite_gradients(flight.step + 1, norm, run.model, flight.batches)
    _is_spike(run, flight.step, loss)
    return StepResult(loss, norm, flight.lr)


def _is_spike(run: Run, step: int, loss: float) -> bool:
    spike = run.guard.is_spike(step + 1, loss)
    if spike:
        run.metrics.screen.say(f"step {step + 1}: loss {loss:.4g} is a spike, update skipped")
    return spike


def accumulate_gradients(run: Run, step: int, batches: list[MicroBatch]) -> Tensor:
    """Run forward and backward on every micro-batch and return the mean loss (FP32, 0-dim).

    Each micro-batch weighs in by its number of targets, so that the gradient is that of the mean
    over the global batch however the batch is cut.
    """
    predicted = torch.stack([(targets != -1).sum() for _, targets in batches]).double()
    shares = (predicted / predicted.sum()).float()
    # On the device, the norm is taken from what the last backward pass has measured.
    measures = run.device_guard is not None
    if run.recorder is not None:
        replayed = run.recorder.accumulate(batches, shares, step, measures=measures)
        if replayed is not None:
            return replayed
    total = torch.zeros((), dtype=torch.float32, device=run.device)
    run.precision.step = step
    first_token = 0
    for index, ((tokens, targets), share) in enumerate(zip(batches, shares, strict=True)):
        # Random bits are keyed by the token's place in the global batch: cutting it into other
        # micro-batches draws the same ones.
        run.precision.first_token = first_token
        loss = run.model(tokens, targets) * share
        run.precision.measures = measures and index == len(batches) - 1
        loss.backward()
        total += loss.detach()
        first_token += tokens.numel()
    return total
