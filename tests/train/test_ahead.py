"""A run that reads each step's numbers one step late behaves like one that waits for them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megafp4.errors import DivergenceError
from megafp4.optim import Optimizer
from megafp4.train import ahead, loop
from megafp4.train.build import Run, build
from megafp4.train.guard import LossGuard
from megafp4.train.loop import train
from tests.train.test_resume import assert_same
from tests.train.tiny import rows, summary, tiny

FP64 = torch.float64


@pytest.fixture
def _always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: both kinds of run then use the fused optimizer."""
    monkeypatch.setattr(Run, "runs_ahead", property(lambda run: run.optimizer.can_run_ahead))


def build_fused(config: Any, **options: Any) -> Run:
    run = build(config, quiet=True, **options)
    run.optimizer = Optimizer(run.optimizer.params, config.optim, config.train.seed, fused=True)
    return run


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("mxfp4", {}), ("mxfp4", {"log_interval": 3, "checkpoint_interval": 4}), ("dqt8", {})],
)
def test_late_numbers_are_the_same_numbers(
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    changes: dict[str, int],
) -> None:
    shared = {"layers": 1, "dropout": 0.1, "steps": 7, "eval_interval": 5, **changes}
    train(build_fused(tiny(corpus, tmp_path / "waits", recipe, **shared)))
    monkeypatch.setattr(Run, "runs_ahead", property(lambda run: True))
    run = build_fused(tiny(corpus, tmp_path / "ahead", recipe, **shared))
    late = []
    real = loop.read

    def counted(run: Run) -> loop.StepResult:
        assert run.flight is not None
        late.append((run.flight.step, run.precision.step))
        return real(run)

    monkeypatch.setattr(loop, "read", counted)
    train(run)
    assert_same(tmp_path / "waits", tmp_path / "ahead")
    if changes:
        # Steps 3, 4 (saved), 5 (evaluated), 6, 7 are read at once; the others during the next.
        assert late == [(0, 1), (1, 2), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)]


def test_the_device_judges_as_the_host_does() -> None:
    generator = torch.Generator().manual_seed(5)
    losses = (5 * torch.rand(200, generator=generator).exp()).tolist()
    losses[20], losses[21], losses[90] = 60.0, 70.0, 1e9
    host = LossGuard(1.5, 10**6)
    device = ahead.DeviceGuard(host, torch.device("cpu"))
    norm = torch.ones((), dtype=FP64)
    for step, loss in enumerate(torch.tensor(losses)):
        refused = bool(device.refuses(loss, norm))
        assert refused == host.is_spike(step, float(loss))
        assert float(device._mean) == host.running_mean
    assert 5 < host.spikes < 150
    resumed = ahead.DeviceGuard(host, torch.device("cpu"))
    assert float(resumed._mean) == host.running_mean
    assert bool(resumed.refuses(torch.tensor(1.0), norm * math.nan))
    assert bool(resumed.refuses(torch.tensor(math.inf), norm))


@pytest.mark.usefixtures("_always_ahead")
def test_a_bad_loss_ends_the_run_before_anything_moves(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path, "bf16", log_interval=0, eval_interval=0, checkpoint_interval=1)
    run = build_fused(config)
    with torch.no_grad():
        run.model.get_parameter("blocks.1.mlp.up.weight")[3, 5] = torch.nan
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(
        DivergenceError, match=r"loss at step 1 is nan, first in the output of blocks\.1\.mlp\.up:"
    ):
        train(run)
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("_always_ahead")
def test_a_bad_gradient_is_found_a_step_late_and_nothing_has_moved(
    corpus: str, tmp_path: Path
) -> None:
    config = tiny(corpus, tmp_path, "bf16", log_interval=0, eval_interval=0)
    run = build_fused(config)
    weight = run.model.get_parameter("blocks.0.attention.qkv.weight")
    weight.register_hook(lambda grad: grad * (torch.inf if run.precision.step == 2 else 1.0))
    moved = []
    real = run.optimizer.step

    def step(*args: Any, **options: Any) -> None:
        before = weight.detach().clone()
        real(*args, **options)
        moved.append(not torch.equal(before, weight))

    run.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(
        DivergenceError, match=r"step 3 is (nan|inf), first in the gradient of blocks\.0\.attention"
    ):
        train(run)
    # The third update was skipped, the fourth never begun, though its gradient was there.
    assert moved == [True, True, False]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("_always_ahead")
def test_spikes_are_skipped_and_several_in_a_row_end_the_run(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, factors = loop.accumulate_gradients, {1: 50.0, 3: 50.0, 4: 60.0}
    monkeypatch.setattr(
        loop, "accumulate_gradients", lambda r, s, b: real(r, s, b) * factors.get(s, 1.0)
    )
    config = tiny(corpus, tmp_path / "a", "bf16", log_interval=0, eval_interval=0, max_spikes=3)
    run = build_fused(config)
    weight, seen = run.model.get_parameter("embedding.weight"), []
    real_step = run.optimizer.step

    def step(*args: Any, **options: Any) -> None:
        before = weight.detach().clone()
        real_step(*args, **options)
        seen.append(not torch.equal(before, weight))

    run.optimizer.step = step  # type: ignore[method-assign]
    train(run)
    assert seen == [True, False, True, False, False, True]
    assert summary(tmp_path / "a")["spikes"] == 3
    assert rows(tmp_path / "a", "train")[-1]["spikes"] == 3
    config = tiny(corpus, tmp_path / "b", "bf16", log_interval=0, eval_interval=0, max_spikes=2)
    with pytest.raises(DivergenceError, match=r"at step 5 .* spike number 2 in a row"):
        train(build_fused(config))


def test_grid_values_that_were_not_stored_end_the_run_a_step_late(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "runs_ahead", property(lambda run: True))
    config = tiny(corpus, tmp_path, "dqt8", log_interval=0, eval_interval=0)
    run, steps = build_fused(config), []
    real = run.optimizer.step

    def step(at: int, *args: Any, **options: Any) -> None:
        real(at, *args, **options)
        steps.append(at)
        if at == 2:  # as a kernel says it
            next(iter(run.optimizer.grid_statistics.values())).broken.add_(1)

    run.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="weight update is NaN or Inf"):
        train(run)
    assert steps == [0, 1, 2]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.usefixtures("_always_ahead")
def test_grid_recipes_wait_where_no_kernel_moves_them(corpus: str, tmp_path: Path) -> None:
    run = build_fused(tiny(corpus, tmp_path, "dqt8", steps=2))
    train(run)
    assert run.device_guard is None
    assert len(rows(tmp_path, "train")) == 2
