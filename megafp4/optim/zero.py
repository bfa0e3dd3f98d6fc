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

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError
from megafp4.numerics.grid import StoreStatistics
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.arrivals import Arrivals
from megafp4.optim.grid_step import GridStep, check_stored
from megafp4.optim.optimizer import grid_codec, grid_of, kernels_take
from megafp4.optim.shard_states import (
    PieceStates,
    bucket_kinds,
)
from megafp4.optim.sharded import ShardedOptimizer
from megafp4.optim.zero_amax import WeightAmax
from megafp4.optim.zero_grids import GridShards
from megafp4.parallel.bucket import BUCKET_ELEMENTS, Bucket, Piece, plan_buckets
from megafp4.parallel.collectives import Group
from megafp4.parallel.gradients import GradientBuckets, Stage
from megafp4.parallel.reduce import Reducer, gather_shards


class ZeroOptimizer(ShardedOptimizer):
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
        names: Parameters of the whole model in its order, if other ranks of ``model`` hold others
            of them: random bits are then those of a rank that holds all.
        places: Where random bits of a parameter are counted from, a multiple of 128, if ranks of
            ``model`` hold other parts of it.

    Raises:
        ConfigError: A dense parameter is not FP32, sizes do not fit, or ranks would cut a group of
            elements that share a scale.
        UnsupportedError: State is to lie in host memory, and there is not enough of it.
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
        names: Sequence[str] | None = None,
        places: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.params = dict(params)
        self.config, self.seed, self.group, self.fused = config, seed, group, fused
        self.reducer = reducer
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """Flips and saturation of each grid parameter in the last step."""
        self._model = Group("model") if model is None else model
        self._elsewhere = frozenset(elsewhere)
        _check(self.params, partial)
        self._states = PieceStates(self.params, config, seed, fused, names, places)
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
        self._homes = {name: bucket for bucket in self.buckets for name in bucket.names}
        self._owned = [bucket.owned(group.rank) for bucket in self.buckets]
        self._pieces = {piece.name: piece for owned in self._owned for piece in owned}
        self._states.reserve(self._pieces.values())
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
            self._states.check_rows(bucket)
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
        return self.fused and kernels_take(self.params.values())

    def begin(self, last: bool) -> None:
        """Announce the backward pass of a micro-batch; ``last`` if it is the step's last one."""
        self.gradients.begin(last)

    def norm(self) -> Tensor:
        """See :meth:`ShardedOptimizer.norm`."""
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
                hyper, rows = self._hyper(piece.name, lr), self._grids.pieces[piece.name]
                how = GridStep(grid_codec(self.config), hyper, step, self.seed, scale, skip)
                grid_steps[piece.name] = self._states.grid_step(
                    piece.name, rows, piece.of(shard), how
                )
        self._grids.gather()
        self.grid_statistics = self._grids.statistics(grid_steps)
        if not isinstance(grad_scale, Tensor):
            check_stored(self.grid_statistics)
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

    def _mark_weights_written(self) -> None:
        """Tell operands made from weights that these changed, which a gather hides from them."""
        for param in self.params.values():
            if grid_of(param) is None:
                torch.autograd.graph.increment_version(param)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self.gradients.clear()

    def _layout(self, name: str) -> Bucket:
        return self._homes[name]

    def _piece(self, name: str) -> Piece | None:
        return self._pieces.get(name)

    def weights_loaded(self) -> None:
        """Look at the weights again, which were loaded; every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        self._amax.measure()


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
