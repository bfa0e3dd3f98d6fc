"""GPT and Llama whose sequences are cut over ranks train as they do on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4.config import ModelConfig, OptimConfig
from megafp4.models import QuantizedFactory
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.models.layers import SelfAttention
from megafp4.numerics import QTensor
from megafp4.optim import build_optimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.context import Attention, ContextParallel
from megafp4.parallel.factory import ParallelFactory
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.sequence import sum_partial_gradients
from megafp4.parallel.weights import layouts
from megafp4.precision import Precision
from megafp4.recipes import get_recipe
from tests.parallel.pool import Ranks
from tests.parallel.test_models import EXACT, FP32_RECIPE, off, prepare

SIZES: dict[str, Any] = {
    "layers": 2, "hidden": 128, "heads": 4, "ffn_hidden": 256, "vocab_size": 256, "seq_len": 256,
}  # fmt: skip
GPT = ModelConfig(family="gpt", **SIZES)
LLAMA = ModelConfig(family="llama", kv_heads=2, **SIZES)
SEED, BATCH, MICRO_BATCHES = 5, 4, 2
Codes = dict[tuple[int, str, str, str], QTensor]


def batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (BATCH, config.seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :100] = -1  # ranks have different numbers of targets
    return tokens[:, :-1], targets


def train(
    model: Decoder, precision: Precision, context: ContextParallel, config: ModelConfig
) -> tuple[float, Codes]:
    """Forward and backward of a step; this rank's summand of the loss, and what it quantized."""
    seen: Codes = {}
    precision.step, first = 3, 0
    tokens, targets = batch(config)
    every = int((targets != -1).sum())
    total = torch.zeros(())
    for number, (own, wanted) in enumerate(
        zip(tokens.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True)
    ):
        precision.probe = lambda name, gemm, side, x, q, at=number: seen.update(
            {(at, name, gemm, side): q}
        )
        own, wanted, precision.first_token = context.cut(own, wanted, first)
        loss = model(own, wanted) * ((wanted != -1).sum() / every)
        loss.backward()
        total += loss.detach()
        first += config.seq_len * len(own)
    return float(total), seen


def both(
    config: ModelConfig, recipe: str, mesh: Mesh, attention: Attention, dtype: torch.dtype
) -> tuple[tuple[Decoder, Precision], tuple[Decoder, Precision, ContextParallel]]:
    """The whole model, and what this rank has of it."""
    used = FP32_RECIPE if recipe == EXACT else get_recipe(recipe)
    whole, part = Precision(seed=SEED), Precision(seed=SEED)
    plain = QuantizedFactory(used, "reference", whole, config.layers)
    cut = QuantizedFactory(used, "reference", part, config.layers)
    if mesh.tp.size > 1:
        cut = ParallelFactory(
            used, "reference", part, config.layers, mesh.tp,
            sequence=True, reduce_dtype=torch.float32,
        )  # fmt: skip
    context = ContextParallel(mesh.cp, attention)
    mine = prepare(config, cut, dtype)
    context.place(mine, part)
    return (prepare(config, plain, dtype), whole), (mine, part, context)


