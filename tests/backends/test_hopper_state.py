"""What backend hopper carries from call to call, saved and restored; kernels by twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels import it")

from megafp4.backends import BF16Backend, BlackwellBackend, HopperBackend, hopper
from megafp4.backends.hopper_state import Positions
from megafp4.errors import CheckpointError, ConfigError, UnsupportedError
from megafp4.linear import Linear
from megafp4.numerics import Key
from megafp4.precision import Precision
from megafp4.recipes import GEMMS, get_recipe, recipe_names
from megafp4.recipes.cast import CastRequest
from tests.backends import kernel_twins

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_twins, "OCTAVES", -6)  # many blocks are raised
    kernel_twins.install(monkeypatch)


def gradients(backend: HopperBackend, step: int, gain: float = 1.0) -> list[Tensor]:
    """Gradients of a linear of layer 3 whose dy is ``gain`` times the same for every step."""
    torch.manual_seed(1)
    linear = Linear(64, 128, recipe="mxfp4", backend=backend, precision=Precision(5), layer=3)
    linear.op.precision.step = step
    x = torch.randn(128, 64).bfloat16().requires_grad_()
    spread = torch.exp2(torch.arange(128) / 10)
    linear(x).backward((torch.randn(128, 128) * gain * spread).bfloat16())
    assert x.grad is not None
    assert linear.weight.grad is not None
    return [x.grad, linear.weight.grad]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resumed_backend_raises_the_same_blocks() -> None:
    straight = HopperBackend()
    gradients(straight, 0, gain=8.0)
    saved = {name: window.clone() for name, window in straight.state_dict(CPU).items()}
    # Within the reach of the base that the first step chose: one of its own would be lower.
    expected = gradients(straight, 1)

    resumed = HopperBackend()
    resumed.load_state_dict(saved, CPU)
    assert same(gradients(resumed, 1), expected)
    assert resumed.raised_blocks() == straight.raised_blocks()
    assert not same(gradients(HopperBackend(), 1), expected)


def test_loading_rewinds_windows_where_they_lie() -> None:
    backend = HopperBackend()
    fresh = {name: window.clone() for name, window in backend.state_dict(CPU).items()}
    assert fresh == {}
    first = gradients(backend, 0, gain=8.0)
    addresses = {name: window.data_ptr() for name, window in backend.state_dict(CPU).items()}
    gradients(backend, 1)
    backend.load_state_dict(fresh, CPU)
    assert set(backend.raised_blocks().values()) == {0}
    assert same(gradients(backend, 0, gain=8.0), first)
    assert {n: w.data_ptr() for n, w in backend.state_dict(CPU).items()} == addresses


def test_raised_blocks_are_counted_by_operand() -> None:
    backend = HopperBackend()
    assert backend.raised_blocks() == {}
    gradients(backend, 0)
    streams = {
        Key(0, 0, 3, gemm, side).stream: (gemm, side) for gemm in GEMMS for side in ("a", "b")
    }
    found = {streams[stream]: count for stream, count in backend.raised_blocks().items()}
    assert set(found) == {("dgrad", "a"), ("dgrad", "b"), ("wgrad", "a"), ("wgrad", "b")}
    assert found["wgrad", "a"] > 0
    gradients(backend, 0)
    assert backend.raised_blocks()[Key(0, 0, 3, "wgrad", "a").stream] == 2 * found["wgrad", "a"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"moments": torch.zeros(8, dtype=torch.int32)}, "'moments', which is not a window"),
        ({"window.x": torch.zeros(8, dtype=torch.int32)}, r"'window\.x', which is not a window"),
        ({"window.3": torch.zeros(8)}, r"'window\.3' .* torch\.float32 \[8\] instead of"),
        ({"window.3": torch.zeros(4, dtype=torch.int32)}, r"\[4\] instead of torch\.int32 \[8\]"),
    ],
)
def test_a_foreign_state_changes_nothing(state: dict[str, Tensor], message: str) -> None:
    backend = HopperBackend()
    gradients(backend, 0)
    before = {name: window.clone() for name, window in backend.state_dict(CPU).items()}
    good = {name: torch.zeros_like(window) for name, window in before.items()}
    with pytest.raises(CheckpointError, match=message):
        backend.load_state_dict({**good, **state}, CPU)
    assert before.keys() == backend.state_dict(CPU).keys()
    assert all(torch.equal(before[n], w) for n, w in backend.state_dict(CPU).items())


@pytest.mark.parametrize("backend", [BF16Backend(), BlackwellBackend()])
def test_other_backends_have_no_state(backend: BF16Backend | BlackwellBackend) -> None:
    assert (backend.state_dict(CPU), backend.raised_blocks()) == ({}, {})
    backend.load_state_dict({}, CPU)
    with pytest.raises(CheckpointError, match=rf"'window\.1' .* {backend.name!r} keeps no state"):
        backend.load_state_dict({"window.1": torch.zeros(8)}, CPU)


def test_positions_are_pinned_for_one_device() -> None:
    positions = Positions()
    spec = get_recipe("mxfp4").dgrad
    request = CastRequest(spec, "a", 1, Key(7, 2, 0, "dgrad", "a"), (32, 0))
    weight = CastRequest(spec, "b", 0, Key(7, 2, 0, "dgrad", "b"))
    assert positions.of(request, CPU).position.tolist() == [7, 2, 32, 0]
    positions.pin(2**64 - 1, 9, 64, CPU)
    pinned = positions.of(request, CPU).position
    assert pinned.tolist() == [-1, 9, 96, 0]
    assert positions.of(weight, CPU).position.tolist() == [-1, 9, 0, 0]
    other = torch.device("meta")
    assert (positions.pinned(CPU), positions.pinned(other)) == (True, False)
    assert positions.of(request, other).position.device == other
    positions.pin(1, 1, 0, other)
    positions.pin(5, 3, 96, CPU)
    assert positions.of(request, CPU).position is pinned
    assert pinned.tolist() == [5, 3, 128, 0]
    assert positions.of(request, other).position.device == other
    positions.unpin()
    assert positions.of(request, CPU).position.tolist() == [7, 2, 32, 0]


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        ("fp8", (72, 64), r"'l' has 72 input features, .*fp8-e4m3 x fp8-e4m3 \(fprop\) in mult"),
        ("fp8", (64, 72), r"72 output features, .* of 16: pad the layer, exempt it or choose"),
        ("bitnet", (64, 40), r"40 output features, .* int8 x ternary \(fprop\)"),
        ("mxfp4", (72, 64), r"72 input features, .* mxfp4 x mxfp4 \(dgrad\)"),
    ],
)
def test_widths_that_tensor_cores_cannot_take(
    recipe: str, sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Linear(*sizes, recipe=recipe, backend="hopper", name="l")
    Linear(*sizes, recipe=recipe, backend="reference")
    linear = Linear(*sizes, backend="hopper", name="l")
    with pytest.raises(UnsupportedError, match=message):
        linear.set_recipe(recipe)
    assert linear.recipe.name == "bf16"


def test_tokens_that_tensor_cores_cannot_take() -> None:
    linear = Linear(64, 64, recipe="fp8", backend="hopper", name="l")
    x = torch.randn(24, 64).bfloat16()
    with pytest.raises(UnsupportedError, match=r"24 tokens, .*\(wgrad\).* change micro-batch or"):
        linear(x)
    with torch.no_grad():
        assert linear(x).shape == (24, 64)
    with pytest.raises(ConfigError, match="wgrad of 'l' contracts over 24 tokens"):
        Linear(64, 64, recipe="mxfp4", backend="hopper", name="l")(x)


@pytest.mark.parametrize("name", recipe_names())
def test_no_tokens_give_zeros(name: str) -> None:
    linear = Linear(64, 128, recipe=name, backend="hopper", precision=Precision())
    if linear.recipe.grid is not None:
        linear.to_grid()
    x = torch.empty(2, 0, 64, dtype=torch.bfloat16, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert (y.shape, y.dtype) == ((2, 0, 128), torch.bfloat16)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert torch.equal(linear.weight.grad, torch.zeros(128, 64))
    assert torch.equal(linear.bias.grad, torch.zeros(128))
    assert linear.op.precision.ledger.total() == 0
