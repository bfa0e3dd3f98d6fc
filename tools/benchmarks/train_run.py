"""Steps of a real training run on one rank: ``python -m benchmarks.train_run``, started by parent.

The run is put together and stepped as ``megafp4 train`` does it, on the tokens it would read.
"""

from __future__ import annotations

import gc
import hashlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.processes import serve
from megafp4.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megafp4.launch import find_job
from megafp4.models import get_preset
from megafp4.optim.optimizer import grid_of, storage_bytes
from megafp4.train.ahead import DeviceGuard, Flight
from megafp4.train.build import Run, build
from megafp4.train.loop import StepResult, accumulate_gradients, land, take_step


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how."""

    preset: str
    recipe: str
    folder: str
    """Run folder."""
    cache: str
    """Folder of what is made of the token files, shared by all jobs."""
    parallel: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration's ``parallel``."""
    ranks: int = 1
    steps: int = 8
    """Steps that are timed."""
    warm_up: int = 3
    layers: int = 0
    """Blocks; 0 for the preset's."""
    micro_batch: int = 4
    micro_batches: int = 1
    """Per rank, whatever the mesh: so all meshes of some ranks see the same batches."""
    data: tuple[str, ...] = ()
    """Token files; none are the text of this Python, as bytes."""
    tokenizer: str = "bytes"
    vocab_size: int = 0
    """Rows of the embedding; 0 for the preset's."""
    states: str = ""
    """How the optimizer keeps its states; empty for the preset's way."""
    grad_dtype: str = "float32"
    """Type of the matrices' gradients."""
    recompute: str = ""
    """What backward makes again; empty for the preset's way."""
    dtype: str = ""
    """Type of activations; empty for the preset's."""
    saved_as: str = "recipe"
    graph: bool = False
    offload: bool = False
    """Whether optimizer state lies in host memory."""
    lr: float = 1e-4
    accounts: bool = False
    """Whether to take memory apart by kind behind the last step; on one rank only."""
    backend: str = "hopper"
    device: str = "cuda"

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.warm_up + self.steps

    def config(self) -> RunConfig:
        """The run.

        Raises:
            ConfigError: It is impossible.
        """
        run = get_preset(self.preset)
        kept = {"states": self.states} if self.states else {}
        again = {"recompute": self.recompute} if self.recompute else {}
        parallel = {**self.parallel, "layers": tuple(self.parallel.get("layers", ()))}
        return replace(
            run,
            recipe=self.recipe,
            precision_schedule="",
            backend=self.backend,  # type: ignore[arg-type]
            saved_as=self.saved_as,  # type: ignore[arg-type]
            device=self.device,
            dtype=self.dtype or run.dtype,  # type: ignore[arg-type]
            out=self.folder,
            model=replace(
                run.model,
                dropout=0.0,
                layers=self.layers or run.model.layers,
                vocab_size=self.vocab_size or run.model.vocab_size,
            ),
            data=DataConfig(train=tuple(self.data), tokenizer=self.tokenizer, cache=self.cache),
            optim=replace(
                run.optim,
                lr=self.lr,
                min_lr=0.1 * self.lr,
                warmup_steps=0,
                decay_steps=None,
                schedule="constant",
                grad_dtype=self.grad_dtype,  # type: ignore[arg-type]
                offload=self.offload,
                **kept,  # type: ignore[arg-type]
            ),
            train=replace(
                run.train,
                steps=self.total + self.accounts,
                global_batch=self.micro_batch * self.micro_batches * self.ranks,
                micro_batch=self.micro_batch,
                eval_batches=0,
                eval_interval=0,
                log_interval=0,
                stats_interval=0,
                checkpoint_interval=0,
                spike_factor=0.0,
                memory_report=False,
                cuda_graph=self.graph,
                **again,  # type: ignore[arg-type]
            ),
            parallel=ParallelConfig(**parallel),
        )


@dataclass(frozen=True)
class Trained:
    """What happened."""

    step_ms: list[float]
    """Of each timed step, on the slowest rank."""
    losses: list[float]
    """Of every step, warm-up included."""
    tokens_per_step: int
    """Of all ranks."""
    parameters: int
    """Of the whole model."""
    peak_gib: float
    """Allocated, on the rank that needed most."""
    reserved_gib: float
    """What PyTorch held for it, likewise."""
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by group of the mesh; of the rank that sends most."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Memory by kind, if that was asked for."""


