"""The mesh of ranks: pipeline, data, context and tensor parallelism, and who talks to whom.

Ranks are numbered with tp fastest, then cp, dp and pp: tensor parallelism, which talks most, stays
within a node. Groups travel in a :class:`Mesh` object; nothing here is process-wide state but the
connection that ``torch.distributed`` itself keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from megafp4.config import ModelConfig
from megafp4.errors import CommunicationError, ConfigError, UnsupportedError
from megafp4.models.factory import layer_name
from megafp4.models.layers import is_gated
from megafp4.parallel.collectives import CommunicationLedger, Group
from megafp4.parallel.context import check_context
from megafp4.parallel.cut import Cut, check_cut
from megafp4.recipes import Gemm, Recipe
from megafp4.recipes.exemptions import matches

AXES = ("pp", "dp", "cp", "tp")
"""Axes of the mesh, slowest first."""

TIMEOUT = timedelta(seconds=600)
"""How long a collective waits for a rank while the job starts, evaluates or saves."""

STEP_TIMEOUT = timedelta(seconds=45)
"""How long a collective of a training step waits for a rank before the job ends."""

# Groups over more than one axis: gradients are summed over replicas of the weights; norms and
# checkpoints concern all ranks that hold parts of one replica; signals concern everybody.
_UNIONS = {"replicas": ("dp", "cp"), "model": ("pp", "tp"), "world": AXES}
_NODE_GROUPS = ("within_node", "between_nodes")


class Coordinate(NamedTuple):
    """Place of a rank in the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Ranks along each axis.

    Raises:
        ConfigError: A size is not positive.
    """

    pp: int = 1
    """Stages of the pipeline."""
    dp: int = 1
    """Replicas that see different sequences."""
    cp: int = 1
    """Ranks that share the tokens of one sequence in attention."""
    tp: int = 1
    """Ranks that share each layer."""
    sequence: bool = False
    """Cut norms and residuals over the tp ranks as well (sequence parallelism)."""
    nodes: int = 1
    """Runs of dp x cp ranks, of equal length, that lie on a node each."""

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1:
                raise ConfigError(f"parallel.{axis} is {size}: give a positive number of ranks")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of :data:`AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """Short form, ``pp 1 x dp 2 x cp 1 x tp 4``."""
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)

    def fill(self, world_size: int) -> MeshSizes:
        """Let dp take the ranks that the other axes leave.

        Raises:
            ConfigError: They do not divide the number of ranks.
        """
        others = self.pp * self.cp * self.tp
        if world_size % others:
            raise ConfigError(
                f"pp {self.pp} x cp {self.cp} x tp {self.tp} needs a multiple of {others} ranks, "
                f"and the job has {world_size}: change a size or the number of ranks"
            )
        return replace(self, dp=world_size // others)

    def coordinate(self, rank: int) -> Coordinate:
        """Place of a rank.

        Raises:
            ConfigError: There is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} does not exist in {self}: it has {self.world_size}")
        place = []
        for size in reversed(self.shape):
            rank, index = divmod(rank, size)
            place.append(index)
        return Coordinate(*reversed(place))

    def rank(self, coordinate: Sequence[int]) -> int:
        """Rank at a place; undoes :meth:`coordinate`."""
        number = 0
        for index, size in zip(coordinate, self.shape, strict=True):
            number = number * size + index
        return number

    def node_groups(self) -> tuple[list[list[int]], list[list[int]]]:
        """Ranks of every group of replicas within a node, and of every one between nodes.

        Raises:
            ConfigError: The nodes do not part the replicas into equal groups of two or more.
        """
        replicas = self.dp * self.cp
        each = replicas // self.nodes
        if replicas % self.nodes or each < 2:
            raise ConfigError(
                f"parallel.nodes {self.nodes} does not part the {replicas} ranks of dp {self.dp} x "
                f"cp {self.cp} into equal groups of two or more: give the nodes that dp x cp "
                "spans, or 1"
            )
        within, between = [], []
        for ranks in self.groups(("dp", "cp")):
            rows = [ranks[first : first + each] for first in range(0, replicas, each)]
            within += rows
            between += [list(place) for place in zip(*rows, strict=True)]
        return within, between

    def groups(self, axes: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ranks of every group that differs along ``axes`` alone, in rank order."""
        spans = [range(1) if axis in axes else range(getattr(self, axis)) for axis in AXES]
        inner = [range(getattr(self, axis)) if axis in axes else range(1) for axis in AXES]
        for base in product(*spans):
            yield [
                self.rank([b + i for b, i in zip(base, offset, strict=True)])
                for offset in product(*inner)
            ]


class Mesh:
    """The mesh as one rank sees it.

    All ranks of the job must build it, together. :func:`connect` must have been called, unless
    there is only one rank.

    Args:
        sizes: Ranks along each axis.
        timeout: How long a collective waits for a rank.

    Raises:
        ConfigError: The sizes do not multiply to the number of ranks.
    """

    def __init__(self, sizes: MeshSizes, timeout: timedelta = TIMEOUT) -> None:
        connected = dist.is_initialized()
        world, self.rank = (dist.get_world_size(), dist.get_rank()) if connected else (1, 0)
        if sizes.world_size != world:
            raise ConfigError(
                f"{sizes} needs {sizes.world_size} ranks and the job has {world}: change a size or "
                "the number of ranks"
            )
        self.sizes = sizes
        self.coordinate = sizes.coordinate(self.rank)
        self.ledger = CommunicationLedger()
        """Traffic of all groups."""
        self._groups = {
            name: self._group(name, list(sizes.groups(axes)), timeout)
            if connected
            else Group(name, ledger=self.ledger)
            for name, axes in ({axis: (axis,) for axis in AXES} | _UNIONS).items()
        }
        if sizes.nodes > 1:
            for name, lists in zip(_NODE_GROUPS, sizes.node_groups(), strict=True):
                self._groups[name] = self._group(name, lists, timeout)

    def _group(self, name: str, lists: list[list[int]], timeout: timedelta) -> Group:
        # Not DeviceMesh's own groups: those wait for as long as their backend's default is.
        handle, _ = dist.new_subgroups_by_enumeration(lists, timeout=timeout)
        own = next(ranks for ranks in lists if self.rank in ranks)
        return Group(name, own.index(self.rank), len(own), handle, self.ledger)

    @property
    def pp(self) -> Group:
        """Stages of this rank's pipeline."""
        return self._groups["pp"]

    @property
    def dp(self) -> Group:
        """Ranks that hold the same share of the model and see other sequences."""
        return self._groups["dp"]

    @property
    def cp(self) -> Group:
        """Ranks that hold other tokens of the same sequences."""
        return self._groups["cp"]

    @property
    def tp(self) -> Group:
        """Ranks that hold the other shares of this rank's layers."""
        return self._groups["tp"]

    @property
    def replicas(self) -> Group:
        """Ranks with the same weights, dp x cp: gradients are summed over them."""
        return self._groups["replicas"]

    @property
    def nodes(self) -> tuple[Group, Group] | None:
        """Replicas on this rank's node, and those with its place on all nodes; None on one node."""
        if self.sizes.nodes == 1:
            return None
        within, between = (self._groups[name] for name in _NODE_GROUPS)
        return within, between

    @property
    def model(self) -> Group:
        """Ranks that hold one replica of the weights together, pp x tp."""
        return self._groups["model"]

    @property
    def world(self) -> Group:
        """All ranks of the job."""
        return self._groups["world"]

    def wait_for_at_most(self, timeout: timedelta) -> None:
        """Let collectives from now on wait that long for a rank.

        Starting takes some ranks longer than others; in a step they should be close together, and a
        rank that stays away is noticed soon.
        """
        for group in self._groups.values():
            if group.handle is not None:
                distributed_c10d._set_pg_timeout(timeout, group.handle)

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The same groups as PyTorch's :class:`DeviceMesh`, for FSDP2 and pipelining.

        Args:
            device_type: ``cuda`` or ``cpu``.

        Raises:
            ConfigError: There is only one rank, which has no process groups.
        """
        handles = [self._groups[axis].handle for axis in AXES]
        found = [handle for handle in handles if handle is not None]
        if len(found) != len(AXES):
            raise ConfigError("a job of one rank has no device mesh: connect its ranks first")
        ranks = [self.sizes.rank(place) for place in product(*map(range, self.sizes.shape))]
        shaped = torch.tensor(ranks).view(self.sizes.shape)
        return DeviceMesh.from_group(found, device_type, shaped, mesh_dim_names=AXES)


def connect(
    backend: str, rank: int, world_size: int, address: str, timeout: timedelta = TIMEOUT
) -> None:
    """Join the job.

    Args:
        backend: ``nccl``, ``gloo``, or ``cpu:gloo,cuda:nccl`` for both, by the tensors' device.
        rank: Number of this process.
        world_size: Number of processes.
        address: Where they meet: ``tcp://host:port``, ``file:///path`` or ``env://``.
        timeout: How long to wait for the others, here and in later collectives.

    Raises:
        CommunicationError: Somebody did not come in time.
    """
    try:
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CommunicationError(
            f"rank {rank} of {world_size} could not join the job at {address} within "
            f"{timeout.total_seconds():g} s ({cause}): check that all ranks were started with the "
            "same address and number of ranks"
        ) from error


def disconnect() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_model(
    sizes: MeshSizes, model: ModelConfig, recipe: Recipe, exempt: Sequence[str] = ()
) -> None:
    """Refuse a model that cannot be cut as a mesh asks, before anything is built.

    Args:
        sizes: The mesh.
        model: Shape of the model.
        recipe: What its linears run.
        exempt: Patterns of the linears that stay BF16.

    Raises:
        ConfigError: One sentence: which size, what it must divide, what to change.
        UnsupportedError: Dropout under tensor parallelism.
    """
    tp, pp = sizes.tp, sizes.pp
    for name, number in (
        ("heads", model.heads),
        ("kv_heads", model.num_kv_heads),
        ("ffn_hidden", model.num_ffn_hidden),
        ("vocab_size", model.vocab_size),
    ):
        if number % tp:
            raise ConfigError(
                f"tp {tp} does not divide model.{name} {number}: choose a tp that does, or change "
                f"model.{name}"
            )
    if model.layers < pp:
        raise ConfigError(
            f"pp {pp} needs at least one block a stage and model.layers is {model.layers}: choose "
            "a smaller pp"
        )
    pieces = sizes.cp * (tp if sizes.sequence else 1)
    if model.seq_len % pieces:
        raise ConfigError(
            f"model.seq_len {model.seq_len} cannot be cut into {pieces} (cp {sizes.cp}"
            f"{f' x tp {tp}' if sizes.sequence else ''}): choose a multiple"
        )
    check_context(sizes.cp, model.seq_len, recipe)
    if model.dropout and tp * sizes.cp > 1:
        axis = "tp" if tp > 1 else "cp"
        raise UnsupportedError(
            f"model.dropout {model.dropout} under {axis} {getattr(sizes, axis)} would drop other "
            f"elements than one rank does: set model.dropout to 0 or {axis} to 1"
        )
    if tp == 1:
        return
    keys = model.num_kv_heads * model.head_dim
    cuts: tuple[tuple[Gemm, tuple[int, ...], str], ...] = (
        ("dgrad", (model.hidden, keys, keys), "attention.qkv"),
        ("fprop", (model.hidden,), "attention.out"),
        ("dgrad", (model.num_ffn_hidden,), _widening(model)),
        ("fprop", (model.num_ffn_hidden,), "mlp.down"),
    )
    for block, (gemm, segments, slot) in product(range(model.layers), cuts):
        name = layer_name(block, slot)
        stays = recipe.exempts_block(block, model.layers) or any(matches(name, p) for p in exempt)
        if not stays:
            check_cut(recipe, gemm, Cut(segments, tp), name)


def _widening(model: ModelConfig) -> str:
    return "mlp.gate_up" if is_gated(model.mlp_activation) else "mlp.up"
