"""Dense parameters follow torch.optim.AdamW, grid parameters follow Direct Quantized Training."""

import math

import pytest
import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.errors import CheckpointError, ConfigError, DivergenceError
from megafp4.numerics.grid import GridWeight
from megafp4.optim import Optimizer, build_optimizer, memory_report

CONFIG = OptimConfig(weight_decay=0.1)


def grid_parameter(shape=(6, 8), bits: float = 8, layer: int = 0) -> nn.Parameter:
    return GridWeight.from_dense(torch.randn(shape) * 0.02, bits, layer=layer).parameter()


def set_gradients(optimizer: Optimizer, scale: float = 1.0) -> None:
    for param in optimizer.params.values():
        param.grad = torch.randn(param.shape) * scale


def stored(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every bit that training keeps."""
    state = {f"state.{k}": v.clone() for k, v in optimizer.state_dict().items()}
    for name, param in optimizer.params.items():
        grid = getattr(param, "grid", None)
        state[name] = (param.detach() if grid is None else grid.codes).clone()
    return state


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def mixed() -> Optimizer:
    params = {
        "embedding": nn.Parameter(torch.randn(9, 8)),
        "norm": nn.Parameter(torch.ones(8)),
        "a": grid_parameter(layer=0),
        "b": grid_parameter(bits=1.58, layer=1),
    }
    return build_optimizer(params.items(), CONFIG, seed=11)


def test_a_dense_model_trains_as_under_torch_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    twin = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    twin.load_state_dict(model.state_dict())
    groups = [
        {"params": [p for p in twin.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps, foreach=False)
    ours = build_optimizer(model.named_parameters(), CONFIG, seed=0)
    for step in range(25):
        lr = 0.01 / (1 + step)
        x = torch.randn(16, 5)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        ours.step(step, lr, grad_scale=0.5)
        for group in theirs.param_groups:
            group["lr"] = lr
        for param in twin.parameters():
            param.grad.mul_(0.5)
        theirs.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_gradients_survive_the_step_and_zero_grad_drops_them() -> None:
    optimizer = mixed()
    set_gradients(optimizer)
    before = {name: param.grad.clone() for name, param in optimizer.params.items()}
    optimizer.step(0, 1e-3, grad_scale=0.25)
    assert_same(before, {name: param.grad for name, param in optimizer.params.items()})
    optimizer.zero_grad()
    assert all(param.grad is None for param in optimizer.params.values())


def test_parameters_without_gradient_stay_with_their_moments() -> None:
    optimizer = mixed()
    before = stored(optimizer)
    optimizer.step(0, 1e-3)
    assert_same(before, stored(optimizer))
    assert optimizer.grid_statistics == {}


def test_frozen_parameters_are_left_out() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert build_optimizer([("frozen", frozen)], CONFIG, 0).params == {}


def test_only_matrices_decay() -> None:
    optimizer = mixed()
    decays = {name: optimizer.decay_of(param) for name, param in optimizer.params.items()}
    assert decays == {"embedding": 0.1, "norm": 0.0, "a": 0.1, "b": 0.1}


def test_grid_parameters_move_on_their_grid_and_report_it() -> None:
    optimizer = mixed()
    scale = optimizer.params["a"].grid.scale.clone()
    before = stored(optimizer)
    set_gradients(optimizer)
    optimizer.step(0, 1e-3)
    after = stored(optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"embedding", "norm", "a", "state.exp_avg.a", "state.exp_avg_sq.b"} <= changed
    assert torch.equal(optimizer.params["a"].grid.scale, scale)
    assert optimizer.grid_statistics.keys() == {"a", "b"}
    flips = (before["a"] != after["a"]).double().mean().item()
    assert optimizer.grid_statistics["a"].flip_rate == flips > 0
    assert 0 <= optimizer.grid_statistics["b"].saturation_rate <= 1
    assert optimizer.params["a"].isnan().all()


def run(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for param in optimizer.params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step(step, 1e-3)


def test_resume_is_exact_stochastic_rounding_included() -> None:
    torch.manual_seed(1)
    straight = mixed()
    torch.manual_seed(1)
    first = mixed()
    torch.manual_seed(2)
    second = mixed()
    run(straight, 0, 6)
    run(first, 0, 3)
    second.load_state_dict(first.state_dict())
    for name, param in second.params.items():
        source = first.params[name]
        if hasattr(param, "grid"):
            param.grid.load_state_dict(source.grid.state_dict())
        else:
            param.data.copy_(source.data)
    torch.rand(100)  # the global generator plays no part
    run(second, 3, 6)
    assert_same(stored(straight), stored(second))


def test_seed_and_step_choose_the_random_bits() -> None:
    def codes(seed: int, step: int) -> Tensor:
        torch.manual_seed(0)
        param = grid_parameter((64, 64))
        optimizer = build_optimizer([("a", param)], OptimConfig(weight_decay=0.0), seed)
        param.grad = torch.ones(64, 64)
        # One step at this index with the moments of a first one: only the draw may differ.
        for moment in optimizer.states["a"].values():
            moment.fill_(1.0)
        optimizer.step(step, 1e-5)
        return param.grid.codes

    assert torch.equal(codes(1, 5000), codes(1, 5000))
    assert not torch.equal(codes(1, 5000), codes(2, 5000))
    assert not torch.equal(codes(1, 5000), codes(1, 5001))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_moves_nothing(scale: float) -> None:
    optimizer = mixed()
    set_gradients(optimizer)
    before = stored(optimizer)
    with pytest.raises(DivergenceError, match="gradients of step 7 hold NaN or Inf"):
        optimizer.step(7, 1e-3, grad_scale=scale)
    assert_same(before, stored(optimizer))


def test_a_nan_gradient_of_a_grid_parameter_is_an_error_and_not_a_code() -> None:
    param = grid_parameter()
    optimizer = build_optimizer([("a", param)], CONFIG, 0)
    before = param.grid.codes.clone()
    param.grad = torch.zeros(6, 8)
    param.grad[2, 3] = math.nan
    with pytest.raises(DivergenceError, match="weight update is NaN or Inf"):
        optimizer.step(0, 1e-3)
    assert torch.equal(param.grid.codes, before)


def test_state_is_flat_named_and_measured() -> None:
    optimizer = mixed()
    assert list(optimizer.state_dict()) == [
        f"{kind}.{name}"
        for name in ("embedding", "norm", "a", "b")
        for kind in ("exp_avg", "exp_avg_sq")
    ]
    assert optimizer.state_bytes() == 2 * 4 * (9 * 8 + 8 + 48 + 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg.norm": None}, "lacks 'exp_avg.norm'"),
        ({"exp_avg.zzz": torch.zeros(1)}, "has an unknown 'exp_avg.zzz'"),
        ({"exp_avg.norm": torch.zeros(9)}, r"'exp_avg.norm' .* torch.float32 \[9\], expected"),
        ({"exp_avg_sq.a": torch.zeros(6, 8).half()}, "torch.float16"),
    ],
)
def test_state_of_another_model_is_refused_and_nothing_is_copied(change, message) -> None:
    optimizer = mixed()
    before = stored(optimizer)
    foreign = {name: torch.ones_like(t) for name, t in optimizer.state_dict().items()} | change
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict({k: v for k, v in foreign.items() if v is not None})
    assert_same(before, stored(optimizer))


def test_parameters_that_cannot_be_optimized() -> None:
    shared = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ConfigError, match=r"'head' was given twice \(first as 'embedding'\)"):
        build_optimizer([("embedding", shared), ("head", shared)], CONFIG, 0)
    half = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"'w' is torch.bfloat16: keep parameters in torch"):
        build_optimizer([("w", half)], CONFIG, 0)
    pair = [("a", grid_parameter(layer=3)), ("b", grid_parameter(layer=3))]
    with pytest.raises(ConfigError, match="'a' and 'b' both have layer id 3"):
        build_optimizer(pair, CONFIG, 0)


def test_memory_of_a_dense_model_is_4_plus_8_bytes() -> None:
    model = nn.Linear(16, 16)
    optimizer = build_optimizer(model.named_parameters(), CONFIG, 0)
    assert memory_report(model.named_parameters(), optimizer) == {
        "weights": 4.0,
        "optimizer": 8.0,
        "total": 12.0,
    }


@pytest.mark.parametrize(("bits", "code_bytes"), [(8, 1.0), (4, 0.5), (3, 0.5), (1.58, 0.25)])
def test_memory_of_a_grid_weight_is_its_codes_and_scales(bits: float, code_bytes: float) -> None:
    param = grid_parameter((64, 128), bits)
    optimizer = build_optimizer([("a", param)], CONFIG, 0)
    report = memory_report([("a", param)], optimizer)
    overhead = (64 * 4 + 4) / (64 * 128)
    assert report["weights"] == code_bytes + overhead
    assert report["total"] == code_bytes + overhead + 8.0


def test_memory_counts_shared_memory_once() -> None:
    shared = nn.Parameter(torch.ones(4, 4))
    optimizer = build_optimizer([("embedding", shared)], CONFIG, 0)
    named = [("embedding", shared), ("head", shared)]
    assert memory_report(named, optimizer)["weights"] == 4.0


def test_a_fused_optimizer_leaves_grid_parameters_their_own_step() -> None:
    torch.manual_seed(20260)
    exact = mixed()
    torch.manual_seed(20260)
    fused = build_optimizer(mixed().params.items(), CONFIG, seed=11, fused=True)
    for mine, other in zip(fused.params.values(), exact.params.values(), strict=True):
        other.grad = torch.randn(other.shape)
        mine.grad = other.grad.clone()
    for optimizer in (exact, fused):
        optimizer.step(3, 1e-2, grad_scale=0.5)
    assert_same(stored(exact), stored(fused))
    assert not fused.can_run_ahead
    assert fused.grid_statistics.keys() == {"a", "b"}


def test_grid_weights_follow_a_tensor_scale_and_a_flag_too() -> None:
    found = []
    for scale, skip in ((0.25, None), (torch.tensor(0.25).double(), 0.0), (torch.tensor(9.0), 1.0)):
        torch.manual_seed(1)
        optimizer = mixed()
        set_gradients(optimizer)
        before = stored(optimizer)
        flag = None if skip is None else torch.tensor(skip)
        optimizer.step(0, 1e-2, grad_scale=scale, skip=flag)
        found.append(stored(optimizer))
        flips = sum(int(one.flips) for one in optimizer.grid_statistics.values())
        assert (flips > 0) == (skip != 1.0)
    assert_same(found[0], found[1])
    assert_same(before, found[2])


def test_a_tensor_scale_is_a_number_and_a_flag_stops_the_step() -> None:
    def dense() -> Optimizer:
        torch.manual_seed(1)
        params = {"w": nn.Parameter(torch.randn(9, 8)), "b": nn.Parameter(torch.randn(8))}
        optimizer = build_optimizer(params.items(), CONFIG, seed=0, fused=True)
        set_gradients(optimizer)
        return optimizer

    numbers, tensors, skipped = dense(), dense(), dense()
    assert tensors.can_run_ahead
    before = stored(skipped)
    numbers.step(0, 1e-2, grad_scale=0.25)
    go = torch.zeros((), dtype=torch.float32)
    tensors.step(0, 1e-2, grad_scale=torch.tensor(0.25, dtype=torch.float64), skip=go)
    skipped.step(0, 1e-2, grad_scale=torch.tensor(math.nan, dtype=torch.float64), skip=go + 1)
    assert_same(stored(numbers), stored(tensors))
    assert_same(before, stored(skipped))
