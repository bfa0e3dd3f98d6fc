"""ZeRO stages 1 and 2: every rank owns, steps and publishes an equal part of every bucket.

::

    backward   hooks fill buckets; a full one is reduce-scattered while backward goes on
    clip       squares of the owned FP32 sums, one number reduced over the ranks
    step       owners move their pieces; weights are all-gathered as the model reads them

Weights live in flat buffers, so a gather writes them where the model reads them, and the gather of
one bucket runs during the step of the next or, where modules wait for their weights
(:attr:`ZeroOptimizer.arrivals`), during the next forward pass. Grid weights are owned by rows and
gathered as codes.

With an FP32 wire every number equals that of a serial run bit for bit, where the sum over
micro-batches does (:mod:`megafp4.parallel.gradients` says when) and the clipping factor, which is
taken from a sum of squares in another order (FP64) and rounded to FP32, is the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics.grid import StoreStatistics
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.arrivals import Arrivals
from megafp4.optim.optimizer import grid_of, storage_bytes
from megafp4.optim.shard_states import (
    OwnedState,
    PieceStates,
    StateKind,
    bucket_kinds,
    rows_of,
    whole_state,
)
from megafp4.optim.zero_amax import WeightAmax
from megafp4.optim.zero_grids import GridShards
from megafp4.parallel.bucket import BUCKET_ELEMENTS, Bucket, plan_buckets
from megafp4.parallel.collectives import Group
from megafp4.parallel.gradients import GradientBuckets, Stage
from megafp4.parallel.reduce import Reducer, gather_shards


class ZeroOptimizer:
    """AdamW and Direct Quantized Training with state sharded over data parallelism.

    One step is ``for each micro-batch: begin(last); loss.backward()``, then ``clip`` and ``step``.
    Every rank makes the same calls.

    Args:
        params: Trainable parameters by name, in order of use, FP32 or on a grid, the same on all
            ranks. Dense ones move into flat buffers.
        config: Adam's constants, and how state is kept: matrices become BF16 if it asks for that.
        seed: Seed of the stochastic rounding.
        group: The ranks of data parallelism.
        reducer: Sums gradients over the same ranks.
        stage: 1 reduces once a step, 2 after each micro-batch
            (:mod:`megafp4.parallel.gradients`).
        fused: Move dense pieces by kernels if they are on a GPU.
        bucket_elements: Elements of a bucket.
        model: Ranks over which the model itself is cut: norms are taken over them too.
        elsewhere: Parameters that another rank of ``model`` counts in the norm: this rank holds a
            replica, or a tied copy.
        partial: Parameters whose gradients are still to be summed over another group: those of
            norms under sequence parallelism, tied embeddings of a pipeline. The groups differ in
            name, and their ranks have the same place in ``group``.
        weight_amax: Keep :attr:`weight_amax`.
        tensor: Ranks of ``model`` that hold other parts of the same weights.

    Raises:
        ConfigError: A dense parameter is not FP32, or sizes do not fit.
        UnsupportedError: The codec cannot keep pieces of parameters.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: OptimConfig,
        seed: int,
        group: Group,
        reducer: Reducer,
        *,
        stage: Stage = 1,
        fused: bool = False,
        bucket_elements: int = BUCKET_ELEMENTS,
        model: Group | None = None,
        elsewhere: Collection[str] = (),
        partial: Mapping[str, Group] = MappingProxyType({}),
        weight_amax: bool = False,
        tensor: Group | None = None,
    ) -> None:
        self.params = dict(params)
        self.config, self.seed, self.group, self.fused = config, seed, group, fused
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """Flips and saturation of each grid parameter in the last step."""
        self._model = Group("model") if model is None else model
        self._elsewhere = frozenset(elsewhere)
        _check(self.params, partial)
        self._states = PieceStates(self.params, config, seed, fused)
        self.buckets = plan_buckets(
            {name: param.shape for name, param in self.params.items()},
            {
                name: f"{kind} summed over {partial[name].name}" if name in partial else kind
                for name, kind in bucket_kinds(self._states, self.params).items()
            },
            group.size,
            by_rows=["grid"],
            bucket_elements=bucket_elements,
        )
        self._owned = [bucket.owned(group.rank) for bucket in self.buckets]
        grids = {name: grid for name, param in self.params.items() if (grid := grid_of(param))}
        self._grids = GridShards(grids, [b for b in self.buckets if b.kind == "grid"], group)
        self._weights = [self._adopt(i) for i in range(len(self.buckets))]
        self.gradients = GradientBuckets(self.params, self.buckets, reducer, stage, partial)
        self.arrivals = Arrivals(self.buckets)
        """Weights that are being gathered. :meth:`step` waits for them unless modules do."""
        pieces = self._dense_pieces() if weight_amax else {}
        cut_over = Group("tp") if tensor is None else tensor
        self._amax = WeightAmax(pieces, group, cut_over, self.gradients.shards[0].device)

    @property
    def weight_amax(self) -> Mapping[str, Tensor]:
        """As :attr:`megafp4.optim.Optimizer.weight_amax`, of the whole of what is cut by tp."""
        return self._amax.by_name

    def _dense_pieces(self) -> dict[str, list[Tensor]]:
        """What this rank owns of each dense weight, where the model reads it."""
        found: dict[str, list[Tensor]] = {
            name: [] for name, param in self.params.items() if grid_of(param) is None
        }
        for flat, owned in zip(self._weights, self._owned, strict=True):
            for piece in owned if flat is not None else []:
                assert flat is not None
                found[piece.name].append(piece.of(self.group.own(flat)))
        return found

    def _adopt(self, index: int) -> Tensor | None:
        """Move a bucket's dense weights to a flat buffer and begin to keep what this rank owns.

        The buffer holds what the model reads; of a grid bucket there is none.
        """
        bucket, owned = self.buckets[index], self._owned[index]
        if bucket.kind == "grid":
            for piece in owned:
                self._states.adopt_grid(piece)
            return None
        first = self.params[bucket.names[0]]
        dtype = self._states.weight_dtype(bucket.names[0])
        flat = torch.zeros(bucket.numel, dtype=dtype, device=first.device)
        for piece in bucket.pieces:
            piece.of(flat).copy_(self.params[piece.name].detach().reshape(-1))
        mine = self.group.own(flat)
        for piece in owned:
            self._states.adopt(piece, piece.of(mine))
        for piece in bucket.pieces:
            param = self.params[piece.name]
            param.data = piece.of(flat).view(param.shape)
            if dtype != torch.float32:
                param.grad_dtype = torch.float32
        # An owner's codec may round otherwise than the copy above.
        gather_shards(self.group, flat, f"weights of {bucket.name}").wait()
        return flat

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`step` never waits for the device, given device tensors."""
        return self.fused and not any(grid_of(param) for param in self.params.values())

    def begin(self, last: bool) -> None:
        """Announce the backward pass of a micro-batch; ``last`` if it is the step's last one."""
        self.gradients.begin(last)

    def norm(self) -> Tensor:
        """Global L2 norm of the summed gradients, FP64 0-dim, the same on all ranks.

        Squares are summed in FP64. What is not finite on any rank is not finite here.

        Raises:
            ConfigError: A parameter got no gradient in this step.
            CommunicationError: Another rank is gone.
        """
        self.gradients.finish()
        counted = [
            piece.of(shard)
            for shard, owned in zip(self.gradients.shards, self._owned, strict=True)
            for piece in owned
            if piece.name not in self._elsewhere
        ]
        square = torch.zeros(1, dtype=torch.float64, device=self.gradients.shards[0].device)
        if counted:
            norms = torch.stack(list(torch._foreach_norm(counted, 2, dtype=torch.float64)))
            square += norms.square().sum()
        square = self.group.all_reduce(square, "gradient norm")
        return self._model.all_reduce(square, "gradient norm").sqrt().view(())

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

    def step(
        self,
        step: int,
        lr: float,
        grad_scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Move every parameter, after :meth:`norm` or :meth:`clip`; arguments as Optimizer's.

        Raises:
            DivergenceError: ``grad_scale`` is not finite (nothing has moved then), or the new
                value of a grid parameter is not.
            CommunicationError: Another rank is gone.
        """
        scale = self._scale(step, grad_scale)
        skip = None if skip is None else skip.view(1)
        grid_steps: dict[str, StoreStatistics] = {}
        self.arrivals.wait()
        # Forward reads the last bucket first.
        for index in reversed(range(len(self.buckets))):
            shard, weights = self.gradients.shards[index], self._weights[index]
            if weights is not None:
                self._step_dense(index, step, lr, scale, skip)
                what = f"weights of {self.buckets[index].name}"
                self.arrivals.start(index, gather_shards(self.group, weights, what))
                continue
            for piece in self._owned[index]:
                grad = piece.of(shard)
                grid_steps[piece.name] = self._grids.step(
                    piece.name,
                    grad if scale is None else grad * scale,
                    self._states.moments(piece.name),
                    self._hyper(piece.name, lr),
                    step,
                    self.seed,
                )
        self._grids.gather()
        self.grid_statistics = self._grids.statistics(grid_steps)
        self._amax.measure()
        if not self.arrivals.awaited_by_modules:
            self.arrivals.wait()
        self._mark_weights_written()

    def _step_dense(
        self, index: int, step: int, lr: float, scale: Tensor | None, skip: Tensor | None
    ) -> None:
        """Move what this rank owns of a bucket, pieces of equal decay in one call."""
        groups: dict[AdamHyper, dict[str, Tensor]] = {}
        for piece in self._owned[index]:
            group = groups.setdefault(self._hyper(piece.name, lr), {})
            group[piece.name] = piece.of(self.gradients.shards[index])
        for hyper, grads in groups.items():
            self._states.step(grads, hyper, step, scale, skip)

    def _scale(self, step: int, grad_scale: float | Tensor) -> Tensor | None:
        if isinstance(grad_scale, Tensor):
            return grad_scale.float().view(1)
        if not math.isfinite(grad_scale):
            raise DivergenceError(
                f"the gradients of step {step} hold NaN or Inf: lower the learning rate or go on "
                "from an earlier checkpoint"
            )
        if grad_scale == 1.0:
            return None
        return torch.full((1,), grad_scale, device=self.gradients.shards[0].device)

    def _mark_weights_written(self) -> None:
        """Tell operands made from weights that these changed, which a gather hides from them."""
        for param in self.params.values():
            if grid_of(param) is None:
                torch.autograd.graph.increment_version(param)

    def _hyper(self, name: str, lr: float) -> AdamHyper:
        return AdamHyper(lr, self.config.betas, self.config.eps, self.decay_of(self.params[name]))

    def decay_of(self, param: Tensor) -> float:
        """Weight decay of a parameter: the configured one for two or more dims, else 0."""
        return self.config.weight_decay if param.dim() >= 2 else 0.0

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self.gradients.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Whole state by kind and parameter, ``exp_avg.<parameter>`` say, on every rank.

        Shapes are the parameters' (or those of their scales), so any number of ranks, or one
        without ZeRO, can go on from it. Every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        return {
            f"{label}.{name}": whole_state(
                bucket, name, kind, self._states.read(name, label), self.group
            ).view(self.params[name].shape if kind.group == kind.width == 1 else (-1, kind.width))
            for label, bucket, name, kind in self._kinds()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned, perhaps for another number of ranks.

        Weights are the model's own to load, before this. Every rank must call it.

        Raises:
            CheckpointError: Names, sizes or types are not this optimizer's; nothing has changed
                then.
            CommunicationError: Another rank is gone.
        """
        expected = {f"{label}.{name}": (name, kind) for label, _, name, kind in self._kinds()}
        strange = sorted(expected.keys() ^ state.keys())
        if strange:
            where = "lacks" if strange[0] in expected else "has an unknown"
            raise CheckpointError(
                f"the saved optimizer {where} {strange[0]!r} ({len(strange)} names differ): load "
                "the optimizer of the same model and recipe"
            )
        for key, (name, kind) in expected.items():
            count = rows_of(self.params[name].numel(), kind) * kind.width
            if state[key].numel() != count or state[key].dtype != kind.dtype:
                raise CheckpointError(
                    f"{key!r} of the saved optimizer is {state[key].dtype} "
                    f"{list(state[key].shape)}, expected {kind.dtype} of {count} elements: load "
                    "the optimizer of the same model and recipe"
                )
        owned = {piece.name: piece for pieces in self._owned for piece in pieces}
        for label, _, name, kind in self._kinds():
            if name in owned:
                mine, piece = self._states.read(name, label), owned[name]
                rows = state[f"{label}.{name}"].reshape(-1, kind.width)
                part = rows[piece.start // kind.group : rows_of(piece.stop, kind)]
                mine.copy_(part.reshape(mine.shape))
        self._amax.measure()

    def _kinds(self) -> Iterator[tuple[str, Bucket, str, StateKind]]:
        """(label, bucket, parameter, kind) of all state, alike on all ranks."""
        homes = {name: bucket for bucket in self.buckets for name in bucket.names}
        for name in self.params:
            for label, kind in self._states.layout(name).items():
                yield label, homes[name], name, kind

    def owned_states(self) -> Iterator[OwnedState]:
        """All kinds of state of all parameters, with the memory of what this rank owns of them."""
        owned = {piece.name: piece for pieces in self._owned for piece in pieces}
        for label, _, name, kind in self._kinds():
            piece = owned.get(name)
            start, stop = (0, 0) if piece is None else (piece.start, piece.stop)
            memory = None if piece is None else self._states.read(name, label)
            yield OwnedState(name, label, kind, start, stop, memory)

    def weights_loaded(self) -> None:
        """Look at the weights again, which were loaded; every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        self._amax.measure()

    def state_bytes(self) -> int:
        """Bytes of this rank's state, measured on storages."""
        return storage_bytes(self._states.tensors())


def _check(params: Mapping[str, nn.Parameter], partial: Mapping[str, Group]) -> None:
    strange = sorted(partial.keys() - params.keys())
    if strange:
        raise ConfigError(
            f"the gradient of {strange[0]!r} is to be summed over group "
            f"{partial[strange[0]].name!r}, and there is no such parameter: name those of this rank"
        )
    for name, param in params.items():
        if grid_of(param) is None and param.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name!r} is {param.dtype}: give torch.float32 parameters, the "
                "optimizer makes those BF16 that are to be read in it"
            )
