"""What an owner keeps for its pieces of the parameters, and how it moves them.

A piece is a run of a parameter's elements in row-major order that begins at a multiple of 128, the
group of elements that shares scales in a codec's state: a piece's state is that part of the whole
parameter's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError
from megafp4.numerics import Key
from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.optim.adamw import AdamHyper, StepNumbers
from megafp4.optim.fused import Dense, FusedSteps, exact_steps
from megafp4.optim.grid_step import GridStep
from megafp4.optim.offload import HostStates
from megafp4.optim.optimizer import codec_of, grid_of
from megafp4.optim.quantizers import GROUP
from megafp4.optim.states import State
from megafp4.parallel.bucket import Bucket, Piece
from megafp4.parallel.collectives import Group


class StateKind(NamedTuple):
    """How one kind of state lies in memory: rows of ``width`` numbers."""

    dtype: torch.dtype
    """Type of the numbers."""
    group: int = 1
    """Elements that a row stands for: 1, or 128 for scales."""
    width: int = 1
    """Numbers of a row."""


class OwnedState(NamedTuple):
    """What a rank owns of one kind of state of one parameter."""

    name: str
    """Parameter."""
    label: str
    """Kind of state, ``exp_avg`` say."""
    shape: torch.Size
    """Of the parameter, as this rank's model holds it; whole under ZeRO 3."""
    kind: StateKind
    """How it lies in memory."""
    start: int
    """First element; a multiple of the group."""
    stop: int
    """Behind the last element; ``start`` where the rank owns nothing."""
    memory: Tensor | None
    """The state itself; None where the rank owns nothing."""


class OwnedRows(NamedTuple):
    """The rows that a rank owns of one tensor of the model's state."""

    name: str
    """Name in the state dict of the model that is not cut."""
    shape: torch.Size
    """Of the whole tensor."""
    first: int
    """First row."""
    memory: Tensor
    """The rows, perhaps none."""


