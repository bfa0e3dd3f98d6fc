"""The kernel of Direct Quantized Training against its specification, bit for bit."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from megafp4.numerics.formats import Integer
from megafp4.numerics.grid import GRID_FORMATS, GridWeight
from megafp4.numerics.philox import Key
from megafp4.numerics.shards import Origin
from megafp4.optim.adamw import AdamHyper
from megafp4.optim.dqt import GridNumbers, grid_step
from megafp4.optim.states import CoatStates, FP32States, GridCodec, State
from tests.kernels.triton_device import DEVICE, gpu_only

from megafp4_kernels.adamw_grid import Draw, Grid, fits, grid_adamw  # isort: skip

SEED = (1 << 40) + 5
CODECS: list[GridCodec] = [FP32States(), CoatStates()]


class Twins:
    """A weight twice: for the specification on the CPU, and for the kernel."""

    def __init__(
        self, codec: GridCodec, bits: float, shape: tuple[int, int], origin: Origin = (0, 0)
    ) -> None:
        self.codec, self.shape = codec, shape
        self.generator = torch.Generator().manual_seed(shape[0])
        weight = torch.randn(shape, generator=self.generator) * 0.02
        self.exact = GridWeight.from_dense(weight, bits, range=2.0, layer=3, origin=origin)
        self.exact.scale *= torch.rand(self.exact.scale.shape, generator=self.generator) + 0.5
        self.fused = copy.deepcopy(self.exact)
        self.fused.codes = self.fused.codes.to(DEVICE)
        self.fused.scale = self.fused.scale.to(DEVICE)
        self.exact_state = codec.adopt(nn.Parameter(torch.zeros(shape)))
        self.state: State = {n: t.clone().to(DEVICE) for n, t in self.exact_state.items()}

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """Return a gradient over six orders of magnitude, a tenth of it zero."""
        grad = torch.randn(self.shape, generator=self.generator)
        size = torch.rand(self.shape, generator=self.generator) * 6 - 4
        keep = torch.rand(self.shape, generator=self.generator) > 0.1
        return (grad * 10**size * keep).to(dtype)

    def launch(
        self, grad: Tensor, at: int, hyper: AdamHyper, scale: float, skip: float = 0.0
    ) -> list[int]:
        element = self.fused.format.element
        assert isinstance(element, Integer)
        line, first_col = self.fused.origin
        assert isinstance(first_col, int)
        runs = ((line, self.shape[0]),) if isinstance(line, int) else line
        lines = torch.cat([torch.arange(first, first + n) for first, n in runs])
        return grid_adamw(
            self.fused.codes,
            self.fused.scale,
            Grid(self.fused.format.bits, element.low, element.high),
            grad.to(DEVICE),
            self.state,
            GridNumbers.of(hyper, at),
            Draw(
                lines.to(DEVICE, torch.int32),
                first_col,
                Key(SEED, at, self.fused.layer, "update", "b").stream,
                SEED,
                at,
            ),
            scale=torch.full((1,), scale, device=DEVICE),
            skip=torch.full((1,), skip, device=DEVICE),
        ).tolist()

    def step(self, at: int, dtype: torch.dtype, lr: float, scale: float = 0.3) -> list[int]:
        hyper = AdamHyper(lr, (0.9, 0.95), 1e-8, 0.1)
        grad = self.gradient(dtype)
        scaled = grad.float() * scale
        found = grid_step(self.codec, self.exact, scaled, self.exact_state, hyper, at, SEED)
        counts = self.launch(grad, at, hyper, scale)
        assert counts == [int(found.flips), int(found.saturated), 0]
        return counts

    def assert_same(self) -> None:
        assert torch.equal(self.exact.codes, self.fused.codes.cpu())
        for kind, expected in self.exact_state.items():
            found = self.state[kind].cpu().view(torch.uint8)
            assert torch.equal(expected.view(torch.uint8), found), kind


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("bits", GRID_FORMATS)
def test_bits_are_those_of_the_specification(bits: float, codec: GridCodec) -> None:
    twins = Twins(codec, bits, (9, 384))
    for at, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32]):
        flips, saturated, _ = twins.step(at, dtype, 1e-2)
        twins.assert_same()
        assert min(flips, saturated) > 0


@pytest.mark.parametrize("bits", [8, 1.58])
def test_random_bits_are_those_of_the_place_in_the_whole(bits: float) -> None:
    origins: list[Origin] = [(1000, 128), (((7, 3), (512, 2)), 4)]
    for origin in origins:
        twins = Twins(FP32States(), bits, (5, 128), origin)
        twins.step(0, torch.float32, 1e-2)
        twins.assert_same()


@gpu_only
@pytest.mark.gpu
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("bits", GRID_FORMATS)
def test_bits_are_the_same_for_millions_of_elements(bits: float, codec: GridCodec) -> None:
    twins = Twins(codec, bits, (1027, 4096))
    for at in range(2):
        twins.step(at, torch.float32, 1e-3, 0.7)
    twins.assert_same()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_flag_on_the_device_leaves_everything_as_it_is(bits: float) -> None:
    twins = Twins(FP32States(), bits, (3, 128))
    twins.step(0, torch.float32, 1e-2)
    grad, hyper = torch.full((3, 128), math.nan), AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    assert twins.launch(grad, 1, hyper, 1.0, skip=1.0) == [0, 0, 0]
    twins.assert_same()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_value_that_is_not_finite_is_counted_and_not_stored(value: float) -> None:
    twins = Twins(FP32States(), 4, (2, 128))
    grad = torch.zeros(2, 128)
    grad[1, 5:8] = value
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.0)
    broken = 0 if value == 1e30 else 3
    flips, _, counted = twins.launch(grad, 0, hyper, 1.0)
    assert counted == broken
    assert flips <= 3 - broken
    if broken:
        assert torch.equal(twins.exact.codes, twins.fused.codes.cpu())


def test_what_the_kernel_cannot_move_is_refused() -> None:
    assert fits((3, 256), 4)
    assert not fits((3, 200), 0)
    assert not fits((3, 256), 2)
    twins = Twins(FP32States(), 8, (3, 96))
    with pytest.raises(ValueError, match="has 96 columns from column 0 on: give a multiple of 128"):
        twins.launch(torch.zeros(3, 96), 0, AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1), 1.0)
    twins = Twins(FP32States(), 8, (3, 128))
    with pytest.raises(ValueError, match=r"a gradient is torch\.float16"):
        twins.launch(torch.zeros(3, 128).half(), 0, AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1), 1.0)
