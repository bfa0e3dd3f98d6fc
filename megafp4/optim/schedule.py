"""Learning rate as a closed form of the step: nothing to save, nothing to resume.

Steps are counted from 0. With ``W`` warm-up steps and ``D`` decay steps, step ``W`` runs at the
peak and step ``D - 1`` at ``min_lr``; every later step stays there::

    step   0 ... W-1            W           ...        D-1         D ...
    rate   lr (step+1)/(W+1)    lr          shape      min_lr      min_lr

``wsd`` (warm-up, stable, decay) holds the peak and spends the last share of the steps falling by
``1 - sqrt(x)``, which ends lower than a straight line does [2405.18392, sec. 4].
"""

from __future__ import annotations

import math

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError, unknown_name

SHAPES = ("constant", "cosine", "linear", "wsd")


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of one step.

    Args:
        step: Index of the step, counted from 0.
        config: Peak, floor and shape.
        total_steps: Optimizer steps of the whole run; ``config.decay_steps`` overrides it as the
            end of the decay.

    Raises:
        ConfigError: The warm-up does not fit, the shape is unknown, or a number is out of range.
    """
    decay_steps = _checked_decay_steps(config, total_steps)
    if step < 0:
        raise ConfigError(f"step {step} of a learning rate schedule: count steps from 0")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    first = config.warmup_steps
    if config.schedule == "wsd":
        falling = max(1, round(config.wsd_decay_fraction * decay_steps))
        first = max(first, decay_steps - falling - 1)
    progress = _progress(step, first, decay_steps - 1)
    return config.min_lr + (config.lr - config.min_lr) * _height(config.schedule, progress)


def _progress(step: int, first: int, last: int) -> float:
    """Share of the way from the step at the peak to the step at the floor, within [0, 1]."""
    if step > last:
        return 1.0
    if step <= first:
        return 0.0
    return (step - first) / (last - first)


def _height(shape: str, progress: float) -> float:
    """Height above the floor, from 1 to 0, as a function of progress."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "linear":
        return 1 - progress
    return 1 - math.sqrt(progress)


def _checked_decay_steps(config: OptimConfig, total_steps: int) -> int:
    if config.schedule not in SHAPES:
        raise unknown_name("learning rate schedule", config.schedule, SHAPES)
    decay_steps = total_steps if config.decay_steps is None else config.decay_steps
    if total_steps < 1 or decay_steps < 1:
        raise ConfigError(
            f"a schedule over {total_steps} steps that decays by step {decay_steps}: "
            "give positive numbers of steps"
        )
    if config.warmup_steps > decay_steps:
        raise ConfigError(
            f"optim.warmup_steps {config.warmup_steps} is more than the {decay_steps} steps of the "
            "schedule: warm up for fewer steps or train for more"
        )
    if config.schedule == "wsd" and not 0 < config.wsd_decay_fraction <= 1:
        raise ConfigError(
            f"optim.wsd_decay_fraction is {config.wsd_decay_fraction}: give a share in (0, 1]"
        )
    return decay_steps
