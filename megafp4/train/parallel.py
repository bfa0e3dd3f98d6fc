"""What a run on several ranks does besides: its mesh, its optimizer, and what ranks agree on.

With one rank every group has one member, and nothing here sends anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megafp4.backends import Backend
from megafp4.config import ParallelConfig, RunConfig
from megafp4.errors import ConfigError, MegaFP4Error, UnsupportedError
from megafp4.models import QuantizedFactory
from megafp4.models.decoder import Decoder
from megafp4.optim.deepspeed import DeepSpeedOptimizer
from megafp4.optim.zero import ZeroOptimizer
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.factory import ParallelFactory
from megafp4.parallel.mesh import Mesh, MeshSizes, check_model
from megafp4.parallel.pipeline import Pipeline, check_schedule
from megafp4.parallel.reduce import FlatReducer, NodeReducer, Reducer
from megafp4.parallel.sequence import partial_parameters
from megafp4.parallel.shared_scale import SharedScaleReducer
from megafp4.parallel.stages import Stages, plan_stages
from megafp4.parallel.weights import layouts
from megafp4.precision import Precision
from megafp4.recipes import PrecisionSchedule, Recipe
from megafp4.train.streams import parameter_names, place_of

Result = TypeVar("Result")
Sharded: TypeAlias = ZeroOptimizer | Zero3Optimizer | DeepSpeedOptimizer
"""What steps the weights where several ranks share the work."""

TIED = "embedding.weight"
"""Parameter that the first and the last stage of a pipeline both hold if the model ties it."""


def mesh_sizes(config: ParallelConfig, world_size: int) -> MeshSizes:
    """The mesh that a configuration asks for; dp takes the ranks that are left.

    Raises:
        ConfigError: The sizes do not divide the number of ranks.
    """
    axes = {"pp": config.pp, "cp": config.cp, "tp": config.tp}
    sizes = MeshSizes(**axes, sequence=config.sequence, nodes=config.nodes)
    return sizes.fill(world_size)


def check_mesh(config: RunConfig, schedule: PrecisionSchedule, world_size: int) -> None:
    """Refuse a mesh that ranks, model, recipe or batch cannot share, before anything is built.

    Raises:
        ConfigError: One sentence: which size, what it must divide, what to change.
        UnsupportedError: What several ranks do not do.
    """
    sizes = mesh_sizes(config.parallel, world_size)
    for _, recipe in schedule.stages:
        check_model(sizes, config.model, recipe, config.exempt)
    _check_engine(config.parallel, world_size)
    if sizes.nodes > 1:
        _check_nodes(config.parallel, sizes)
    train = config.train
    if config.optim.grad_dtype == "bfloat16" and train.micro_batches * world_size > 1:
        raise UnsupportedError(
            f"optim.grad_dtype bfloat16 would add up {train.micro_batches} micro-batches on "
            f"{world_size} ranks in BF16, where small gradients are lost: take one micro-batch a "
            "step on one rank, or set it to float32"
        )
    if world_size == 1:
        return
    if train.micro_batches % sizes.dp:
        raise ConfigError(
            f"train.global_batch {train.global_batch} is {train.micro_batches} micro-batches of "
            f"{train.micro_batch}, which dp {sizes.dp} does not divide: choose a global batch that "
            f"is a multiple of {sizes.dp * train.micro_batch}, or a smaller micro-batch"
        )
    if config.model.dropout:
        raise UnsupportedError(
            f"model.dropout {config.model.dropout} on {world_size} ranks would drop other elements "
            "than one rank does: set model.dropout to 0"
        )
    if train.cuda_graph:
        _check_graph(config.parallel, sizes, train.micro_batches // sizes.dp)
    if train.memory_report and sizes.pp * sizes.cp > 1:
        raise UnsupportedError(
            f"train.memory_report runs the model by itself, which {sizes} does not do: switch it "
            "off, or measure without pp and cp"
        )
    if sizes.pp > 1:
        each = train.micro_batches // sizes.dp
        check_schedule(config.parallel.schedule, stages_of(config), each)
    if config.parallel.engine == "deepspeed":
        _check_deepspeed(config, sizes)
    elif config.parallel.zero == 3:
        _check_zero3(sizes, schedule)


def stages_of(config: RunConfig) -> Stages:
    """How a run's pipeline cuts the blocks.

    Raises:
        ConfigError: The numbers do not fit.
    """
    parallel = config.parallel
    return plan_stages(config.model.layers, parallel.pp, parallel.chunks, parallel.layers)


def _check_engine(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse what would be passed over in silence."""
    if world_size == 1 and (parallel.zero != 1 or parallel.engine != "megafp4"):
        raise ConfigError(
            f"parallel.zero {parallel.zero} with parallel.engine {parallel.engine} is for several "
            "ranks and the job has one: start it with torchrun or srun, or leave them out"
        )


