"""How a model is cut into stages, and wgrads that wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megafp4.errors import ConfigError, UnsupportedError
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory, build_model, init_weights
from megafp4.numerics import QTensor
from megafp4.parallel.pipeline import check_schedule
from megafp4.parallel.stages import Stages, build_part, plan_stages
from megafp4.parallel.weights import init_sharded_weights
from megafp4.precision import Precision
from tests.models.small import small_config


@pytest.mark.parametrize(
    ("num_layers", "ranks", "chunks", "layers", "expected"),
    [
        (8, 2, 1, (), (4, 4)),
        (7, 3, 1, (), (3, 2, 2)),
        (8, 2, 2, (), (2, 2, 2, 2)),
        (8, 2, 2, (3, 2, 2, 1), (3, 2, 2, 1)),
    ],
)
def test_blocks_of_each_stage(
    num_layers: int, ranks: int, chunks: int, layers: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    stages = plan_stages(num_layers, ranks, chunks, layers)
    assert stages.layers == expected
    assert (stages.count, stages.chunks) == (ranks * chunks, chunks)
    blocks = [block for stage in range(stages.count) for block in stages.blocks(stage)]
    assert blocks == list(range(num_layers))
    placed = sorted(stage for rank in range(ranks) for stage in stages.of_rank(rank))
    assert placed == list(range(stages.count))
    assert list(stages.of_rank(1)) == [1 + chunk * ranks for chunk in range(chunks)]


@pytest.mark.parametrize(
    ("ranks", "chunks", "layers", "message"),
    [
        (3, 2, (), "pp 3 x chunks 2 needs at least 6 blocks and model.layers is 4"),
        (2, 0, (), "parallel.chunks is 0: give a positive number"),
        (2, 1, (1, 1, 2), "names 3 stages and pp 2 x chunks 1 has 2"),
        (2, 1, (1, 2), "parallel.layers 1 2 must be positive and add up to model.layers 4"),
        (2, 1, (4, 0), "parallel.layers 4 0 must be positive"),
    ],
)
def test_cuts_that_cannot_be(
    ranks: int, chunks: int, layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_stages(4, ranks, chunks, layers)


@pytest.mark.parametrize(
    ("schedule", "ranks", "chunks", "micro_batches", "message"),
    [
        ("dualpipe", 2, 1, 4, "unknown pipeline schedule 'dualpipe'"),
        ("1f1b", 2, 2, 4, "1f1b needs one stage a rank and parallel.chunks is 2"),
        ("interleaved", 2, 1, 4, "interleaved needs two or more stages a rank"),
        ("1f1b", 4, 1, 3, "1f1b with pp 4 needs at least 4 micro-batches a step and has 3"),
        ("zero-bubble", 4, 1, 9, "runs 9 micro-batches a step in 2 rounds, .*multiple of 4"),
    ],
)
def test_schedules_that_cannot_be(
    schedule: str, ranks: int, chunks: int, micro_batches: int, message: str
) -> None:
    stages = Stages(ranks, (1,) * ranks * chunks)
    with pytest.raises(ConfigError, match=message):
        check_schedule(schedule, stages, micro_batches)


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_parts_are_those_of_the_whole(family: str) -> None:
    config = small_config(family, layers=5)
    factory = QuantizedFactory("bf16", "reference", Precision(), config.layers)
    whole = build_model(config, factory)
    init_weights(whole, config, 3)
    expected, found, numel = whole.state_dict(), {}, []
    stages = plan_stages(config.layers, 2, 2)
    for rank in range(2):
        part = build_part(config, factory, stages, rank)
        init_sharded_weights(part, config, 3)
        assert all(value.device.type == "cpu" for value in part.parameters())
        numel.append(sum(value.numel() for value in part.parameters()))
        for name, value in part.state_dict().items():
            assert torch.equal(value, expected[name]), name
            found[name] = value
    assert found.keys() == expected.keys()
    tied = whole.embedding.weight
    assert isinstance(tied, Tensor)
    twice = tied.numel() if config.ties_embeddings else 0
    assert sum(numel) == sum(value.numel() for value in whole.parameters()) + twice


def test_dropout_is_refused() -> None:
    config = small_config(dropout=0.1)
    factory = QuantizedFactory("bf16", "reference", Precision(), config.layers)
    with pytest.raises(UnsupportedError, match=r"model.dropout 0.1 under pp 2 would drop other"):
        build_part(config, factory, plan_stages(2, 2), 0)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4", "int8", "dqt8"])
def test_a_wgrad_that_waits_is_the_same_wgrad(recipe: str) -> None:
    torch.manual_seed(0)
    precision = Precision(seed=2)
    linear = Linear(64, 128, recipe=recipe, precision=precision, layer=3)
    if linear.recipe.grid is not None:
        linear.to_grid()
    x = torch.randn(64, 64, requires_grad=True)
    dy, calls, casts = torch.randn(64, 128), [], []

    def see(layer: str, gemm: str, operand: str, value: Tensor, q: QTensor, /) -> None:
        casts.append((gemm, operand, q.codes.clone()))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        casts.clear()
        for one in (x, *linear.parameters()):
            one.grad = None
        precision.probe = see
        linear.op.forget_weights()
        linear(x).backward(dy)
        assert x.grad is not None
        assert linear.bias.grad is not None
        grad = linear.weight.grad
        return x.grad, linear.bias.grad, torch.empty(0) if grad is None else grad

    dx, db, dw = run()
    expected = sorted((gemm, operand) for gemm, operand, _ in casts)
    gemms = precision.ledger.by_gemm()
    linear.weight.register_post_accumulate_grad_hook(lambda weight: calls.append(weight.grad))
    precision.deferred = []
    late_dx, late_db, nothing = run()
    assert nothing.numel() == 0
    assert calls == []
    assert torch.equal(late_dx, dx)
    assert torch.equal(late_db, db)
    (waiting,) = precision.deferred
    waiting()
    assert len(calls) == 1
    assert torch.equal(calls[0], dw)
    assert dw.norm() > 0
    assert sorted((gemm, operand) for gemm, operand, _ in casts) == expected
    assert precision.ledger.by_gemm() == {
        gemm: {formats: 2 * count for formats, count in counts.items()}
        for gemm, counts in gemms.items()
    }
