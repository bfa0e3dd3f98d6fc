"""The optimizer's step with each way to keep weights and states, and PyTorch's beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.ceilings import COPY
from benchmarks.report import Report
from benchmarks.session import Session
from benchmarks.timing import Work
from megafp4.config import OptimConfig
from megafp4.numerics.grid import GridWeight
from megafp4.optim import Optimizer, build_optimizer
from megafp4.optim.optimizer import grid_of, storage_bytes
from megafp4.optim.states import CODECS

WIDTH = 4096
_COLUMNS = (
    "states, gradients",
    "ms",
    "TB/s",
    "of copy",
    "x torch",
    "moved B",
    "weight B",
    "states B",
    "allocated B",
)
_CHECKED = ((1025, 4097), (333, 128), (77,))
"""Shapes of the slice that is held to the specification: odd ones, matrices and a vector."""
_CHECKED_STEPS = 3
_LR = 1e-3


class Way(NamedTuple):
    """How weights and states are kept, and what gradients are."""

    states: str
    """Value of ``optim.states``."""
    dtype: torch.dtype
    """Type of the gradients."""
    bits: float = 0
    """Bits of a weight on a grid; 0 for dense ones."""

    @property
    def name(self) -> str:
        """Name of the row."""
        label = "FP32" if self.dtype == torch.float32 else "BF16"
        on = f"dqt{self.bits:g} " if self.bits else ""
        return f"{on}{self.states}, {label}"


WAYS = [
    *(Way(states, dtype) for states in CODECS for dtype in (torch.float32, torch.bfloat16)),
    *(Way(states, torch.float32, 8) for states in ("fp32", "coat")),
    *(Way("coat", torch.float32, bits) for bits in (4, 3, 1.58)),
]


class Kept(NamedTuple):
    """An optimizer with gradients, and what its memory is."""

    optimizer: Optimizer
    parameters: int
    allocated: float
    """Bytes of weights and states, from the allocator; on a CPU from storages."""


def measure(
    session: Session, parameters: int, rounds: int, matrices: int = 32, fused: bool = True
) -> Report:
    """Time a step of every codec with FP32 and with BF16 gradients, and of weights on grids.

    The check is the share of bits of weights and states that differ from the CPU's after three
    steps of a smaller model; it must be 0.

    Args:
        session: Rows that are wanted, budget, ceilings.
        parameters: How many are stepped, in equal matrices.
        rounds: Samples of each row.
        matrices: How many tensors they are in.
        fused: Whether kernels take the step.
    """
    rows = max(parameters // (matrices * WIDTH), 1)
    shapes = [(rows, WIDTH)] * matrices
    millions = matrices * rows * WIDTH / 1e6
    report = session.report(f"AdamW step of {millions:,.0f} M parameters", _COLUMNS, "of copy")
    for way in WAYS:
        if session.starts(report, way.name):
            _row(report, session, way, shapes, rounds, fused)
    return report


def difference(way: Way, device: str, fused: bool) -> float:
    """Share of bytes of weights and states that differ from the specification's."""
    exact, found = (
        build_optimizer(_params(_checked(way), at, way.bits), _config(way), 7, fused=by_kernel)
        for at, by_kernel in (("cpu", False), (device, fused))
    )
    for step in range(_CHECKED_STEPS):
        draws = torch.Generator().manual_seed(step)
        for name, param in exact.params.items():
            grad = torch.randn(param.shape, generator=draws).to(way.dtype)
            for optimizer in (exact, found):
                mine = optimizer.params[name]
                mine.grad_dtype = way.dtype
                mine.grad = grad.to(mine.device)
        exact.step(step, _LR, 0.5)
        scale = torch.tensor(0.5, dtype=torch.float64, device=device)
        found.step(step, _LR, scale, torch.zeros((), device=device))
    different = total = 0
    for mine, other in zip(_kept(found), _kept(exact), strict=True):
        ours = mine.detach().cpu().contiguous().view(torch.uint8)
        theirs = other.detach().contiguous().view(torch.uint8)
        different += int((ours != theirs).sum())
        total += ours.numel()
    return different / total