class PieceStates:
    """State of the pieces that one rank owns, kept as ``config.states`` says.

    Args:
        params: All parameters by name, the same on all ranks.
        config: How state is kept.
        seed: Seed of the stochastic rounding.
        fused: Move dense pieces by kernels if they are on a GPU.
        names: Parameters of the whole model in its order, which numbers their random streams; None
            if these are ``params``.
        places: Where the first element of a parameter is counted from in its stream, a multiple of
            128; 0 for those that are not in it.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: OptimConfig,
        seed: int,
        fused: bool,
        names: Sequence[str] | None = None,
        places: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._params = params
        self._config = config
        self._fused = fused
        self._places = places
        order = list(params) if names is None else names
        self._keys = {n: Key(seed, 0, i, "update", "a") for i, n in enumerate(order)}
        self._dense: dict[str, Dense] = {}
        self._states: dict[str, State] = {}
        self._launches = FusedSteps(None)
        self._host: HostStates | None = None

    def weight_dtype(self, name: str) -> torch.dtype:
        """What the model reads and ranks gather."""
        return codec_of(self._params[name], self._config).weight_dtype

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Make room for the pieces that will be adopted, in the order of their steps.

        Raises:
            UnsupportedError: State is to lie in host memory, and there is not enough of it.
        """
        if self._config.offload and self._params:
            device = next(iter(self._params.values())).device
            kept = {
                piece.name: (codec_of(self._params[piece.name], self._config), piece.numel)
                for piece in pieces
            }
            self._host = HostStates(kept, device, fused=self._fused)

    def adopt(self, piece: Piece, weights: Tensor) -> None:
        """Begin to keep a dense piece.

        Args:
            piece: The piece.
            weights: Where the model reads it, flat, of its :meth:`weight_dtype`; overwritten with
                the first values, which are taken from the parameter while it is FP32.
        """
        param = self._params[piece.name]
        codec = codec_of(param, self._config)
        first = param.detach().reshape(-1)[piece.start : piece.stop]
        own = nn.Parameter(first.clone())
        state = self._keep(piece, codec.adopt(own))
        weights.copy_(own.detach())
        own.data = weights
        key, index = self._keys[piece.name], len(self._dense)
        place = piece.start + self._places.get(piece.name, 0)
        self._dense[piece.name] = Dense(piece.name, own, codec, state, key, index, place)

    def check_rows(self, bucket: Bucket) -> None:
        """Refuse rows, of any rank, whose state would share a scale with another rank's.

        Raises:
            ConfigError: Some begin within a group of 128 elements.
        """
        for piece in bucket.pieces:
            grouped = any(kind.group > 1 for kind in self.layout(piece.name).values())
            if grouped and piece.start % GROUP:
                raise ConfigError(
                    f"optim.states {self._config.states} keeps state in groups of {GROUP} elements "
                    f"and {bucket.ranks} ranks cut {piece.name!r} "
                    f"{list(self._params[piece.name].shape)} within one: choose a width that is a "
                    f"multiple of {GROUP}, another number of ranks, or optim.states fp32"
                )

    def adopt_grid(self, piece: Piece) -> None:
        """Begin to keep the moments of rows of a grid weight."""
        param = self._params[piece.name]
        rows = torch.empty((), device=param.device).expand(piece.numel)
        self._keep(piece, codec_of(param, self._config).adopt(nn.Parameter(rows)))

    def _keep(self, piece: Piece, state: State) -> State:
        if self._host is not None:
            state = self._host.adopt(piece.name, state)
        self._states[piece.name] = state
        return state

    def step(
        self,
        grads: Mapping[str, Tensor],
        hyper: AdamHyper,
        step: int,
        scale: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """Move dense pieces that share their constants.

        Args:
            grads: FP32 gradient of each piece, flat; only read.
            hyper: Constants of this step.
            step: Index of the step, counted from 0.
            scale: FP32 [1] on the device; multiplies every gradient.
            skip: FP32 [1] on the device: where it is 1 nothing moves.
        """
        numbers = StepNumbers.of(hyper, step)
        by_codec: dict[str, list[Dense]] = {}
        for name, grad in grads.items():
            piece = self._dense[name]
            piece.param.grad = grad
            by_codec.setdefault(piece.codec.name, []).append(piece)
        for pieces in by_codec.values():
            if self._host is not None:
                self._host.step(pieces, numbers, step, scale, skip)
            elif self._fused and pieces[0].param.is_cuda:
                self._launches.step(pieces, numbers, step, scale, skip)
            elif skip is None or not skip.item():
                exact_steps(pieces, numbers, step, scale)
            for piece in pieces:
                piece.param.grad = None

    def grid_step(
        self, name: str, rows: GridWeight, grad: Tensor, how: GridStep
    ) -> StoreStatistics:
        """Take a Direct Quantized Training step of the owned rows of a grid weight.

        Args:
            name: The parameter.
            rows: Its owned rows; their codes are overwritten.
            grad: FP32, of as many elements.
            how: The step.

        Raises:
            DivergenceError: As :meth:`GridStep.move`.
        """
        if self._host is not None:
            return self._host.grid_step(name, rows, grad, how)
        return how.move(rows, grad, self._states[name], fused=self._fused)

    def layout(self, name: str) -> dict[str, StateKind]:
        """What is kept of a parameter, whether or not this rank owns a piece of it."""
        codec = codec_of(self._params[name], self._config)
        elements = {kind: StateKind(dtype) for kind, dtype in codec.element_dtypes.items()}
        groups = {
            kind: StateKind(dtype, GROUP, width)
            for kind, (dtype, width) in codec.group_dtypes.items()
        }
        return elements | groups

    def read(self, name: str, kind: str) -> Tensor:
        """State of a parameter's owned piece, the memory itself; empty if there is none."""
        if self._host is not None:
            self._host.settle()
        if name in self._states:
            return self._states[name][kind]
        device = self._params[name].device if self._host is None else torch.device("cpu")
        return torch.empty(0, dtype=self.layout(name)[kind].dtype, device=device)

    def tensors(self) -> Iterable[Tensor]:
        """All memory that the state takes."""
        return [tensor for state in self._states.values() for tensor in state.values()]


def bucket_kinds(states: PieceStates, params: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Kind of bucket of each parameter: ``grid``, or the type in which its weight is gathered."""
    return {
        name: "grid" if grid_of(param) is not None else str(states.weight_dtype(name))
        for name, param in params.items()
    }


def rows_of(count: int, kind: StateKind) -> int:
    """Rows of state that ``count`` elements have."""
    return -(-count // kind.group)


def whole_state(bucket: Bucket, name: str, kind: StateKind, mine: Tensor, group: Group) -> Tensor:
    """State of a whole parameter from the pieces that the ranks own, flat, on every rank.

    Args:
        bucket: Where the parameter lies.
        name: The parameter.
        kind: What is gathered.
        mine: This rank's rows, perhaps none.
        group: The ranks.

    Raises:
        CommunicationError: Another rank is gone.
    """
    counts = [
        sum(rows_of(piece.numel, kind) for piece in bucket.owned(rank) if piece.name == name)
        * kind.width
        for rank in range(group.size)
    ]
    sent = mine.reshape(-1).view(torch.uint8)
    sent = F.pad(sent, (0, max(counts) * kind.dtype.itemsize - sent.numel()))
    received = group.all_gather(sent[None], "optimizer state")
    parts = [row[: n * kind.dtype.itemsize] for row, n in zip(received, counts, strict=True)]
    return torch.cat(parts).view(kind.dtype)
