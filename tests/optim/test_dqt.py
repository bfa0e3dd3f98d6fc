"""The DQT step against its equations, and why its rounding is stochastic."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError
from megafp4.numerics import Key
from megafp4.numerics.grid import GridWeight
from megafp4.optim import (
    AdamHyper,
    Optimizer,
    StepNumbers,
    adamw_update,
    build_optimizer,
    dqt_step,
)
from megafp4.optim.dqt import grid_step
from megafp4.optim.states import CoatStates, GridCodec

HYPER = AdamHyper(1e-3, (0.9, 0.999), 1e-6, 0.01)


def key(step: int, layer: int = 0) -> Key:
    return Key(1, step, layer, "update", "b")


def moments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


def test_expected_weight_is_adam_then_decay(generator: torch.Generator) -> None:
    # Every row holds the same weights, so the mean over rows estimates the expectation. Decay and
    # move are large, so that leaving one out, or swapping them, is far outside the error.
    rows, cols = 4096, 16
    w = torch.linspace(-0.9, 0.9, cols).expand(rows, cols)
    grid = GridWeight.from_dense(w, 8, range=4.0)
    start = grid.decode()[0].double()
    m, v = moments((rows, cols))
    grad = torch.randn(cols, generator=generator)
    hyper = AdamHyper(0.05, (0.9, 0.999), 1e-6, 10.0)
    dqt_step(grid, grad.expand(rows, cols), m, v, hyper, 0, key(0))

    wanted_m, wanted_v = 0.1 * grad.double(), 0.001 * grad.double() ** 2
    torch.testing.assert_close(m[7].double(), wanted_m, rtol=1e-6, atol=0)
    torch.testing.assert_close(v[7].double(), wanted_v, rtol=1e-6, atol=0)
    move = wanted_m * math.sqrt(1 - 0.999) / (1 - 0.9) / (wanted_v.sqrt() + 1e-6)
    wanted = start - 0.05 * move
    wanted -= 0.05 * 10.0 * wanted
    step = grid.scale[0].item()
    fraction = (wanted / step) % 1
    error = 4 * step * (fraction * (1 - fraction) / rows).sqrt() + 1e-6
    assert ((grid.decode().double().mean(0) - wanted).abs() < error).all()
    assert error.max() < 1e-3


def test_epsilon_stands_beside_the_uncorrected_root() -> None:
    # A tiny gradient: sqrt(v) = sqrt(1e-3) * 1e-6 << eps, so the move is about
    # lr * m / eps * sqrt(bc2) / bc1, much less than torch.optim.AdamW's lr * m / bc1 / eps.
    grid = GridWeight.from_dense(torch.zeros(512, 512), 8)
    grid.scale.fill_(1e-3)
    m, v = moments((512, 512))
    grad = torch.full((512, 512), -1e-6)
    dqt_step(grid, grad, m, v, HYPER, 0, key(0))
    root = math.sqrt(1e-3)
    expected = 1e-3 * root * 1e-6 / (root * 1e-6 + 1e-6) / 1e-3
    rate = grid.to_qtensor().values().mean().item()
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected / 512**2))


def test_zero_gradient_and_zero_decay_keep_every_bit(generator: torch.Generator) -> None:
    grid = GridWeight.from_dense(torch.randn(33, 7, generator=generator), 4)
    before = grid.codes.clone()
    m, v = moments((33, 7))
    hyper = AdamHyper(1e-3, (0.9, 0.95), 1e-8, 0.0)
    for step in range(3):
        assert dqt_step(grid, torch.zeros(33, 7), m, v, hyper, step, key(step)).flip_rate == 0
    assert torch.equal(grid.codes, before)


def test_flip_rate_is_the_move_in_units_of_the_step() -> None:
    # p = |dW| / step [2412.04787, supplement 4]; the first Adam step moves by lr.
    grid = GridWeight.from_dense(torch.zeros(512, 512), 1.58)
    grid.scale.fill_(0.02)
    m, v = moments((512, 512))
    hyper = AdamHyper(1e-5, (0.9, 0.95), 1e-12, 0.0)
    statistics = dqt_step(grid, torch.ones(512, 512), m, v, hyper, 0, key(0))
    probability = 1e-5 / 0.02
    error = 4 * math.sqrt(probability / 512**2)
    assert statistics.flip_rate == pytest.approx(probability, abs=error)
    assert grid.decode().max() == 0


def student_loss(
    bits: float | None, rounding: str, steps: int = 150, codec: GridCodec | None = None
) -> tuple[float, float]:
    """Loss before and after training a linear student of a linear teacher on a grid."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 32, generator=generator) * 0.02
    w = torch.randn(16, 32, generator=generator) * 0.02
    inputs = torch.randn(256, 32, generator=generator)
    grid = (
        None if bits is None else GridWeight.from_dense(w, bits, range=1.5 if bits == 1.58 else 3.0)
    )
    m, v = moments((16, 32))
    state = None if codec is None else codec.adopt(nn.Parameter(w))
    losses = []
    for step in range(steps):
        weight = w if grid is None else grid.decode()
        error = inputs @ (weight - teacher).T
        losses.append(error.square().mean().item())
        grad = 2 * error.T @ inputs / error.numel()
        lr = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        hyper = AdamHyper(lr, (0.9, 0.95), 1e-10, 0.0)
        if grid is None:
            adamw_update(w, grad, m, v, StepNumbers.of(hyper, step))
        elif codec is not None and state is not None:
            grid_step(codec, grid, grad, state, hyper, step, seed=0)
        else:
            dqt_step(grid, grad, m, v, hyper, step, key(step), rounding)
    return losses[0], losses[-1]


