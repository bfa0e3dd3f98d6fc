"""The three GEMMs of a linear: values, shapes, gradients, ledger, errors."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import megafp4
from megafp4 import numerics
from megafp4.backends import Ledger
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.precision import Position, Precision
from megafp4.recipes import OCC, GemmSpec, OperandSpec, Recipe, get_recipe, recipe_names
from tests.linear_oracle import ORACLES, Case
from tests.tolerances import BF16_GEMM, FP32_SUM


def relative(a: Tensor, b: Tensor) -> float:
    """Relative RMS difference."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def make(recipe: str | Recipe, case: Case, backend: str = "reference") -> megafp4.Linear:
    precision = Precision(seed=case.seed, step=case.step, first_token=case.first_token)
    out_features, in_features = case.w.shape
    linear = megafp4.Linear(
        in_features, out_features, False, recipe, backend, precision, case.layer, "lin"
    )
    with torch.no_grad():
        linear.weight.copy_(case.w)
    if get_recipe(recipe).grid:
        linear.to_grid()
    return linear


def run(linear: megafp4.Linear, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x = case.x.clone().requires_grad_()
    y = linear(x)
    y.backward(case.dy)
    assert x.grad is not None
    assert linear.weight.grad is not None
    return y.detach(), x.grad, linear.weight.grad


@pytest.fixture
def case(generator: torch.Generator) -> Case:
    """Heavy-tailed data: outliers are what the recipes differ on."""
    x, w, dy = (torch.randn(s, generator=generator) for s in ((128, 160), (192, 160), (128, 192)))
    # 160 features: enough for OCC to clamp one at either end, and no multiple of 64.
    return Case(x * x.abs().exp() * 0.3, w * 0.05, dy * dy.abs().exp() * 1e-4)


@pytest.mark.parametrize("name", recipe_names())
def test_every_gemm_of_every_recipe_equals_float64(name: str, case: Case) -> None:
    actual = run(make(name, case), case)
    for got, expected in zip(actual, ORACLES[name](case), strict=True):
        assert relative(got, expected) < FP32_SUM


def test_there_is_an_oracle_for_every_recipe() -> None:
    assert set(ORACLES) == set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_bf16_backend_equals_reference(name: str, case: Case) -> None:
    actual = run(make(name, case, "bf16"), case)
    for got, expected in zip(actual, run(make(name, case), case), strict=True):
        assert relative(got, expected) < FP32_SUM


@pytest.mark.parametrize("name", recipe_names())
def test_bf16_activations_cost_one_rounding(name: str, case: Case) -> None:
    low = replace(case, x=case.x.bfloat16(), dy=case.dy.bfloat16())
    linear = make(name, low)
    y, dx, dw = run(linear, low)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = replace(low, x=low.x.float(), dy=low.dy.float())
    for got, expected in zip((y, dx, dw), ORACLES[name](exact), strict=True):
        assert relative(got, expected) < BF16_GEMM


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("shape", [(2, 64), (2, 1, 64), (128,)])
def test_leading_dims_and_bias(name: str, shape: tuple[int, ...], case: Case) -> None:
    """A 3-D input is the same as its tokens; the bias is added, and its gradient is sum(dy)."""
    linear = make(name, case)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, 192))
    linear.op.precision.ledger = Ledger()
    x = case.x.view(*shape, 160).requires_grad_()
    y = linear(x)
    y.backward(case.dy.view(*shape, 192))
    expected = run(make(name, case), case)
    assert y.shape == (*shape, 192)
    torch.testing.assert_close(y.view(128, 192), expected[0] + linear.bias, rtol=0, atol=1e-6)
    assert x.grad is not None
    assert torch.equal(x.grad.view(128, 160), expected[1])
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, expected[2])
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad, case.dy.sum(0))


UNBLOCKED = [n for n in recipe_names() if "mxfp4" not in n and n != "nvfp4"]


@pytest.mark.parametrize("name", UNBLOCKED)
def test_odd_sizes_where_nothing_is_blocked(name: str, generator: torch.Generator) -> None:
    shapes = ((7, 33), (19, 33), (7, 19))
    case = Case(*(torch.randn(s, generator=generator) for s in shapes))
    for got, expected in zip(run(make(name, case), case), ORACLES[name](case), strict=True):
        assert relative(got, expected) < FP32_SUM


