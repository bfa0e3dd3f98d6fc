"""Ranks as real processes that stay for many tests, because starting them takes seconds."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megafp4.parallel.mesh import connect, disconnect

TIMEOUT = 60.0
"""Seconds that a rank waits for another, and a test for its ranks."""


class Ranks:
    """Processes connected by gloo, which run functions of modules side by side.

    A failure on one rank ends all of them, and the next call starts new ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, dies: int | None = None) -> list[Any]:
        """Call ``function(*args)`` on every rank; what each returned, in rank order.

        A rank that ``dies`` ends its process in the function, and its place is None.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results: dict[int, Any] = {} if dies is None else {dies: None}
        while len(results) < self.count:
            left = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(left, 2 * TIMEOUT)
            if not ready:
                self._fail(f"no answer within {2 * TIMEOUT:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    fine, result = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} ended")
                if not fine:
                    self._fail(f"rank {rank} raised\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self.count)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        address = f"file://{Path(self._folder.name) / 'store'}"
        for rank in range(self.count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.count, address, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def _fail(self, why: str) -> None:
        self.stop()
        raise AssertionError(why)


def _serve(rank: int, count: int, address: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    connect("gloo", rank, count, address, timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(20260)
        try:
            answer = True, function(*args)
        except Exception:  # noqa: BLE001  the test shows it
            answer = False, traceback.format_exc()
        _leave_groups()
        pipe.send_bytes(pickle.dumps(answer))
    disconnect()


def _leave_groups() -> None:
    """Destroy the groups that a test has made: each holds threads, and some of gloo's spin."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
