"""Kill a run with stochastic rounding at every place of every step: the same bits at the end."""

from pathlib import Path

import pytest
import torch

from megafp4.train.build import build
from megafp4.train.loop import train
from tests.train.test_resume import assert_same, run_killed_at
from tests.train.tiny import tiny


@pytest.mark.parametrize("recipe", ["mxfp4", "dqt8-ternary"])
def test_kills_at_every_place_of_every_step(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    changes = {"layers": 1, "steps": 3, "dropout": 0.1, "checkpoint_interval": 1}
    changes |= {"stats_interval": 2, "eval_interval": 2}
    once, often = (tiny(corpus, tmp_path / name, recipe, **changes) for name in ("once", "often"))
    train(build(once, quiet=True))
    for step in range(3):
        for number, where in enumerate(("before", "after", "save", "saved")):
            torch.manual_seed(10 * step + number)  # a new process has another global generator
            run_killed_at(often, step, where, monkeypatch)
    torch.manual_seed(99)
    assert train(build(often, quiet=True)).done == 3
    assert_same(tmp_path / "once", tmp_path / "often")