@pytest.mark.parametrize("name", recipe_names())
def test_empty_batch(name: str, case: Case) -> None:
    empty = replace(case, x=torch.empty(0, 160), dy=torch.empty(0, 192))
    y, dx, dw = run(make(name, empty), empty)
    assert y.shape == (0, 192)
    assert dx.shape == (0, 160)
    assert torch.equal(dw, torch.zeros(192, 160))


@pytest.mark.parametrize("name", recipe_names())
def test_not_a_number_stays_one(name: str, case: Case) -> None:
    """A NaN in the gradient shows in what it touches; it is neither hidden nor an exception."""
    dy = case.dy.clone()
    dy[3, 5] = torch.nan
    _, dx, dw = run(make(name, case), replace(case, dy=dy))
    assert dx[3].isnan().any()
    assert dw[5].isnan().any()


def test_only_needed_gradients_are_computed(case: Case) -> None:
    linear = make("mxfp4", case)
    linear.weight.requires_grad_(False)
    linear(case.x.clone().requires_grad_()).backward(case.dy)
    assert list(linear.op.precision.ledger.by_gemm()) == ["fprop", "dgrad"]
    linear.weight.requires_grad_(True)
    linear.op.precision.ledger = Ledger()
    linear(case.x).backward(case.dy)
    assert list(linear.op.precision.ledger.by_gemm()) == ["fprop", "wgrad"]


def test_second_derivatives_are_refused(case: Case) -> None:
    """Autograd would take the gradient for a constant and leave the second-order term out."""
    x = case.x.clone().requires_grad_()
    y = make("mxfp4", case)(x)
    with pytest.raises(UnsupportedError, match=r"gradient of 'lin' was asked for \(create_graph\)"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_gemms_can_be_called_one_by_one(case: Case) -> None:
    """What a zero-bubble pipeline does: dgrad now, wgrad later, when the run has moved on."""
    whole = make("mxfp4-fp8", case)
    expected = run(whole, case)
    linear = make("mxfp4-fp8", case)
    at = Position(case.step, case.first_token)
    y, saved = linear.op.fprop(case.x, linear.weight.detach(), at)
    linear.op.precision.step = 99
    dw = linear.op.wgrad(case.dy, saved, linear.weight.detach(), at)
    dx = linear.op.dgrad(case.dy, linear.weight.detach(), at)
    for got, want in zip((y, dx, dw), expected, strict=True):
        assert torch.equal(got, want)


def test_ledger_says_what_ran(case: Case) -> None:
    linear = make("fp4", case)
    run(linear, case)
    run(linear, case)
    rows = linear.op.precision.ledger.rows()
    assert [(r["gemm"], r["a"], r["b"], r["count"]) for r in rows] == [
        ("fprop", "fp4-vector", "fp4-vector", 2),
        ("residual", "bf16", "bf16", 2),
        ("dgrad", "fp8-e5m2", "fp8-e4m3", 2),
        ("wgrad", "fp8-e5m2", "fp8-e4m3", 2),
    ]
    assert {(r["layer"], r["backend"]) for r in rows} == {("lin", "reference")}


def test_weight_scale_is_per_output_channel(case: Case) -> None:
    """[2501.17116, section 3.1]; the released code scales input channels."""
    linear, seen = make("fp4", case), {}
    linear.op.precision.probe = lambda layer, gemm, side, x, q: seen.update({(gemm, side): q})
    run(linear, case)
    assert seen["fprop", "b"].scales.shape == (192, 1)
    assert seen["fprop", "a"].scales.shape == (128, 1)
    assert seen["dgrad", "b"].scales.shape == (1, 1)


def test_forward_and_dgrad_of_nvfp4_see_the_same_weight(case: Case) -> None:
    linear, seen = make("nvfp4", case), {}
    linear.op.precision.probe = lambda layer, gemm, side, x, q: seen.update({(gemm, side): q})
    run(linear, case)
    assert torch.equal(seen["fprop", "b"].codes, seen["dgrad", "b"].codes)
    assert torch.equal(seen["fprop", "b"].scales, seen["dgrad", "b"].scales)


def test_probe_sees_what_the_codes_stand_for(case: Case) -> None:
    """Transformed and prescaled, so that statistics need to know neither."""
    linear, seen = make("mxfp4", case), {}
    linear.op.precision.probe = lambda layer, gemm, side, x, q: seen.update({(gemm, side): (x, q)})
    run(linear, case)
    assert set(seen) == {("dgrad", "a"), ("dgrad", "b"), ("wgrad", "a"), ("wgrad", "b")}
    for x, q in seen.values():
        assert numerics.operand_statistics(x, q)["clip_rate"] == 0
        assert 14 < numerics.operand_statistics(x, q)["snr_db"] < 18


def test_dge_vector_of_the_released_code() -> None:
    """Twenty weights from -6 to 6 with dy = x = 1: the weight gradient is the slope itself."""
    half = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]
    w = torch.linspace(-6, 6, 20).bfloat16().float()[None]
    case = Case(torch.ones(1, 20), w, torch.ones(1, 1))
    dw = run(make("fp4", case), case)[2]
    torch.testing.assert_close(dw[0], torch.tensor(half + half[::-1]), rtol=2**-8, atol=0)