def _check_nodes(parallel: ParallelConfig, sizes: MeshSizes) -> None:
    sizes.node_groups()
    if parallel.engine != "megafp4" or parallel.wire not in ("fp8", "bf16", "fp32"):
        raise UnsupportedError(
            f"parallel.nodes {sizes.nodes} sums in two stages, which wire {parallel.wire} of "
            f"engine {parallel.engine} does not: choose engine megafp4 and wire fp8, bf16 or "
            "fp32, or one node"
        )


def _check_graph(parallel: ParallelConfig, sizes: MeshSizes, micro_batches: int) -> None:
    """Refuse what a CUDA graph of one rank's forward and backward passes cannot hold."""
    why = ""
    if sizes.pp * sizes.cp > 1:
        why = f"a rank whose part of a micro-batch is another each time, and the mesh is {sizes}"
    elif parallel.engine != "megafp4" or parallel.zero == 3:
        why = f"weights that come and go (zero {parallel.zero}, engine {parallel.engine})"
    elif parallel.zero == 2 and micro_batches > 1:
        why = f"zero 2 with {micro_batches} micro-batches a step, each of which is reduced"
    elif sizes.dp > 1 and parallel.wire in ("fp8-peers", "fp8-lm"):
        why = f"wire {parallel.wire}, which keeps count of its calls"
    if why:
        raise UnsupportedError(
            f"train.cuda_graph cannot record {why}: leave it off, or choose a mesh of dp and tp "
            "with zero 1 and wire fp8, bf16 or fp32"
        )


def _check_deepspeed(config: RunConfig, sizes: MeshSizes) -> None:
    if sizes.pp * sizes.cp * sizes.tp > 1:
        raise UnsupportedError(
            f"parallel.engine deepspeed shares a model by dp alone and the mesh is {sizes}: set "
            "tp, pp and cp to 1, or choose engine megafp4"
        )
    if config.parallel.wire != "fp32":
        raise ConfigError(
            f"parallel.wire {config.parallel.wire} is not DeepSpeed's, which sums FP32 gradients: "
            "set parallel.wire to fp32, or choose engine megafp4"
        )
    if config.train.spike_factor:
        raise UnsupportedError(
            f"train.spike_factor {config.train.spike_factor} skips updates, which parallel.engine "
            "deepspeed does not: set train.spike_factor to 0"
        )


def _check_zero3(sizes: MeshSizes, schedule: PrecisionSchedule) -> None:
    if sizes.pp * sizes.tp > 1 or sizes.dp * sizes.cp == 1:
        raise UnsupportedError(
            f"parallel.zero 3 cuts the weights over dp x cp alone and the mesh is {sizes}: choose "
            "zero 1 or 2, or a mesh without pp and tp and with more than one replica"
        )
    if len(schedule.stages) > 1:
        raise UnsupportedError(
            "parallel.zero 3 gathers weights as one recipe's operands and the run has a "
            "precision_schedule: choose zero 1 or 2, or one recipe"
        )


def make_factory(
    config: RunConfig,
    recipe: Recipe,
    backend: Backend,
    precision: Precision,
    tp: Group | None = None,
) -> QuantizedFactory:
    """What makes the layers of a run, or this rank's share of them."""
    layers, exempt, saved_as = config.model.layers, config.exempt, config.saved_as
    if tp is None or tp.size == 1:
        return QuantizedFactory(recipe, backend, precision, layers, exempt, saved_as)
    sequence = config.parallel.sequence
    return ParallelFactory(
        recipe, backend, precision, layers, tp, exempt, saved_as, sequence=sequence
    )


