"""Run a function on several ranks: real processes that talk over gloo."""

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megafp4.parallel.collectives import Group

# A server that has imported torch forks ranks in milliseconds, and has no threads to lose.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "megafp4", "tests.parallel.reduce_ranks"])


def run(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    patience_s: float = 30,
    expect_lost: int | None = None,
) -> list[Any]:
    """Call ``function(rank, size, *args)`` on every rank.

    Args:
        function: A module's function.
        size: Number of ranks.
        args: More arguments.
        patience_s: How long a rank waits for others.
        expect_lost: A rank that is killed or stopped, whose answer is not waited for.

    Returns:
        What each rank returned, or the string of the exception that ended it, or None if it died
        without a word.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            store = Path(folder) / "store"
            process = _CONTEXT.Process(
                target=_work, args=(theirs, store, patience_s, function, rank, size, args)
            )
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        results = []
        for rank, end in enumerate(ends):
            try:
                results.append(None if rank == expect_lost else _answer(end))
            except EOFError:
                results.append(None)
        for rank, process in enumerate(processes):
            if rank != expect_lost:
                process.join(5)
            process.kill()
            process.join()
        return results


def run_well(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """:func:`run`, where no rank may fail."""
    results = run(function, size, *args)
    failed = [result for result in results if result is None or isinstance(result, str)]
    assert not failed, failed[0]
    return results


def world(rank: int, size: int) -> Group:
    """All ranks as one group."""
    return Group("dp", rank, size, dist.group.WORLD)


def _answer(end: Connection) -> Any:
    if not end.poll(120):
        return "no answer within 120 s"
    return torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)


def _work(
    end: Connection,
    store: Path,
    patience_s: float,
    function: Callable[..., Any],
    rank: int,
    size: int,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=patience_s),
        )
        result = function(rank, size, *args)
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - every failure is reported to the test
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    # Not send(), which would share the tensors' memory, and not pickle, which knows no FP8.
    answer = io.BytesIO()
    torch.save(result, answer)
    end.send_bytes(answer.getvalue())
    end.close()