def test_outlier_channels_need_the_residual(generator: torch.Generator) -> None:
    """0.5 % of channels times 30: clamping alone is worse than nothing."""
    x, w = torch.randn(64, 800, generator=generator), torch.randn(96, 800, generator=generator)
    x[:, ::200] *= 30
    case = Case(x, w, torch.zeros(64, 96))
    base = get_recipe("fp4")

    def error(clamp: OCC | None) -> float:
        spec = replace(base.fprop, a=replace(base.fprop.a, clamp=clamp), b=OperandSpec("bf16"))
        return relative(make(replace(base, fprop=spec), case)(x).detach(), x @ w.T)

    only_clamp, none, both = error(OCC(residual="none")), error(None), error(OCC())
    assert only_clamp > 0.7 > none > 0.3
    assert both < 0.1


def test_magnitude_mode_compensates_as_well(case: Case) -> None:
    base = get_recipe("fp4")
    spec = replace(base.fprop, a=replace(base.fprop.a, clamp=OCC(0.97, "magnitude")))
    y = make(replace(base, fprop=spec), case)(case.x).detach()
    assert relative(y, case.x @ case.w.T) < relative(
        make("fp4-direct", case)(case.x).detach(), case.x @ case.w.T
    )


def test_saved_activation_has_its_prescale_undone(case: Case) -> None:
    """A prescaled forward operand is worth what it was before, also as the start of wgrad."""
    scaled = OperandSpec("int8", prescale=0.5)
    recipe = Recipe(
        "halved",
        fprop=GemmSpec(scaled, scaled),
        dgrad=GemmSpec(b=OperandSpec("bf16", source="fprop")),
        wgrad=GemmSpec(b=OperandSpec("bf16", source="fprop")),
    )
    for got, expected in zip(run(make(recipe, case), case), ORACLES["bf16"](case), strict=True):
        assert relative(got, expected) < 0.05


def test_column_shards_quantize_as_the_whole(case: Case) -> None:
    """Tensor parallelism of the output features: shards at multiples of 32, same codes."""

    def codes(part: slice) -> tuple[Tensor, Tensor]:
        seen = {}
        shard = replace(case, w=case.w[part], dy=case.dy[:, part])
        linear = make("mxfp4-rtn", shard)
        linear.op.precision.probe = lambda layer, gemm, side, x, q: seen.update({(gemm, side): q})
        run(linear, shard)
        return seen["dgrad", "a"].codes, seen["dgrad", "b"].codes

    whole = codes(slice(None))
    left, right = codes(slice(96)), codes(slice(96, 192))
    assert torch.equal(whole[0], torch.cat([left[0], right[0]], dim=1))
    assert torch.equal(whole[1], torch.cat([left[1], right[1]]))


@pytest.mark.parametrize("name", ["bitnet", "dqt8", "dqt8-ternary"])
def test_fused_matrices_keep_their_own_scale(name: str, case: Case) -> None:
    w = case.w * torch.tensor([1.0, 5.0, 0.2]).repeat_interleave(64)[:, None]
    whole = make("bf16", replace(case, w=w))
    fused = megafp4.Linear(160, 192, False, name, segments=(64, 64, 64))
    fused.weight = whole.weight
    if fused.recipe.grid:
        fused.to_grid()
    x = case.x.clone().requires_grad_()
    y = fused(x)
    y.backward(case.dy)
    parts, dx = [], torch.zeros_like(x)
    for rows, dy in zip(w.split(64), case.dy.split(64, 1), strict=True):
        part = replace(case, w=rows, dy=dy)
        one = run(make(name, part), part)
        parts.append(one[0])
        dx += one[1]
    assert relative(y, torch.cat(parts, 1)) < FP32_SUM
    assert x.grad is not None
    assert relative(x.grad, dx) < FP32_SUM


