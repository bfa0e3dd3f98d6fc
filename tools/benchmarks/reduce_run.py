"""Sums of gradients on one rank: ``python -m benchmarks.reduce_run``, started by the parent."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.processes import serve
from benchmarks.timing import FLUSH_BYTES, relative
from megafp4.parallel.blocks import GRANULE
from megafp4.parallel.collectives import Group
from megafp4.parallel.mesh import Mesh, MeshSizes, connect, disconnect
from megafp4.parallel.reduce import CollectiveReducer, FlatReducer
from megafp4.parallel.shared_scale import SharedScaleReducer

_CHECKED = 1 << 24
"""Most gradients that are summed in FP64."""
_WARM_UP = 3
_SLEEP_CYCLES = 3_000_000
"""About 1.5 ms, in which the host launches what follows."""
_SIZE = 1e-3
"""Standard deviation of the gradients."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is summed."""

    elements: int
    """Gradients of each rank."""
    rounds: int
    chunks: tuple[int, ...]
    """Numbers of chunks of the FP8 sums."""
    backend: str = "nccl"
    device: str = "cuda"


@dataclass(frozen=True)
class Found:
    """What was measured of one way to sum."""

    ms: list[float]
    """Of each round, on the slowest rank."""
    sent: int
    """Bytes that a rank sends."""
    independent: float
    """Relative error against the FP64 mean, on the worst rank."""
    correlated: float
    """The same where half of the variance is common to all ranks."""


class Way(NamedTuple):
    """One way to sum."""

    name: str
    source: torch.dtype
    """Type of the gradients."""
    kind: str
    """``library``, ``fp8``, ``fp8-peers``, ``bf16`` or ``fp8-lm``."""
    scatters: bool
    """Whether each rank keeps its shard, or every rank all of it."""
    work: Callable[[Tensor, Tensor], object]
    """Takes the gradients and the shard to write."""
    mean: Callable[[Tensor, Tensor], Tensor]
    """The mean that it finds, of gradients and a shard to write."""


def ways(group: Group, setup: Setup) -> list[Way]:
    """Everything that is compared; the library's own sums first.

    The library's sums are timed alone, without the casts and the scaling that ours do.
    """
    found = []
    peers = _peers(group) if setup.device == "cuda" else None
    for label, dtype in (("BF16", torch.bfloat16), ("FP32", torch.float32)):
        for scatters in (True, False):
            operation = "reduce-scatter" if scatters else "all-reduce"
            prefix = f"{operation} from {label}"
            library = CollectiveReducer(group, dtype)
            alone = group.reduce_scatter if scatters else group.all_reduce
            found.append(
                Way(
                    f"{prefix}, {setup.backend.upper()} {label}",
                    dtype,
                    "library",
                    scatters,
                    lambda x, out, alone=alone: alone(x, "gradients"),
                    _mean(library, scatters),
                )
            )
            ours = {f"fp8, {n} chunks": FlatReducer(group, "fp8", n) for n in setup.chunks}
            ours["bf16, FP32 sum"] = FlatReducer(group, "bf16", 1)
            reducers: dict[str, Any] = dict(ours)
            if scatters:
                reducers["fp8-lm"] = SharedScaleReducer(group)
            if scatters and peers is not None:
                reducers["fp8-peers"] = peers
            for name, reducer in reducers.items():
                mean = _mean(reducer, scatters)
                kind = name.split(",")[0]
                found.append(Way(f"{prefix}, {name}", dtype, kind, scatters, mean, mean))
    return sorted(found, key=lambda way: (not way.scatters, way.kind != "library"))


def _peers(group: Group) -> Any:
    from megafp4.parallel.peers import PeerReducer  # symmetric memory takes time to import

    return PeerReducer(group)


