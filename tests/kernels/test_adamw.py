"""The AdamW kernel against its specification, bit for bit, for every form of state."""

import math

import pytest
import torch
from torch import Tensor, nn

from megafp4.numerics.philox import Key
from megafp4.optim import CODECS, AdamHyper, StepNumbers, codec_step
from megafp4.optim.quantizers import Draw
from megafp4.optim.states import State
from tests.kernels.triton_device import DEVICE, gpu_only

from megafp4_kernels.adamw import FORMS, AdamWLaunch  # isort: skip

SHAPES = [(1,), (7,), (128,), (1023,), (3, 1024), (0,), (5, 129)]
SEED = (1 << 40) + 5


class Twins:
    """The same parameters twice: for the specification on the CPU, and for the kernel."""

    def __init__(self, form: str, shapes: list[tuple[int, ...]]) -> None:
        self.codec = CODECS[form]
        self.generator = torch.Generator().manual_seed(len(shapes))
        drawn = [torch.randn(shape, generator=self.generator) * 0.02 for shape in shapes]
        self.exact = [nn.Parameter(x.clone()) for x in drawn]
        self.fused = [nn.Parameter(x.clone().to(DEVICE)) for x in drawn]
        self.exact_states = [self.codec.adopt(param) for param in self.exact]
        self.states = [self.codec.adopt(param) for param in self.fused]
        self.amax = torch.zeros(len(shapes), device=DEVICE)
        self.keys = [Key(SEED, 0, index, "update", "a") for index in range(len(shapes))]
        # As if each were the end of a parameter that ZeRO has cut.
        self.places = [index * 128 * 1001 for index in range(len(shapes))]
        self.launch = AdamWLaunch(
            form,
            [
                {"weight": param.detach(), **state}
                for param, state in zip(self.fused, self.states, strict=True)
            ],
            [key.stream for key in self.keys],
            self.amax,
            list(range(len(shapes))),
            self.places,
        )

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        """Return gradients over nine orders of magnitude, a tenth of them zero."""
        made = []
        for param in self.exact:
            grad = torch.randn(param.shape, generator=self.generator)
            size = torch.rand(param.shape, generator=self.generator) * 9 - 6
            keep = torch.rand(param.shape, generator=self.generator) > 0.1
            made.append((grad * 10**size * keep).to(dtype))
        return made

    def step(self, at: int, dtype: torch.dtype, scale: float, weight_decay: float) -> None:
        grads = self.gradients(dtype)
        numbers = StepNumbers.of(AdamHyper(1e-2, (0.9, 0.95), 1e-8, weight_decay), at)
        for param, grad, state, key, place in zip(
            self.exact, grads, self.exact_states, self.keys, self.places, strict=True
        ):
            draw = Draw(key._replace(step=at), place)
            codec_step(self.codec, param.detach(), grad, state, numbers, scale, draw)
        factor = torch.full((1,), scale, device=DEVICE)
        self.launch.step([grad.to(DEVICE) for grad in grads], numbers, factor, None, SEED, at)

    def assert_same(self) -> None:
        for index, param in enumerate(self.exact):
            assert same_bits(param.detach(), self.fused[index].detach()), index
            for kind, expected in self.exact_states[index].items():
                assert same_bits(expected, self.states[index][kind]), (index, kind)
            largest = param.detach().abs().amax().item() if param.numel() else 0.0
            assert self.amax[index].item() == largest


def same_bits(expected: Tensor, found: Tensor) -> bool:
    alike = expected.dtype == found.dtype and expected.shape == found.shape
    return alike and torch.equal(expected.view(torch.uint8), found.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", CODECS)
def test_bits_are_those_of_the_specification(form: str, dtype: torch.dtype) -> None:
    twins = Twins(form, [shape or (1,) for shape in SHAPES])
    for at in range(4):
        twins.step(at, dtype, 0.3, 0.1)
        twins.assert_same()


@gpu_only
@pytest.mark.gpu
@pytest.mark.parametrize("form", CODECS)
def test_bits_are_the_same_for_millions_of_elements(form: str) -> None:
    twins = Twins(form, [(1025, 4097), (33,)])
    for at in range(2):
        twins.step(at, torch.float32, 0.7, 0.1)
    twins.assert_same()


@pytest.mark.parametrize("form", CODECS)
def test_a_flag_on_the_device_leaves_everything_as_it_is(form: str) -> None:
    twins = Twins(form, [(5, 129), (3,)])
    twins.step(0, torch.float32, 1.0, 0.1)
    numbers = StepNumbers.of(AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1), 1)
    nan = [torch.full(param.shape, math.nan, device=DEVICE) for param in twins.fused]
    flag = torch.ones(1, device=DEVICE)
    twins.launch.step(nan, numbers, None, flag, SEED, 1)
    twins.assert_same()
    twins.launch.step(nan, numbers, None, flag - 1, SEED, 1)
    assert all(param.isnan().all() for param in twins.fused)
    assert twins.amax.isnan().all()


@pytest.mark.parametrize("form", ["fp8lm", "coat", "coat-sr", "eco"])
def test_huge_and_tiny_gradients_stay_the_specifications(form: str) -> None:
    twins = Twins(form, [(2, 128)])
    numbers = StepNumbers.of(AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.0), 0)
    grad = torch.logspace(-37, 18, 256).view(2, 128)
    grad[0, ::3] = 0.0
    draw = Draw(twins.keys[0])
    codec_step(twins.codec, twins.exact[0].detach(), grad, twins.exact_states[0], numbers, 1, draw)
    twins.launch.step([grad.to(DEVICE)], numbers, seed=SEED)
    twins.assert_same()


def fresh(form: str, shape: tuple[int, ...]) -> tuple[nn.Parameter, State]:
    param = nn.Parameter(torch.zeros(shape, device=DEVICE))
    return param, CODECS[form].adopt(param)


def test_forms_are_those_of_the_codecs() -> None:
    for name, codec in CODECS.items():
        assert FORMS[name] == {"weight": codec.weight_dtype, **codec.dtypes}
    assert FORMS.keys() == CODECS.keys()


def test_tensors_that_cannot_be_walked_through_are_refused() -> None:
    param, state = fresh("fp32", (4, 6))
    with pytest.raises(ValueError, match="form of state is 'fp7': choose one of fp32, bf16-sr"):
        AdamWLaunch("fp7", [{"weight": param.detach(), **state}], [0])
    with pytest.raises(ValueError, match=r"strides \[1, 4\], 0 bytes .* contiguous torch.float32"):
        AdamWLaunch("fp32", [{"weight": param.detach().view(6, 4).t(), **state}], [0])
    with pytest.raises(ValueError, match=r"exp_avg is torch.float32 .* give a contiguous torch.fl"):
        AdamWLaunch("coat", [{"weight": param.detach(), **state}], [0])
    with pytest.raises(ValueError, match=r"begins at element 64 .* at multiples of 128"):
        AdamWLaunch("fp32", [{"weight": param.detach(), **state}], [0], places=[64])
    launch = AdamWLaunch("fp32", [{"weight": param.detach(), **state}], [0])
    numbers = StepNumbers.of(AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.0), 0)
    shifted = torch.zeros(25, device=DEVICE)[1:].view(4, 6)
    with pytest.raises(ValueError, match=r"a gradient is .* 4 bytes past a multiple of 16"):
        launch.step([shifted], numbers)
    with pytest.raises(ValueError, match=r"a gradient is \[6, 4\] and its weight \[4, 6\]"):
        launch.step([torch.zeros(6, 4, device=DEVICE)], numbers)
