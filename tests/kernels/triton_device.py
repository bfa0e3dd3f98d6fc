"""Where Triton kernels are tested: on the GPU, or interpreted on the CPU by a process of its own.

Triton decides when it is imported whether it interprets kernels, and other parts of PyTorch import
it too. So the interpreted tests run in processes that ``test_interpreted.py`` starts; elsewhere, on
a machine without a GPU, the modules that import this one are skipped: they import it before any
kernel, which needs Triton.
"""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETING or torch.cuda.is_available()):
    pytest.skip("needs a GPU; test_interpreted.py runs it on the CPU", allow_module_level=True)
DEVICE = "cpu" if INTERPRETING else "cuda"
gpu_only = pytest.mark.skipif(INTERPRETING, reason="needs a CUDA device")


def position(seed: int, step: int, first_row: int, first_col: int = 0) -> torch.Tensor:
    """Return what kernels read: the seed as signed 64 bits, step, first row, first column."""
    signed = seed - (1 << 64) if seed >> 63 else seed
    return torch.tensor([signed, step, first_row, first_col], device=DEVICE)


def runs(firsts: list[int]) -> torch.Tensor:
    """Return what kernels read of rows or columns of which every 16 lie at one of ``firsts``."""
    table = torch.tensor(firsts, dtype=torch.int32) // 16
    return F.pad(table, (0, -len(firsts) % 8)).to(DEVICE)


def adversarial(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers over 40 octaves, zeros of both signs, subnormals, ties, NaN and infinities."""
    generator = torch.Generator().manual_seed(rows * 10007 + cols)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.logspace(-6, 6, cols)
    flat = x.view(-1)
    special = [0.0, -0.0, 1e-40, -1e-40, torch.nan, torch.inf, -torch.inf, 3e38, -3e38]
    ties = [0.25, -0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 7.0, 0.5, -1.5, 126.5, -128.5, 17.0]
    values = torch.tensor(special + ties)
    places = torch.randperm(flat.numel(), generator=generator)[: len(values)]
    flat[places[: flat.numel()]] = values[: len(places)]
    return x.to(dtype).to(DEVICE)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two FP32 tensors hold the same bits; every NaN counts as the same."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    bits = [torch.where(t.isnan(), torch.nan, t).view(torch.int32) for t in (found, expected)]
    return torch.equal(*bits)
