"""The composition root: a :class:`RunConfig` in, everything a training run consists of out.

Nothing else in ``train`` sees the whole configuration. Whatever is wrong with a run (names, shapes,
data, a run folder that belongs to something else) comes to light here, before the first step.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megafp4 import settings
from megafp4.backends import Backend, HopperBackend, resolve_backend
from megafp4.backends.sizes import check_tokens
from megafp4.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from megafp4.data import corpus
from megafp4.data.sidecar import check_vocabulary
from megafp4.data.tokenizer import get_tokenizer
from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory, build_model, flops_per_token, init_weights
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.models.factory import SavedAs, set_recipe
from megafp4.optim import Optimizer, build_optimizer, learning_rate
from megafp4.precision import Precision
from megafp4.recipes import PrecisionSchedule, Recipe, Side
from megafp4.report.load import read_object
from megafp4.train.ahead import DeviceGuard, Flight
from megafp4.train.batches import Batches
from megafp4.train.graphs import Recorder
from megafp4.train.guard import LossGuard
from megafp4.train.metrics import Clock, Metrics, Screen, Workload, peak_flops
from megafp4.train.quant_stats import raised_blocks
from megafp4.train.summary import SUMMARY

MAY_CHANGE = (
    "out", "data.cache", "train.checkpoint_interval", "train.keep_checkpoints",
    "train.memory_report", "train.recompute", "saved_as",
)  # fmt: skip
"""Fields that do not influence any number: a run may be continued with others."""


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
    optimizer: Optimizer
    """How the weights move."""
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

    def note_magnitudes(self) -> None:
        """Tell the linears what the optimizer knows of the weights that it has just moved."""
        for name, amax in self.optimizer.weight_amax.items():
            if (param := self.optimizer.params[name]).grad is not None:
                self.precision.magnitudes.record(param, amax)

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


def build(config: RunConfig, *, quiet: bool = False) -> Run:
    """Put a run together and claim its folder; nothing is trained yet.

    Args:
        config: What to run.
        quiet: Print nothing.

    Raises:
        ConfigError: The configuration is impossible, or the folder holds another run.
        DataError: The token files are missing, damaged or do not fit the model.
        UnsupportedError: The backend or device cannot do what is asked.
    """
    schedule = check(config)
    check_folder(config)
    device = torch.device(config.device)
    data = open_batches(config, device)
    precision = Precision(seed=config.train.seed, accumulates=True)
    backend = resolve_backend(config.backend)
    model = make_model(config, schedule, backend, precision, device)
    clock = Clock()
    work = Workload(
        steps=config.train.steps,
        tokens_per_step=data.tokens_per_step,
        flops_per_token_half=flops_per_token(config.model, config.model.seq_len, "half"),
        flops_per_token_full=flops_per_token(config.model, config.model.seq_len, "full"),
        peak_flops=peak_flops(device),
    )
    folder = Path(config.out)
    optimizer = build_optimizer(
        model.named_parameters(),
        config.optim,
        config.train.seed,
        fused=device.type == "cuda",
        weight_amax=_takes_scales(schedule, backend, "b"),
    )
    torch.manual_seed(config.train.seed)  # dropout; everything else has generators of its own
    recipe_name = _recipe_name(config)
    screen = Screen(f"{config.name}, {recipe_name}", work, quiet=quiet)
    claim_folder(config)
    return Run(
        name=config.name,
        recipe_name=recipe_name,
        folder=folder,
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
        data=data,
        guard=LossGuard(config.train.spike_factor, config.train.max_spikes),
        clock=clock,
        metrics=Metrics(folder, work, screen, clock, partial(raised_blocks, model, backend)),
        recorder=Recorder(model, precision) if config.train.cuda_graph else None,
    )


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
) -> Decoder:
    """Build the model with its initial weights, on the grid where the recipe keeps them there."""
    recipe = schedule.recipe_at(0)
    with torch.device("meta"):  # what the constructors would draw is not used
        model = build_model(
            config.model, _factory(config, recipe, backend, precision), getattr(torch, config.dtype)
        )
    model.to_empty(device=device)
    init_weights(model, config.model, config.train.seed)
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    compiled = config.train.compile
    on_gpu = device.type == "cuda"
    execution = Execution(on_gpu if compiled is None else compiled, config.train.recompute)
    if _takes_scales(schedule, backend, "a"):
        execution.magnitudes = precision.magnitudes
    model.execute(execution)
    return model


def check(config: RunConfig) -> PrecisionSchedule:
    """Find whatever makes a run impossible before any work is done.

    Returns:
        The precision schedule, or the one recipe as a schedule.

    Raises:
        ConfigError: Unknown names, exemptions that match no linear or all of them, or sizes that
            recipe, model, schedule and batch cannot share.
        DataError: Model and tokenizer have different vocabularies.
        UnsupportedError: The backend cannot run the recipe.
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
    backend = resolve_backend(config.backend)
    for _, recipe in schedule.stages:
        check_tokens(recipe, backend, config.train.micro_batch * config.model.seq_len)
        with torch.device("meta"):  # widths and names are checked, nothing is allocated
            build_model(config.model, _factory(config, recipe, backend, Precision()))
    return schedule


def _factory(
    config: RunConfig, recipe: Recipe, backend: Backend, precision: Precision
) -> QuantizedFactory:
    layers = config.model.layers
    return QuantizedFactory(recipe, backend, precision, layers, config.exempt, config.saved_as)


def open_batches(config: RunConfig, device: torch.device) -> Batches:
    """Open the token files of a run, and build or find its order of samples.

    Raises:
        ConfigError: Unknown tokenizer.
        DataError: The files are missing, damaged, too small, or do not fit tokenizer and model.
    """
    return Batches(token_files(config), config.model, config.train, device)


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


def check_folder(config: RunConfig) -> None:
    """Refuse a run folder that holds another run.

    Raises:
        ConfigError: Names the fields that differ.
    """
    path = Path(config.out) / "config.json"
    if not path.exists():
        return
    changed = settings.differences(settings.read_config(path), config, MAY_CHANGE)
    if changed:
        raise ConfigError(
            f"{config.out} holds a run with another configuration ({', '.join(changed)}): choose "
            "another --out, or delete the folder to start over"
        )


def claim_folder(config: RunConfig) -> None:
    """Write ``config.json`` into the run folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        settings.write_config(config, Path(config.out) / "config.json")
    except OSError as error:
        raise ConfigError(
            f"run folder {config.out} cannot be written ({error}): choose another --out"
        ) from error


def finished_summary(config: RunConfig) -> dict[str, Any] | None:
    """Summary of this very run, if its folder says that it took its last step.

    Raises:
        ConfigError: The folder holds another run.
        DataError: The summary is damaged.
    """
    check_folder(config)
    path = Path(config.out) / SUMMARY
    return read_object(path) if path.exists() else None


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}): choose cpu") from error
