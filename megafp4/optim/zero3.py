"""ZeRO stage 3: weights, too, are cut over data parallelism; FSDP2 gathers a block when it runs.

Every rank keeps the rows of each parameter that FSDP2 gives it (:mod:`megafp4.parallel.fsdp`), with
their state, and steps them; nothing is published, because the next gather reads what was written.
Gradients are reduced after every micro-batch, on top of the FP32 sum so far. With an FP32 wire
losses, weights and states are those of a serial run bit for bit, as in stage 2 of
:mod:`megafp4.optim.zero`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import ConfigError
from megafp4.numerics.grid import GridWeight, StoreStatistics
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.grid_step import GridStep, check_stored, takes_kernel
from megafp4.optim.optimizer import grid_codec, grid_of, storage_bytes
from megafp4.optim.shard_states import OwnedRows, PieceStates, StateKind, whole_state
from megafp4.optim.sharded import ShardedOptimizer
from megafp4.optim.zero3_state import layout_of, saved_rows
from megafp4.optim.zero_grids import grid_rows
from megafp4.parallel.bucket import Bucket, Piece
from megafp4.parallel.collectives import Group
from megafp4.parallel.fsdp import ShardedModel, shard_model, share_of
from megafp4.parallel.reduce import Reducer


class Zero3Optimizer(ShardedOptimizer):
    """AdamW and Direct Quantized Training of a model that it cuts over data parallelism.

    Calls are those of :class:`~megafp4.optim.zero.ZeroOptimizer`: ``for each micro-batch:
    begin(last); loss.backward()``, then ``clip`` and ``step``. Every rank makes the same calls.

    Args:
        model: FP32 parameters or grid weights, the same on all ranks; FSDP2 cuts them in place.
        units: Modules of the model that are gathered one at a time: its blocks.
        config: Adam's constants, and how state is kept.
        seed: Seed of the stochastic rounding.
        group: The ranks of data parallelism, two or more.
        reducer: Sums gradients over the same ranks.
        fused: Move dense pieces by kernels if they are on a GPU.
        operands: Gather the weights of linears as the operands that the recipe makes of them, where
            that is exact and sends less.
        model_group: Ranks over which the model itself is cut: norms are taken over them too.
        elsewhere: Parameters that another rank of ``model_group`` counts in the norm.
        partial: Parameters whose gradients are still to be summed over another group, whose ranks
            have the same place in ``group``: those of norms under sequence parallelism.

    Raises:
        ConfigError: A dense parameter is not FP32, sizes do not fit, or ranks would cut a group of
            elements that share a scale.
        UnsupportedError: State is to lie in host memory, and there is not enough of it.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        config: OptimConfig,
        seed: int,
        group: Group,
        reducer: Reducer,
        *,
        fused: bool = False,
        operands: bool = True,
        model_group: Group | None = None,
        elsewhere: Collection[str] = (),
        partial: Mapping[str, Group] = MappingProxyType({}),
    ) -> None:
        self.config, self.seed, self.group, self.fused = config, seed, group, fused
        self.reducer = reducer
        self.grid_statistics: dict[str, StoreStatistics] = {}
        """Flips and saturation of each grid parameter in the last step."""
        self._model = Group("model") if model_group is None else model_group
        self._elsewhere = frozenset(elsewhere)
        self._partial = dict(partial)
        self._complete = False
        whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check_types(whole)
        self._states = PieceStates(whole, config, seed, fused)
        self._layouts = {name: layout_of(name, p.shape, group.size) for name, p in whole.items()}
        for layout in self._layouts.values():
            self._states.check_rows(layout)
        dtypes = {n: self._states.weight_dtype(n) for n, p in whole.items() if grid_of(p) is None}
        self.sharded = self._shard(model, units, whole, reducer, dtypes, operands)
        self._owned: dict[str, Piece] = {}
        for name, layout in self._layouts.items():
            for piece in layout.owned(group.rank):
                self._owned[name] = piece
        self._states.reserve(self._owned.values())
        for name, piece in self._owned.items():
            if name in self.sharded.grids:
                self._states.adopt_grid(piece)
            else:
                self._states.adopt(piece, self.sharded.local[name].view(-1))
        # From here on only shapes and grids are asked for: the whole weights go.
        for name, param in whole.items():
            if grid_of(param) is None:
                whole[name] = nn.Parameter(
                    torch.empty((), device=param.device).expand(param.shape), requires_grad=False
                )
        self.params = whole
        """Shapes of the parameters, and grids; no values."""

    def _shard(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        whole: Mapping[str, nn.Parameter],
        reducer: Reducer,
        dtypes: Mapping[str, torch.dtype],
        operands: bool,
    ) -> ShardedModel:
        grids = {}
        for name, param in whole.items():
            if (grid := grid_of(param)) is not None:
                share = share_of(param.shape, self.group.rank, self.group.size)
                grids[name] = grid_rows(grid, share.first, share.stop)
        return shard_model(model, units, self.group, reducer, dtypes, grids, operands=operands)

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`step` never waits for the device, given device tensors."""
        return self.fused and all(map(takes_kernel, self.sharded.grids.values()))

    def begin(self, last: bool) -> None:
        """Announce the backward pass of a micro-batch; each one is reduced, ``last`` or not."""
        del last
        self.sharded.begin()

    def norm(self) -> Tensor:
        """See :meth:`ShardedOptimizer.norm`."""
        grads = self._gradients()
        self._sum_partial(grads)
        counted = [grad for name, grad in grads.items() if name not in self._elsewhere]
        device = next(iter(self.params.values())).device
        square = torch.zeros(1, dtype=torch.float64, device=device)
        if counted:
            norms = torch.stack(list(torch._foreach_norm(counted, 2, dtype=torch.float64)))
            square += norms.square().sum()
        square = self.group.all_reduce(square, "gradient norm")
        return self._model.all_reduce(square, "gradient norm").sqrt().view(())

    def _sum_partial(self, grads: Mapping[str, Tensor]) -> None:
        """Complete the gradients that are partial, once a step."""
        if self._complete:
            return
        self._complete = True
        for group in {group.name: group for group in self._partial.values()}.values():
            # A rank may own no row of a parameter: its peers own none either.
            found = [
                grads[n] for n, g in self._partial.items() if g.name == group.name and n in grads
            ]
            if group.size == 1 or not found:
                continue
            total = group.all_reduce(torch.cat(found), "partial gradients")
            for grad, summed in zip(found, total.split([g.numel() for g in found]), strict=True):
                grad.copy_(summed)

    def _gradients(self) -> dict[str, Tensor]:
        """FP32 gradients of what this rank owns, flat."""
        found = {name: self.sharded.gradient(name) for name in self._owned}
        for name, grad in found.items():
            if grad is None:
                raise ConfigError(
                    f"{name!r} got no gradient in a step: use every parameter in the loss, or set "
                    "requires_grad to False"
                )
        return {name: grad for name, grad in found.items() if grad is not None}

    def step(
        self,
        step: int,
        lr: float,
        grad_scale: float | Tensor = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """Move what this rank owns, after :meth:`norm` or :meth:`clip`; arguments as Optimizer's.

        Raises:
            DivergenceError: ``grad_scale`` is not finite (nothing has moved then), or the new
                value of a grid parameter is not.
            CommunicationError: Another rank is gone.
        """
        scale = self._scale(step, grad_scale)
        skip = None if skip is None else skip.view(1)
        groups: dict[AdamHyper, dict[str, Tensor]] = {}
        moved: dict[str, StoreStatistics] = {}
        for name, grad in self._gradients().items():
            hyper = self._hyper(name, lr)
            if name in self.sharded.grids:
                how = GridStep(grid_codec(self.config), hyper, step, self.seed, scale, skip)
                moved[name] = self._states.grid_step(name, self.sharded.grids[name], grad, how)
            else:
                groups.setdefault(hyper, {})[name] = grad
        for hyper, grads in groups.items():
            self._states.step(grads, hyper, step, scale, skip)
        self.sharded.reshard()
        self.grid_statistics = self._statistics(moved)
        if not isinstance(grad_scale, Tensor):
            check_stored(self.grid_statistics)

    def _statistics(self, moved: Mapping[str, StoreStatistics]) -> dict[str, StoreStatistics]:
        """Add up what the ranks' steps did to each grid weight."""
        if not moved:
            return {}
        counts = torch.stack([one.counts() for one in moved.values()])
        total = self.group.all_reduce(counts, "grid statistics")
        return {
            name: StoreStatistics.of(total[i], self.params[name].numel())
            for i, name in enumerate(moved)
        }

    def zero_grad(self) -> None:
        """Drop every gradient."""
        self.sharded.clear()
        self._complete = False

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state by name, as it was before it was cut, on every rank.

        Every rank must call this.

        Raises:
            CommunicationError: Another rank is gone.
        """
        found: dict[str, Tensor] = {}
        for name, layout in self._layouts.items():
            shape = self.params[name].shape
            for key, tensor in self._kept(name).items():
                kind = StateKind(tensor.dtype, shape[1:].numel(), tensor.shape[1:].numel())
                whole = whole_state(layout, name, kind, tensor, self.group)
                found[key] = whole.view(-1, *tensor.shape[1:])
        return found

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take over whole weights, as :meth:`weights` or the state dict of an uncut model has them.

        Raises:
            CheckpointError: A name is missing or a shape or type is another; nothing has changed
                then.
        """
        pairs = [
            (tensor, saved_rows(state, key, tensor, self.sharded.shares[name]))
            for name in self.params
            for key, tensor in self._kept(name).items()
        ]
        for tensor, rows in pairs:
            tensor.copy_(rows)
        self.weights_loaded()

    def owned_weights(self) -> Iterator[OwnedRows]:
        """What :meth:`weights` gathers, with the memory of this rank's rows.

        Whoever writes there calls :meth:`weights_loaded` afterwards.
        """
        for name in self.params:
            share = self.sharded.shares[name]
            for key, rows in self._kept(name).items():
                shape = torch.Size((share.shape[0], *rows.shape[1:]))
                yield OwnedRows(key, shape, share.first, rows)

    def weights_loaded(self) -> None:
        """Gather the weights anew when they are needed: those of this rank were loaded."""
        self.sharded.reshard()

    def _kept(self, name: str) -> dict[str, Tensor]:
        """This rank's rows of what the uncut model's state dict has of a parameter."""
        if name not in self.sharded.grids:
            return {name: self.sharded.local[name]}
        grid: GridWeight = self.sharded.grids[name]
        return {f"{name}_codes": grid.codes, f"{name}_scale": grid.scale}

    def _layout(self, name: str) -> Bucket:
        return self._layouts[name]

    def _piece(self, name: str) -> Piece | None:
        return self._owned.get(name)

    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank keeps between steps, measured on storages."""
        return storage_bytes(t for name in self.params for t in self._kept(name).values())


def _check_types(params: Mapping[str, nn.Parameter]) -> None:
    for name, param in params.items():
        if grid_of(param) is None and param.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name!r} is {param.dtype}: give torch.float32 parameters, the "
                "optimizer makes those BF16 that are to be read in it"
            )
