"""A run that does not wait takes its norm from what the last micro-batch has measured."""

from pathlib import Path
from typing import Any

import pytest

from megafp4.linear import Linear
from megafp4.train import loop
from megafp4.train.build import Run, build
from tests.optim.test_clip_measured import MeasuringBackend
from tests.train.tiny import rows, tiny


def train(config: Any, monkeypatch: pytest.MonkeyPatch, *, uses: bool) -> tuple[list[float], int]:
    """Return the norms of a run, and how many weights were measured over all its steps."""
    run = build(config, quiet=True)
    linears = [one for one in run.model.modules() if isinstance(one, Linear)]
    squares, step, known = run.precision.squares, run.optimizer.step, []
    of = squares.of
    for linear in linears:
        linear.op.backend = MeasuringBackend()

    def counted(*args: Any, grad_scale: Any, skip: Any) -> None:
        assert not skip
        known.extend(one for one in linears if of(one.weight) is not None)
        step(*args, grad_scale=float(grad_scale))

    monkeypatch.setattr(run.optimizer, "step", counted)
    if not uses:
        monkeypatch.setattr(squares, "of", lambda parameter: None)
    loop.train(run)
    assert len(known) == config.train.steps * len(linears)
    return [row["grad_norm"] for row in rows(Path(config.out), "train")], len(known)


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_the_last_micro_batch_is_measured(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    monkeypatch.setattr(Run, "runs_ahead", property(lambda run: True))
    shared: dict[str, Any] = {"steps": 3, "layers": 1}
    shared |= {"micro_batch": micro_batch, "global_batch": 8, "eval_interval": 0}
    found = []
    for uses in (False, True):
        config = tiny(corpus, tmp_path / str(uses), "mxfp4", **shared)
        norms, known = train(config, monkeypatch, uses=uses)
        assert known > 0
        found.append(norms)
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_run_that_waits_does_not_measure(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tiny(corpus, tmp_path, "mxfp4", steps=1, layers=1), quiet=True)
    for module in run.model.modules():
        if isinstance(module, Linear):
            module.op.backend = MeasuringBackend()
    monkeypatch.setattr(MeasuringBackend, "measured_gemm", None)
    loop.train(run)
    assert not run.precision.measures
