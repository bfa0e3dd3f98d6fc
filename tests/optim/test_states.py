"""How weights and moments are kept between steps: sizes, rounding errors, checkpoints, learning."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megafp4 import checkpoint
from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError
from megafp4.linear import Linear
from megafp4.models import QuantizedFactory
from megafp4.numerics.philox import Key
from megafp4.optim import CODECS, AdamHyper, Optimizer, StepNumbers, build_optimizer, codec_step
from megafp4.precision import Precision
from tests.models.small import build, small_config

from megafp4.optim import memory_report, quantizers as q  # isort: skip

# Bytes of weights, and of what a codec keeps beside them, of each element of a matrix.
BYTES = {
    "fp32": (4, 8),
    "bf16-sr": (2, 4),
    "fp8lm": (2, 4 + 2 / 128),
    "coat": (4, 2 + 16 / 128),
    "coat-sr": (2, 2 + 16 / 128),
    "eco": (2, 3 + 8 / 128),
}


def matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02)


def optimizer_of(states: str, **options: bool) -> Optimizer:
    params = {"embedding": matrix(40, 64), "norm": nn.Parameter(torch.ones(64)), "w": matrix(9, 70)}
    return build_optimizer(params.items(), OptimConfig(states=states), seed=7, **options)


def run(optimizer: Optimizer, first: int, last: int) -> None:
    for at in range(first, last):
        generator = torch.Generator().manual_seed(at)
        for param in optimizer.params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step(at, 1e-3, grad_scale=0.5)


def stored(optimizer: Optimizer) -> dict[str, bytes]:
    tensors = {**optimizer.state_dict(), **{n: p.detach() for n, p in optimizer.params.items()}}
    return {k: t.contiguous().view(torch.uint8).numpy().tobytes() for k, t in tensors.items()}


@pytest.mark.parametrize("states", CODECS)
def test_bytes_of_a_matrix(states: str) -> None:
    param = matrix(128, 1024)
    optimizer = build_optimizer([("w", param)], OptimConfig(states=states), 0)
    weights, kept = BYTES[states]
    report = memory_report([("w", param)], optimizer)
    assert report == {"weights": weights, "optimizer": kept, "total": weights + kept}


# Bytes of weights and of optimizer state of each parameter of a model of ten million.
OF_A_MODEL = {
    ("mxfp4", "fp32"): (4.0, 8.0),
    ("mxfp4", "bf16-sr"): (2.0, 4.0),
    ("mxfp4", "fp8lm"): (2.0, 4.02),
    ("mxfp4", "coat"): (4.0, 2.13),
    ("mxfp4", "coat-sr"): (2.0, 2.13),
    ("mxfp4", "eco"): (2.0, 3.07),
    ("dqt8", "fp32"): (1.08, 8.0),
    ("dqt8", "coat"): (1.08, 2.13),
    ("dqt8", "coat-sr"): (1.04, 2.13),
    ("dqt4", "coat-sr"): (0.55, 2.13),
}


@pytest.mark.parametrize(("recipe", "states"), OF_A_MODEL)
def test_bytes_of_a_model(recipe: str, states: str) -> None:
    """Of the memory that its tensors hold behind a step, gradients apart."""
    config = small_config(layers=12, hidden=256, heads=4, ffn_hidden=1024, vocab_size=1024)
    model = build(config, QuantizedFactory(recipe, "reference", Precision(), config.layers))
    for module in model.modules():
        if isinstance(module, Linear) and module.recipe.grid is not None:
            module.to_grid()
    params = dict(model.named_parameters())
    assert 9.5e6 < sum(param.numel() for param in params.values()) < 1.05e7
    optimizer = build_optimizer(params.items(), OptimConfig(states=states), 0)
    for param in params.values():
        param.grad = torch.zeros(()).expand(param.shape)
    optimizer.step(0, 1e-3)
    report = memory_report(params.items(), optimizer)
    weights, kept = OF_A_MODEL[recipe, states]
    assert report["weights"] == pytest.approx(weights, abs=0.03)
    assert report["optimizer"] == pytest.approx(kept, abs=0.03)
    assert recipe == "mxfp4" or states == "fp32" or report["total"] <= 5


def test_bytes_that_were_asked_for() -> None:
    assert BYTES["fp8lm"][1] <= 5.05
    assert sum(BYTES["coat-sr"]) <= 4.3  # coat, with its FP32 master, takes 6.13


@pytest.mark.parametrize("states", CODECS)
def test_vectors_keep_fp32(states: str) -> None:
    optimizer = optimizer_of(states)
    assert optimizer.params["norm"].dtype == torch.float32
    assert {t.dtype for t in optimizer.states["norm"].values()} == {torch.float32}
    assert optimizer.params["w"].dtype == CODECS[states].weight_dtype
    assert optimizer.states["w"].keys() == CODECS[states].dtypes.keys()


def reference(
    states: str, weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: AdamHyper, at: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what AdamW makes of decoded state, in FP64."""
    weight, grad, m, v = (x.double() for x in (weight, grad, m, v))
    m = hyper.betas[0] * m + (1 - hyper.betas[0]) * grad
    v = hyper.betas[1] * v + (1 - hyper.betas[1]) * grad.square()
    root = (v / (1 - hyper.betas[1] ** (at + 1))).sqrt() + hyper.eps
    move = hyper.lr * (m / (1 - hyper.betas[0] ** (at + 1))) / root
    return weight * (1 - hyper.lr * hyper.weight_decay) - move, m, v


