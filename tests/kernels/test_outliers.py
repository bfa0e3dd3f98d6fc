"""The OCC and recast kernels give the specification's bits: interpreted here, compiled on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled on a GPU by the tests below")
def test_interpreted_kernels_equal_the_specification() -> None:
    """Triton decides when it is imported whether it interprets, hence a process of its own."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.outliers_cases", "cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("same bits")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
def test_compiled_kernels_equal_the_specification() -> None:
    from tests.kernels.outliers_cases import check_all, check_all_slices, check_saturation

    check_all("cuda")
    check_all_slices("cuda")
    check_saturation("cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("features", [4096, 11008, 16384, 40000])
@pytest.mark.parametrize("residual", ["exact", "folded", "none"])
def test_widths_of_large_models(features: int, residual: str) -> None:
    from tests.kernels.outliers_cases import activations, check_occ, check_recast, check_slices

    for dtype in (torch.bfloat16, torch.float32):
        # More tokens than programs, so that searches start where the token before ended.
        x = activations(5000 if features == 4096 else 64, features, dtype).cuda()
        found = check_occ(x, 0.99, "signed", residual)
        check_recast(x, found, residual, 0.99, "signed")
        check_slices(x, 2, 0.99, "signed", residual)


@pytest.mark.parametrize(
    ("features", "dtype", "options", "message"),
    [
        (10, torch.float32, {"alpha": 0.4}, "alpha is 0.4"),
        (10, torch.float32, {"mode": "both"}, "mode 'both'"),
        (10, torch.float32, {"residual": "all"}, "residual 'all'"),
        (11, torch.bfloat16, {}, "an even number in bfloat16"),
        (70000, torch.float32, {}, "at most 65536"),
    ],
)
def test_refusals(
    features: int, dtype: torch.dtype, options: dict[str, object], message: str
) -> None:
    from megafp4_kernels.outliers import _fake_occ

    given = {"alpha": 0.99, "mode": "signed", "residual": "exact", **options}
    x = torch.empty(2, features, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=message if x.is_cuda else f"{message}|CUDA device"):
        _fake_occ(x, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "smallest", "largest", "message"),
    [(10, 0, 0, "largest of 10"), (10, -1, 3, "the -1 smallest"), (70000, 1, 1, "at most 65536")],
)
def test_refusals_of_tails_and_limits(
    width: int, smallest: int, largest: int, message: str
) -> None:
    from megafp4_kernels.outliers import _fake_occ
    from megafp4_kernels.tails import _fake_limits, _fake_tails

    x = torch.empty(2, width, device="cuda" if torch.cuda.is_available() else "cpu")
    given = message if x.is_cuda else f"{message}|CUDA device"
    with pytest.raises(ValueError, match=given):
        _fake_tails(x, smallest, largest)
    with pytest.raises(ValueError, match=given):
        _fake_limits(x, smallest, largest, False)
    with pytest.raises(ValueError, match=r"limits are torch|at most 65536|CUDA device"):
        _fake_occ(x, 0.9, "signed", "exact", x.new_empty(2, 3))
