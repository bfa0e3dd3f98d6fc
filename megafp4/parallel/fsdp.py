"""ZeRO-3 through FSDP2: parameters cut over the ranks, whole only while a block runs.

``torch.distributed.fsdp`` gathers each block before forward and before backward, frees it
afterwards and hands gradients over; what travels is decided here:

* gradients go through a :class:`~megafp4.parallel.reduce.Reducer` (FP8 on the wire, say) and are
  added to an FP32 shard that stays, micro-batch after micro-batch and rank after rank: the order of
  a serial accumulation if micro-batch i of rank r is number ``i * ranks + r``;
* weights come in the form that the layers multiply (:mod:`megafp4.parallel.fsdp_weights`).

What FSDP2 does not see are operands that layers keep of a weight: they go when the weight goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.numerics.grid import GridWeight
from megafp4.parallel.blocks import GRANULE
from megafp4.parallel.collectives import Group
from megafp4.parallel.fsdp_operands import AsOperands, GatheredOperands, travels_as_operands
from megafp4.parallel.fsdp_weights import AsKept, Form, OnGrid, StoredRows
from megafp4.parallel.reduce import Reducer, gather_shards


@dataclass(frozen=True)
class Share:
    """The rows of a parameter that one rank keeps."""

    first: int
    """First row."""
    stop: int
    """Behind the last row."""
    every: int
    """Rows of each rank but the last ones, which may have fewer."""
    shape: torch.Size
    """Of the whole parameter."""

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[1:].numel()

    @property
    def numel(self) -> int:
        """Elements of this rank."""
        return (self.stop - self.first) * self.width


def share_of(shape: torch.Size, rank: int, ranks: int) -> Share:
    """Which rows FSDP2 gives to a rank: equal runs, of which the last may be short or empty."""
    every = -(-shape[0] // ranks)
    first = min(rank * every, shape[0])
    return Share(first, min(first + every, shape[0]), every, shape)


@dataclass
class ShardedModel:
    """A model that FSDP2 has cut, and what this rank keeps of it."""

    model: nn.Module
    group: Group
    shares: dict[str, Share]
    """By parameter."""
    local: dict[str, Tensor]
    """This rank's rows where they are kept: FP32 or BF16; not those of grid weights."""
    grids: dict[str, GridWeight]
    """This rank's rows of grid weights."""
    units: list[Unit] = field(default_factory=list)
    gradients: list[Reduction] = field(default_factory=list)
    """Of the units."""
    _params: dict[str, nn.Parameter] = field(default_factory=dict)

    def begin(self) -> None:
        """Announce the backward pass of a micro-batch: what FSDP2 hands over is the sum so far."""
        for param in self._params.values():
            param.grad = None

    def gradient(self, name: str) -> Tensor | None:
        """FP32 sum of this rank's rows, flat; None if there was no gradient."""
        grad: Any = self._params[name].grad
        if grad is None:
            return None
        with torch.no_grad():
            return grad.to_local().reshape(-1)

    def clear(self) -> None:
        """Forget the step's gradients."""
        self.begin()
        for one in self.gradients:
            one.summed = False

    def reshard(self) -> None:
        """Free whole weights, so that they are gathered anew."""
        for unit in self.units:
            unit.reshard()


class Unit:
    """A module whose parameters are gathered together.

    Args:
        module: Cut by FSDP2.
        forms: How its weights travel that FSDP2 would gather otherwise.
    """

    def __init__(self, module: FSDPModule, forms: Sequence[Form]) -> None:
        self.module, self.forms = module, forms

    def prepare(self, module: nn.Module, _: Any) -> None:
        """Before forward: get gathered parameters ready for autograd."""
        for form in self.forms:
            form.hollow()
        for param in module.parameters():
            if param.dtype != torch.float32 and param.grad_dtype != torch.float32:
                param.grad_dtype = torch.float32

    def leave(self, *_: Any) -> None:
        """After forward: drop operands, unless backward is computing it again."""
        if torch._C._current_graph_task_id() == -1:
            self.forget()

    def forget(self) -> None:
        """Drop what layers keep of gathered weights."""
        for form in self.forms:
            form.release()
        assert isinstance(self.module, nn.Module)
        for module in self.module.modules():
            if isinstance(module, Linear):
                module.op.forget_weights()

    def reshard(self) -> None:
        """Free whole weights, so that they are gathered anew."""
        self.module.reshard()
        self.forget()