@pytest.mark.parametrize("bits", [4, 3, 1.58])
def test_deterministic_rounding_does_not_train_where_stochastic_rounding_does(bits: float) -> None:
    # The control of [2412.04787, fig. 5]: a move of less than half a step is lost every time.
    start, nearest = student_loss(bits, "nearest-even")
    _, stochastic = student_loss(bits, "stochastic")
    assert nearest == start
    assert stochastic < 0.5 * start


def test_8_bit_moments_are_rounded_between_steps_and_nowhere_else(
    generator: torch.Generator,
) -> None:
    codec, shape = CoatStates(), (33, 7)  # the last group of 128 is not full
    grid = GridWeight.from_dense(torch.randn(shape, generator=generator), 8)
    exact = copy.deepcopy(grid)
    state = codec.adopt(nn.Parameter(torch.zeros(shape)))
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    for step in range(3):
        grad = torch.randn(shape, generator=generator)
        m, v = (one.view(-1)[:231].view(shape).clone() for one in codec.decode_moments(state))
        grid_step(codec, grid, grad, state, hyper, step, seed=0)
        dqt_step(exact, grad, m, v, hyper, step, Key(0, step, grid.layer, "update", "b"))
        assert torch.equal(grid.codes, exact.codes)
        for found, kept in zip(codec.decode_moments(state), (m, v), strict=True):
            flat = found.view(-1)[:231].view(shape)
            assert not torch.equal(flat, kept)
            torch.testing.assert_close(flat, kept, rtol=0.13, atol=float(kept.abs().max()) * 1e-3)


def test_8_bit_moments_train_as_fp32_ones_do() -> None:
    start, exact = student_loss(8, "stochastic")
    _, short = student_loss(8, "stochastic", codec=CoatStates())
    assert exact < 0.01 * start
    assert short == pytest.approx(exact, rel=0.1)


def test_fp32_moments_of_grid_weights_are_told_apart() -> None:
    """As versions kept them that had 8 bits for dense weights only."""
    grid = nn.Parameter(torch.empty(()).expand(4, 32))
    grid.grid = GridWeight.from_dense(torch.ones(4, 32), 8)  # type: ignore[attr-defined]

    def optimizer(states: str) -> Optimizer:
        params = [("w", grid), ("z", nn.Parameter(torch.ones(4, 32)))]
        return build_optimizer(params, OptimConfig(states=states), 0)

    old, now = optimizer("fp32").state_dict(), optimizer("coat")
    with pytest.raises(CheckpointError, match=r"set optim\.states to what the run began with"):
        now.load_state_dict(old)
    old = {name: t for name, t in old.items() if name.endswith(".w")} | {
        name: t for name, t in now.state_dict().items() if name.endswith(".z")
    }
    message = "FP32 moments of 'w', a weight on a grid, .*: finish the run with the version"
    with pytest.raises(CheckpointError, match=message):
        now.load_state_dict(old)


def test_more_bits_train_better() -> None:
    losses = [student_loss(bits, "stochastic")[1] for bits in (None, 8, 4, 3, 1.58)]
    assert losses == sorted(losses)
