"""The training loop: read this file to know in what order things happen.

One optimizer step is::

    for each micro-batch:   loss = model(tokens, targets)      three quantized GEMMs per linear,
                            loss.backward()                    gradients accumulate in FP32
    clip by the global norm -> guard -> optimizer.step

On several ranks each takes its micro-batches and its part of the model and the optimizer
(:mod:`megafp4.train.parallel`); all of them make the same decisions, from numbers that all have.

Everything random is a function of what it is for, not of when it runs: batches of the samples
consumed, stochastic rounding and Hadamard signs of (seed, step, layer, GEMM, operand). What is left
(weights, moments, dropout's generator) is in the checkpoint. So a run that is killed at any moment
and started again ends in the same bits as one that was not.

On a GPU the host does not wait for a step (:mod:`megafp4.train.ahead`): it reads a step's numbers
just before the next update, or at once where they are logged or saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megafp4.numerics import Runs
from megafp4.numerics.grid import not_finite
from megafp4.optim import Optimizer, clip_grad_norm, clip_grad_norm_on_device, learning_rate
from megafp4.optim.deepspeed import DeepSpeedOptimizer
from megafp4.optim.grid_step import broken_values
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.mesh import STEP_TIMEOUT, TIMEOUT
from megafp4.train import state
from megafp4.train.ahead import DeviceGuard, Flight, launch
from megafp4.train.batches import MicroBatch
from megafp4.train.build import Run
from megafp4.train.evaluate import evaluate
from megafp4.train.guard import check_finite_gradients, check_finite_loss
from megafp4.train.hooks import StopRequest, is_due
from megafp4.train.memory import report_activations
from megafp4.train.parallel import agree_to_stop, gather_objects, in_order
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
        CommunicationError: Another rank is gone.
    """
    progress = state.restore(run)
    run.metrics.open(progress.done)
    run.traffic.start(progress.done)
    if progress.done:
        run.metrics.screen.say(f"continuing after step {progress.done}")
    if run.runs_ahead:
        run.device_guard = DeviceGuard(run.guard, run.device)
    try:
        if run.train.memory_report and progress.done < run.steps:
            report_activations(run, progress.done)
        with StopRequest() as stop:
            signal = agree_to_stop(run.mesh.world, stop.number)
            while progress.done < run.steps and signal is None:
                advance(run, progress)
                signal = agree_to_stop(run.mesh.world, stop.number)
            run.mesh.wait_for_at_most(TIMEOUT)
            run.wait_for_weights()
            progress.train_loss = land(run, progress.train_loss)
            if progress.saved < progress.done:
                state.save(run, progress)
        if progress.done == run.steps:
            write_summary(run, progress)
        else:
            progress.stopped_by = signal
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
            **run.traffic.per_step(done),
        )
    # Ranks are as close together as the slowest of them only while they train.
    run.mesh.wait_for_at_most(TIMEOUT)
    if collector is not None:
        rows = gather_objects(run.mesh.pp, collector.rows(done))
        run.metrics.statistics([row for stage in rows for row in stage])
    if evaluates:
        progress.valid_loss = validate(run, done)
    if saves:
        state.save(run, progress)
    run.mesh.wait_for_at_most(STEP_TIMEOUT)