class Reduction:
    """How FSDP2 sums the gradients of one unit; it calls this as its reduce-scatter.

    Args:
        reducer: Sums over the ranks.
        what: What is summed, for the ledger and errors.
        count: Elements of a rank's shard.
        unit: Whose gradients they are.
    """

    def __init__(self, reducer: Reducer, what: str, count: int, unit: Unit) -> None:
        self.reducer, self.what, self.count = reducer, what, count
        self._unit = unit
        self.summed = False
        """Whether the step's sum has begun."""
        self._shard: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for all gradients, or the shard, which holds the sum so far.

        Raises:
            ConfigError: A parameter got no gradient.
        """
        count = math.prod(size)
        if count not in (self.count, self.count * self.reducer.size):
            raise ConfigError(
                f"some parameters got no gradient in the {self.what}: use every parameter in the "
                "loss, or set requires_grad to False"
            )
        if count != self.count:
            return torch.empty(count, dtype=dtype, device=device)
        if self._shard is None:
            self._shard = torch.zeros(-(-count // GRANULE) * GRANULE, device=device)
        return self._shard[:count]

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Add the ranks' gradients to this rank's shard; the sum is not divided."""
        del output_tensor, group, op, async_op
        self._unit.forget()
        assert self._shard is not None, "the shard is allocated before it is summed to"
        missing = len(self._shard) - self.count
        if missing:
            rows = input_tensor.view(self.reducer.size, -1)
            input_tensor = F.pad(rows, (0, missing)).view(-1)
        self.reducer.reduce_scatter(input_tensor, self._shard, self.what, accumulate=self.summed)
        self.summed = True


class _Gathering:
    """How FSDP2 gathers the weights of one unit: recorded, and failing in words."""

    def __init__(self, group: Group, what: str) -> None:
        self.group, self.what = group, what

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        del input_tensor, group  # this rank's part of the output, and the same ranks
        assert not async_op, "streams order what FSDP2 does here"
        gather_shards(self.group, output_tensor, self.what).wait()


def shard_model(
    model: nn.Module,
    units: Sequence[nn.Module],
    group: Group,
    reducer: Reducer,
    dtypes: Mapping[str, torch.dtype],
    grids: Mapping[str, GridWeight],
    *,
    operands: bool = True,
) -> ShardedModel:
    """Cut a model's parameters over the ranks of data parallelism.

    Args:
        model: FP32 parameters or grid weights, the same on all ranks; changed in place.
        units: Modules that are gathered one at a time, the blocks; what is in none of them is
            gathered for the whole of forward and backward.
        group: The ranks.
        reducer: Sums gradients over the same ranks.
        dtypes: Type in which each dense parameter is kept.
        grids: This rank's rows of each grid weight; their codes move to the shards' memory.
        operands: Let the weights of linears travel as the operands that the recipe makes of them,
            where that is exact and sends less.

    Raises:
        ConfigError: There is one rank, the reducer has another number of ranks, or a grid weight
            has rows that the ranks do not divide.
    """
    if group.size < 2 or reducer.size != group.size or group.handle is None:
        raise ConfigError(
            f"parameters were to be cut over {group.size} ranks and gradients reduced over "
            f"{reducer.size}: give the same two or more ranks, or set parallel.zero to 1"
        )
    whole = {name: param for name, param in model.named_parameters() if param.requires_grad}
    shares = {name: share_of(p.shape, group.rank, group.size) for name, p in whole.items()}
    sharded = ShardedModel(model, group, shares, {}, dict(grids))
    forms: dict[str, Form] = {}
    for name, param in whole.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        form = _form(sharded, name, module if leaf == "weight" else None, dtypes, operands)
        if form is not None:
            forms[name] = form
            stored = _stored(module, param, form, dtypes.get(name, torch.float32))
            new = nn.Parameter(StoredRows(stored, param.shape[-1], form))
            for owner in model.modules():
                for key, value in owner._parameters.items():
                    if value is param:
                        owner._parameters[key] = new
    _apply(sharded, units, reducer, forms)
    sharded._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        dtensors: dict[str, Any] = dict(sharded._params)
        for name, param in dtensors.items():
            local = param.to_local()
            kept = local.stored if isinstance(local, StoredRows) else local
            if name in sharded.grids:
                _keep_grid(model.get_submodule(name.rpartition(".")[0]), grids[name], kept)
            else:
                sharded.local[name] = kept
    return sharded


