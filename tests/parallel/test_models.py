"""GPT and Llama cut over ranks train as the whole model does, to FP32 summation order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megafp4.config import ModelConfig, OptimConfig
from megafp4.errors import ConfigError
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory, build_model, init_weights
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.models.factory import LayerFactory
from megafp4.optim import build_optimizer
from megafp4.parallel.collectives import Group
from megafp4.parallel.factory import ParallelFactory
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.sequence import sum_partial_gradients
from megafp4.parallel.weights import gather_state, init_sharded_weights, layouts, shard_state
from megafp4.precision import Precision
from megafp4.recipes import GemmSpec, OperandSpec, Recipe, get_recipe
from tests.parallel.pool import Ranks

SIZES: dict[str, Any] = {
    "layers": 2, "hidden": 256, "heads": 4, "ffn_hidden": 512, "vocab_size": 512, "seq_len": 64,
}  # fmt: skip
GPT = ModelConfig(family="gpt", **SIZES)
LLAMA = ModelConfig(family="llama", kv_heads=2, **SIZES)
BITNET = ModelConfig(family="llama", activation="relu2-glu", subln=True, **SIZES)
SEED, BATCH = 5, 4
_PLAIN = GemmSpec(OperandSpec("fp32"), OperandSpec("fp32"))
FP32_RECIPE = Recipe("fp32", fprop=_PLAIN, dgrad=_PLAIN, wgrad=_PLAIN)


def prepare(config: ModelConfig, factory: LayerFactory, dtype: torch.dtype) -> Decoder:
    model = build_model(config, factory, dtype)
    if isinstance(factory, ParallelFactory):
        init_sharded_weights(model, config, SEED)
    else:
        init_weights(model, config, SEED)
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    return model


def both(
    config: ModelConfig,
    recipe: str,
    group: Group,
    sequence: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Decoder, Precision], tuple[Decoder, Precision]]:
    whole, part = Precision(seed=SEED), Precision(seed=SEED)
    used = FP32_RECIPE if recipe == EXACT else get_recipe(recipe)
    plain = QuantizedFactory(used, "reference", whole, config.layers)
    cut = ParallelFactory(
        used,
        "reference",
        part,
        config.layers,
        group,
        sequence=sequence,
        reduce_dtype=torch.float32,
    )
    return (prepare(config, plain, dtype), whole), (prepare(config, cut, dtype), part)


def batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (BATCH, config.seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -1
    return tokens[:, :-1], targets


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def backward(model: nn.Module, tokens: Tensor, targets: Tensor, group: Group) -> float:
    loss = model(tokens, targets)
    loss.backward()
    sum_partial_gradients(model, group)
    return float(loss.detach())


def gradients(
    config: ModelConfig, recipe: str, sequence: bool, recompute: str = "none"
) -> tuple[float, float]:
    """Largest relative error of the loss and of any gradient."""
    group = Mesh(MeshSizes(tp=torch.distributed.get_world_size())).tp
    (whole, _), (part, _) = both(config, recipe, group, sequence)
    part.execute(Execution(recompute=recompute))  # type: ignore[arg-type]
    tokens, targets = batch(config)
    expected = backward(whole, tokens, targets, Group("none"))
    found = backward(part, tokens, targets, group)
    own, cut, worst = dict(part.named_parameters()), layouts(part), 0.0
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None, name
        assert own[name].grad is not None, name
        gradient = cut[name].take(parameter.grad) if name in cut else parameter.grad
        assert gradient.norm() > 0, name
        worst = max(worst, off(own[name].grad, gradient))
    return abs(found - expected) / expected, worst


EXACT = "fp32"
"""Recipe without any rounding: nothing hides an error of the layers."""

# A value within FP32 rounding of a threshold goes to the other side of it, and every layer makes
# more of them: bounds are the noise of the format.
CASES = [(EXACT, 2e-6), ("bf16", 6e-3), ("mxfp4", 0.25), ("fp4", 0.15), ("dqt8", 6e-3),
         ("nvfp4", 0.25)]  # fmt: skip


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize(("recipe", "bound"), CASES)
def test_gradients_are_those_of_the_whole(
    recipe: str, bound: float, config: ModelConfig, sequence: bool, two: Ranks
) -> None:
    for loss, worst in two.run(gradients, config, recipe, sequence):
        assert loss < 1e-5
        assert worst < bound


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_four_ranks(sequence: bool, four: Ranks) -> None:
    for loss, worst in four.run(gradients, GPT, EXACT, sequence):
        assert loss < 1e-6
        assert worst < 2e-6


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_norms_of_split_features(sequence: bool, two: Ranks) -> None:
    for loss, worst in two.run(gradients, BITNET, EXACT, sequence):
        assert loss < 1e-6
        assert worst < 2e-6


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_talk_again(recompute: str, two: Ranks) -> None:
    for loss, worst in two.run(gradients, LLAMA, EXACT, True, recompute):
        assert loss < 1e-6
        assert worst < 2e-6


def losses(
    config: ModelConfig, recipe: str, sequence: bool, dtype: torch.dtype, steps: int
) -> tuple[list[float], list[float]]:
    """Losses of the whole model and of this rank's share of it over a few steps."""
    group = Mesh(MeshSizes(tp=torch.distributed.get_world_size())).tp
    tokens, targets = batch(config)
    curves = []
    optim = OptimConfig(lr=5e-4, min_lr=5e-4, clip_grad=0.0)
    for model, precision in both(config, recipe, group, sequence, dtype):
        optimizer = build_optimizer(model.named_parameters(), optim, SEED)
        curve = []
        for step in range(steps):
            precision.step = step
            model.zero_grad()
            curve.append(backward(model, tokens, targets, group))
            optimizer.step(step, optim.lr)
        curves.append(curve)
    return curves[0], curves[1]


