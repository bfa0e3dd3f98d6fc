"""Which kernels backend hopper asks for, and that they add up to the recipe; kernels by twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels import it")

from megafp4.backends import HopperBackend, hopper
from megafp4.errors import UnsupportedError
from megafp4.linear import Linear
from megafp4.precision import Precision
from megafp4.recipes import GemmSpec, OperandSpec, Recipe, get_recipe, recipe_names
from tests.backends.kernel_twins import Calls, install

BF16_ROUNDINGS = 6e-3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    monkeypatch.setattr(hopper, "device_capability", lambda: (9, 0))
    return install(monkeypatch)


def train_step(
    recipe: str | Recipe, backend: str, micro_batches: int = 1
) -> tuple[Linear, list[torch.Tensor]]:
    precision = Precision(seed=2**63 + 11, step=5, first_token=64)
    torch.manual_seed(0)
    linear = Linear(64, 128, recipe=recipe, backend=backend, precision=precision, layer=3)
    if linear.recipe.grid is not None:
        linear.to_grid()
    for _ in range(micro_batches):
        x = (torch.randn(192, 64) * torch.randn(64).exp()).bfloat16().requires_grad_()
        y = linear(x)
        y.backward((torch.randn(192, 128) * 1e-4).bfloat16())
        precision.first_token += 192
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert linear.bias is not None
    assert linear.bias.grad is not None
    return linear, [y.detach(), x.grad, linear.weight.grad, linear.bias.grad]


@pytest.mark.parametrize("name", recipe_names())
def test_a_step_equals_the_references(name: str, calls: Calls) -> None:
    _, expected = train_step(name, "reference")
    linear, found = train_step(name, "hopper")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a.double() - b.double()).norm() / b.double().norm()) < BF16_ROUNDINGS
    assert {str(row["backend"]).split("/")[0] for row in linear.op.precision.ledger.rows()} == {
        "hopper"
    }


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("bf16", []),
        # dY for both GEMMs in one pass, the weight, the activation.
        ("mxfp4", ["mxfp4.both", "mxfp4.sums", "mxfp4.col", "gemm", "mxfp4.col", "gemm"]),
        # The activation for forward and wgrad in one pass, the weight for forward and dgrad.
        ("mxfp4-fp8", ["mxfp4.both"] * 2 + ["gemm", "mxfp4.both", "mxfp4.sums", "gemm", "gemm"]),
        ("fp8", ["cast.fp8-e4m3", "cast.fp8-e4m3", "gemm", "cast.fp8-e5m2", "gemm", "gemm"]),
        # The outliers come apart in the pass that casts the rest, and wgrad's operand of both.
        (
            "fp4",
            [
                *("occ.exact", "recast", "lines.fp4-vector", "recast", "gemm"),
                *("cast.fp8-e5m2", "gemm", "gemm"),
            ],
        ),
        (
            "fp4-folded",
            [
                *("occ.folded", "recast", "lines.fp4-vector", "recast", "gemm"),
                *("cast.fp8-e5m2", "gemm", "gemm"),
            ],
        ),
        (
            "fp4-direct",
            [
                *("lines.fp4-vector", "recast", "lines.fp4-vector", "recast", "gemm"),
                *("cast.fp8-e5m2", "gemm", "gemm"),
            ],
        ),
    ],
)
def test_what_one_pass_can_serve_is_asked_for_together(
    name: str, kernels: list[str], calls: Calls
) -> None:
    train_step(name, "hopper")
    assert calls == kernels


def test_weights_are_quantized_once_a_step(calls: Calls) -> None:
    train_step("mxfp4-fp8", "hopper", micro_batches=3)
    assert calls.count("mxfp4.both") == 1 + 2 * 3  # the weight, activations and gradients
    assert calls.count("gemm") == 9


def test_a_weight_that_is_only_read_is_cast_for_forward_alone(calls: Calls) -> None:
    linear = Linear(64, 128, recipe="fp4-folded", backend="hopper").requires_grad_(False)
    linear(torch.randn(192, 64).bfloat16())
    assert calls == ["occ.folded", "lines.fp4-vector", "gemm"]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4-fp8", "nvfp4", "fp8", "fp4", "fp4-folded"])
def test_how_the_input_waits_changes_nothing(name: str, calls: Calls) -> None:
    base = get_recipe(name)
    results = []
    for form in ("input", "operand", *(("packed",) if "mxfp4" in name else ())):
        wgrad = replace(base.wgrad, b=replace(base.wgrad.b, saved_as=form))
        results.append(train_step(replace(base, wgrad=wgrad), "hopper")[1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_the_ledger_tells_fp8_and_int8_from_bf16(calls: Calls) -> None:
    found = {}
    for name in ("mxfp4", "nvfp4", "bitnet"):
        linear, _ = train_step(name, "hopper")
        found[name] = [row["backend"] for row in linear.op.precision.ledger.rows()]
    assert found == {
        "mxfp4": ["hopper/bf16", "hopper", "hopper"],
        "nvfp4": ["hopper/bf16"] * 3,
        "bitnet": ["hopper", "hopper/bf16", "hopper/bf16"],
    }


def test_gradients_are_added_where_they_lie_only_if_allowed(calls: Calls) -> None:
    linear, _ = train_step("mxfp4", "hopper")
    x = torch.randn(192, 64).bfloat16()
    y = linear(x)
    dy = torch.ones_like(y)
    (apart,) = torch.autograd.grad(y, linear.weight, dy, retain_graph=True)
    first = linear.weight.grad.clone()
    linear.op.precision.accumulates = True
    address = linear.weight.grad.data_ptr()
    linear(x.requires_grad_()).backward(dy)
    assert linear.weight.grad.data_ptr() == address
    torch.testing.assert_close(linear.weight.grad, first + apart)


def test_pinned_positions_rule(calls: Calls) -> None:
    linear, eager = train_step("mxfp4", "hopper")
    backend = linear.op.backend
    assert isinstance(backend, HopperBackend)
    backend.pin_position(2**63 + 11, 5, 64, torch.device("cpu"))
    precision = linear.op.precision
    precision.step, precision.first_token = 99, 0  # what a recorded graph would have frozen
    torch.manual_seed(0)
    again = Linear(64, 128, recipe="mxfp4", backend=backend, precision=precision, layer=3)
    x = (torch.randn(192, 64) * torch.randn(64).exp()).bfloat16().requires_grad_()
    y = again(x)
    y.backward((torch.randn(192, 128) * 1e-4).bfloat16())
    assert all(
        torch.equal(a, b)
        for a, b in zip((y, x.grad, again.weight.grad, again.bias.grad), eager, strict=True)
    )


def test_dge_next_to_a_bf16_wgrad(calls: Calls) -> None:
    recipe = replace(get_recipe("fp4"), wgrad=GemmSpec())
    _, expected = train_step(recipe, "reference")
    _, found = train_step(recipe, "hopper")
    for a, b in zip(found, expected, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < BF16_ROUNDINGS


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_a_pinned_position_reaches_values_behind_an_operand_or_is_refused(
    fmt: str, calls: Calls
) -> None:
    drawn = OperandSpec("mxfp4", rounding="stochastic")
    through = GemmSpec(OperandSpec("bf16"), OperandSpec(fmt, source="fprop"))
    recipe = Recipe("behind", fprop=GemmSpec(drawn, drawn), dgrad=through)
    backend = HopperBackend()
    linear = Linear(64, 128, recipe=recipe, backend=backend, precision=Precision(seed=1))
    x = torch.randn(192, 64).bfloat16().requires_grad_()
    backend.pin_position(1, 5, 0, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"would repeat them: leave train\.cuda_graph off"):
        linear(x).backward(torch.ones(192, 128).bfloat16())


def test_refusals(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    base = get_recipe("mxfp4")
    odd = replace(base.dgrad.a, dither_bits=16)
    recipe = replace(base, dgrad=replace(base.dgrad, a=odd))
    with pytest.raises(UnsupportedError, match=r"8 random bits, not 'stochastic' with 16: change"):
        train_step(recipe, "hopper")
    with pytest.raises(UnsupportedError, match=r"cannot multiply fp32 x bf16: choose backend"):
        HopperBackend().check("fp32", "bf16")
    for found, words in ((None, "no CUDA GPU"), ((8, 0), r"one of 8\.0")):
        monkeypatch.setattr(hopper, "device_capability", lambda found=found: found)
        with pytest.raises(UnsupportedError, match=rf"9\.0 \(H100, H200\) and .* has {words}"):
            Linear(64, 128, recipe="mxfp4", backend="hopper")


def test_bias_gradients_of_composed_recipes_are_summed(calls: Calls) -> None:
    """E4M3 for dgrad beside MXFP4 for wgrad comes from another pass than two MXFP4 operands."""
    mxfp4, fp8 = get_recipe("mxfp4"), get_recipe("fp8")
    dgrad = replace(fp8.dgrad, a=replace(fp8.dgrad.a, format="fp8-e4m3"))
    _, expected = train_step(replace(mxfp4, name="mixed", dgrad=dgrad), "reference")
    _, found = train_step(replace(mxfp4, name="mixed", dgrad=dgrad), "hopper")
    assert "mxfp4.sums" in calls
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("residual", ["none", "exact"])
@pytest.mark.parametrize("saved", ["input", "operand"])
def test_clamped_fp8_starts_from_what_is_left(residual: str, saved: str, calls: Calls) -> None:
    base, clamp = get_recipe("mxfp4-fp8"), get_recipe("fp4").fprop.a.clamp
    assert clamp is not None
    clamped = replace(clamp, residual=residual, alpha=0.9)
    a = replace(base.fprop.a, clamp=clamped)
    b = replace(base.wgrad.b, source="fprop", saved_as=saved)
    recipe = replace(
        base, name="clamped", fprop=replace(base.fprop, a=a), wgrad=replace(base.wgrad, b=b)
    )
    _, expected = train_step(recipe, "reference")
    _, found = train_step(recipe, "hopper")
    for mine, other in zip(found, expected, strict=True):
        error = (mine.double() - other.double()).norm() / other.double().norm()
        assert float(error) < BF16_ROUNDINGS


def test_what_is_known_of_an_activation_does_not_describe_its_clamped_rest(calls: Calls) -> None:
    base, clamp = get_recipe("fp8"), get_recipe("fp4").fprop.a.clamp
    assert clamp is not None
    a = replace(base.fprop.a, clamp=replace(clamp, residual="none", alpha=0.9))
    recipe = replace(base, name="clamped", fprop=replace(base.fprop, a=a))
    precision = Precision()
    linear = Linear(64, 64, recipe=recipe, backend="hopper", precision=precision)
    x = torch.randn(128, 64).bfloat16()
    x[:, 0] = 300
    with torch.no_grad():
        before = linear(x)
        precision.magnitudes.record(x, x.abs().amax(-1).float())
        assert torch.equal(linear(x), before)


@pytest.mark.parametrize("residual", ["exact", "folded"])
def test_the_kernel_that_clamps_is_asked_only_for_its_own_rounding(
    residual: str, calls: Calls
) -> None:
    base, clamp = get_recipe("fp4"), get_recipe("fp4").fprop.a.clamp
    assert clamp is not None
    a = replace(base.fprop.a, rounding="nearest-even", clamp=replace(clamp, residual=residual))
    recipe = replace(base, name="even", fprop=replace(base.fprop, a=a))
    _, expected = train_step(recipe, "reference")
    _, found = train_step(recipe, "hopper")
    assert not any(call.startswith("occ") for call in calls)
    for mine, other in zip(found, expected, strict=True):
        error = (mine.double() - other.double()).norm() / other.double().norm()
        assert float(error) < BF16_ROUNDINGS
