"""The guard: what it stops, where it says the trouble began, and what it lets pass."""

import math

import pytest
import torch
from torch import Tensor, nn

from megafp4.errors import DivergenceError
from megafp4.train.guard import LossGuard, check_finite_gradients, check_finite_loss


class Model(nn.Module):
    """Layers declared in another order than they run: ``first`` runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.first = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.last(self.middle(self.first(tokens))).sum()


TOKENS = torch.tensor([[0, 1, 2]])
BATCHES = [(TOKENS, TOKENS)]


def poison(parameter: Tensor, value: float = math.nan) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = value


def test_a_finite_step_passes() -> None:
    check_finite_loss(3, 1.5, Model(), BATCHES)
    check_finite_gradients(3, 1.5, Model(), BATCHES)


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [("first", "first.weight"), ("middle.0", "middle.0.weight"), ("last", "last.bias")],
)
def test_a_bad_loss_names_the_first_bad_layer(layer: str, parameter: str) -> None:
    model = Model()
    poison(model.get_parameter(parameter))
    with pytest.raises(DivergenceError, match=rf"step 7 is nan, first in the output of {layer}:"):
        check_finite_loss(7, math.nan, model, BATCHES)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bad_loss_of_a_healthy_model_is_blamed_on_the_loss() -> None:
    with pytest.raises(DivergenceError, match=r"step 0 is inf, in the loss itself"):
        check_finite_loss(0, math.inf, Model(), BATCHES)


@pytest.mark.parametrize(
    ("bad", "blamed"),
    [
        (["first.weight"], "first.weight"),
        (["first.weight", "middle.0.weight"], "middle.0.weight"),
        (["first.weight", "middle.0.weight", "last.bias"], "last.bias"),
    ],
)
def test_a_bad_gradient_names_where_backward_went_wrong(bad: list[str], blamed: str) -> None:
    model = Model()
    model(TOKENS, TOKENS).backward()
    for name in bad:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        poison(gradient, math.inf)
    with pytest.raises(DivergenceError, match=rf"first in the gradient of {blamed}:"):
        check_finite_gradients(1, math.inf, model, BATCHES)


def test_one_spike_is_skipped_and_forgotten() -> None:
    guard = LossGuard(3.0, 2)
    losses = [4.0, 4.0, 11.9, 30.0, 4.0, 100.0, 4.0]
    assert [guard.is_spike(step, loss) for step, loss in enumerate(losses)] == [
        False, False, False, True, False, True, False,
    ]  # fmt: skip
    assert guard.spikes == 2
    # A spike does not raise the bar for the next one.
    mean = 4.0
    for loss in (4.0, 4.0, 11.9, 4.0, 4.0):
        mean = 0.9 * mean + 0.1 * loss
    assert guard.running_mean == pytest.approx(mean)


def test_spikes_in_a_row_end_the_run() -> None:
    guard = LossGuard(3.0, 3)
    assert [guard.is_spike(step, loss) for step, loss in enumerate([1.0, 9.0, 9.0])] == [
        False, True, True,
    ]  # fmt: skip
    with pytest.raises(DivergenceError, match=r"step 3 is 9, spike number 3 in a row above 3 x"):
        guard.is_spike(3, 9.0)


def test_factor_zero_switches_the_check_off() -> None:
    guard = LossGuard(0.0, 1)
    assert not any(guard.is_spike(step, 10.0**step) for step in range(9))


def test_a_restored_guard_judges_the_same() -> None:
    guard, copy = LossGuard(3.0, 3), LossGuard(3.0, 3)
    for step, loss in enumerate([2.0, 2.5, 9.0, 9.0]):
        guard.is_spike(step, loss)
    copy.load_state_dict(guard.state_dict())
    for judge in (guard, copy):
        with pytest.raises(DivergenceError, match="spike number 3"):
            judge.is_spike(4, 9.0)
