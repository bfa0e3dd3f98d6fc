"""Small runs in a pipeline and without it, on the same micro-batches."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megafp4.config import ModelConfig, OptimConfig
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory, build_model, init_weights
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.numerics import QTensor
from megafp4.optim import build_optimizer, clip_grad_norm
from megafp4.optim.zero import ZeroOptimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.factory import ParallelFactory
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.pipeline import Pipeline, tied_group
from megafp4.parallel.reduce import FlatReducer
from megafp4.parallel.sequence import sum_partial_gradients
from megafp4.parallel.stages import build_part, plan_stages
from megafp4.parallel.weights import init_sharded_weights
from megafp4.precision import Precision
from megafp4.recipes import Recipe
from tests.models.small import small_config

LLAMA = small_config("llama", layers=4, hidden=64, ffn_hidden=64, heads=2, kv_heads=1)
CUT = replace(LLAMA, kv_heads=2, vocab_size=128)
"""The same, such that tensor parallelism can cut it."""
GPT = small_config("gpt", layers=4, heads=2, ffn_hidden=64)
OPTIM = OptimConfig(lr=5e-3, clip_grad=0.0)
SEED, MICRO_BATCHES, MICRO_BATCH = 5, 4, 2
Codes = dict[tuple[str, str, str], list[str]]


@dataclass
class Outcome:
    """What a run leaves."""

    losses: list[list[float]] = field(default_factory=list)
    """Of every micro-batch times its share, by step."""
    codes: Codes = field(default_factory=dict)
    """Digests of what the last step quantized, in order, by layer, GEMM and operand."""
    ledger: list[dict[str, str | int]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0
    """Of the last step's gradients."""
    valid: list[float] = field(default_factory=list)
    """Losses of an evaluation after the last step."""
    notes: dict[str, Any] = field(default_factory=dict)


class Watch:
    """A probe that keeps digests."""

    def __init__(self) -> None:
        self.seen: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)

    def __call__(self, layer: str, gemm: str, operand: str, x: Tensor, q: QTensor, /) -> None:
        """Keep the digest of one quantization."""
        digest = hashlib.sha256(q.codes.numpy().tobytes() + q.scales.numpy().tobytes())
        self.seen[layer, gemm, operand].append(digest.hexdigest())


