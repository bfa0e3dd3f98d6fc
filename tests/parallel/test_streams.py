"""Random bits that ranks with parts of a weight round it with."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.reduce import FlatReducer
from megafp4.train.streams import place_of
from tests.parallel.zero_runs import OPTIM


@pytest.mark.parametrize("states", ["bf16-sr", "coat-sr"])
def test_a_rank_with_some_rows_draws_what_one_with_all_draws(states: str) -> None:
    config = replace(OPTIM, states=states)  # type: ignore[arg-type]
    whole = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    grad = torch.randn(6, 128, generator=torch.Generator().manual_seed(4))
    moved = []
    for first, last in ((0, 6), (0, 3), (3, 6)):
        params = {
            "other": nn.Parameter(torch.ones(3)),
            "w": nn.Parameter(whole[first:last].clone()),
        }
        group = Group("dp")
        places = {"w": place_of(params["w"], first // 3)}
        optimizer = ZeroOptimizer(params, config, 1, group, FlatReducer(group), places=places)
        optimizer.begin(True)
        (params["w"].float() * grad[first:last]).sum().add(params["other"].sum()).backward()
        optimizer.clip(0.0)
        optimizer.step(0, 1e-3)
        moved.append(params["w"].detach().clone())
    assert torch.equal(torch.cat(moved[1:]), moved[0])


def test_no_two_ranks_begin_within_a_group() -> None:
    part = torch.empty(3, 43)
    assert [place_of(part, rank) for rank in range(3)] == [0, 256, 512]