@pytest.mark.parametrize(
    ("recipe", "dtype", "bound"),
    [
        (EXACT, torch.float32, 2e-6),
        ("bf16", torch.bfloat16, 5e-4),
        ("mxfp4", torch.bfloat16, 3e-3),
        ("dqt8", torch.float32, 3e-3),
    ],
)
def test_training_follows_the_whole(
    recipe: str, dtype: torch.dtype, bound: float, two: Ranks
) -> None:
    for whole, part in two.run(losses, LLAMA, recipe, True, dtype, 3):
        assert whole[-1] < whole[0] - 0.1
        assert part == pytest.approx(whole, rel=bound)


def logits_and_state(config: ModelConfig, recipe: str) -> list[bool]:
    """Whether weights are parts of one draw, and logits and a change of recipe work."""
    group = Mesh(MeshSizes(tp=torch.distributed.get_world_size())).tp
    (whole, _), (part, _) = both(config, recipe, group, sequence=True)
    gathered, expected = gather_state(part, group), whole.state_dict()
    assert gathered.keys() == expected.keys()
    answers = [torch.equal(gathered[name], expected[name]) for name in expected]
    part.load_state_dict(shard_state({name: t * 1 for name, t in gathered.items()}, part))
    tokens, _ = batch(config)
    logits = part(tokens)
    assert logits.shape == (*tokens.shape, config.vocab_size)
    answers.append(off(logits.detach(), whole(tokens).detach()) < 5e-3)
    return answers


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("recipe", ["bf16", "dqt4"])
def test_weights_are_parts_of_one_draw(config: ModelConfig, recipe: str, two: Ranks) -> None:
    for answers in two.run(logits_and_state, config, recipe):
        assert all(answers)


def test_what_cannot_be_cut_is_refused() -> None:
    group = Group("tp", 0, 2)
    factory = ParallelFactory("bf16", "reference", Precision(), 2, group)
    odd = ModelConfig(family="gpt", **{**SIZES, "vocab_size": 511})
    with pytest.raises(ConfigError, match="511 cannot be cut over tp 2"):
        build_model(odd, factory)