def keep(way: Way, shapes: list[tuple[int, ...]], device: str, fused: bool) -> Kept:
    """Allocate an optimizer, measure it, and give every parameter a gradient."""
    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    optimizer = build_optimizer(_params(shapes, device, way.bits), _config(way), 7, fused=fused)
    after = torch.cuda.memory_allocated() if on_gpu else storage_bytes(_kept(optimizer))
    for param in optimizer.params.values():
        param.grad_dtype = way.dtype
        param.grad = torch.randn(param.shape, device=device, dtype=way.dtype)
    count = sum(param.numel() for param in optimizer.params.values())
    return Kept(optimizer, count, after - before)


def _row(
    report: Report,
    session: Session,
    way: Way,
    shapes: list[tuple[int, ...]],
    rounds: int,
    fused: bool,
) -> None:
    device = session.device
    kept: list[Kept] = []

    def works() -> dict[str, Work]:
        kept.append(keep(way, shapes, device, fused))
        scale = torch.ones((), dtype=torch.float64, device=device)
        skip = torch.zeros((), device=device)
        ours = kept[0].optimizer
        return {
            "ours": lambda: ours.step(1, _LR, scale, skip),
            "torch": _torch_step(shapes, device),
        }

    checked = session.checked(
        report, way.name, 0.0, lambda: difference(way, device, fused), works, rounds
    )
    if checked is None:
        return
    error, times = checked
    one, ms = kept[0], times["ours"].median
    weights = storage_bytes(_weights(one.optimizer))
    state_bytes = one.optimizer.state_bytes()
    moved = 2 * (weights + state_bytes) + one.parameters * way.dtype.itemsize
    report.add(
        way.name,
        ms,
        moved / ms / 1e9,
        moved / ms / 1e9 / report.ceilings[COPY],
        times["torch"].median / ms,
        moved / one.parameters,
        weights / one.parameters,
        state_bytes / one.parameters,
        one.allocated / one.parameters,
        error=error,
        limit=0.0,
        times={key: time.as_json() for key, time in times.items()},
    )


def _torch_step(shapes: list[tuple[int, ...]], device: str) -> Work:
    """PyTorch's fused AdamW: FP32 parameters, gradients and states."""
    params = [param for _, param in _params(shapes, device)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, lr=_LR, fused=True, capturable=device == "cuda")
    return optimizer.step


def _config(way: Way) -> OptimConfig:
    return OptimConfig(states=way.states)  # type: ignore[arg-type]


def _checked(way: Way) -> Iterable[tuple[int, ...]]:
    """Shapes of the slice: on a grid matrices, of widths that kernels take."""
    if not way.bits:
        return _CHECKED
    return [(shape[0], shape[1] // 128 * 128) for shape in _CHECKED if len(shape) == 2]


def _params(
    shapes: Iterable[tuple[int, ...]], device: str, bits: float = 0
) -> list[tuple[str, nn.Parameter]]:
    draws = torch.Generator().manual_seed(1)
    found = []
    for index, shape in enumerate(shapes):
        # The slice's are made on the host, so that all devices begin with the same.
        small = math.prod(shape) <= math.prod(_CHECKED[0])
        value = 0.02 * (
            torch.randn(shape, generator=draws) if small else torch.randn(shape, device=device)
        )
        param = nn.Parameter(value.to(device))
        if bits:
            grid = GridWeight.from_dense(value, bits, range=3.0, layer=index)
            grid.codes, grid.scale = grid.codes.to(device), grid.scale.to(device)
            param = grid.parameter()
        found.append((f"weight{index}", param))
    return found


def _weights(optimizer: Optimizer) -> list[Tensor]:
    found: list[Tensor] = []
    for param in optimizer.params.values():
        grid = grid_of(param)
        found += [param] if grid is None else [grid.codes, grid.scale]
    return found


def _kept(optimizer: Optimizer) -> list[Tensor]:
    return [*_weights(optimizer), *optimizer.state_dict().values()]