def run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check and time everything on this rank; all ranks return the same."""
    setup = Setup(**{**given, "chunks": tuple(given["chunks"])})
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if setup.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    connect(setup.backend, rank, world, "env://")
    try:
        return {name: asdict(one) for name, one in measure(setup).items()}
    finally:
        disconnect()


def measure(setup: Setup) -> dict[str, Found]:
    """Check and time every way to sum, on a connected rank."""
    mesh = Mesh(MeshSizes(dp=dist.get_world_size()))
    group, device = mesh.dp, torch.device(setup.device)
    cut = group.size * GRANULE
    elements = max(setup.elements // cut, 1) * cut
    checked = min(elements, _CHECKED // cut * cut)
    every = ways(group, setup)
    errors = {}
    for correlated in (False, True):
        source = gradients(checked, group.rank, correlated, device)
        for way in every:
            errors[way.name, correlated] = _error(way, source, group)
    del source
    sent = {}
    for way in every:
        before = mesh.ledger.total()
        x = gradients(cut, group.rank, False, device).to(way.source)
        way.work(x, torch.empty(GRANULE, device=device))
        sent[way.name] = (mesh.ledger.total() - before) * elements // cut
    samples = _time(every, elements, setup.rounds, group, device)
    return {
        way.name: Found(
            samples[way.name],
            sent[way.name],
            errors[way.name, False],
            errors[way.name, True],
        )
        for way in every
    }


def gradients(count: int, rank: int, correlated: bool, device: torch.device) -> Tensor:
    """FP32 normal gradients of a rank, half of whose variance all ranks may share."""
    own = torch.Generator(device).manual_seed(100 + rank)
    x = torch.randn(count, generator=own, device=device)
    if correlated:
        common = torch.Generator(device).manual_seed(1)
        x = (x + torch.randn(count, generator=common, device=device)) * 0.5**0.5
    return x * _SIZE


def _mean(reducer: Any, scatters: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def scatter(x: Tensor, out: Tensor) -> Tensor:
        reducer.reduce_scatter(x, out, "gradients", factor=1 / reducer.size)
        return out

    def all_reduce(x: Tensor, out: Tensor) -> Tensor:
        reducer.all_reduce(x, "gradients", factor=1 / reducer.size)
        return x

    return scatter if scatters else all_reduce


def _error(way: Way, source: Tensor, group: Group) -> float:
    """Relative error of the mean, the largest of all ranks."""
    x = source.to(way.source, copy=True)
    exact = x.double()
    dist.all_reduce(exact, group=group.handle)
    exact /= group.size
    out = torch.empty(x.numel() // group.size, device=x.device)
    found = way.mean(x, out)
    expected = group.own(exact) if way.scatters else exact
    error = torch.tensor([relative(found, expected)], device=x.device)
    return float(group.largest(error))


def _time(
    every: list[Way], elements: int, rounds: int, group: Group, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each round, in turn; those of the rank that took longest."""
    sources = {
        dtype: gradients(elements, group.rank, False, device).to(dtype)
        for dtype in dict.fromkeys(way.source for way in every)
    }
    out = torch.empty(elements // group.size, device=device)
    clock = _GpuClock(group) if device.type == "cuda" else _CpuClock(group)
    for index in range(rounds + _WARM_UP):
        for way in every:
            x = sources[way.source]
            x = x if way.scatters else x.clone()  # an all-reduce overwrites it
            clock.time(lambda way=way, x=x: way.work(x, out), kept=index >= _WARM_UP)
        clock.settle()
    found = torch.tensor(clock.samples(), device=device).float()
    slowest = group.largest(found).view(rounds, len(every)).t().tolist()
    return {way.name: ms for way, ms in zip(every, slowest, strict=True)}


class _GpuClock:
    """Times work by events; all ranks begin together and the host is ahead of them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._one = torch.ones(1, device="cuda")
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, work: Callable[[], object], kept: bool) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(1)
        torch.cuda._sleep(_SLEEP_CYCLES)
        dist.all_reduce(self._one.fill_(1.0), group=self._group.handle)
        start.record()
        work()
        end.record()
        if kept:
            self._events.append((start, end))

    def settle(self) -> None:
        torch.cuda.synchronize()

    def samples(self) -> list[float]:
        return [start.elapsed_time(end) for start, end in self._events]


class _CpuClock:
    """Times work by the host's clock."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._samples: list[float] = []

    def time(self, work: Callable[[], object], kept: bool) -> None:
        dist.barrier(group=self._group.handle)
        start = time.perf_counter()
        work()
        if kept:
            self._samples.append(1e3 * (time.perf_counter() - start))

    def settle(self) -> None:
        return

    def samples(self) -> list[float]:
        return self._samples


if __name__ == "__main__":
    sys.exit(serve(run, sys.argv[1:]))
