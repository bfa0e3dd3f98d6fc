import pytest
import torch
from torch import Tensor

from megafp4.optim import AdamHyper, adamw_step, fused_adamw_step


def run_both(steps: int, *, weight_decay: float, betas=(0.9, 0.95), eps=1e-8, shape=(7, 5)):
    """Weights after the same gradients under PyTorch's AdamW and ours, and both moments."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1.0, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
    )
    mine, m, v = start.clone(), torch.zeros(shape), torch.zeros(shape)
    for step in range(steps):
        lr = 1e-3 * (1 + step % 17)
        scale = 10.0 ** ((step % 9) - 4)
        grad = torch.randn(shape, generator=generator) * scale
        theirs.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        adamw_step(mine, grad, m, v, AdamHyper(lr, betas, eps, weight_decay), step)
    return mine, m, v, theirs, optimizer.state[theirs]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
def test_equals_torch_adamw_bit_for_bit_over_many_steps(weight_decay, betas):
    mine, m, v, theirs, state = run_both(300, weight_decay=weight_decay, betas=betas)
    assert torch.equal(mine, theirs)
    assert torch.equal(m, state["exp_avg"])
    assert torch.equal(v, state["exp_avg_sq"])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1031,), (3, 0), (2, 3, 4)])
def test_any_shape(shape):
    mine, _, _, theirs, _ = run_both(5, weight_decay=0.1, shape=shape)
    assert torch.equal(mine, theirs)


def test_first_step_moves_by_the_learning_rate_against_the_sign():
    # m / sqrt(v) is exactly sign(g) after bias correction, whatever the size of g.
    for size in (1e-6, 1.0, 1e6):
        param = torch.zeros(2)
        grad = torch.tensor([size, -size])
        hyper = AdamHyper(0.01, (0.9, 0.95), 1e-12, 0.0)
        adamw_step(param, grad, torch.zeros(2), torch.zeros(2), hyper, 0)
        torch.testing.assert_close(param, torch.tensor([-0.01, 0.01]), rtol=1e-4, atol=0)


def test_decay_is_decoupled_from_the_gradient():
    param, m, v = torch.full((3,), 2.0), torch.zeros(3), torch.zeros(3)
    adamw_step(param, torch.zeros(3), m, v, AdamHyper(0.1, (0.9, 0.95), 1e-8, 0.5), 0)
    assert torch.equal(param, torch.full((3,), 2.0 * (1 - 0.05)))
    assert not m.any()
    assert not v.any()


def fused_case(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(33, 7), (5,), (128, 64)]
    params, grads, m, v = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
    )
    return params, grads, m, [one.abs() for one in v]


@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_fused_step_agrees_with_the_exact_one(scale: float | None) -> None:
    """Within a few units in the last place of the weight and of its move."""
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    params, grads, m, v = fused_case(0)
    exact_params, exact_grads, exact_m, exact_v = fused_case(0)
    factor = None if scale is None else torch.tensor([scale])
    for step in range(5):
        if step:
            grads, exact_grads = fused_case(step)[1], fused_case(step)[1]
        fused_adamw_step(params, grads, (m, v), hyper, step, factor)
        for param, grad, first, second in zip(
            exact_params, exact_grads, exact_m, exact_v, strict=True
        ):
            adamw_step(param, grad * (scale or 1.0), first, second, hyper, step)
    for mine, exact in zip([*params, *m, *v], [*exact_params, *exact_m, *exact_v], strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-6, atol=1e-7)


def test_the_fused_step_is_skipped_by_a_flag_on_the_device() -> None:
    hyper = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    params, grads, m, v = fused_case(0)
    before = [one.clone() for one in [*params, *m, *v]]
    nan = torch.full((1,), float("nan"))
    fused_adamw_step(params, grads, (m, v), hyper, 0, nan, skip=torch.ones(1))
    assert [torch.equal(a, b) for a, b in zip(before, [*params, *m, *v], strict=True)] == [True] * 9
    fused_adamw_step(params, fused_case(0)[1], (m, v), hyper, 0, None, skip=torch.zeros(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, [*params, *m, *v], strict=True))
    fused_adamw_step([], [], ([], []), hyper, 0)