def within_e4m3(found: Tensor, exact: Tensor) -> bool:
    """Half a step of 3 mantissa bits, or of the subnormals that start 2^-14.8 below the top."""
    largest = exact.abs().amax(1, keepdim=True)
    return bool(((found - exact).abs() <= exact.abs() / 16 + largest * 2.0**-17).all())


def within_fp16(found: Tensor, exact: Tensor) -> bool:
    """Half a step of 10 mantissa bits, or of the subnormals that start 2^-28 below the top."""
    largest = exact.abs().amax(1, keepdim=True)
    return bool(((found - exact).abs() <= exact.abs() * 2.0**-11 + largest * 2.0**-39).all())


def within_expansion(found: Tensor, exact: Tensor, power: Tensor) -> bool:
    """Half a step of E4M3, an eighth of an octave or half of one below 2^-6, over the power."""
    magnitude = exact.abs()
    largest = magnitude.amax(1, keepdim=True)
    half_step = torch.where(magnitude > largest * 2 ** (-14.5 / power), 1 / 16, 1 / 2) / power
    return bool(((found - exact).abs() <= half_step * magnitude * 1.05).all())


@pytest.mark.parametrize("states", CODECS)
def test_a_step_is_adamw_in_fp64_but_for_the_documented_rounding(states: str) -> None:
    codec = CODECS[states]
    generator = torch.Generator().manual_seed(1)
    param = matrix(64, 128)
    state = codec.adopt(param)
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    for at in range(6):
        grad = torch.randn(64, 128, generator=generator) * torch.logspace(-2, 2, 128)
        weight, m, v = (x.clone().view(64, 128) for x in codec.decode(param.detach(), state))
        exact = reference(states, weight, grad, m, v, hyper, at)
        numbers = StepNumbers.of(hyper, at)
        draw = q.Draw(Key(5, at, 0, "update", "a"))
        codec_step(codec, param.detach(), grad, state, numbers, 1.0, draw)
        found = [x.view(64, 128).double() for x in codec.decode(param.detach(), state)]
        weight_step = {"fp32": 2.0**-22, "coat": 2.0**-22, "fp8lm": 2.0**-16, "eco": 2.0**-8}
        error = (found[0] - exact[0]).abs()
        assert (error <= weight_step.get(states, 2.0**-7) * exact[0].abs() + 1e-7).all()
        if states == "fp32":
            assert ((found[1] - exact[1]).abs() <= 1e-6 * (exact[1].abs() + grad.abs())).all()
            torch.testing.assert_close(found[2], exact[2], rtol=1e-5, atol=0)
        elif states == "bf16-sr":
            torch.testing.assert_close(found[1], exact[1], rtol=2.0**-8, atol=1e-6)
            torch.testing.assert_close(found[2], exact[2], rtol=2.0**-7, atol=0)
        elif states == "fp8lm":
            assert within_e4m3(found[1], exact[1])
            assert within_fp16(found[2], exact[2])
        elif states == "eco":
            # The virtual weight of the paper lacks nothing but the rounding of the moments.
            root = (exact[2] / (1 - 0.95 ** (at + 1))).sqrt() + 1e-8
            alpha = (1 - 0.9 ** (at + 1)) / 1e-2 * (1 - 1 / 0.9) * root
            m = exact[1] + alpha * (exact[0] - found[0])
            slack = 1e-5 * (m.abs() + root)
            assert ((found[1] - m).abs() <= 2.0**-8 * m.abs() + slack).all()
            assert within_expansion(found[2], exact[2], state["ranges"][:, 1:2])
        else:
            assert within_expansion(found[1], exact[1], state["ranges"][:, 1:2])
            assert within_expansion(found[2], exact[2], state["ranges"][:, 3:4])


