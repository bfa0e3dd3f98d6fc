"""Backend hopper against backend reference, on the GPU: same codes, same results to FP32 order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafp4.backends.hopper import HopperBackend, device_capability
from megafp4.linear import Linear
from megafp4.numerics import QTensor
from megafp4.optim import clip_grad_norm_on_device, global_norm
from megafp4.precision import Precision
from megafp4.recipes import Recipe, get_recipe, recipe_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_capability() != (9, 0), reason="needs a Hopper GPU"),
]

# Two results rounded to BF16 differ by at most a rounding each, and sums by FP32's order.
TOLERANCE = 4e-3


def train_step(
    recipe: str | Recipe, backend: str, shape: tuple[int, int, int], *, first: int = 0
) -> tuple[Linear, dict[str, torch.Tensor]]:
    tokens, wide, out = shape
    precision = Precision(seed=2**63 + 11, step=5, first_token=first)
    torch.manual_seed(0)
    with torch.device("cuda"):
        linear = Linear(wide, out, recipe=recipe, backend=backend, precision=precision, layer=3)
        with torch.no_grad():
            linear.weight.normal_(std=0.02)
            linear.bias.normal_()
        if linear.recipe.grid is not None:
            linear.to_grid()
        x = torch.randn(tokens, wide) * torch.randn(wide).exp()
        x = x.bfloat16().requires_grad_()
        dy = (torch.randn(tokens, out) * 1e-4 * torch.randn(tokens, 1).exp()).bfloat16()
    y = linear(x)
    y.backward(dy)
    grads = {"y": y.detach(), "dx": x.grad, "dw": linear.weight.grad, "db": linear.bias.grad}
    return linear, {name: found for name, found in grads.items() if found is not None}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", [(512, 256, 384), (192, 448, 320)])
@pytest.mark.parametrize("name", recipe_names())
def test_a_step_equals_the_references(name: str, shape: tuple[int, int, int]) -> None:
    _, expected = train_step(name, "reference", shape, first=64)
    linear, found = train_step(name, "hopper", shape, first=64)
    assert found.keys() == expected.keys()
    assert {key: relative(found[key], expected[key]) for key in found} == pytest.approx(
        dict.fromkeys(found, 0.0), abs=TOLERANCE
    )
    rows = linear.op.precision.ledger.rows()
    assert {str(row["backend"]).split("/")[0] for row in rows} == {"hopper"}


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-fp8", "nvfp4", "fp8", "fp4-folded"])
def test_how_the_input_waits_changes_nothing(name: str) -> None:
    base = get_recipe(name)
    results = []
    for form in ("input", "operand", *(("packed",) if "mxfp4" in name else ())):
        wgrad = replace(base.wgrad, b=replace(base.wgrad.b, saved_as=form))
        results.append(train_step(replace(base, wgrad=wgrad), "hopper", (512, 256, 384))[1])
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in other)


def test_mxfp4_runs_on_fp8_tensor_cores_and_bf16_does_not() -> None:
    linear, _ = train_step("mxfp4-fp8", "hopper", (512, 256, 384))
    assert {str(row["backend"]) for row in linear.op.precision.ledger.rows()} == {"hopper"}
    linear, _ = train_step("bf16", "hopper", (512, 256, 384))
    assert {str(row["backend"]) for row in linear.op.precision.ledger.rows()} == {"hopper/bf16"}


def test_gradients_accumulate_in_the_epilogue() -> None:
    linear, _ = train_step("mxfp4", "hopper", (512, 256, 384))
    linear.op.precision.accumulates = True
    once = linear.weight.grad.clone()
    address = linear.weight.grad.data_ptr()
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16)
    linear(x).backward(dy)
    assert linear.weight.grad.data_ptr() == address
    both = linear.weight.grad.clone()
    linear.weight.grad = None
    linear(x).backward(dy)
    assert relative(both, once + linear.weight.grad) < 1e-6


def test_a_graph_draws_what_an_eager_step_would() -> None:
    linear, _ = train_step("mxfp4-fp8", "hopper", (512, 256, 384))
    backend, precision = linear.op.backend, linear.op.precision
    assert isinstance(backend, HopperBackend)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16)

    def run(step: int, first_token: int) -> tuple[torch.Tensor, ...]:
        precision.step, precision.first_token = step, first_token
        linear.op.forget_weights()
        y = linear(x)
        dx, dw = torch.autograd.grad(y, (x, linear.weight), dy)
        return y.detach(), dx, dw

    # Where a position is pinned, places count from it: the pass itself begins at token 0.
    backend.pin_position(precision.seed, 6, 512, torch.device("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(6, 0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(6, 0)
    gradients = []
    for step in (7, 8):
        backend.pin_position(precision.seed, step, 512, torch.device("cuda"))
        graph.replay()
        backend.unpin_position()
        gradients.append(captured[2].clone())
        assert all(torch.equal(a, b) for a, b in zip(captured, run(step, 512), strict=True))
    assert not torch.equal(*gradients)


def test_a_probe_sees_the_specifications_codes() -> None:
    seen: list[str] = []

    def probe(layer: str, gemm: str, operand: str, x: torch.Tensor, q: QTensor) -> None:
        seen.append(f"{gemm}.{operand}:{q.format.name}")

    linear, _ = train_step("mxfp4", "hopper", (512, 256, 384))
    linear.op.precision.probe = probe
    linear.weight.grad = None
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    linear(x).float().square().sum().backward()
    assert sorted(seen) == ["dgrad.a:mxfp4", "wgrad.a:mxfp4", "wgrad.b:mxfp4"]


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-fp8", "fp8", "fp4-folded"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_the_norm_comes_out_of_the_epilogue(recipe: str, accumulates: bool) -> None:
    linear, _ = train_step(recipe, "hopper", (512, 256, 384))
    precision = linear.op.precision
    precision.accumulates, precision.measures = accumulates, True
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, 384, device="cuda", dtype=torch.bfloat16)
    if not accumulates:
        linear.weight.grad = None
    linear(x).backward(dy)
    assert precision.squares.of(linear.weight) is not None
    expected = global_norm(one.grad for one in linear.parameters() if one.grad is not None)
    norm, _ = clip_grad_norm_on_device(linear.parameters(), 1.0, precision.squares.of)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert linear.weight.grad is not None
    linear.weight.grad.mul_(2)
    assert precision.squares.of(linear.weight) is None
