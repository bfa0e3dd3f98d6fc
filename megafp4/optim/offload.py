"""Optimizer state in host memory, which a step streams through the device.

State of all parameters lies in pinned host memory, as their codecs keep it. A step cuts it into
windows, and each window goes through one of two buffers on the device::

    stream in     window 0   window 1   window 2 ...
    computing                window 0   window 1 ...
    stream out                          window 0 ...

So the device holds two windows however large the model is, and a step can take as little as the
link needs for the state one way, both directions being busy at once. ZeRO-Offload [2101.06840]
steps on the host instead. A part of a parameter that begins at a multiple of 128 moves as it would
in the whole: the bits are those of a step without offload.

A parameter begins at a multiple of 1,024 elements, so that each kind of state does at a multiple of
16 bytes, which kernels read at a time. Without a GPU the same windows are copied by the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megafp4.errors import UnsupportedError
from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.optim.adamw import StepNumbers
from megafp4.optim.fused import Dense, FusedSteps, exact_steps
from megafp4.optim.grid_step import GridStep
from megafp4.optim.host_memory import HostMemory
from megafp4.optim.quantizers import GROUP
from megafp4.optim.states import State, StateCodec
from megafp4.optim.zero_grids import grid_rows

WINDOW_ELEMENTS = 1 << 24
"""Elements of a window: 128 MiB of FP32 moments, large enough for the full rate of the link."""
_TILE = 8 * GROUP


class _Section(NamedTuple):
    """Where one kind of state of a codec's parameters lies in host memory."""

    dtype: torch.dtype
    tile_bytes: int
    """Bytes of 1,024 elements."""
    offset: int
    """First byte in host memory."""
    staged: int
    """First byte in a buffer on the device."""


class _Span(NamedTuple):
    """A part of a parameter."""

    name: str
    start: int
    """First element, at a multiple of 1,024."""
    stop: int
    """Behind the last one."""


@dataclass
class _Window:
    """What is on the device at one time."""

    slot: int
    """Its buffer."""
    spans: list[_Span]
    states: list[State]
    """State of each span, in the buffer."""
    copies: list[tuple[Tensor, Tensor]]
    """Bytes in host memory and in the buffer."""
    arrived: Any = None
    """Event: it is in the buffer."""
    parts: list[Dense] = field(default_factory=list)
    """The spans of dense parameters as parameters of their own."""
    launches: FusedSteps = field(default_factory=lambda: FusedSteps(None))