def test_a_master_of_24_bits_is_split_and_joined_exactly() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -1e-40, 1.00390625, 1.01171875])
    x = torch.cat([x, special])
    high, low = q.split_24_bits(x)
    joined = q.join_24_bits(high, low)
    assert ((joined - x).abs() <= x.abs() * 2.0**-16 + 2.0**-140)[x.isfinite() & (x < 3e38)].all()
    again = q.split_24_bits(joined)
    assert torch.equal(again[0].view(torch.int16), high.view(torch.int16))
    assert torch.equal(again[1], low)
    # The model reads the nearest BF16 number; the last two are ties of the master's.
    nearest = (high.double() - joined.double()).abs() <= (joined.bfloat16() - joined).abs()
    assert nearest[joined.isfinite() & (joined.abs() < 3e38)].all()
    assert q.join_24_bits(*q.split_24_bits(torch.tensor([-math.nan]))).isnan().all()


def test_expansion_loses_hardly_more_than_the_exact_power_of_the_paper() -> None:
    """Against 448 (|x| / max)^k in FP64, with logarithms that are no lines between powers of 2."""
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    for values in (x, x.square(), x.square() * torch.logspace(-3, 3, 128)):
        largest, power = q.expansion(values)
        ours = q.contract(q.expand(values, largest, power), largest, power)
        magnitude = values.double().abs()
        top, low = magnitude.amax(1, keepdim=True), magnitude.amin(1, keepdim=True)
        k = (16 * math.log2(448**2 / 2) / (top / low).log2()).floor() / 16
        code = (448 * (magnitude / top) ** k).float().to(torch.float8_e4m3fn).double()
        theirs = (code / 448) ** (1 / k) * top * values.sign()
        ours_rms, theirs_rms = (
            ((y - values).square().sum() / values.double().square().sum()).sqrt()
            for y in (ours.double(), theirs)
        )
        assert ours_rms < 1.1 * theirs_rms


def test_expansion_keeps_what_has_no_logarithm() -> None:
    x = torch.zeros(4, 128)
    x[1, 0], x[2], x[3, :2] = -3.0, 5.0, torch.tensor([1e-18, 3e18])
    largest, power = q.expansion(x)
    back = q.contract(q.expand(x, largest, power), largest, power)
    assert torch.equal(back[:3], x[:3])
    assert back[3, 0] > 0
    assert (power[:3] == 16).all()
    assert power[3] == 0.125


