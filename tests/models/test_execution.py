"""How a model runs changes neither loss nor gradients; compiled code is shared by all layers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megafp4.models import QuantizedFactory
from megafp4.models.decoder import Decoder
from megafp4.models.execution import Execution
from megafp4.models.layers import gelu_tanh, relu2_glu, swiglu
from megafp4.precision import Magnitudes, Precision
from tests.models.small import batch, build, scatter, small_config

FAMILIES = ("gpt", "llama")
RECOMPUTE = ("none", "selective", "full")


def model_of(family: str, recipe: str, execution: Execution, **changes: Any) -> Decoder:
    config = small_config(family, **changes)
    factory = QuantizedFactory(recipe, "reference", Precision(seed=1), config.layers)
    model = build(config, factory, dtype=torch.bfloat16)
    scatter(model, 0.02)
    model.execute(execution)
    return model


def step(model: Decoder) -> tuple[Tensor, list[Tensor]]:
    tokens, targets = batch(model.config, rows=4, length=32)
    torch.manual_seed(3)
    loss = model(tokens, targets)
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None for grad in grads)
    return loss.detach(), [grad for grad in grads if grad is not None]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace pieces and their gradients as torch.compile does, without generating code."""
    compiler = torch.compile

    def trace_only(piece: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        del options["options"]
        return compiler(piece, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace_only)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "mxfp4-fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_no_bit(family: str, recipe: str) -> None:
    """With dropout and stochastic rounding, whose draws must come again."""
    runs = [
        step(model_of(family, recipe, Execution(recompute=mode), dropout=0.1, subln=True))
        for mode in RECOMPUTE
    ]
    for loss, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert [torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True)].count(False) == 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_give_the_same_gradients(family: str, mode: str) -> None:
    loss, grads = step(model_of(family, "mxfp4", Execution()))
    compiled_loss, compiled = step(model_of(family, "mxfp4", Execution(True, mode)))  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] >= 3
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    for mine, expected in zip(compiled, grads, strict=True):
        assert (mine - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_compiled_does_not_depend_on_depth_or_step(family: str) -> None:
    graphs = []
    for layers in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        model = model_of(family, "mxfp4", Execution(True, "selective"), layers=layers)
        for number in range(3):
            model.blocks[0].mlp.down.op.precision.step = number  # type: ignore[union-attr]
            step(model)
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("piece", [swiglu, relu2_glu])
def test_generated_code_rounds_where_the_pieces_do(piece: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(Execution(True).run(piece, x), piece(x))


def test_a_copy_runs_as_its_model_does() -> None:
    model = model_of("gpt", "bf16", Execution(recompute="full"))
    assert copy.deepcopy(model).execution.recompute == "full"
    assert model.blocks[0].mlp.execution is model.execution


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_evaluation_keeps_nothing(mode: str) -> None:
    model = model_of("gpt", "bf16", Execution(recompute=mode))  # type: ignore[arg-type]
    with torch.no_grad():
        assert not model(*batch(model.config)).requires_grad


def test_compiled_pieces_say_how_large_their_rows_are() -> None:
    execution = Execution(True)
    execution.magnitudes = Magnitudes()
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    out = execution.repeatable(gelu_tanh, x)
    assert torch.equal(out, gelu_tanh(x))
    amax = execution.magnitudes.of(out)
    assert amax is not None
    assert torch.equal(amax, out.detach().abs().amax(-1).float().flatten())
    assert not amax.requires_grad
    out.sum().backward()
    (expected,) = torch.autograd.grad(gelu_tanh(x).sum(), x)
    assert torch.equal(x.grad, expected)


def test_measured_pieces_run_in_inference_mode() -> None:
    execution = Execution(True)
    execution.magnitudes = Magnitudes()
    with torch.inference_mode():
        out = execution.repeatable(gelu_tanh, torch.randn(2, 3, 8))
        assert execution.magnitudes.of(out) is None
