import math

import pytest
import torch
from torch import nn

from megafp4.errors import ConfigError
from megafp4.optim import clip_grad_norm, clip_grad_norm_on_device, global_norm


def parameters_with_gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(3, 5), (7,), (), (0,), (2, 3, 4)]:
        param = nn.Parameter(torch.zeros(shape))
        param.grad = torch.randn(shape, generator=generator) * scale
        params.append(param)
    return [*params, nn.Parameter(torch.zeros(4))]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_agrees_with_torch(scale, max_norm):
    params = parameters_with_gradients(scale)
    norm, factor = clip_grad_norm(params, max_norm)
    before = [None if p.grad is None else p.grad.clone() for p in params]
    expected = nn.utils.clip_grad_norm_(params, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for param, grad in zip(params, before, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad * factor, param.grad, rtol=5e-6, atol=0)


def test_gradients_are_left_as_they_are():
    params = parameters_with_gradients(10.0)
    before = [None if p.grad is None else p.grad.clone() for p in params]
    assert clip_grad_norm(params, 1.0)[1] < 1
    for param, grad in zip(params, before, strict=True):
        assert grad is None or torch.equal(param.grad, grad)


def test_scaled_gradients_have_the_limit_as_their_norm():
    params = parameters_with_gradients(10.0)
    _, factor = clip_grad_norm(params, 0.25)
    assert global_norm(p.grad * factor for p in params if p.grad is not None) == pytest.approx(0.25)


def test_a_norm_within_the_limit_changes_nothing():
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm([param], 5.0) == (5.0, 1.0)
    assert clip_grad_norm([param], 0.0) == (5.0, 1.0)
    assert clip_grad_norm([param], 2.5) == (5.0, 0.5)


def test_no_gradients():
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0) == (0.0, 1.0)
    assert clip_grad_norm([], 1.0) == (0.0, 1.0)


def test_huge_and_tiny_finite_gradients_keep_a_finite_norm():
    # Their squares overflow and underflow FP32.
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3e30, 4e30])
    assert clip_grad_norm([param], 1.0)[0] == pytest.approx(5e30)
    param.grad = torch.tensor([3e-30, 4e-30])
    assert clip_grad_norm([param], 1.0)[0] == pytest.approx(5e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_norm_that_is_not_finite_is_reported_and_not_clipped_away(bad, max_norm):
    params = parameters_with_gradients(1.0)
    params[1].grad[3] = bad
    norm, factor = clip_grad_norm(params, max_norm)
    assert not math.isfinite(norm)
    assert math.isnan(factor)


def test_bfloat16_gradients_are_summed_in_full_precision():
    param = nn.Parameter(torch.zeros(10000, dtype=torch.bfloat16))
    param.grad = torch.ones(10000, dtype=torch.bfloat16)
    assert clip_grad_norm([param], 0)[0] == pytest.approx(100.0, rel=1e-12)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_limit_that_makes_no_sense(max_norm):
    with pytest.raises(ConfigError, match=r"clip_grad is .*: give 0"):
        clip_grad_norm([], max_norm)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
def test_on_the_device_the_same_numbers_come_as_tensors(scale, max_norm):
    params = parameters_with_gradients(scale)
    norm, factor = clip_grad_norm_on_device(params, max_norm)
    expected = clip_grad_norm(params, max_norm)
    assert norm.dtype == factor.dtype == torch.float64
    assert (norm.item(), factor.item()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_on_the_device_too_nothing_bad_is_clipped_away(bad):
    params = parameters_with_gradients(1.0)
    params[1].grad[3] = bad
    norm, factor = clip_grad_norm_on_device(params, 1.0)
    assert not norm.isfinite()
    assert factor.isnan()
    with pytest.raises(ConfigError, match=r"clip_grad is -1"):
        clip_grad_norm_on_device(params, -1.0)