def test_stochastic_rounding_to_bf16_has_no_bias_and_leaves_bf16_alone() -> None:
    random = q.random_words(q.Draw(Key(3, 1, 0, "update", "a")), 1 << 16, torch.device("cpu"))
    assert random.min() >= 0
    assert random.max() < 1 << 32
    x = torch.full((1 << 9, 128), 1.0 + 2.0**-7 * 0.3)
    for half in (random & 0xFFFF, random >> 16):
        rounded = q.round_to_bf16(x, half)
        assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2.0**-7}
        ups = (rounded > 1).double().mean().item()
        assert abs(ups - 0.3) < 5 * math.sqrt(0.3 * 0.7 / (1 << 16))
    kept = torch.tensor([1.5, -math.inf, math.inf, 0.0])
    assert torch.equal(q.round_to_bf16(kept, torch.full((4,), 0xFFFF)).float(), kept)
    assert q.round_to_bf16(torch.tensor([math.nan]), torch.tensor([0xFFFF])).isnan().all()


def test_bits_are_drawn_for_seed_step_and_parameter() -> None:
    def weight(seed: int, at: int, index: int) -> Tensor:
        params = [(str(i), nn.Parameter(torch.ones(16, 16))) for i in range(index + 1)]
        config = OptimConfig(states="bf16-sr", weight_decay=0.0)
        optimizer = build_optimizer(params, config, seed)
        params[index][1].grad = torch.ones(16, 16)
        optimizer.step(at, 1e-3)
        return params[index][1].detach().clone()

    first = weight(1, 5000, 0)
    assert torch.equal(first, weight(1, 5000, 0))
    for other in ((2, 5000, 0), (1, 5001, 0), (1, 5000, 1)):
        assert not torch.equal(first, weight(*other))


@pytest.mark.parametrize("states", CODECS)
def test_a_resumed_run_is_the_same_bit_for_bit(states: str, tmp_path: Path) -> None:
    straight, first, second = (optimizer_of(states) for _ in range(3))
    run(straight, 0, 6)
    run(first, 0, 3)
    weights = {name: param.detach() for name, param in first.params.items()}
    checkpoint.save(tmp_path, 3, {"model": weights, "optimizer": first.state_dict()}, {}, keep=1)
    saved = checkpoint.load(tmp_path)
    for name, param in second.params.items():
        param.detach().copy_(saved.tensors["model"][name])
    second.load_state_dict(saved.tensors["optimizer"])
    run(second, 3, 6)
    assert stored(second) == stored(straight)


def test_state_of_another_codec_is_refused_by_name() -> None:
    """But for coat and coat-sr, which differ in the type of the weight alone."""
    alike = {"coat", "coat-sr"}
    for theirs in CODECS:
        for mine in CODECS.keys() - (alike if theirs in alike else {theirs}):
            optimizer = optimizer_of(mine)
            before = stored(optimizer)
            named = "'coat' or 'coat-sr'" if theirs in alike else f"'{theirs}'"
            message = f"states {named} does and this one as '{mine}': set optim.states to"
            with pytest.raises(CheckpointError, match=re.escape(message)):
                optimizer.load_state_dict(optimizer_of(theirs).state_dict())
            assert stored(optimizer) == before


def test_weights_that_a_codec_does_not_keep_are_refused() -> None:
    half = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    for states in ("fp32", "coat"):
        with pytest.raises(ConfigError, match=r"'w' is torch.bfloat16: keep parameters"):
            build_optimizer([("w", half)], OptimConfig(states=states), 0)
    assert build_optimizer([("w", half)], OptimConfig(states="fp8lm"), 0).params["w"] is half


@pytest.mark.parametrize("states", ["bf16-sr", "fp8lm"])
def test_gradients_of_bf16_weights_are_fp32(states: str) -> None:
    optimizer = optimizer_of(states)
    embedding = optimizer.params["embedding"]
    for factor in (1.0, 2.0**-12):
        (embedding.float() * factor).sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.dtype == torch.float32
    assert (embedding.grad == 1 + 2.0**-12).all()


