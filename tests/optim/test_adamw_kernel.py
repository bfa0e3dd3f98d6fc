"""The GPU's AdamW kernel against the exact step: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megafp4.optim import AdamHyper, adamw_step
from megafp4.optim.adamw import _step_on_gpu

ROOT = Path(__file__).resolve().parents[2]
HYPER = AdamHyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
SHAPES = [(33, 7), (5,), (40, 64), (0,), (3, 1024)]


def tensors(seed: int, device: str) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]
    made[3] = [one.abs() for one in made[3]]
    return [[one.to(device) for one in kind] for kind in made]


def compare(device: str) -> None:
    """Five steps with a factor, of which one is skipped, and one without."""
    params, _, m, v = tensors(0, device)
    exact, _, exact_m, exact_v = tensors(0, "cpu")
    versions = [param._version for param in params]
    for step in range(6):
        grads = tensors(step, device)[1]
        skip = torch.full((1,), float(step == 2), device=device)
        scale = None if step == 5 else torch.full((1,), 0.25, device=device)
        if step == 2:
            grads = [grad * torch.nan for grad in grads]
        _step_on_gpu(params, grads, (m, v), HYPER, step, scale, skip)
        if step != 2:
            factor = 1.0 if step == 5 else 0.25
            for param, grad, first, second in zip(
                exact, tensors(step, "cpu")[1], exact_m, exact_v, strict=True
            ):
                adamw_step(param, grad * factor, first, second, HYPER, step)
    for mine, other in zip([*params, *m, *v], [*exact, *exact_m, *exact_v], strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=2e-6, atol=1e-6)
    assert all(p._version > before for p, before in zip(params, versions, strict=True))


def test_the_kernel_agrees_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    found = subprocess.run(
        [sys.executable, "-c", "from tests.optim.test_adamw_kernel import compare; compare('cpu')"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_the_kernel_takes_only_what_it_can_walk_through() -> None:
    columns = torch.zeros(4, 6).t()
    with pytest.raises(ValueError, match=r"shape \[6, 4\] and strides \[1, 6\]: give contiguous"):
        _step_on_gpu([columns], [columns], ([columns], [columns]), HYPER, 0, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_agrees_on_the_gpu() -> None:
    compare("cuda")