def validate(run: Run, done: int) -> float:
    """Measure and record the validation loss after step ``done``."""
    gathers = not isinstance(run.optimizer, Optimizer | ZeroOptimizer)
    rounds = -(-run.train.eval_batches // run.mesh.dp.size)
    loss = evaluate(
        run.callable_model,
        run.data.validation(),
        run.precision,
        run.mesh.dp,
        run.context,
        run.pipeline,
        (rounds, run.model.config.seq_len) if gathers else None,
    )
    suspects = run.data.validation() if run.mesh.world.size == 1 else None
    check_finite_loss(done, loss, run.model, suspects, "validation loss")
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

    suspects = _suspects(run, batches)
    loss = float(accumulate_gradients(run, step, batches))
    check_finite_loss(step + 1, loss, run.model, suspects)
    if isinstance(run.optimizer, DeepSpeedOptimizer):
        norm = run.optimizer.step(lr)  # which clips, and cannot be refused
        check_finite_gradients(step + 1, norm, run.model, suspects)
        return StepResult(loss, norm, lr)
    if isinstance(run.optimizer, Optimizer):
        norm, scale = clip_grad_norm(run.model.parameters(), run.optim.clip_grad)
    else:
        norm, scale = run.optimizer.clip(run.optim.clip_grad)
    check_finite_gradients(step + 1, norm, run.model, suspects)

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
    assert not isinstance(run.optimizer, DeepSpeedOptimizer)  # it does not run ahead
    if isinstance(run.optimizer, Optimizer):
        norm, scale = clip_grad_norm_on_device(
            run.model.parameters(), run.optim.clip_grad, run.precision.squares.of
        )
    else:
        norm, scale = run.optimizer.clip_on_device(run.optim.clip_grad)
    skip = guard.refuses(loss, norm)
    land(run, None)  # after a step that ends the run nothing may move
    run.optimizer.step(step, lr, grad_scale=scale, skip=skip)
    run.note_magnitudes()
    run.optimizer.zero_grad()
    broken = broken_values(run.optimizer.grid_statistics)
    run.flight = launch(step, lr, batches, loss, norm, broken)
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
    loss, norm, broken = flight.read()
    suspects = _suspects(run, flight.batches)
    check_finite_loss(flight.step + 1, loss, run.model, suspects)
    if not math.isfinite(norm) and suspects is not None:
        # The gradients are gone, or another step's: no weight has moved, so they come again.
        assert isinstance(run.optimizer, Optimizer)
        run.optimizer.zero_grad()
        accumulate_gradients(run, flight.step, flight.batches)
    check_finite_gradients(flight.step + 1, norm, run.model, suspects)
    if broken:
        raise not_finite()
    _is_spike(run, flight.step, loss)
    return StepResult(loss, norm, flight.lr)


def _suspects(run: Run, batches: list[MicroBatch]) -> list[MicroBatch] | None:
    """Batches among which the culprit is looked for: on one rank that has them all."""
    return batches if run.mesh.world.size == 1 else None


def _is_spike(run: Run, step: int, loss: float) -> bool:
    spike = run.guard.is_spike(step + 1, loss)
    if spike:
        run.metrics.screen.say(f"step {step + 1}: loss {loss:.4g} is a spike, update skipped")
    return spike


def accumulate_gradients(run: Run, step: int, batches: list[MicroBatch]) -> Tensor:
    """Run forward and backward on every micro-batch and return the mean loss (FP32, 0-dim).

    Each micro-batch weighs in by its number of targets, so that the gradient is that of the mean
    over the global batch however the batch is cut.

    Args:
        run: What is trained.
        step: Index of the step.
        batches: This rank's micro-batches of it.
    """
    dp, cp = run.mesh.dp, run.mesh.cp
    firsts = [(i * dp.size + dp.rank) * tokens.numel() for i, (tokens, _) in enumerate(batches)]
    predicted = _predicted(batches)
    everywhere = in_order(dp, predicted, "targets").double().sum()
    own = [run.context.cut(*batch, first) for batch, first in zip(batches, firsts, strict=True)]
    if cp.size > 1:
        predicted = _predicted([(tokens, targets) for tokens, targets, _ in own])
    shares = (predicted.double() / everywhere).float()
    run.precision.step = step
    replayed = None
    if run.recorder is not None:
        run.wait_for_weights()  # in a replay, no module would
        on_end = [(*batch, first) for batch, first in zip(batches, firsts, strict=True)]
        # On the device, the norm is taken from what the last backward pass has measured.
        replayed = run.recorder.accumulate(on_end, shares, step, measures=_measures(run))
    if replayed is not None:
        losses = replayed
    elif run.pipeline is not None:
        assert isinstance(run.optimizer, ZeroOptimizer)
        micro_batches = [(tokens, targets) for tokens, targets, _ in own]
        places = [place for *_, place in own]
        losses = run.pipeline.step(micro_batches, shares, places, run.optimizer.begin)
    else:
        losses = torch.stack(list(_backward(run, own, shares)))
    if cp.size > 1:
        losses = cp.all_reduce(losses, "losses")
    total = torch.zeros((), dtype=torch.float32, device=run.device)
    for loss in in_order(dp, losses, "losses"):
        total += loss
    return total


def _backward(
    run: Run, own: list[tuple[Tensor, Tensor, int | Runs]], shares: Tensor
) -> Iterator[Tensor]:
    """Run forward and backward on one micro-batch after the other; yield losses times shares."""
    for index, ((tokens, targets, place), share) in enumerate(zip(own, shares, strict=True)):
        last = index == len(own) - 1
        # Random bits are keyed by the token's place in the global batch: cutting it into other
        # micro-batches draws the same ones.
        run.precision.first_token = place
        loss = run.forward(tokens, targets)
        if run.mesh.cp.size > 1:  # a rank may hold no target, and the mean over none is NaN
            loss = torch.where(share > 0, loss, 0.0)
        loss = loss * share
        run.precision.measures = _measures(run) and last
        if isinstance(run.optimizer, DeepSpeedOptimizer):
            run.optimizer.backward(loss, last=last)
        else:
            if not isinstance(run.optimizer, Optimizer):
                run.optimizer.begin(last)
            loss.backward()
        yield loss.detach()


def _predicted(batches: list[MicroBatch]) -> Tensor:
    """Targets of each micro-batch, int64 [n]."""
    return torch.stack([(targets != -1).sum() for _, targets in batches])


def _measures(run: Run) -> bool:
    """Whether the last backward pass measures the gradients that it writes."""
    return run.device_guard is not None and isinstance(run.optimizer, Optimizer)