@pytest.mark.parametrize("states", CODECS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_largest_weight_is_known_after_a_step(states: str, fused: bool) -> None:
    optimizer = optimizer_of(states, fused=fused, weight_amax=True)
    assert optimizer.weight_amax.keys() == optimizer.params.keys()
    places = {name: amax.data_ptr() for name, amax in optimizer.weight_amax.items()}

    def assert_known() -> None:
        for name, param in optimizer.params.items():
            amax = optimizer.weight_amax[name]
            assert amax.shape == (1,)
            assert amax.dtype == torch.float32
            assert amax.item() == param.detach().float().abs().max().item()

    assert_known()
    run(optimizer, 0, 3)
    assert_known()
    optimizer.params["w"].grad = None
    optimizer.step(3, 1e-2)
    assert_known()
    flag, scale = torch.ones(()), torch.tensor(math.nan, dtype=torch.float64)
    optimizer.step(4, 1e-2, scale, flag)
    assert_known()
    assert places == {name: amax.data_ptr() for name, amax in optimizer.weight_amax.items()}
    assert optimizer_of(states).weight_amax == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("states", CODECS)
def test_a_gpu_keeps_the_bits_of_the_cpu(states: str) -> None:
    exact = optimizer_of(states, weight_amax=True)
    params = {
        name: nn.Parameter(p.detach().cuda()) for name, p in optimizer_of("fp32").params.items()
    }
    config = OptimConfig(states=states)
    fused = build_optimizer(params.items(), config, seed=7, fused=True, weight_amax=True)
    run(exact, 0, 3)
    for at in range(3):
        generator = torch.Generator().manual_seed(at)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).cuda()
        scale = torch.tensor(0.5, dtype=torch.float64, device="cuda")
        fused.step(at, 1e-3, scale, torch.zeros((), device="cuda"))
    for name, tensor in fused.state_dict().items():
        assert torch.equal(
            tensor.cpu().view(torch.uint8), exact.state_dict()[name].view(torch.uint8)
        ), name
    for name, param in params.items():
        assert torch.equal(param.detach().cpu(), exact.params[name].detach()), name
        assert fused.weight_amax[name].item() == exact.weight_amax[name].item()


@pytest.mark.parametrize("states", CODECS)
def test_a_part_of_a_parameter_moves_as_it_does_in_the_whole(states: str) -> None:
    """Cut at multiples of 128: the parts' bits are those of the whole, drawn ones included."""
    codec = CODECS[states]
    whole = matrix(7, 100)
    cuts = [(0, 256), (256, 384), (384, 700)]
    parts = [nn.Parameter(whole.detach().view(-1)[a:b].clone()) for a, b in cuts]
    state, kept = codec.adopt(whole), [codec.adopt(part) for part in parts]
    for at in range(3):
        grad = torch.randn(7, 100, generator=torch.Generator().manual_seed(at))
        numbers = StepNumbers.of(AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1), at)
        key = Key(5, at, 3, "update", "a")
        codec_step(codec, whole.detach(), grad, state, numbers, 1.0, q.Draw(key))
        for (a, b), part, own in zip(cuts, parts, kept, strict=True):
            piece = grad.view(-1)[a:b]
            codec_step(codec, part.detach(), piece, own, numbers, 1.0, q.Draw(key, a))
    joined = torch.cat([part.detach() for part in parts])
    assert torch.equal(joined, whole.detach().view(-1))
    for kind in codec.element_dtypes:
        found = torch.cat([own[kind].view(torch.uint8) for own in kept])
        assert torch.equal(found, state[kind].view(-1).view(torch.uint8)), kind
    for kind in codec.group_dtypes:
        assert torch.equal(torch.cat([own[kind] for own in kept]), state[kind]), kind
