"""``import megafp4`` costs nothing: no torch, no optional package, no CUDA context."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "datasets", "deepspeed", "matplotlib", "megafp4_kernels", "mpi4py", "numpy", "rich",
    "tensorboard", "tokenizers", "torch", "transformers", "triton", "tyro",
)  # fmt: skip
OPTIONAL = (
    "datasets", "deepspeed", "matplotlib", "megafp4_kernels", "mpi4py", "tokenizers",
    "transformers", "triton",
)  # fmt: skip


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter at the repository root and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def loaded(statement: str, packages: tuple[str, ...]) -> str:
    """Return which of ``packages`` are loaded after ``statement``."""
    return run(f"import sys\n{statement}\nprint([p for p in {packages} if p in sys.modules])")


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import megafp4", HEAVY) == "[]"


def test_the_check_sees_a_heavy_import() -> None:
    assert loaded("import numpy", HEAVY) == "['numpy']"


def test_using_the_public_names_loads_no_optional_package() -> None:
    statement = (
        "import megafp4, torch\n"
        "megafp4.quantize(torch.ones(2, 32), 'mxfp4').dequantize()\n"
        "megafp4.Linear(64, 64, recipe='mxfp4')\n"
        "assert not torch.cuda.is_initialized()"
    )
    # torch may itself load triton where both are installed: what counts is what megafp4 adds.
    before = loaded("import torch, torch.nn, torch.utils.checkpoint", OPTIONAL)
    assert loaded(statement, OPTIONAL) == before
