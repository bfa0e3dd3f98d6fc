"""A rank that is killed, or never comes, ends the others with a sentence instead of a hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megafp4.errors import CommunicationError
from megafp4.parallel.mesh import Mesh, MeshSizes, connect
from megafp4.parallel.tensor import ColumnParallelLinear
from tests.parallel.pool import TIMEOUT, Ranks

PATIENCE = 2.0


@pytest.fixture
def mortal() -> Iterator[Ranks]:
    """Processes of one test alone."""
    ranks = Ranks(3)
    yield ranks
    ranks.stop()


def lose(victim: int, how: str, during: str) -> tuple[str, float]:
    """What a survivor is told, and after how many seconds."""
    patience = timedelta(seconds=PATIENCE if how == "asleep" else TIMEOUT)
    mesh = Mesh(MeshSizes(tp=dist.get_world_size()), patience)
    layer = ColumnParallelLinear(48, 96, mesh.tp)
    y = layer(torch.randn(4, 48, requires_grad=True)).sum()
    dist.barrier()  # everybody is there
    if mesh.rank == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 * PATIENCE)
        return "late", 0.0
    start = time.monotonic()
    try:
        if during == "backward":
            y.backward()
        else:
            mesh.tp.all_gather(torch.ones(3), during)
    except CommunicationError as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


@pytest.mark.parametrize("during", ["backward", "scales"])
def test_a_killed_rank_ends_the_others(during: str, mortal: Ranks) -> None:
    first, second, _ = mortal.run(lose, 2, "killed", during, dies=2)
    expected = "dgrad" if during == "backward" else during
    for rank, (message, seconds) in enumerate((first, second)):
        assert f"rank {rank} of 3 in group 'tp' lost the others during '{expected}'" in message
        assert "start the job again from its last checkpoint" in message
        assert seconds < 10


def test_a_rank_that_never_comes_is_not_awaited_for_ever(mortal: Ranks) -> None:
    *others, last = mortal.run(lose, 2, "asleep", "scales")
    assert last[0] == "late"
    for message, seconds in others:
        assert "lost the others during 'scales'" in message
        assert seconds < 2 * PATIENCE


def test_a_job_that_nobody_joins_says_so(tmp_path: object) -> None:
    with pytest.raises(CommunicationError, match="could not join the job at file://"):
        connect("gloo", 0, 2, f"file://{tmp_path}/store", timedelta(seconds=1))
