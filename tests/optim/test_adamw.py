"""One step of AdamW against PyTorch's and against FP64."""

import pytest
import torch
from torch import Tensor

from megafp4.optim import AdamHyper, StepNumbers, adamw_update

EPS = 2.0**-24


def step(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: AdamHyper, at: int) -> None:
    adamw_update(weight, grad, m, v, StepNumbers.of(hyper, at))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
def test_equals_torch_adamw_but_for_the_order_of_operations(
    weight_decay: float, betas: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(7, 5, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1.0, betas=betas, eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    mine, m, v = start.clone(), torch.zeros(7, 5), torch.zeros(7, 5)
    for at in range(300):
        lr = 1e-3 * (1 + at % 17)
        grad = torch.randn(7, 5, generator=generator) * 10.0 ** ((at % 9) - 4)
        theirs.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        step(mine, grad, m, v, AdamHyper(lr, betas, 1e-8, weight_decay), at)
    state = optimizer.state[theirs]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-5, atol=1e-6 * m.abs().max().item())
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-5, atol=0)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=3e-6)


def test_one_step_is_the_formula_to_a_few_units_in_the_last_place() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad, m, v = (torch.randn(4096, generator=generator) for _ in range(4))
    v = v.square()
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    w64, g64, m64, v64 = (x.double() for x in (weight, grad, m, v))
    m64 = 0.9 * m64 + (1 - 0.9) * g64
    v64 = 0.95 * v64 + (1 - 0.95) * g64**2
    move = 1e-2 * (m64 / (1 - 0.9**6)) / ((v64 / (1 - 0.95**6)).sqrt() + 1e-8)
    w64 = w64 * (1 - 1e-2 * 0.1) - move
    step(weight, grad, m, v, hyper, 5)
    # The difference of gradient and moment is rounded at the size of the larger.
    assert ((m - m64).abs() <= 4 * EPS * (m64.abs() + grad.abs())).all()
    assert ((v - v64).abs() <= 4 * EPS * v64).all()
    assert ((weight - w64).abs() <= 4 * EPS * (w64.abs() + 4 * move.abs() + 0.1)).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1031,), (3, 0), (2, 3, 4)])
def test_an_element_moves_alike_wherever_it_lies(shape: tuple[int, ...]) -> None:
    flat = [torch.linspace(0.1, 2.0, 2048) for _ in range(4)]
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    count = torch.Size(shape).numel()
    cut = [one[:count].clone().view(shape) for one in flat]
    step(flat[0], flat[1], flat[2], flat[3], hyper, 4)
    step(cut[0], cut[1], cut[2], cut[3], hyper, 4)
    for whole, part in zip(flat, cut, strict=True):
        assert torch.equal(whole[:count].view(shape), part)


def test_first_step_moves_by_the_learning_rate_against_the_sign() -> None:
    # m / sqrt(v) is exactly sign(g) after bias correction, whatever the size of g.
    for size in (1e-6, 1.0, 1e6):
        param = torch.zeros(2)
        grad = torch.tensor([size, -size])
        hyper = AdamHyper(0.01, (0.9, 0.95), 1e-12, 0.0)
        step(param, grad, torch.zeros(2), torch.zeros(2), hyper, 0)
        torch.testing.assert_close(param, torch.tensor([-0.01, 0.01]), rtol=1e-4, atol=0)


def test_decay_is_decoupled_from_the_gradient() -> None:
    param, m, v = torch.full((3,), 2.0), torch.zeros(3), torch.zeros(3)
    step(param, torch.zeros(3), m, v, AdamHyper(0.1, (0.9, 0.95), 1e-8, 0.5), 0)
    assert torch.equal(param, torch.full((3,), 2.0 * (1 - 0.05)))
    assert not m.any()
    assert not v.any()
