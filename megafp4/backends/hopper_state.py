"""What Hopper's kernels find on the GPU from call to call: windows, and where in the run they are.

A *window* holds the base exponent that an MXFP4 operand is folded with, see
:mod:`megafp4_kernels.mxfp4`. Values depend on it for raised blocks alone, so a resumed run is exact
only if it goes on with the windows that were saved. A *position* is what random bits are keyed by,
and a *place* a position with where the parts of a slice lie that are not contiguous in the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from megafp4.backends.hopper_requests import is_weight
from megafp4.errors import CheckpointError, UnsupportedError
from megafp4.numerics import Runs
from megafp4.recipes.cast import CastRequest

# Positions kept on the device: those of the micro-batches whose backward is still to come.
_POSITIONS = 64
_PREFIX = "window."  # and the stream: a window's name in checkpoints


class Windows:
    """Windows of all operands: int32 [8] by random stream and device, zero to begin with."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device], torch.Tensor] = {}

    def of(self, stream: int, device: torch.device) -> torch.Tensor:
        """Window of an operand, at the same address for good: graphs hold it."""
        from megafp4_kernels.mxfp4 import WINDOW

        if (stream, device) not in self._kept:
            self._kept[stream, device] = torch.zeros(WINDOW, dtype=torch.int32, device=device)
        return self._kept[stream, device]

    def raised_blocks(self) -> dict[int, int]:
        """Raised blocks so far by stream, over all devices; waits for each device once."""
        from megafp4_kernels.mxfp4 import RAISED

        found: dict[int, int] = {}
        for device in {device for _, device in self._kept}:
            windows = self._on(device)
            counts = torch.stack(list(windows.values()))[:, RAISED].tolist()
            for stream, count in zip(windows, counts, strict=True):
                found[stream] = found.get(stream, 0) + count
        return found

    def state_dict(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The windows themselves, which go on changing, by the names of a checkpoint."""
        return {f"{_PREFIX}{stream}": kept for stream, kept in self._on(_indexed(device)).items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Set all windows on a device: those without a saved state to zero.

        Raises:
            CheckpointError: A name or a tensor is not that of a window; nothing is changed then.
        """
        from megafp4_kernels.mxfp4 import WINDOW

        device, loaded = _indexed(device), {}
        for name, saved in state.items():
            stream = name.removeprefix(_PREFIX)
            if stream == name or not stream.isdecimal():
                raise CheckpointError(
                    f"the checkpoint holds {name!r}, which is not a window of backend 'hopper': "
                    "continue with the backend that saved it"
                )
            if saved.dtype != torch.int32 or saved.shape != (WINDOW,):
                raise CheckpointError(
                    f"{name!r} of the checkpoint is {saved.dtype} {list(saved.shape)} instead of "
                    f"torch.int32 [{WINDOW}]: load a checkpoint of this version of megafp4"
                )
            loaded[int(stream)] = saved
        for window in self._on(device).values():
            window.zero_()
        for number, saved in loaded.items():
            self.of(number, device).copy_(saved)

    def _on(self, device: torch.device) -> dict[int, torch.Tensor]:
        return {stream: window for (stream, on), window in self._kept.items() if on == device}


class Place(NamedTuple):
    """Where in the run, and in the whole matrix, what a kernel casts lies."""

    position: torch.Tensor
    """int64 [4] on the device: seed (as signed 64 bits), step, first row, first column."""
    row_runs: torch.Tensor | None
    """int32: of every 16 rows where they lie, see :mod:`megafp4_kernels.philox`; None: on end."""
    col_runs: torch.Tensor | None
    """int32: of every 16 columns."""


class _Pins:
    """Places that are counted from a position which is written anew for every replay of a graph."""

    def __init__(self, device: torch.device) -> None:
        # Rows of `_table` are handed out and keep their addresses, which graphs hold.
        self._table, self._first = torch.zeros(2, _POSITIONS, 4, dtype=torch.int64, device=device)
        self._moves = torch.zeros(_POSITIONS, 4, dtype=torch.int64, device=device)
        self._now = torch.zeros(4, dtype=torch.int64, device=device)
        self._rows: dict[tuple[bool, int, int], torch.Tensor] = {}

    def write(self, seed: int, step: int, first_token: int) -> None:
        """Move all places to a position."""
        _write(self._now, seed, step, first_token, 0)
        torch.addcmul(self._first, self._moves, self._now, out=self._table)

    def of(self, weight: bool, row: int, col: int) -> torch.Tensor:
        """A place that far behind the position; that of a weight does not move with the tokens.

        Raises:
            UnsupportedError: There are too many places.
        """
        name = weight, row, col
        if name not in self._rows:
            assert not (self._now.is_cuda and torch.cuda.is_current_stream_capturing()), (
                "a pass without a graph has met every place before"
            )
            index = len(self._rows)
            if index == _POSITIONS:
                raise UnsupportedError(
                    f"a CUDA graph of operands at more than {_POSITIONS} places of their matrices "
                    "cannot be recorded: leave train.cuda_graph off"
                )
            self._rows[name] = self._table[index]
            _write(self._first[index], 0, 0, row, col)
            _write(self._moves[index], 1, 1, int(not weight), 0)
            torch.addcmul(self._first[index], self._moves[index], self._now, out=self._rows[name])
        return self._rows[name]


class Positions:
    """Places of the operands, written on the device without waiting for it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int, int, torch.device], torch.Tensor] = {}
        self._pins: dict[torch.device, _Pins] = {}
        self._pinned: set[torch.device] = set()
        self._runs: dict[tuple[Runs, torch.device], torch.Tensor] = {}

    def pin(self, seed: int, step: int, first_token: int, device: torch.device) -> None:
        """Write a position from which casts on a device count from now on."""
        device = _indexed(device)
        if device not in self._pins:
            self._pins[device] = _Pins(device)
        self._pinned.add(device)
        self._pins[device].write(seed, step, first_token)

    def unpin(self) -> None:
        """Let casts on all devices again read the position that they are asked for."""
        self._pinned.clear()

    def pinned(self, device: torch.device) -> bool:
        """Whether casts on a device count from the position that was pinned."""
        return device in self._pinned

    def of(self, request: CastRequest, device: torch.device) -> Place:
        """Place that an operand's random bits are drawn at.

        Raises:
            UnsupportedError: A position is pinned, and the tokens are not on end.
        """
        rows, cols = request.origin if request.axis == 1 else request.origin[::-1]
        first_row, row_runs = self._first_and_runs(rows, device)
        first_col, col_runs = self._first_and_runs(cols, device)
        if device in self._pinned:
            weight = is_weight(request)
            if row_runs is not None and not weight:
                raise UnsupportedError(
                    f"{request.operand} is cast of several runs of tokens, and a CUDA graph knows "
                    "only where its micro-batch begins: leave train.cuda_graph off under context "
                    "parallelism"
                )
            position = self._pins[device].of(weight, first_row, first_col)
            return Place(position, row_runs, col_runs)
        name = request.key.seed, request.key.step, first_row, first_col, device
        if name not in self._kept:
            while len(self._kept) >= _POSITIONS:
                del self._kept[next(iter(self._kept))]
            position = torch.empty(4, dtype=torch.int64, device=device)
            _write(position, *name[:-1])
            self._kept[name] = position
        return Place(self._kept[name], row_runs, col_runs)

    def _first_and_runs(
        self, origin: int | Runs, device: torch.device
    ) -> tuple[int, torch.Tensor | None]:
        """First index of contiguous rows or columns; or 0 and a table of the others."""
        if isinstance(origin, int):
            return origin, None
        if (origin, device) not in self._runs:
            parts = [
                torch.arange(first // 16, (first + n) // 16, dtype=torch.int32, device=device)
                for first, n in origin
            ]
            granules = sum(len(part) for part in parts)
            parts.append(torch.zeros(-granules % 8, dtype=torch.int32, device=device))
            self._runs[origin, device] = torch.cat(parts)
        return 0, self._runs[origin, device]


def _indexed(device: torch.device) -> torch.device:
    """A device as tensors name it: ``cuda`` is the current GPU."""
    return torch.empty(0, device=device).device


def _write(position: torch.Tensor, seed: int, step: int, first_row: int, first_col: int) -> None:
    """Fill a position; kernels that fill need no copy from the host, which would wait."""
    signed = seed - (1 << 64) if seed >> 63 & 1 else seed
    for i, number in enumerate((signed, step, first_row, first_col)):
        position[i].fill_(number)
