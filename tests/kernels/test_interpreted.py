"""Run the tests of the Triton kernels on the CPU, by Triton's interpreter, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

HERE = Path(__file__).parent
MODULES = sorted(
    path.name
    for path in HERE.glob("test_*.py")
    if "from tests.kernels.triton_device import" in path.read_text() and path != Path(__file__)
)


def test_modules_are_found() -> None:
    assert {"test_casts.py", "test_triton_amax.py", "test_triton_gemm.py"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(HERE / module)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 3