def compare(
    config: ModelConfig,
    recipe: str,
    attention: Attention,
    dtype: torch.dtype,
    tp: int = 1,
    recompute: str = "none",
) -> tuple[float, float, float]:
    """Relative errors of the loss and of the worst gradient; share of forward's codes that differ.

    Run on every rank.
    """
    mesh = Mesh(MeshSizes(cp=torch.distributed.get_world_size() // tp, tp=tp))
    (whole, precision), (part, own, context) = both(config, recipe, mesh, attention, dtype)
    part.execute(Execution(recompute=recompute))  # type: ignore[arg-type]
    expected, codes = train(whole, precision, ContextParallel(Group("none")), config)
    summand, found = train(part, own, context, config)
    loss = float(mesh.cp.sum(torch.tensor(summand, dtype=torch.float64)))
    assert found.keys() == codes.keys()
    sum_partial_gradients(part, mesh.tp)
    worst, shares = 0.0, layouts(part) if tp > 1 else {}
    parameters = dict(part.named_parameters())
    for name, parameter in whole.named_parameters():
        mine = parameters[name].grad
        assert mine is not None, name
        assert parameter.grad is not None, name
        gradient = shares[name].take(parameter.grad) if name in shares else parameter.grad
        assert gradient.norm() > 0, name
        worst = max(worst, off(mesh.cp.sum(mine), gradient))
    inputs = [(key, q) for key, q in codes.items() if key[2:] == ("fprop", "a")] if tp == 1 else []
    differ = [
        found[key].codes.view(BATCH // MICRO_BATCHES, -1, q.shape[1])
        != context.zigzag.take(q.codes.view(BATCH // MICRO_BATCHES, -1, q.shape[1]))
        for key, q in inputs
    ]
    off_codes = torch.cat([one.flatten() for one in differ]).double().mean() if differ else 0.0
    return abs(loss - expected) / expected, worst, float(off_codes)


# As in test_models: what a format makes of differences in the last bit.
BOUNDS = {EXACT: 2e-6, "bf16": 1.5e-2, "mxfp4": 0.25, "fp4": 0.15, "dqt8": 1.5e-2, "nvfp4": 0.25}


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("recipe", list(BOUNDS)[1:])
def test_gathered_keys_keep_the_codes_of_forward(
    recipe: str, config: ModelConfig, two: Ranks
) -> None:
    for result in two.run(compare, config, recipe, "all-gather", torch.bfloat16):
        loss, worst, codes = result
        assert loss < 1e-6
        assert worst < BOUNDS[recipe]
        assert codes == 0


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_ring_gives_the_gradients_of_the_whole(
    recipe: str, config: ModelConfig, two: Ranks
) -> None:
    for result in two.run(compare, config, recipe, "ring", torch.float32):
        loss, worst, codes = result
        assert loss < 1e-5
        assert worst < BOUNDS[recipe]
        assert codes < 1e-2


@pytest.mark.parametrize("attention", ["all-gather", "ring"])
def test_four_ranks(attention: Attention, four: Ranks) -> None:
    for loss, worst, _ in four.run(compare, LLAMA, EXACT, attention, torch.float32):
        assert loss < 1e-6
        assert worst < 2e-6


@pytest.mark.parametrize(("recipe", "bound"), [(EXACT, 2e-6), ("mxfp4", 0.3)])
def test_context_tensor_and_sequence_parallelism(recipe: str, bound: float, four: Ranks) -> None:
    for loss, worst, _ in four.run(compare, GPT, recipe, "ring", torch.float32, 2):
        assert loss < 1e-5
        assert worst < bound


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_attend_again(recompute: str, two: Ranks) -> None:
    config = replace(LLAMA, seq_len=64)
    for attention in ("all-gather", "ring"):
        for loss, worst, _ in two.run(
            compare, config, EXACT, attention, torch.float32, 1, recompute
        ):
            assert loss < 1e-6
            assert worst < 2e-6


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_group_of_one_changes_nothing(config: ModelConfig) -> None:
    precision, context = Precision(), ContextParallel(Group("cp"), "ring")
    model = prepare(config, QuantizedFactory("bf16", "reference", precision, 2), torch.float32)
    context.place(model, precision)
    assert model.blocks[1].attention.context is SelfAttention.context
    assert precision.others is None
    tokens, targets = batch(config)
    assert context.cut(tokens, targets, 77) == (tokens, targets, 77)


def losses(recipe: str, attention: Attention, dtype: torch.dtype) -> tuple[list[float], ...]:
    """Losses of the whole model and of the cut one over a few steps, on every rank."""
    mesh = Mesh(MeshSizes(cp=torch.distributed.get_world_size()))
    config = replace(LLAMA, seq_len=256)
    (whole, precision), (part, own, context) = both(config, recipe, mesh, attention, dtype)
    optim = OptimConfig(lr=1e-3, min_lr=1e-3, clip_grad=0.0)
    curves: tuple[list[float], ...] = ([], [])
    for curve, group, model, its, where in (
        (curves[0], Group("none"), whole, precision, ContextParallel(Group("none"))),
        (curves[1], mesh.cp, part, own, context),
    ):
        optimizer = build_optimizer(model.named_parameters(), optim, SEED)
        for step in range(4):
            summand, _ = train(model, its, where, config)
            curve.append(float(group.sum(torch.tensor(summand, dtype=torch.float64))))
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = group.sum(parameter.grad)
            optimizer.step(step, optim.lr)
            optimizer.zero_grad()
    return curves


@pytest.mark.parametrize(
    ("recipe", "attention", "dtype", "bound"),
    [
        (EXACT, "all-gather", torch.float32, 1e-6),
        (EXACT, "ring", torch.float32, 1e-6),
        ("mxfp4", "all-gather", torch.bfloat16, 2e-3),
    ],
)
def test_training_follows_the_whole(
    recipe: str, attention: Attention, dtype: torch.dtype, bound: float, two: Ranks
) -> None:
    for whole, part in two.run(losses, recipe, attention, dtype):
        assert whole[-1] < whole[0] - 0.1
        assert part == pytest.approx(whole, rel=bound)