@pytest.mark.parametrize(
    ("kwargs", "tokens", "message"),
    [
        ({"recipe": "mxfp5"}, 64, r"unknown recipe 'mxfp5': did you mean 'mxfp4"),
        ({"backend": "volta"}, 64, r"unknown backend 'volta': .*choose one of bf16, black"),
        ({"recipe": "nvfp4", "in_features": 40}, 64, r"fprop of 'l' .* 40 input .* by 16 \(block"),
        ({"out_features": 96}, 64, r"dgrad of 'l' contracts over 96 output features, not divisible "
         r"by 64 \(block 32 of mxfp4, Hadamard block 64\): pad"),
        ({}, 96, r"wgrad of 'l' contracts over 96 tokens, not divisible by 64 \(.*\): choose"),
        ({"recipe": "mxfp4-rtn"}, 65, r"wgrad of 'l' .* 65 tokens, not divisible by 32 \(block 32"),
        ({"segments": (64, 32)}, 64, r"segments \[64, 32\] of 'l' must add up to its 64 output"),
        ({"recipe": "dqt8"}, 64, r"'l' has no grid weight yet: call to_grid\(\) first"),
        ({"recipe": "dqt8-ternary"}, 64, r"'l' has no grid weight yet"),
    ],
)  # fmt: skip
def test_errors(kwargs: dict[str, object], tokens: int, message: str) -> None:
    arguments = {"in_features": 64, "out_features": 64, "recipe": "mxfp4", "name": "l", **kwargs}
    with pytest.raises(ConfigError, match=message) as caught:
        megafp4.Linear(**arguments)(torch.zeros(tokens, 64))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'layer 0' got a torch.float64 input: give FP32"):
        megafp4.Linear(32, 32)(torch.zeros(4, 32, dtype=torch.float64))


def test_refused_combination() -> None:
    exact = Recipe("exact", fprop=GemmSpec(OperandSpec("fp32"), OperandSpec("fp32")))
    with pytest.raises(UnsupportedError, match="backend 'bf16' cannot multiply fp32 x fp32"):
        megafp4.Linear(32, 32, recipe=exact, backend="bf16")


def test_inference_needs_no_divisible_batch(case: Case) -> None:
    """Generation goes token by token: only wgrad contracts over tokens."""
    linear = make("mxfp4", case)
    with torch.no_grad():
        assert linear(case.x[:3]).shape == (3, 192)
    with torch.inference_mode():
        assert linear(case.x[:3]).shape == (3, 192)


def test_autocast_does_not_reach_the_gemms(case: Case) -> None:
    linear = make("fp8", case)
    expected = linear(case.x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(case.x), expected)


def test_set_recipe_switches_between_steps(case: Case) -> None:
    linear = make("mxfp4", case)
    linear.set_recipe("bf16")
    for got, want in zip(run(linear, case), run(make("bf16", case), case), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ConfigError, match="unknown recipe"):
        linear.set_recipe("bf17")
    narrow = megafp4.Linear(64, 48, recipe="bf16")
    with pytest.raises(ConfigError, match="48 output features"):
        narrow.set_recipe("mxfp4")
    assert narrow.recipe.name == "bf16"


def test_print_shows_every_cast() -> None:
    text = repr(megafp4.Linear(64, 64, recipe="fp4"))
    assert (
        "recipe=fp4, fprop: fp4-vector(nearest-up, OCC 0.99) x fp4-vector(nearest-up, DGE 5)"
        in text
    )
    assert "dgrad: fp8-e5m2 x fp8-e4m3(fprop)" in text


def test_copies_and_pickles_compute_the_same(case: Case) -> None:
    linear = make("mxfp4", case)
    expected = run(linear, case)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    assert buffer.tell() < linear.weight.nbytes + 20_000  # without the quantized weights
    buffer.seek(0)
    for twin in (copy.deepcopy(linear), torch.load(buffer, weights_only=False)):
        twin.weight.grad = None
        for got, want in zip(run(twin, case), expected, strict=True):
            assert torch.equal(got, want)