def batches(config: ModelConfig, step: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Micro-batches of a step, of which some predict less, and their shares."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (MICRO_BATCHES, MICRO_BATCH, config.seq_len + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    targets = text[..., 1:].clone()
    targets[1, 0, :7] = -1
    counts = (targets != -1).sum((1, 2)).double()
    found = list(zip(text[..., :-1].contiguous(), targets, strict=True))
    return found, (counts / counts.sum()).float()


def first_tokens(config: ModelConfig) -> list[int]:
    return [i * MICRO_BATCH * config.seq_len for i in range(MICRO_BATCHES)]


def to_grids(model: Decoder) -> None:
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()


def train_alone(model: Decoder, precision: Precision, steps: int, group: Group) -> Outcome:
    """Train a whole model, or its share under tensor parallelism, as the training loop does."""
    config, outcome, watch = model.config, Outcome(), Watch()
    optimizer = build_optimizer(model.named_parameters(), OPTIM, SEED)
    for step in range(steps):
        precision.step, losses = step, []
        precision.probe = watch if step == steps - 1 else None
        found, shares = batches(config, step)
        for index, ((tokens, targets), share) in enumerate(zip(found, shares, strict=True)):
            precision.first_token = first_tokens(config)[index]
            loss = model(tokens, targets) * share
            loss.backward()
            losses.append(float(loss.detach()))
        outcome.losses.append(losses)
        sum_partial_gradients(model, group)
        outcome.norm, _ = clip_grad_norm(model.parameters(), 0.0)
        optimizer.step(step, OPTIM.lr)
        optimizer.zero_grad()
    outcome.codes, precision.probe = dict(watch.seen), None
    outcome.ledger = precision.ledger.rows()
    outcome.weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for index, (tokens, targets) in enumerate(batches(config, 99)[0][:3]):
            precision.first_token = index * tokens.numel()
            outcome.valid.append(float(model(tokens, targets)))
    return outcome


@functools.cache
def serial(config: ModelConfig, recipe: str, steps: int) -> Outcome:
    """Train on one rank."""
    torch.set_num_threads(1)
    precision = Precision(seed=SEED)
    factory = QuantizedFactory(recipe, "reference", precision, config.layers)
    model = build_model(config, factory, torch.bfloat16)
    init_weights(model, config, SEED)
    to_grids(model)
    return train_alone(model, precision, steps, Group("none"))


def tensor_parallel(config: ModelConfig, recipe: str, steps: int) -> Outcome:
    """Train on the ranks of the job, without a pipeline."""
    precision = Precision(seed=SEED)
    mesh = Mesh(MeshSizes(tp=torch.distributed.get_world_size(), sequence=True))
    factory = ParallelFactory(recipe, "reference", precision, config.layers, mesh.tp, sequence=True)
    model = build_model(config, factory, torch.bfloat16)
    init_sharded_weights(model, config, SEED)
    to_grids(model)
    return train_alone(model, precision, steps, mesh.tp)


@dataclass
class Piped:
    """One rank of a pipeline."""

    mesh: Mesh
    precision: Precision
    model: Decoder
    pipeline: Pipeline


def connect_pipeline(
    config: ModelConfig,
    recipe: str | Recipe,
    schedule: Any,
    chunks: int = 1,
    layers: tuple[int, ...] = (),
    tp: int = 1,
    recompute: Any = "none",
    dp: int = 1,
) -> Piped:
    """Build this rank's part of a model and the pipeline that it is in."""
    pp = torch.distributed.get_world_size() // (tp * dp)
    sizes = MeshSizes(pp=pp, dp=dp, tp=tp, sequence=tp > 1)
    mesh, precision = Mesh(sizes), Precision(seed=SEED)
    backend, count = "reference", config.layers
    factory = (
        ParallelFactory(recipe, backend, precision, count, mesh.tp, sequence=True)
        if tp > 1
        else QuantizedFactory(recipe, backend, precision, count)
    )
    stages = plan_stages(count, mesh.pp.size, chunks, layers)
    model = build_part(config, factory, stages, mesh.pp.rank, torch.bfloat16)
    init_sharded_weights(model, config, SEED)
    to_grids(model)
    model.execute(Execution(recompute=recompute))
    pipeline = Pipeline(
        model,
        stages,
        mesh,
        schedule=schedule,
        micro_batches=MICRO_BATCHES // dp,
        micro_batch=MICRO_BATCH,
        precision=precision,
    )
    return Piped(mesh, precision, model, pipeline)


def piped(
    config: ModelConfig, recipe: str | Recipe, steps: int, *args: Any, **options: Any
) -> Outcome:
    """Train on the ranks of the job; arguments as :func:`connect_pipeline`'s."""
    one, outcome, watch = connect_pipeline(config, recipe, *args, **options), Outcome(), Watch()
    model, precision = one.model, one.precision
    tied = tied_group(one.mesh) if config.ties_embeddings else None
    calls: list[Any] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    optimizer = build_optimizer(model.named_parameters(), OPTIM, SEED)
    for step in range(steps):
        precision.step = step
        precision.probe = watch if step == steps - 1 else None
        calls.clear()
        found, shares = batches(config, step)
        losses = one.pipeline.step(found, shares, first_tokens(config), calls.append)
        outcome.losses.append(losses.tolist())
        sum_partial_gradients(model, one.mesh.tp)
        if tied is not None:
            weight = model.embedding.weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            weight.grad = tied.all_reduce(weight.grad, "tied")
        optimizer.step(step, OPTIM.lr)
        optimizer.zero_grad()
    outcome.notes = {
        "calls": calls,
        "names": [name for name, _ in model.named_parameters()],
        "sent": one.mesh.ledger.total(operation="send"),
        "deferred": precision.deferred,
    }
    outcome.codes, precision.probe = dict(watch.seen), None
    outcome.weights = model.state_dict()
    few = enumerate(batches(config, 99)[0][:3])
    held_out = [(tokens, targets, i * tokens.numel()) for i, (tokens, targets) in few]
    outcome.valid = one.pipeline.evaluate(held_out).tolist()
    outcome.ledger = precision.ledger.rows()
    return outcome


def zero(schedule: Any, chunks: int, dp: int) -> tuple[list[list[float]], float, dict[str, Tensor]]:
    """Losses, last norm and weights after three steps of ZeRO, each stage with its own."""
    one = connect_pipeline(LLAMA, "mxfp4", schedule, chunks, dp=dp)
    mesh, params = one.mesh, dict(one.model.named_parameters())
    reducer = FlatReducer(mesh.replicas, "fp32", 1)
    optimizer = ZeroOptimizer(params, OPTIM, SEED, mesh.replicas, reducer, model=mesh.model)
    losses, mine = [], slice(mesh.dp.rank, None, dp)
    for step in range(3):
        one.precision.step = step
        found, shares = batches(LLAMA, step)
        first = first_tokens(LLAMA)[mine]
        done = one.pipeline.step(found[mine], shares[mine], first, optimizer.begin)
        losses.append(mesh.dp.all_gather(done[None], "losses").T.flatten().tolist())
        norm, scale = optimizer.clip(0.0)
        optimizer.step(step, OPTIM.lr, scale)
        optimizer.zero_grad()
    return losses, norm, one.model.state_dict()
