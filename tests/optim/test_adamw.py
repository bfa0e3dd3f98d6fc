import pytest
import torch

from megafp4.optim import AdamHyper, adamw_step


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
