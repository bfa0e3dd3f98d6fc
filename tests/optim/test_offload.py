"""State in host memory: the bits of a step without offload, in a bounded part of the device."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megafp4 import checkpoint
from megafp4.config import OptimConfig
from megafp4.errors import UnsupportedError
from megafp4.numerics.grid import GridWeight
from megafp4.optim import CODECS, Optimizer, build_optimizer, offload

WINDOW = 4096


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of the tests take several windows, and vectors share one."""
    monkeypatch.setattr(offload, "WINDOW_ELEMENTS", WINDOW)


def make(states: str, offloaded: bool, device: str = "cpu", **options: Any) -> Optimizer:
    torch.manual_seed(0)
    grids = [
        GridWeight.from_dense(torch.randn(shape).to(device), bits, layer=layer).parameter()
        for layer, (shape, bits) in enumerate([((50, 256), 8), ((70, 33), 1.58)])
    ]
    shapes = {"embedding": (41, 300), "norm": (64,), "w": (9, 70), "none": (0, 3), "up": (32, 256)}
    params = {n: nn.Parameter((0.02 * torch.randn(s)).to(device)) for n, s in shapes.items()}
    params |= {"grid": grids[0]}
    if states != "coat-sr" and device == "cpu":
        params |= {"odd": grids[1]}
    config = OptimConfig(states=states, offload=offloaded)  # type: ignore[arg-type]
    return build_optimizer(params.items(), config, seed=7, **options)


def run(optimizer: Optimizer, first: int, last: int) -> None:
    for at in range(first, last):
        generator = torch.Generator().manual_seed(at)
        for name, param in optimizer.params.items():
            grad = torch.randn(param.shape, generator=generator).to(param.device)
            # A parameter without a gradient leaves others in other windows.
            param.grad = None if name == "w" and at == 1 else grad
        optimizer.step(at, 1e-3, grad_scale=0.5)


