"""The composition root: a :class:`RunConfig` in, everything a training run consists of out.

Nothing else in ``train`` sees the whole configuration. Whatever is wrong with a run (names, shapes,
data, a run folder that belongs to something else) comes to light here, before the first step.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megafp4.backends import Backend, HopperBackend, resolve_backend
from megafp4.backends.sizes import check_tokens
from megafp4.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from megafp4.data import corpus
from megafp4.data.sidecar import check_vocabulary
from megafp4.data.tokenizer import get_tokenizer
from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.models import build_model, flops_per_token, parameter_count
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.models.factory import SavedAs, set_recipe
from megafp4.optim import Optimizer, build_optimizer, learning_rate
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.context import ContextParallel
from megafp4.parallel.mesh import Mesh
from megafp4.parallel.pipeline import Pipeline, tied_group
from megafp4.parallel.stages import build_part
from megafp4.parallel.weights import init_sharded_weights
from megafp4.precision import Precision
from megafp4.recipes import PrecisionSchedule, Recipe, Side
from megafp4.train.ahead import DeviceGuard, Flight
from megafp4.train.batches import Batches
from megafp4.train.folder import check_folder, claim_folder, mesh_changes
from megafp4.train.graphs import Recorder
from megafp4.train.guard import LossGuard
from megafp4.train.metrics import Clock, Metrics, MutedMetrics, Screen, Workload, peak_flops
from megafp4.train.parallel import (
    Sharded,
    Traffic,
    check_mesh,
    first_then_others,
    make_factory,
    make_optimizer,
    make_pipeline,
    mesh_sizes,
    stages_of,
)
from megafp4.train.quant_stats import raised_blocks


@dataclass
class Run:
    """A training run, put together."""

    name: str
    """Name for logs and reports."""
    recipe_name: str
    """Recipe or precision schedule, for reports."""
    folder: Path
    """Run folder."""
    device: torch.device
    """Where the model is."""
    train: TrainConfig
    """Order, length and intervals."""
    optim: OptimConfig
    """Learning rate and clipping."""
    model: Decoder
    """What is trained."""
    backend: Backend
    """Who computes, shared by every linear of ``model``."""
    precision: Precision
    """Step and token counters, ledger and probe, shared by every linear of ``model``."""
    schedule: PrecisionSchedule
    """Which recipe is in force at which step."""
    exempt: tuple[str, ...]
    """Patterns of the linears that stay BF16 under every recipe."""
    saved_as: SavedAs
    """Form in which linears keep their input for wgrad."""
    recipe: Recipe
    """Recipe in force now."""
    optimizer: Optimizer | Sharded
    """How the weights move; the second kind where several ranks share the work."""
    mesh: Mesh
    """The ranks."""
    context: ContextParallel
    """Which tokens of each sequence are this rank's."""
    pipeline: Pipeline | None
    """Runs forward and backward, where the blocks lie on several ranks."""
    traffic: Traffic
    """What they send each other."""
    parameters: int
    """Parameters of the whole model."""
    data: Batches
    """Training and validation batches."""
    guard: LossGuard
    """Judge of every loss."""
    clock: Clock
    """Times the steps."""
    metrics: Metrics
    """Where numbers go."""
    device_guard: DeviceGuard | None = None
    """Judges on the device, while a run that does not wait for it trains."""
    flight: Flight | None = None
    """The step whose numbers have not been read yet, in such a run."""
    recorder: Recorder | None = None
    """Replays forward and backward, if the run asks for CUDA graphs."""

    @property
    def runs_ahead(self) -> bool:
        """Whether the host need not wait for the device at every step."""
        return self.device.type == "cuda" and self.optimizer.can_run_ahead

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a micro-batch, or of this rank's tokens of it."""
        loss: Tensor = self.callable_model(tokens, targets)
        return loss

    @property
    def callable_model(self) -> nn.Module:
        """What is called in place of the model, which DeepSpeed wraps."""
        engine: nn.Module | None = getattr(self.optimizer, "engine", None)
        return self.model if engine is None else engine

    def note_magnitudes(self) -> None:
        """Tell the linears what the optimizer knows of the weights that it has just moved."""
        optimizer = self.optimizer
        if isinstance(optimizer, Optimizer | ZeroOptimizer):
            for name, amax in optimizer.weight_amax.items():
                param = optimizer.params[name]
                # ZeRO, which keeps no gradients, has measured all weights.
                if isinstance(optimizer, ZeroOptimizer) or param.grad is not None:
                    self.precision.magnitudes.record(param, amax)

    def wait_for_weights(self) -> None:
        """Let what follows read any weight, not only where modules do."""
        if isinstance(self.optimizer, ZeroOptimizer):
            self.optimizer.arrivals.wait()

    @property
    def writes(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.mesh.rank == 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.steps

    def follow_schedule(self, step: int) -> None:
        """Put every linear under the recipe that is in force at a step, if that has changed."""
        recipe = self.schedule.recipe_at(step)
        if recipe != self.recipe:
            layers = self.model.config.layers
            set_recipe(self.model, recipe, layers, self.exempt, self.saved_as)
            if self.recorder is not None:
                self.recorder.restart()
            self.recipe = recipe
            self.metrics.screen.say(f"recipe {recipe.name} from step {step + 1} on")


def build(config: RunConfig, mesh: Mesh | None = None, *, quiet: bool = False) -> Run:
    """Put a run together and claim its folder; nothing is trained yet.

    Args:
        config: What to run.
        mesh: The ranks, as :func:`make_mesh` makes it; None for one rank. All ranks must call.
        quiet: Print nothing.

    Raises:
        ConfigError: The configuration is impossible, or the folder holds another run.
        DataError: The token files are missing, damaged or do not fit the model.
        UnsupportedError: The backend or device cannot do what is asked.
    """
    mesh = make_mesh(config) if mesh is None else mesh
    schedule = check(config, mesh.world.size)
    check_folder(config)
    device = torch.device(config.device)
    data = first_then_others(mesh, lambda: open_batches(config, device, mesh.dp))
    # Under ZeRO 3 a weight's gradient goes to its owner before another could be added to it.
    precision = Precision(seed=config.train.seed, accumulates=config.parallel.zero < 3)
    backend = resolve_backend(config.backend)
    model = make_model(config, schedule, backend, precision, device, mesh)
    context = ContextParallel(mesh.cp, config.parallel.attention)
    context.place(model, precision)
    clock = Clock()
    work = _workload(config, data, device, mesh)
    torch.manual_seed(config.train.seed)  # dropout; everything else has generators of its own
    recipe_name = _recipe_name(config)
    screen = Screen(f"{config.name}, {recipe_name}", work, quiet=quiet or mesh.rank > 0)
    optimizer = _make_optimizer(config, schedule, backend, model, device, mesh)
    buckets = optimizer.gradients if isinstance(optimizer, ZeroOptimizer) else None
    if buckets is not None:  # wgrad writes where gradients are collected
        precision.destination = buckets.destination
    graph = config.train.cuda_graph
    recorder = Recorder(model, precision, buckets, mesh.ledger) if graph else None
    pipeline = make_pipeline(model, config, precision, device, mesh)
    if changed := mesh_changes(config):
        screen.say(f"continuing with another mesh ({', '.join(changed)})")
    # Behind all that may refuse the run: a folder that is claimed belongs to this configuration.
    first_then_others(mesh, lambda: claim_folder(config) if mesh.rank == 0 else None)
    kind = Metrics if mesh.rank == 0 else MutedMetrics
    raised = partial(raised_blocks, model, backend, mesh.world)
    return Run(
        name=config.name,
        recipe_name=recipe_name,
        folder=Path(config.out),
        device=device,
        train=config.train,
        optim=config.optim,
        model=model,
        backend=backend,
        precision=precision,
        schedule=schedule,
        exempt=config.exempt,
        saved_as=config.saved_as,
        recipe=schedule.recipe_at(0),
        optimizer=optimizer,
        mesh=mesh,
        context=context,
        pipeline=pipeline,
        traffic=Traffic(mesh),
        parameters=parameter_count(config.model),
        data=data,
        guard=LossGuard(config.train.spike_factor, config.train.max_spikes),
        clock=clock,
        metrics=kind(Path(config.out), work, screen, clock, raised),
        recorder=recorder,
    )


def make_mesh(config: RunConfig) -> Mesh:
    """The mesh of a run, of the ranks that are connected.

    Raises:
        ConfigError: Sizes and number of ranks do not fit.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return Mesh(mesh_sizes(config.parallel, world_size))


def _workload(config: RunConfig, data: Batches, device: torch.device, mesh: Mesh) -> Workload:
    peak = peak_flops(device)
    return Workload(
        steps=config.train.steps,
        tokens_per_step=data.tokens_per_step,
        flops_per_token_half=flops_per_token(config.model, config.model.seq_len, "half"),
        flops_per_token_full=flops_per_token(config.model, config.model.seq_len, "full"),
        peak_flops=None if peak is None else peak * mesh.world.size,
        ranks=mesh.world.size,
    )


def _make_optimizer(
    config: RunConfig,
    schedule: PrecisionSchedule,
    backend: Backend,
    model: Decoder,
    device: torch.device,
    mesh: Mesh,
) -> Optimizer | Sharded:
    seed, fused = config.train.seed, device.type == "cuda"
    amax = _takes_scales(schedule, backend, "b")
    if mesh.world.size == 1:
        return build_optimizer(
            model.named_parameters(), config.optim, seed, fused=fused, weight_amax=amax
        )
    tied = tied_group(mesh) if config.model.ties_embeddings else None
    return make_optimizer(model, config, mesh, tied, fused=fused, weight_amax=amax)


def _recipe_name(config: RunConfig) -> str:
    text = config.precision_schedule
    # With @, the recipe is in force before the schedule's first step; shares name all of them.
    return f"{config.recipe}, {text}" if "@" in text else text or config.recipe


def _takes_scales(schedule: PrecisionSchedule, backend: Backend, side: Side) -> bool:
    """Whether the backend scales fprop's operand as a whole and can be told how large it is."""
    specs = [recipe.fprop.side(side) for _, recipe in schedule.stages]
    scaled = any(each.quantized and each.shared_scale == "tensor" for each in specs)
    return scaled and isinstance(backend, HopperBackend)


def make_model(
    config: RunConfig,
    schedule: PrecisionSchedule,
    backend: Backend,
    precision: Precision,
    device: torch.device,
    mesh: Mesh,
) -> Decoder:
    """Build this rank's part of the model with its initial weights, on the recipe's grid if any."""
    recipe = schedule.recipe_at(0)
    factory = make_factory(config, recipe, backend, precision, mesh.tp)
    dtype = getattr(torch, config.dtype)
    if mesh.pp.size > 1:
        rank = mesh.pp.rank
        model = build_part(config.model, factory, stages_of(config), rank, dtype, device)
    else:
        with torch.device("meta"):  # what the constructors would draw is not used
            model = build_model(config.model, factory, dtype)
        model.to_empty(device=device)
    init_sharded_weights(model, config.model, config.train.seed)
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    compiled = config.train.compile
    on_gpu = device.type == "cuda"
    execution = Execution(on_gpu if compiled is None else compiled, config.train.recompute)
    # Where tokens are cut over tp, a rank's norms know how large its own ones are.
    if _takes_scales(schedule, backend, "a") and not config.parallel.sequence:
        execution.magnitudes = precision.magnitudes
    model.execute(execution)
    return model


def check(config: RunConfig, world_size: int = 1) -> PrecisionSchedule:
    """Find whatever makes a run impossible before any work is done.

    Args:
        config: What to run.
        world_size: Ranks of the job.

    Returns:
        The precision schedule, or the one recipe as a schedule.

    Raises:
        ConfigError: Unknown names, exemptions that match no linear or all of them, or sizes that
            recipe, model, schedule and batch cannot share.
        DataError: Model and tokenizer have different vocabularies.
        UnsupportedError: The backend cannot run the recipe, or several ranks something else.
    """
    _check_device(config.device)
    steps = config.train.steps
    schedule = PrecisionSchedule.parse(config.precision_schedule, steps, config.recipe)
    learning_rate(0, config.optim, steps)
    check_vocabulary(get_tokenizer(config.data.tokenizer), config.model.vocab_size)
    if not config.data.train and config.data.tokenizer != "bytes":
        raise ConfigError(
            f"data.train is empty and tokenizer {config.data.tokenizer!r} has no built-in text: "
            "make token files with megafp4 data preprocess and name them with --data.train"
        )
    check_mesh(config, schedule, world_size)
    backend = resolve_backend(config.backend)
    # Under sequence and context parallelism operands are cast in the ranks' runs of tokens.
    runs = (config.parallel.tp if config.parallel.sequence else 1) * config.parallel.cp
    tokens = config.train.micro_batch * config.model.seq_len // runs
    for _, recipe in schedule.stages:
        check_tokens(recipe, backend, tokens)
        with torch.device("meta"):  # widths and names are checked, nothing is allocated
            build_model(config.model, make_factory(config, recipe, backend, Precision()))
    return schedule


def open_batches(config: RunConfig, device: torch.device, dp: Group | None = None) -> Batches:
    """Open the token files of a run, and build or find its order of samples.

    Args:
        config: What to run.
        device: Where the batches go.
        dp: Ranks that share the micro-batches; None for one that reads them all.

    Raises:
        ConfigError: Unknown tokenizer.
        DataError: The files are missing, damaged, too small, or do not fit tokenizer and model.
    """
    return Batches(token_files(config), config.model, config.train, device, dp)


def token_files(config: RunConfig) -> DataConfig:
    """Say what is read: the configured files or, where none are named, the text of this Python.

    That text, as bytes, is written into ``data.cache`` or the folder ``data`` of the run if it is
    not there yet.

    Raises:
        DataError: The token files cannot be written.
    """
    if config.data.train:
        return config.data
    prefixes = corpus.prepare(config.data.cache or Path(config.out) / "data")
    train, valid = ((shlex.quote(prefix),) for prefix in prefixes)
    return replace(config.data, train=train, valid=valid)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({why}): choose cpu") from error