class HostStates:
    """State of an optimizer's parameters in host memory, and the steps that stream it.

    Steps only queue their work where kernels take them; whoever reads or writes the state in host
    memory calls :meth:`settle` first.

    Args:
        kept: Codec and number of elements of each parameter, or piece of one, by name.
        device: Where the parameters are.
        fused: Move dense parameters by kernels if they are on a GPU.

    Raises:
        UnsupportedError: The system does not pin that much memory.
    """

    def __init__(
        self,
        kept: Mapping[str, tuple[StateCodec, int]],
        device: torch.device,
        *,
        fused: bool,
    ) -> None:
        self._device, self._fused = device, fused
        self._codecs = {name: codec.name for name, (codec, _) in kept.items()}
        self._layouts: dict[str, dict[str, tuple[torch.dtype, int]]] = {}
        self._places: dict[str, int] = {}
        tiles: dict[str, int] = {}
        for name, (codec, count) in kept.items():
            self._layouts[codec.name] = _tile_bytes(codec)
            self._places[name] = tiles.get(codec.name, 0)
            tiles[codec.name] = self._places[name] + -(-count // _TILE)
        # No window needs more than all that a codec keeps.
        self._capacity = min(WINDOW_ELEMENTS // _TILE, max(tiles.values(), default=0))
        self._sections, size = self._lay_out(tiles)
        self._turn = 0
        self._buffers: list[Tensor] = []
        self._free: list[Any] = [None, None]
        self._windows: dict[str, tuple[Any, list[_Window]]] = {}
        self._in: Any = None
        self._out: Any = None
        if device.type == "cuda":
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._memory = HostMemory(size, self._out)
        self._reserve_buffers()

    def _lay_out(self, tiles: Mapping[str, int]) -> tuple[dict[str, dict[str, _Section]], int]:
        """Sections of each codec, and the bytes of all."""
        sections: dict[str, dict[str, _Section]] = {}
        offset = 0
        for codec, count in tiles.items():
            sections[codec], staged = {}, 0
            for kind, (dtype, tile_bytes) in self._layouts[codec].items():
                sections[codec][kind] = _Section(dtype, tile_bytes, offset, staged)
                offset += count * tile_bytes
                staged += self._capacity * tile_bytes
        return sections, offset

    def _reserve_buffers(self) -> None:
        tile_bytes = [sum(b for _, b in kinds.values()) for kinds in self._layouts.values()]
        size = self._capacity * max(tile_bytes, default=0)
        self._buffers = [
            torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)
        ]
        if self._in is not None:  # what used the memory before may still be running
            self._in.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers, all that state takes on the device."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def adopt(self, name: str, state: State) -> State:
        """Take over a first state and return what holds it from now on: CPU tensors of its shapes.

        Args:
            name: Parameter or piece.
            state: Of its codec's ``adopt``.
        """
        self.settle()
        found = {}
        for kind, first in state.items():
            section = self._sections[self._codecs[name]][kind]
            offset = section.offset + self._places[name] * section.tile_bytes
            found[kind] = self._memory.like(offset, first).copy_(first)
        return found

    def settle(self) -> None:
        """Wait until host memory holds what the steps so far have made."""
        if self._out is not None:
            self._out.synchronize()

    def step(
        self,
        tensors: Sequence[Dense],
        numbers: StepNumbers,
        step: int,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """Move dense parameters of one codec, as :meth:`FusedSteps.step` does.

        Args:
            tensors: The parameters, contiguous, with gradients; their state is of :meth:`adopt`.
            numbers: Constants of the step.
            step: Index of the step.
            scale: FP32 [1] on the device; multiplies every gradient.
            skip: FP32 [1] on the device: 1 leaves everything as it is.

        Raises:
            UnsupportedError: A CUDA graph is being recorded.
        """
        by_kernel = self._fused and self._in is not None
        if not by_kernel and skip is not None and skip.item():
            return
        grads = {one.name: _flat_grad(one.param) for one in tensors}
        for window in self._walk(self._dense_windows(tensors)):
            for part, span in zip(window.parts, window.spans, strict=True):
                part.param.grad = grads[span.name][span.start : span.stop]
            if by_kernel:
                window.launches.step(window.parts, numbers, step, scale, skip)
            else:
                exact_steps(window.parts, numbers, step, scale)
            for part in window.parts:
                part.param.grad = None
        for one in tensors:
            torch.autograd.graph.increment_version(one.param)

    def grid_step(
        self, name: str, grid: GridWeight, grad: Tensor, how: GridStep
    ) -> StoreStatistics:
        """Move a weight on a grid, or rows of one, as :meth:`GridStep.move` does.

        Args:
            name: Parameter or piece.
            grid: The weight or rows; its codes are overwritten.
            grad: FP32 or BF16 gradient, of as many elements.
            how: The step.

        Raises:
            DivergenceError: As there; rows before may have moved.
            UnsupportedError: A CUDA graph is being recorded, or a thousand rows, which must not be
                parted in a width without factors of two, are larger than a window.
        """
        width, total = grid.shape[1], grid.shape.numel()
        flat = grad.reshape(-1)
        counts = torch.zeros(3, dtype=torch.int64, device=grid.codes.device)
        for window in self._walk(self._grid_windows(name, width, total)):
            ((_, start, stop),), (state,) = window.spans, window.states
            rows = grid_rows(grid, start // width, stop // width)
            counts += how.move(rows, flat[start:stop], state, fused=self._fused).counts()
        return StoreStatistics.of(counts, total)

    def _walk(self, windows: Sequence[_Window]) -> Iterator[_Window]:
        """Bring window after window to the device, and back when the next one is asked for."""
        if self._in is not None and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a step with optim.offload waits for copies on other streams, which a CUDA graph "
                "cannot record: take steps outside of graphs, or set optim.offload to false"
            )
        for index, window in enumerate(windows):
            if index == 0:
                self._fetch(window)
            if index + 1 < len(windows):
                self._fetch(windows[index + 1])
            if window.arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(window.arrived)
            yield window
            self._store(window)

    def _fetch(self, window: _Window) -> None:
        if self._in is None:
            for host, staged in window.copies:
                staged.copy_(host)
            return
        with torch.cuda.stream(self._in):
            # Also behind the last copy from the buffer: this window's own one was no later.
            if self._free[window.slot] is not None:
                self._in.wait_event(self._free[window.slot])
            for host, staged in window.copies:
                staged.copy_(host, non_blocking=True)
            window.arrived = self._in.record_event()

    def _store(self, window: _Window) -> None:
        if self._out is None:
            for host, staged in window.copies:
                host.copy_(staged)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for host, staged in window.copies:
                host.copy_(staged, non_blocking=True)
            self._free[window.slot] = self._out.record_event()

    def _dense_windows(self, tensors: Sequence[Dense]) -> list[_Window]:
        # Whoever gives a parameter other memory gets other windows.
        where = [(one.name, one.param.data_ptr()) for one in tensors]
        first = tensors[0].name
        if first not in self._windows or self._windows[first][0] != where:
            by_name = {one.name: one for one in tensors}
            # Windows that share a parameter are not kept side by side: the state of it may still be
            # on its way from the other's buffer, and only new windows wait for that.
            for key, (others, _) in list(self._windows.items()):
                if others is not None and any(name in by_name for name, _ in others):
                    del self._windows[key]
            windows = self._plan([(one.name, one.param.numel()) for one in tensors], _TILE)
            for window in windows:
                pairs = zip(window.spans, window.states, strict=True)
                window.parts = [_part(by_name[span.name], span, state) for span, state in pairs]
            self._windows[first] = where, windows
        return self._windows[first][1]

    def _grid_windows(self, name: str, width: int, total: int) -> list[_Window]:
        if name not in self._windows:
            # Rows that begin at a multiple of 1,024 elements.
            unit = math.lcm(_TILE, width)
            if unit > self._capacity * _TILE and total > self._capacity * _TILE:
                raise UnsupportedError(
                    f"optim.offload streams {name!r} in runs of {unit // width} rows of {width}, "
                    f"more than the {self._capacity * _TILE} elements of a window: choose a width "
                    "with more factors of two, or set optim.offload to false"
                )
            self._windows[name] = None, self._plan([(name, total)], unit)
        return self._windows[name][1]

    def _plan(self, items: Sequence[tuple[str, int]], unit: int) -> list[_Window]:
        """Windows of parameters of one codec, which are cut at multiples of ``unit`` elements."""
        if self._in is not None:  # their state may have been stored from the other buffer
            self._in.wait_stream(self._out)
        filled: list[list[_Span]] = []
        room = 0
        for name, count in items:
            start = 0
            while start < count:
                fits = room * _TILE
                taken = count - start if count - start <= fits else fits // unit * unit
                if not taken:
                    filled.append([])
                    room = self._capacity
                    continue
                filled[-1].append(_Span(name, start, start + taken))
                start, room = start + taken, room - -(-taken // _TILE)
        return [self._window(spans) for spans in filled]

    def _window(self, spans: list[_Span]) -> _Window:
        slot, self._turn = self._turn, 1 - self._turn
        sections = self._sections[self._codecs[spans[0].name]]
        buffer, at = self._buffers[slot], 0
        states: list[State] = []
        runs: list[list[int]] = []  # first tile in host memory, in the buffer, number of tiles
        for span in spans:
            count = span.stop - span.start
            place, tiles = self._places[span.name] + span.start // _TILE, -(-count // _TILE)
            if runs and runs[-1][0] + runs[-1][2] == place:
                runs[-1][2] += tiles
            else:
                runs.append([place, at, tiles])
            states.append({k: _staged(buffer, one, at, count) for k, one in sections.items()})
            at += tiles
        copies = [
            (
                self._memory.bytes(one.offset + place * one.tile_bytes, tiles * one.tile_bytes),
                _bytes_of(buffer, one, begin, tiles * one.tile_bytes),
            )
            for place, begin, tiles in runs
            for one in sections.values()
        ]
        return _Window(slot, spans, states, copies)


def _tile_bytes(codec: StateCodec) -> dict[str, tuple[torch.dtype, int]]:
    """Type, and bytes of 1,024 elements, of each kind of a codec's state."""
    found = {kind: (dtype, _TILE * dtype.itemsize) for kind, dtype in codec.element_dtypes.items()}
    for kind, (dtype, width) in codec.group_dtypes.items():
        found[kind] = dtype, _TILE // GROUP * width * dtype.itemsize
    return found


def _bytes_of(buffer: Tensor, section: _Section, tile: int, count: int) -> Tensor:
    return buffer.narrow(0, section.staged + tile * section.tile_bytes, count)


def _staged(buffer: Tensor, section: _Section, tile: int, count: int) -> Tensor:
    """One kind of state of ``count`` elements in a buffer, of the shape that its codec gives it."""
    itemsize = section.dtype.itemsize
    if section.tile_bytes == _TILE * itemsize:
        return _bytes_of(buffer, section, tile, count * itemsize).view(section.dtype)
    groups, row_bytes = -(-count // GROUP), section.tile_bytes * GROUP // _TILE
    found = _bytes_of(buffer, section, tile, groups * row_bytes).view(section.dtype)
    return found.view(groups, row_bytes // itemsize)


def _part(one: Dense, span: _Span, state: State) -> Dense:
    """A span of a parameter as a parameter with state in a buffer."""
    part = nn.Parameter(one.param.detach().view(-1)[span.start : span.stop])
    part.grad_dtype = None  # what is assigned is a piece of a gradient that has been checked
    return Dense(one.name, part, one.codec, state, one.key, one.index, one.start + span.start)


def _flat_grad(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad.reshape(-1)