def stored(optimizer: Optimizer) -> dict[str, Tensor]:
    found = {f"state.{n}": t.clone() for n, t in optimizer.state_dict().items()}
    for name, param in optimizer.params.items():
        grid = getattr(param, "grid", None)
        found[name] = (param.detach() if grid is None else grid.codes).clone()
    found |= {f"amax.{n}": t.clone() for n, t in optimizer.weight_amax.items()}
    return {name: tensor.cpu().view(torch.uint8) for name, tensor in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def flips(optimizer: Optimizer) -> dict[str, tuple[int, int, int]]:
    return {
        name: (int(one.flips), int(one.saturated), one.numel)
        for name, one in optimizer.grid_statistics.items()
    }


@pytest.mark.parametrize("states", CODECS)
def test_bits_are_those_without_offload(states: str) -> None:
    plain, streamed = (make(states, each, weight_amax=True) for each in (False, True))
    assert_same(stored(streamed), stored(plain))
    for at in range(3):
        run(plain, at, at + 1)
        run(streamed, at, at + 1)
        assert_same(stored(streamed), stored(plain))
        assert flips(streamed) == flips(plain) != {}
    assert streamed.state_bytes() == plain.state_bytes()


@pytest.mark.parametrize("states", ["fp32", "fp8lm"])
def test_a_skipped_step_moves_nothing(states: str) -> None:
    optimizer = make(states, True, weight_amax=True)
    run(optimizer, 0, 1)
    before = stored(optimizer)
    for param in optimizer.params.values():
        param.grad = torch.full(param.shape, math.nan)
    optimizer.step(1, 1e-3, torch.tensor(math.nan, dtype=torch.float64), torch.ones(()))
    assert_same(stored(optimizer), before)


@pytest.mark.parametrize("states", ["fp32", "coat-sr"])
def test_a_checkpoint_goes_on_with_offload_and_without(states: str, tmp_path: Path) -> None:
    expected = make(states, False)
    run(expected, 0, 3)
    for first in (False, True):
        optimizer = make(states, first)
        run(optimizer, 0, 1)
        folder = tmp_path / str(first)
        checkpoint.save(folder, 1, {"optimizer": optimizer.state_dict()}, {})
        other = make(states, not first)
        for name, param in optimizer.params.items():
            mine, grid = other.params[name], getattr(param, "grid", None)
            if grid is None:
                mine.data.copy_(param.detach())
            else:
                mine.grid.load_state_dict(grid.state_dict())  # type: ignore[attr-defined]
        other.load_state_dict(checkpoint.load(folder).tensors["optimizer"])
        run(other, 1, 3)
        assert_same(stored(other), stored(expected))


@pytest.mark.parametrize("states", ["fp32", "fp8lm"])
def test_buffers_do_not_grow_with_the_model(states: str) -> None:
    sizes = []
    for count in (1, 9):
        params = {str(i): nn.Parameter(torch.ones(64, 256)) for i in range(count)}
        config = OptimConfig(states=states, offload=True)  # type: ignore[arg-type]
        optimizer = build_optimizer(params.items(), config, seed=7)
        assert optimizer._host is not None
        sizes.append(optimizer._host.device_bytes)
        assert optimizer.state_bytes() * 2 * WINDOW == sizes[-1] * count * 64 * 256
    assert sizes[0] == sizes[1]


def test_rows_that_no_window_holds_are_refused() -> None:
    param = GridWeight.from_dense(torch.randn(20, 999), 8).parameter()
    optimizer = build_optimizer([("w", param)], OptimConfig(offload=True), seed=7)
    param.grad = torch.randn(20, 999)
    with pytest.raises(UnsupportedError, match=r"streams 'w' in runs of 1024 rows of 999, more"):
        optimizer.step(0, 1e-3)


class LateStream:
    """A stream that does nothing before somebody waits for it, and then no more than it must."""

    current: Any = None

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.done = 0

    def __enter__(self) -> None:
        LateStream.current = self

    def __exit__(self, *_: object) -> None:
        LateStream.current = None

    def run(self, stop: int) -> None:
        while self.done < stop:
            self.done += 1
            self.work[self.done - 1]()

    def record_event(self) -> Callable[[], None]:
        return partial(self.run, len(self.work))

    def wait_event(self, event: Callable[[], None]) -> None:
        self.work.append(event)

    def wait_stream(self, other: "LateStream") -> None:
        self.work.append(other.record_event())

    def synchronize(self) -> None:
        self.run(len(self.work))


class PromptStream(LateStream):
    """The stream that computes: it waits at once."""

    def wait_event(self, event: Callable[[], None]) -> None:
        event()


class LateBytes:
    """Memory that is written when the stream of the copy comes to it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def copy_(self, source: "LateBytes", non_blocking: bool) -> None:
        assert non_blocking
        LateStream.current.work.append(lambda: self.memory.copy_(source.memory))


def late_window_of(host: Any, make_window: Any, spans: Any) -> Any:
    window = make_window(host, spans)
    window.copies = [(LateBytes(one), LateBytes(other)) for one, other in window.copies]
    return window


def stream_late(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give an optimizer streams that copy as late as they may."""
    window, computing = offload.HostStates._window, PromptStream()
    monkeypatch.setattr(offload.HostStates, "_window", partialmethod(late_window_of, window))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert optimizer._host is not None
    optimizer._host._in, optimizer._host._out = LateStream(), LateStream()


@pytest.mark.parametrize("states", ["fp32", "coat"])
def test_copies_are_waited_for_however_late_they_are(
    states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, streamed = (make(states, each) for each in (False, True))
    stream_late(streamed, monkeypatch)
    for at in range(4):
        run(plain, at, at + 1)
        run(streamed, at, at + 1)
        if at != 1:  # nobody looks between two of the steps
            assert_same(stored(streamed), stored(plain))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="which a CUDA graph cannot record"):
        run(streamed, 4, 5)


def test_windows_of_other_parameters_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []
    for offloaded in (False, True):
        params = {name: nn.Parameter(torch.ones(4, 64)) for name in "ab"}
        config = OptimConfig(offload=offloaded)
        optimizers.append(build_optimizer(params.items(), config, seed=7))
    stream_late(optimizers[1], monkeypatch)
    for at in range(5):
        for optimizer in optimizers:
            # All in one window, "b" alone in one of the other buffer, and all again.
            optimizer.params["a"].grad = None if at in (1, 3) else torch.full((4, 64), 1.0 + at)
            optimizer.params["b"].grad = torch.full((4, 64), 2.0 - at)
            optimizer.step(at, 1e-3)
    assert_same(*map(stored, optimizers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("states", CODECS)
def test_a_gpu_streams_the_bits_of_the_cpu(states: str) -> None:
    exact = make(states, False, weight_amax=True)
    exact.params.pop("odd", None)
    streamed = make(states, True, "cuda", fused=True, weight_amax=True)
    run(exact, 0, 3)
    run(streamed, 0, 3)
    expected = {n: t for n, t in stored(exact).items() if not n.endswith("odd")}
    assert_same(stored(streamed), expected)
    plain = make(states, False, "cuda", fused=True, weight_amax=True)
    run(plain, 0, 3)
    assert_same(stored(streamed), stored(plain))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_cannot_record_a_step() -> None:
    params = {"w": nn.Parameter(torch.ones(64, 256, device="cuda"))}
    config = replace(OptimConfig(), offload=True)
    optimizer = build_optimizer(params.items(), config, seed=7, fused=True)
    params["w"].grad = torch.ones(64, 256, device="cuda")
    optimizer.step(0, 1e-3)
    with (
        pytest.raises(UnsupportedError, match="which a CUDA graph cannot record"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step(1, 1e-3)
