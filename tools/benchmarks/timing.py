"""Timing on the GPU: interleaved, with cold caches, as CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 1 << 28
"""Several times the L2 cache of an H200."""


@dataclass(frozen=True)
class Time:
    """Milliseconds of one piece of work, over the rounds of a run."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, samples: list[float]) -> Time:
        """Summarize at least one sample."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def graphed(work: Callable[[], object]) -> Callable[[], None]:
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


def interleaved(rows: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Time]:
    """Time several pieces of work in turn, so that clocks and heat treat them alike.

    The L2 cache is overwritten before each one.

    Args:
        rows: What to time, by name; recorded with :func:`graphed` if launching costs anything.
        rounds: Samples of each.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
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


def ceilings(rounds: int = 10) -> dict[str, float]:
    """What this GPU reaches: TB/s of a copy, TFLOP/s of BF16 and FP8 products of random data."""
    source = torch.randn(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones(1, device="cuda")

    def fp8() -> object:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    # A kernel that copies: a graph would turn copy_() into the slower copy of the driver.
    rows = {"copy": lambda: torch.neg(source, out=target), "bf16": lambda: a @ b.t(), "fp8": fp8}
    times = interleaved({name: graphed(work) for name, work in rows.items()}, rounds)
    product = 2 * 8192**3 / 1e9
    return {
        "copy TB/s": 2 * source.nbytes / times["copy"].median / 1e9,
        "BF16 TFLOP/s": product / times["bf16"].median,
        "cuBLASLt FP8 TFLOP/s": product / times["fp8"].median,
    }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN never passes a check."""
    total = difference = 0.0
    for a, b in zip(found.split(1024), expected.split(1024), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    return (difference / total) ** 0.5
