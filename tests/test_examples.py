"""The examples run as they are, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import megafp4

ROOT = Path(__file__).resolve().parents[1]


def run(name: str) -> str:
    """Run one example in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, f"examples/{name}"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_quantize_a_tensor() -> None:
    text = run("quantize_a_tensor.py")
    assert [line.split()[0] for line in text.splitlines()[1:10]] == list(megafp4.formats())
    one, many = (float(value) for value in re.findall(r"draws? +([\d.]+)", text))
    assert many < one / 4


def test_convert_huggingface() -> None:
    text = run("convert_huggingface.py")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    # 2 blocks x 4 linears x 10 steps; each has a forward GEMM in BF16 and two backward ones.
    assert re.findall(r"(\w+ x \w+) +(\d+)", text) == [
        ("bf16 x bf16", "80"),
        ("mxfp4 x mxfp4", "160"),
    ]


def test_compose_recipe() -> None:
    text = run("compose_recipe.py")
    errors = {line.split()[0]: float(line.split()[-1]) for line in text.splitlines()}
    assert list(errors) == ["mine", "careful", "nvfp4", "mxfp4"]
    assert 0 < errors["careful"] < errors["mine"] < 1


def test_every_example_is_tested() -> None:
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == {"quantize_a_tensor.py", "convert_huggingface.py", "compose_recipe.py"}
