import math
from itertools import pairwise

import pytest

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError
from megafp4.optim import learning_rate

SHAPES = ["cosine", "linear", "wsd", "constant"]


def config(schedule="cosine", **fields) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "schedule": schedule, **fields})


def curve(conf: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(step, conf, steps) for step in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 2), (1, 2), (5, 40), (10, 10), (9, 10)])
def test_rises_to_the_peak_then_never_rises_and_stays_in_bounds(shape, warmup, steps):
    rates = curve(config(shape, warmup_steps=warmup), steps)
    assert all(0 < rate <= 1.0 for rate in rates)
    assert all(after > before for before, after in pairwise(rates[: warmup + 1]))
    assert all(after <= before for before, after in pairwise(rates[warmup:]))
    if warmup < steps:
        assert rates[warmup] == 1.0
    if warmup < steps - 1 and shape != "constant":
        assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_is_a_straight_line_that_starts_above_zero(shape):
    rates = curve(config(shape, warmup_steps=4, lr=10.0), 20)
    assert rates[:5] == pytest.approx([2.0, 4.0, 6.0, 8.0, 10.0])


def test_cosine_closed_form():
    rates = curve(config("cosine", warmup_steps=10), 111)
    for step in range(10, 111):
        angle = math.pi * (step - 10) / 100
        assert rates[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(angle)) / 2)
    assert rates[60] == pytest.approx(0.55)


def test_linear_closed_form():
    rates = curve(config("linear", warmup_steps=10), 111)
    assert rates[10:] == pytest.approx([1.0 - 0.9 * i / 100 for i in range(101)])


def test_wsd_holds_the_peak_then_falls_like_one_minus_the_root():
    rates = curve(config("wsd", warmup_steps=10, wsd_decay_fraction=0.25), 100)
    assert rates[10:75] == [1.0] * 65
    assert rates[75:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(i / 25)) for i in range(1, 26)])


def test_wsd_decay_shortened_by_a_long_warm_up():
    rates = curve(config("wsd", warmup_steps=90, wsd_decay_fraction=0.5), 100)
    assert rates[90] == 1.0
    assert rates[-1] == pytest.approx(0.1)


def test_constant_ignores_the_floor():
    assert curve(config("constant", warmup_steps=2), 6)[2:] == [1.0] * 4


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_decay_that_ends_early_stays_at_the_floor(shape):
    conf = config(shape, warmup_steps=3, decay_steps=20)
    rates = curve(conf, 50)
    assert rates[:20] == curve(config(shape, warmup_steps=3), 20)
    assert rates[19:] == pytest.approx([0.1] * 31)


def test_decay_that_ends_at_the_warm_up_stays_at_the_floor():
    assert curve(config(warmup_steps=3, decay_steps=3), 6)[3:] == pytest.approx([0.1] * 3)


def test_decay_longer_than_the_run_is_cut():
    assert curve(config("cosine", decay_steps=100), 10) == curve(config("cosine"), 100)[:10]


def test_a_floor_of_zero_is_reached():
    assert curve(config("cosine", min_lr=0.0), 10)[-1] == pytest.approx(0.0, abs=1e-16)


@pytest.mark.parametrize(
    ("fields", "steps", "message"),
    [
        ({"warmup_steps": 11}, 10, "warmup_steps 11 is more than the 10 steps"),
        ({"warmup_steps": 6, "decay_steps": 5}, 10, "warmup_steps 6 is more than the 5 steps"),
        ({"decay_steps": 0}, 10, "positive numbers of steps"),
        ({}, 0, "positive numbers of steps"),
        ({"schedule": "wsd", "wsd_decay_fraction": 0.0}, 10, "wsd_decay_fraction is 0.0"),
        ({"schedule": "wsd", "wsd_decay_fraction": 1.5}, 10, "wsd_decay_fraction is 1.5"),
        ({"schedule": "cosin"}, 10, "did you mean 'cosine'"),
    ],
)
def test_schedules_that_cannot_exist(fields, steps, message):
    with pytest.raises(ConfigError, match=message):
        learning_rate(0, config(**fields), steps)


def test_negative_step():
    with pytest.raises(ConfigError, match="count steps from 0"):
        learning_rate(-1, config(), 10)
