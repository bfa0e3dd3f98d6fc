"""Timing on the GPU: interleaved, with cold caches, as CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

FLUSH_BYTES = 1 << 28
"""Several times the L2 cache of an H200."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Milliseconds of one piece of work, over the rounds of a run."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    eager: bool = False
    """Whether it was launched from Python: what waits for the GPU cannot be a graph."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        """Summarize at least one sample."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def as_json(self) -> dict[str, object]:
        """Everything, for ``results.json``."""
        found: dict[str, object] = {"median": self.median, "quartiles": [self.low, self.high]}
        return found | ({"eager": True} if self.eager else {})


class Timer(Protocol):
    """Times several pieces of work so that they can be compared with each other."""

    def __call__(self, rows: Mapping[str, Work], rounds: int, /) -> dict[str, Time]:
        """Time each of ``rows`` in each of ``rounds``."""
        ...


def time_on_gpu(rows: Mapping[str, Work], rounds: int) -> dict[str, Time]:
    """Time work in turn, as CUDA graphs wherever it does not wait for the GPU."""
    eager = {name for name, work in rows.items() if waits(work)}
    ready = {name: work if name in eager else graphed(work) for name, work in rows.items()}
    times = interleaved(ready, rounds)
    return {name: replace(time, eager=name in eager) for name, time in times.items()}


def waits(work: Work) -> bool:
    """Whether work makes the CPU wait for the GPU, so that no graph can record it."""
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def graphed(work: Work) -> Callable[[], None]:
    """Record work as a CUDA graph, so that what Python takes to launch it is not measured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def interleaved(rows: Mapping[str, Work], rounds: int) -> dict[str, Time]:
    """Time several pieces of work in turn, so that clocks and heat treat them alike.

    The L2 cache is overwritten before each one.

    Args:
        rows: What to time, by name; recorded with :func:`graphed` if launching costs anything.
        rounds: Samples of each.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rows}
    for index in range(rounds + 2):
        for name, work in rows.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.fill_(index % 251)
            start.record()
            work()
            end.record()
            if index >= 2:
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: Time.of([a.elapsed_time(b) for a, b in pairs]) for name, pairs in events.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN never passes a check."""
    total = difference = 0.0
    for a, b in zip(found.split(1024), expected.split(1024), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    return (difference / total) ** 0.5
