"""What backward keeps, measured; and that the ways to keep less do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megafp4.models import QuantizedFactory
from megafp4.models.execution import Execution
from megafp4.precision import Precision
from megafp4.train.build import build
from megafp4.train.loop import train
from megafp4.train.memory import saved_bytes
from tests.models.small import batch, small_config
from tests.models.small import build as build_small
from tests.train.test_resume import assert_same
from tests.train.tiny import tiny

TOKENS = 4 * 32


def measured(recipe: str = "bf16", saved_as: Any = "recipe", **how: Any) -> dict[str, int]:
    config = small_config(layers=2)
    factory = QuantizedFactory(
        recipe, "reference", Precision(seed=1), config.layers, saved_as=saved_as
    )
    model = build_small(config, factory, dtype=torch.bfloat16)
    model.execute(Execution(**how))
    return saved_bytes(model, *batch(config, rows=4, length=32))


def test_linears_keep_their_inputs_in_bf16() -> None:
    found = measured()
    # Per block: the inputs of qkv, up (64 wide) and down (256); that of `out` is also attention's.
    kept = 2 * TOKENS * 2 * (64 + 64 + 256)
    assert found["linear inputs"] == kept
    assert found["total"] == sum(count for kind, count in found.items() if kind != "total")
    assert found["attention"] >= 2 * TOKENS * 2 * (3 * 64 + 64)


def test_packed_inputs_are_a_third_or_less() -> None:
    whole = measured("mxfp4", "input")["linear inputs"]
    packed = measured("mxfp4", "packed")["linear inputs"]
    own = 2 * TOKENS * 2 * 64  # input of `out`: kept as it is, it is attention's
    assert 0 < 3 * packed <= whole + own


def test_recomputing_keeps_less() -> None:
    none, selective, full = (measured(recompute=mode) for mode in ("none", "selective", "full"))
    # What stays is the residual stream, from which the norms are computed again.
    assert selective["linear inputs"] == 2 * 2 * TOKENS * 2 * 64 < none["linear inputs"] / 2
    assert 0 < full["total"] < selective["total"] < none["total"]


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_report_changes_nothing_else(corpus: str, tmp_path: Path, recompute: str) -> None:
    changes = {"layers": 1, "dropout": 0.1, "steps": 2, "recompute": recompute}
    for name, report in (("without", False), ("with", True)):
        config = tiny(corpus, tmp_path / name, "mxfp4", memory_report=report, **changes)
        train(build(config, quiet=True))
        assert (tmp_path / name / "memory.json").exists() == report
    assert_same(tmp_path / "without", tmp_path / "with")
    found = json.loads((tmp_path / "with" / "memory.json").read_text())
    assert (found["tokens"], found["blocks"]) == (2 * 32, 1)
    assert found["bytes"]["total"] > 0
