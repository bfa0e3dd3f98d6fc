"""The optimizer step of a weight that lives on a grid: Adam, then stochastic rounding.

There is no master weight. The FP32 value exists for the length of one call: the stored code is
decoded, moved by Adam and rounded back, so nothing survives but the new code and the two moments,
which a codec may keep in 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.numerics.philox import Key
from megafp4.numerics.rounding import Rounding
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.states import GridCodec, State

DITHER_BITS = 32
"""A late update is 1e-4 of a grid step or less: 8 random bits would never let it through."""


class GridNumbers(NamedTuple):
    """What one step multiplies and adds, computed in double precision and used in single."""

    decay: float
    """Factor of the moved weight: 1 - lr * weight decay."""
    move: float
    """-lr * sqrt(1 - beta2^t) / (1 - beta1^t)."""
    beta2: float
    """Factor of the second moment."""
    rest1: float
    """1 - beta1."""
    rest2: float
    """1 - beta2."""
    eps: float
    """Added to the uncorrected root of the second moment."""

    @classmethod
    def of(cls, hyper: AdamHyper, step: int) -> GridNumbers:
        """Numbers of a step, whose index is counted from 0."""
        beta1, beta2 = hyper.betas
        root = (1 - beta2 ** (step + 1)) ** 0.5
        return cls(
            decay=1 - hyper.lr * hyper.weight_decay,
            move=-hyper.lr * root / (1 - beta1 ** (step + 1)),
            beta2=beta2,
            rest1=1 - beta1,
            rest2=1 - beta2,
            eps=hyper.eps,
        )


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
    numbers = GridNumbers.of(hyper, step)
    # As in adamw_update: one IEEE operation after the other, which every device rounds alike.
    m.add_((grad - m).mul_(numbers.rest1))
    v.mul_(numbers.beta2).add_((grad * numbers.rest2).mul_(grad))
    denominator = v.double().sqrt().float().add_(numbers.eps)
    weight = grid.decode().add_((m / denominator).mul_(numbers.move)).mul_(numbers.decay)
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
