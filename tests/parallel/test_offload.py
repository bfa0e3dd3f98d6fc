"""ZeRO with state in host memory against a run on one rank without."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megafp4.optim import offload
from tests.parallel import zero3_runs, zero_runs
from tests.parallel.pool import Ranks
from tests.parallel.zero_runs import Outcome


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def _sharded(rank: int, size: int, recipe: str, stage: int, states: str) -> Outcome:
    with mock.patch.object(offload, "WINDOW_ELEMENTS", 4096):
        options: dict[str, Any] = {"states": states, "offload": True}
        if stage == 3:
            return zero3_runs.sharded(rank, size, recipe, 1, **options)
        return zero_runs.sharded(rank, size, recipe, 1, stage=stage, **options)


@pytest.mark.parametrize(
    ("recipe", "stage", "states"),
    [("mxfp4", 1, "fp8lm"), ("bf16", 2, "fp32"), ("dqt8", 2, "coat"), ("dqt8", 3, "fp32")],
)
def test_bits_are_those_of_one_rank_without_offload(
    two: Ranks, recipe: str, stage: int, states: str
) -> None:
    runs: Any = zero3_runs if stage == 3 else zero_runs
    expected = runs.serial(recipe, 2, 3, states=states)
    for result in zero3_runs.run_on(two, _sharded, recipe, stage, states):
        assert same(result.model, expected.model)
        assert same(result.optimizer, expected.optimizer)
