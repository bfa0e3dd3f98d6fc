"""What the ZeRO optimizers have in common: clipping, constants of a step, whole state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.optimizer import check_kept_as, storage_bytes
from megafp4.optim.shard_states import OwnedState, PieceStates, StateKind, rows_of, whole_state
from megafp4.parallel.bucket import Bucket, Piece
from megafp4.parallel.collectives import Group
from megafp4.parallel.reduce import Reducer


class ShardedOptimizer(ABC):
    """AdamW and Direct Quantized Training of pieces of parameters that the ranks own."""

    params: Mapping[str, nn.Parameter]
    """All parameters by name, alike on all ranks."""
    config: OptimConfig
    group: Group
    """The owners."""
    reducer: Reducer
    """Sums gradients over them."""
    _states: PieceStates

    @abstractmethod
    def norm(self) -> Tensor:
        """Global L2 norm of the summed gradients, FP64 0-dim, the same on all ranks.

        Squares are summed in FP64. What is not finite on any rank is not finite here.

        Raises:
            ConfigError: A parameter got no gradient in this step.
            CommunicationError: Another rank is gone.
        """

    @abstractmethod
    def _layout(self, name: str) -> Bucket:
        """Where the ranks' pieces of a parameter lie."""

    @abstractmethod
    def _piece(self, name: str) -> Piece | None:
        """What this rank owns of a parameter."""

    def clip(self, max_norm: float) -> tuple[float, float]:
        """Measure the norm and the factor that clips it, as :func:`megafp4.optim.clip_grad_norm`.

        Raises:
            ConfigError: ``max_norm`` is negative or NaN, or as :meth:`norm`.
            CommunicationError: Another rank is gone.
        """
        norm, scale = self.clip_on_device(max_norm)
        return float(norm), float(scale)

    def clip_on_device(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """As :func:`megafp4.optim.clip_grad_norm_on_device`: FP64, 0-dim; NaN if not finite.

        Raises:
            ConfigError: As :meth:`clip`.
            CommunicationError: Another rank is gone.
        """
        if not max_norm >= 0:
            raise ConfigError(f"optim.clip_grad is {max_norm}: give 0 (off) or a positive norm")
        norm = self.norm()
        limited = max_norm / norm.clamp(min=max_norm) if max_norm else torch.ones_like(norm)
        return norm, torch.where(norm.isfinite(), limited, math.nan)

    def decay_of(self, param: Tensor) -> float:
        """Weight decay of a parameter: the configured one for two or more dims, else 0."""
        return self.config.weight_decay if param.dim() >= 2 else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Whole state by kind and parameter, ``exp_avg.<parameter>`` say, on every rank.

        Shapes are the parameters' (or those of their scales), so any number of ranks, or one
        without ZeRO, can go on from it. Every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        found = {}
        for label, name, kind in self._kinds():
            param, mine = self.params[name], self._states.read(name, label)
            # Ranks send from the device; what lies in host memory goes back there.
            sent = mine.to(param.device)
            whole = whole_state(self._layout(name), name, kind, sent, self.group).to(mine.device)
            shape = param.shape if kind.group == kind.width == 1 else (-1, kind.width)
            found[f"{label}.{name}"] = whole.view(shape)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned, perhaps for another number of ranks.

        Weights are the model's own to load, before this. Every rank must call it.

        Raises:
            CheckpointError: Names, sizes or types are not this optimizer's; nothing has changed
                then.
            CommunicationError: Another rank is gone.
        """
        self._check_saved(state)
        for owned in self.owned_states():
            if owned.memory is not None:
                kind = owned.kind
                rows = state[f"{owned.label}.{owned.name}"].reshape(-1, kind.width)
                part = rows[owned.start // kind.group : rows_of(owned.stop, kind)]
                owned.memory.copy_(part.reshape(owned.memory.shape))
        self.weights_loaded()

    def owned_states(self) -> Iterator[OwnedState]:
        """All kinds of state of all parameters, with the memory of what this rank owns of them."""
        for label, name, kind in self._kinds():
            piece = self._piece(name)
            start, stop = (0, 0) if piece is None else (piece.start, piece.stop)
            memory = None if piece is None else self._states.read(name, label)
            yield OwnedState(name, label, self.params[name].shape, kind, start, stop, memory)

    def weights_loaded(self) -> None:
        """Look at the weights again, which were loaded; every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        return

    def state_bytes(self) -> int:
        """Bytes of this rank's state, measured on storages."""
        return storage_bytes(self._states.tensors())

    def _check_saved(self, state: Mapping[str, Tensor]) -> None:
        dtypes = {key: tensor.dtype for key, tensor in state.items()}
        check_kept_as(self.params, self.config, dtypes)
        expected = {f"{label}.{name}": (name, kind) for label, name, kind in self._kinds()}
        strange = sorted(expected.keys() ^ state.keys())
        if strange:
            where = "lacks" if strange[0] in expected else "has an unknown"
            raise CheckpointError(
                f"the saved optimizer {where} {strange[0]!r} ({len(strange)} names differ): load "
                "the optimizer of the same model and recipe"
            )
        for key, (name, kind) in expected.items():
            count, found = rows_of(self.params[name].numel(), kind) * kind.width, state[key]
            if found.numel() != count or found.dtype != kind.dtype:
                raise CheckpointError(
                    f"{key!r} of the saved optimizer is {found.dtype} {list(found.shape)}, "
                    f"expected {kind.dtype} of {count} elements: load the optimizer of the same "
                    "model and recipe"
                )

    def _kinds(self) -> Iterator[tuple[str, str, StateKind]]:
        """(label, parameter, kind) of all state, alike on all ranks."""
        for name in self.params:
            for label, kind in self._states.layout(name).items():
                yield label, name, kind

    def _hyper(self, name: str, lr: float) -> AdamHyper:
        return AdamHyper(lr, self.config.betas, self.config.eps, self.decay_of(self.params[name]))

    def _scale(self, step: int, grad_scale: float | Tensor) -> Tensor | None:
        """FP32 [1] on the device that multiplies every gradient; None for 1.

        Raises:
            DivergenceError: It is not finite.
        """
        if isinstance(grad_scale, Tensor):
            return grad_scale.float().view(1)
        if not math.isfinite(grad_scale):
            raise DivergenceError(
                f"the gradients of step {step} hold NaN or Inf: lower the learning rate or go on "
                "from an earlier checkpoint"
            )
        if grad_scale == 1.0:
            return None
        return torch.full((1,), grad_scale, device=next(iter(self.params.values())).device)