def _form(
    sharded: ShardedModel,
    name: str,
    module: nn.Module | None,
    dtypes: Mapping[str, torch.dtype],
    operands: bool,
) -> Form | None:
    """How a parameter travels; None for FSDP2's own way."""
    share, group = sharded.shares[name], sharded.group
    if isinstance(module, Linear) and module.grid is not None:
        if share.shape[0] % group.size:
            raise ConfigError(
                f"{name!r} has {share.shape[0]} rows on a grid, which {group.size} ranks do not "
                "divide: choose another number of ranks, or parallel.zero 1"
            )
        return OnGrid(module.grid, sharded.grids[name])
    kept = dtypes[name]
    even = share.shape[0] % group.size == 0
    if (
        isinstance(module, Linear)
        and operands
        and even
        and travels_as_operands(module.op, share.every, kept)
    ):
        cache = GatheredOperands()
        module.op.use_cache(cache)
        return AsOperands(share.shape, module, cache, group, share.first)
    return AsKept(share.shape, share.every) if kept != torch.float32 else None


def _stored(module: nn.Module, param: nn.Parameter, form: Form, dtype: torch.dtype) -> Tensor:
    """What all ranks together keep of a parameter."""
    if isinstance(form, OnGrid):
        assert isinstance(module, Linear)
        return form.grid.codes
    return param.detach().to(dtype)


def _keep_grid(module: nn.Module, own: GridWeight, codes: Tensor) -> None:
    """Let a grid weight be this rank's rows while it is not gathered."""
    assert isinstance(module, Linear)
    assert module.grid is not None
    own.codes, own.scale = codes, own.scale.clone()
    module.grid.codes, module.grid.scale = own.codes, own.scale
    module.weight_codes, module.weight_scale = own.codes, own.scale


def _apply(
    sharded: ShardedModel,
    units: Sequence[nn.Module],
    reducer: Reducer,
    forms: Mapping[str, Form],
) -> None:
    """Let FSDP2 cut the units and the rest, and give it its communication."""
    group, model = sharded.group, sharded.model
    assert group.handle is not None
    device = next(model.parameters()).device.type
    mesh = DeviceMesh.from_group(group.handle, device, mesh_dim_names=("replicas",))
    names = {id(param): name for name, param in model.named_parameters() if param.requires_grad}
    frozen = {param for param in model.parameters() if not param.requires_grad}
    members: list[list[str]] = []
    for module in [*units, model]:
        members.append([names.pop(id(p)) for p in module.parameters() if id(p) in names])
    for index, (module, found) in enumerate(zip([*units, model], members, strict=True)):
        count = sum(sharded.shares[one].every * sharded.shares[one].width for one in found)
        name = "the rest" if module is model else f"unit {index}"
        fully_shard(
            module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=frozen
        )
        assert isinstance(module, FSDPModule)
        unit = Unit(module, [forms[one] for one in found if one in forms])
        reduction = Reduction(reducer, f"gradients of {name}", count, unit)
        sharded.units.append(unit)
        sharded.gradients.append(reduction)
        module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]  # by its calls
        module.set_custom_all_gather(_Gathering(group, f"weights of {name}"))  # type: ignore[arg-type]
        module.register_forward_pre_hook(unit.prepare)
        if module is not model:
            module.register_forward_hook(unit.leave)
