"""The figures that describe a quantization, on cases small enough to count by hand."""

import math

import pytest
import torch

from megafp4 import numerics


def statistics(x: torch.Tensor, fmt: str, **options: object) -> dict[str, float]:
    """Quantize and describe."""
    return numerics.operand_statistics(x, numerics.quantize(x, fmt, **options))  # type: ignore[arg-type]


def test_clipping_is_counted() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.0, -6.5, 6.0, 1.0])
    assert statistics(x, "mxfp4")["clip_rate"] == 2 / 32


def test_underflow_is_counted_among_the_non_zero() -> None:
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([4.0, 0.1, -0.2, 0.25, 0.3])  # 0.25 ties to even, which is zero
    assert statistics(x, "mxfp4")["underflow_rate"] == 3 / 5


def test_a_vanished_block_underflows_and_does_not_clip() -> None:
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16:] = 1.0, 1e-7  # too small for an E4M3 block scale beside the tensor's 1.0
    figures = statistics(x, "nvfp4")
    assert figures["clip_rate"] == 0.0
    assert figures["underflow_rate"] == 16 / 17


@pytest.mark.parametrize(
    ("name", "scaling"),
    [("mxfp4", "block"), ("nvfp4", "block"), ("nvfp4", "tile"), ("int8", "vector"),
     ("int4", "tensor")],
)  # fmt: skip
def test_a_transpose_has_the_same_figures(
    name: str, scaling: str, generator: torch.Generator
) -> None:
    x = torch.randn(48, 96, generator=generator)
    x[3, 5], x[40:, :32] = 30.0, 0.0
    figures = statistics(x, name, scaling=scaling)
    assert statistics(x.T, name, scaling=scaling, axis=0) == pytest.approx(figures, rel=1e-12)
    batched = x.view(1, 48, 96)
    assert statistics(batched, name, scaling=scaling) == pytest.approx(figures, rel=1e-12)


def test_signal_to_noise() -> None:
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([4.0, 1.1])
    expected = 10 * math.log10((16 + 1.1**2) / 0.1**2)
    assert statistics(x, "mxfp4")["snr_db"] == pytest.approx(expected, rel=1e-5)
    x[0, 1] = 1.0
    assert statistics(x, "mxfp4")["snr_db"] == math.inf
    assert statistics(torch.zeros(1, 32), "mxfp4")["snr_db"] == math.inf


def test_octave_span_is_taken_within_a_line() -> None:
    x = torch.ones(2, 96)
    x[0, 32:64] = 2.0**-5
    x[1] *= 2.0**40
    x[1, :32] = 0.0
    assert statistics(x, "mxfp4")["octave_span"] == pytest.approx(5.0)
    assert statistics(x[1:, 32:], "mxfp4")["octave_span"] == 0.0
    assert statistics(x.T.contiguous(), "mxfp4", axis=0) == statistics(x, "mxfp4")


def test_prescale_is_undone() -> None:
    x = torch.full((1, 32), 7.9)
    q = numerics.quantize(x, "mxfp4", prescale=0.75)
    figures = numerics.operand_statistics(x, q, 0.75)
    assert figures["clip_rate"] == 0.0
    assert figures["snr_db"] == pytest.approx(20 * math.log10(7.9 / 0.1), rel=1e-4)
    assert numerics.operand_statistics(x, numerics.quantize(x, "mxfp4"))["clip_rate"] == 1.0


def test_non_finite_elements_are_left_out(generator: torch.Generator) -> None:
    x = torch.randn(2, 64, generator=generator)
    clean = statistics(x[:1], "mxfp4")
    x[1] = float("nan")
    figures = statistics(x, "mxfp4")
    assert figures["nonfinite_rate"] == 0.5
    for name in ("clip_rate", "underflow_rate", "snr_db", "octave_span"):
        assert figures[name] == pytest.approx(clean[name])


@pytest.mark.parametrize("shape", [(0, 32), (32, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    figures = statistics(torch.zeros(shape), "mxfp4")
    assert figures["clip_rate"] == figures["underflow_rate"] == figures["octave_span"] == 0.0


def test_mxfp4_on_gaussian_data(generator: torch.Generator) -> None:
    # Nearest rounding clips 2.33 % of Gaussian elements.
    figures = statistics(torch.randn(4096, 256, generator=generator), "mxfp4")
    assert figures["clip_rate"] == pytest.approx(0.0233, abs=3e-4)
    assert 10 ** (-figures["snr_db"] / 10) == pytest.approx(0.0132, abs=2e-4)


@pytest.mark.parametrize("name", ["fp4-vector", "fp8-e4m3", "fp8-e5m2", "int8", "int4", "int3"])
def test_a_scale_from_absmax_clips_nothing(name: str, generator: torch.Generator) -> None:
    x = torch.randn(512, 64, generator=generator)
    assert statistics(x, name, scaling="vector")["clip_rate"] == 0.0


def test_figures_are_plain_floats(generator: torch.Generator) -> None:
    x = torch.randn(2, 64, generator=generator, requires_grad=True)
    assert all(type(value) is float for value in statistics(x, "nvfp4").values())