def make_optimizer(
    model: Decoder,
    config: RunConfig,
    mesh: Mesh,
    tied: Group | None,
    *,
    fused: bool,
    weight_amax: bool,
) -> Sharded:
    """Build the optimizer of a run on several ranks.

    Args:
        model: This rank's part of the model; ZeRO 3 cuts it in place.
        config: The run.
        mesh: The ranks.
        tied: First and last stage of a pipeline, where both hold the embedding.
        fused: Move dense parameters by kernels if they are on a GPU.
        weight_amax: Keep :attr:`ZeroOptimizer.weight_amax`.

    Raises:
        ConfigError: A dense parameter is not FP32, or sizes do not fit.
        UnsupportedError: A package is missing, or host memory for the states.
    """
    parallel, optim, seed = config.parallel, config.optim, config.train.seed
    if parallel.engine == "deepspeed":
        each, micro_batch = config.train.micro_batches // mesh.dp.size, config.train.micro_batch
        return DeepSpeedOptimizer(model, optim, each, micro_batch, parallel.zero)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    cut = layouts(model)
    # What is not cut is the same on all tp ranks, and the first one counts it.
    elsewhere = {name for name in params if name not in cut} if mesh.tp.rank else set()
    partial = dict.fromkeys(partial_parameters(model), mesh.tp)
    if tied is not None:
        partial[TIED] = tied
        elsewhere |= {TIED} if tied.rank else set()
    reducer = _reducer(parallel, mesh)
    if parallel.zero == 3:
        units = list(model.blocks)
        return Zero3Optimizer(
            model,
            units,
            optim,
            seed,
            mesh.replicas,
            reducer,
            fused=fused,
            model_group=mesh.model,
            elsewhere=elsewhere,
            partial=partial,
        )
    optimizer = ZeroOptimizer(
        params,
        optim,
        seed,
        mesh.replicas,
        reducer,
        stage=parallel.zero,
        fused=fused,
        model=mesh.model,
        elsewhere=elsewhere,
        partial=partial,
        weight_amax=weight_amax,
        tensor=mesh.tp,
        names=parameter_names(config.model),
        places={name: place_of(params[name], cut[name].rank) for name in params if name in cut},
    )
    ties = config.model.ties_embeddings and TIED in params
    optimizer.arrivals.await_in(model, {"head": [TIED]} if ties else {})
    return optimizer


def _reducer(parallel: ParallelConfig, mesh: Mesh) -> Reducer:
    group = mesh.replicas
    if parallel.wire == "fp8-lm":
        return SharedScaleReducer(group)
    if parallel.wire == "fp8-peers":
        from megafp4.parallel.peers import PeerReducer  # symmetric memory takes time to import

        return PeerReducer(group)
    if mesh.nodes is not None:
        return NodeReducer(*mesh.nodes, parallel.wire)
    return FlatReducer(group, parallel.wire)


def make_pipeline(
    model: Decoder, config: RunConfig, precision: Precision, device: torch.device, mesh: Mesh
) -> Pipeline | None:
    """Build what runs forward and backward; None where every rank holds all blocks."""
    if mesh.pp.size == 1:
        return None
    return Pipeline(
        model,
        stages_of(config),
        mesh,
        schedule=config.parallel.schedule,
        micro_batches=config.train.micro_batches // mesh.dp.size,
        micro_batch=config.train.micro_batch,
        precision=precision,
        device=device,
    )


def first_then_others(mesh: Mesh, work: Callable[[], Result]) -> Result:
    """Do what writes files that all ranks read: the first rank alone, then the others.

    Raises:
        MegaFP4Error: What the first rank raised, on every rank, or what this one raised.
    """
    if mesh.world.size == 1:
        return work()
    outcome: list[MegaFP4Error | None] = [None]
    result = None
    if mesh.rank == 0:
        try:
            result = work()
        except MegaFP4Error as error:
            outcome = [error]
    with mesh.world.in_words("files of the first rank"):
        dist.broadcast_object_list(outcome, 0, group=mesh.world.handle, device=torch.device("cpu"))
    if outcome[0] is not None:
        raise outcome[0]
    return work() if result is None else result


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Plain Python values of all ranks of a group, in rank order.

    Raises:
        CommunicationError: Another rank is gone.
    """
    if group.size == 1:
        return [value]
    found: list[Any] = [None] * group.size
    with group.in_words("objects"):
        dist.all_gather_object(found, value, group=group.handle)
    return found


def in_order(group: Group, own: Tensor, what: str) -> Tensor:
    """Values of all micro-batches in their order, from those of this rank's [n].

    Micro-batch i of rank r is number ``i * ranks + r``.
    """
    return group.all_gather(own[None], what).t().reshape(-1)


def agree_to_stop(world: Group, signal: int | None) -> int | None:
    """The signal that any rank has received, on all of them; the device is not waited for."""
    found = world.all_reduce(torch.tensor([signal or 0]), "signals", "max").item()
    return int(found) or None


class Traffic:
    """Bytes that this rank sends in a step, by group of the mesh.

    Args:
        mesh: Whose ledger is read.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._seen: dict[str, int] = {}
        self._done = 0

    def start(self, done: int) -> None:
        """Count from here: after step ``done``."""
        self._done, self._seen = done, self._totals()

    def per_step(self, done: int) -> dict[str, float]:
        """Mean since the last call, as ``sent_bytes_<group>``; empty in a job of one rank."""
        steps, totals, seen = done - self._done, self._totals(), self._seen
        self.start(done)
        return {
            f"sent_bytes_{name}": (total - seen.get(name, 0)) / steps
            for name, total in totals.items()
        }

    def _totals(self) -> dict[str, int]:
        ledger = self._mesh.ledger
        names = sorted({str(row["group"]) for row in ledger.rows()})
        return {name: ledger.total(group=name) for name in names}