def draw_on_device(device: str) -> None:
    """Draw initial weights where they go: the host takes a minute for those of a 6.7B model.

    They are still a function of the parameter's name, so that all meshes begin with the same.
    """
    from megafp4.parallel import weights

    host = weights.initial_value

    def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
        if len(shape) != 2 or "norm" in name:
            return host(name, shape, config, seed)
        number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(number)
        out = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = config.init_std / (math.sqrt(2 * config.layers) if out else 1.0)
        return torch.empty(*shape, device=device).normal_(0.0, std, generator=generator)

    weights.initial_value = initial_value


def run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Train on this rank; all ranks return the same."""
    job = Job(**{**given, "data": tuple(given["data"])})
    place = find_job()
    place.use_device(job.device)
    if job.device == "cuda":
        draw_on_device(job.device)
    if job.device == "cpu":
        torch.set_num_threads(1)
    place.join(job.device)
    found = asdict(train(job))
    place.leave()
    return found


def train(job: Job) -> Trained:
    """Build the run, take its steps and gather what the ranks measured."""
    trained = build(job.config(), quiet=True)
    on_gpu = trained.device.type == "cuda"
    if trained.runs_ahead:
        trained.device_guard = DeviceGuard(trained.guard, trained.device)
    gc.collect()
    marks: list[Any] = []
    results: list[StepResult | Flight] = []
    for step in range(job.total):
        if step == job.warm_up:
            _mark(marks, on_gpu)
            trained.traffic.start(step)
        trained.follow_schedule(step)
        results.append(take_step(trained, step))
        if step >= job.warm_up:
            _mark(marks, on_gpu)
    land(trained, None)
    mine = {
        "ms": _between(marks, on_gpu),
        "peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "sent": _by_group(trained.traffic.per_step(job.total)),
    }
    ranks = [mine]
    if job.ranks > 1:
        gathered: list[Any] = [None] * job.ranks
        dist.all_gather_object(gathered, mine, group=trained.mesh.world.handle)
        ranks = gathered
    groups = dict.fromkeys(name for one in ranks for name in one["sent"])
    return Trained(
        step_ms=[max(times) for times in zip(*(one["ms"] for one in ranks), strict=True)],
        losses=[_loss(result) for result in results],
        tokens_per_step=trained.train.global_batch * trained.model.config.seq_len,
        parameters=trained.parameters,
        peak_gib=max(one["peak"] for one in ranks) / 2**30,
        reserved_gib=max(one["reserved"] for one in ranks) / 2**30,
        sent={name: max(one["sent"].get(name, 0.0) for one in ranks) for name in groups},
        bytes=accounts(trained, job.total) if job.accounts else {},
    )


def accounts(trained: Run, step: int) -> dict[str, int]:
    """Memory by kind: after the forward and backward passes of one more step, and at their peak.

    Weights, states on the device and gradients are counted on their storages. On a GPU ``other`` is
    what else is allocated then (weights as operands, tables), and ``activations`` what more there
    was at the peak of the passes.
    """
    on_gpu = trained.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    accumulate_gradients(trained, step, trained.data.training(step))
    params = list(trained.model.parameters())
    tensors = [one.detach() for one in params]
    for one in params:
        grid = grid_of(one)
        if grid is not None:
            tensors += grid.state_dict().values()
    found: Counter[str] = Counter()
    found["weights"] = storage_bytes(tensors)
    found["states"] = 0 if trained.optim.offload else trained.optimizer.state_bytes()
    found["gradients"] = storage_bytes(one.grad for one in params if one.grad is not None)
    if on_gpu:
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        peak = torch.cuda.max_memory_allocated()
        found["other"] = allocated - found.total()
        found["activations"] = peak - allocated
    trained.optimizer.zero_grad()
    return dict(found)


def median_ms(found: Trained) -> float:
    """Milliseconds of a step."""
    return statistics.median(found.step_ms)


def _loss(result: StepResult | Flight) -> float:
    return result.loss if isinstance(result, StepResult) else result.read()[0]


def _by_group(per_step: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("sent_bytes_"): sent for name, sent in per_step.items()}


def _mark(marks: list[Any], on_gpu: bool) -> None:
    if not on_gpu:
        marks.append(time.perf_counter())
        return
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    marks.append(event)


def _between(marks: list[Any], on_gpu: bool) -> list[float]:
    if on_gpu:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]
    return [1e3 * (b - a) for a, b in pairwise(marks)]


if __name__ == "__main__":
    sys.exit(serve(run, sys.argv[1:]))
