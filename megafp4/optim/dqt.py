"""The optimizer step of a weight that lives on a grid: Adam, then stochastic rounding.

There is no master weight. The FP32 value exists for the length of one call: the stored code is
decoded, moved by Adam and rounded back, so nothing survives but the new code and the two moments,
which a codec may keep in 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.numerics.philox import Key
from megafp4.numerics.rounding import Rounding
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.states import GridCodec, State

DITHER_BITS = 32
"""A late update is 1e-4 of a grid step or less: 8 random bits would never let it through."""


@torch.no_grad()
def dqt_step(
    grid: GridWeight,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    hyper: AdamHyper,
    step: int,
    key: Key,
    rounding: Rounding = "stochastic",
) -> StoreStatistics:
    """Apply one Direct Quantized Training step [2412.04787, eq. 1 and 5] in place.

    The order is that of the authors' optimizer, which differs from ``torch.optim.AdamW`` in two
    ways: epsilon is added to the root of the *uncorrected* second moment, and the decay comes after
    the Adam move.

    Args:
        grid: Weight; its codes are overwritten.
        grad: FP32 gradient with respect to the decoded weight, same shape.
        m: FP32 first moment; overwritten.
        v: FP32 second moment; overwritten.
        hyper: Constants of this step.
        step: Index of this step, counted from 0.
        key: What the random draw is for: (seed, step, layer, "update", "b").
        rounding: Stochastic; the nearest modes are controls for experiments.

    Returns:
        How many codes changed and how many sit at an end of the grid.

    Raises:
        DivergenceError: The new weight is not finite.
    """
    m.lerp_(grad, 1 - hyper.betas[0])
    v.mul_(hyper.betas[1]).addcmul_(grad, grad, value=1 - hyper.betas[1])
    correction1 = 1 - hyper.betas[0] ** (step + 1)
    correction2 = 1 - hyper.betas[1] ** (step + 1)
    weight = grid.decode()
    move = hyper.lr * correction2**0.5 / correction1
    weight.addcdiv_(m, v.sqrt().add_(hyper.eps), value=-move)
    if hyper.weight_decay:
        weight.add_(weight, alpha=-hyper.lr * hyper.weight_decay)
    return grid.store(weight, key, rounding=rounding, dither_bits=DITHER_BITS)


def grid_step(
    codec: GridCodec,
    grid: GridWeight,
    grad: Tensor,
    state: State,
    hyper: AdamHyper,
    step: int,
    seed: int,
) -> StoreStatistics:
    """Take a step of a weight, or of some of its rows, with moments that a codec keeps.

    Args:
        codec: How the moments are kept.
        grid: Weight; its codes are overwritten.
        grad: FP32 gradient, of as many elements.
        state: Of the codec's ``adopt``; overwritten.
        hyper: Constants of this step.
        step: Index of this step, counted from 0.
        seed: Seed of the run.

    Raises:
        DivergenceError: The new weight is not finite.
    """
    m, v = codec.decode_moments(state)
    shape, count = grid.shape, grid.shape.numel()
    key = Key(seed, step, grid.layer, "update", "b")
    used = [one.view(-1)[:count].view(shape) for one in (m, v)]
    found = dqt_step(grid, grad.view(shape), used[0], used[1], hyper, step, key)
    codec.encode_moments(m, v, state)
    return found
