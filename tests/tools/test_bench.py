"""The commands of tools/bench.py on a CPU: small shapes, timers that do not time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Imports the kernels, and so Triton.
bench = pytest.importorskip("bench", exc_type=ImportError)

from benchmarks import gemm, linear, step  # noqa: E402
from benchmarks.ceilings import product_of  # noqa: E402
from benchmarks.report import FAILED, Report  # noqa: E402
from benchmarks.step_run import Outcome, Setup, run  # noqa: E402

from megafp4.models import flops_per_token  # noqa: E402
from tests.tools.fakes import CEILINGS, session  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"qkv": (64, 128), "out": (64, 64)}
    monkeypatch.setattr(gemm, "LINEARS", shapes)
    monkeypatch.setattr(linear, "LINEARS", shapes)


def product(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """What the GEMM kernels compute."""
    exact = (a.float() @ b.float().t()) * scale_a * scale_b
    return exact.bfloat16()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    for name in ("gemm", "gemm_triton", "gemm_int8"):
        monkeypatch.setattr(gemm, name, product)
    return lambda name, work: monkeypatch.setattr(gemm, name, work)


def names(report: Report) -> list[str]:
    return [row[report.columns[0]] for row in report.rows]


def test_gemm_times_every_pairing(kernels: object, tmp_path: Path) -> None:
    found = gemm.measure(session(tmp_path), 96, 3)
    found.finish()
    # 2 linears x 3 GEMMs; five FP8 pairings with two kernels each, INT8 with one.
    assert len(found.rows) == 6 * (5 * 2 + 1)
    assert names(found)[0] == "qkv fprop, 96 x 128 x 64, folded MXFP4, gemm"
    assert {row["roofline"]["product"] for row in found.rows} == {"fp8", "int8"}
    first = found.rows[0]
    assert first["TFLOP/s"] == pytest.approx(2 * 96 * 128 * 64 / 1e9)
    assert first["over BF16"] == 2.0
    assert not found.failed
    assert (tmp_path / "roofline.png").exists()


def test_a_wrong_kernel_gets_no_speed_and_the_right_one_beside_it_does(
    kernels: Callable[[str, object], None],
) -> None:
    kernels("gemm_triton", lambda a, b, **scales: product(a, b, **scales) * 1.01)
    found = gemm.measure(session(rows="qkv fprop*E4M3 x E4M3, *"), 96, 3)
    assert [row["TFLOP/s"] == FAILED for row in found.rows] == [False, True]
    assert found.failed


def test_a_budget_that_is_spent_is_said(kernels: object) -> None:
    found = gemm.measure(session(rows="out wgrad*INT8*; out wgrad*E5M2, gemm", budget=0.0), 96, 3)
    assert found.rows == []
    reasons = {one["reason"] for one in found.left_out}
    assert reasons == {"the budget of 0 s was spent"}
    assert len(found.left_out) == 3
    assert not found.failed


def test_linear_times_recipes_and_their_forms(tmp_path: Path) -> None:
    recipes = ("mxfp4", "mxfp4@packed", "bitnet", "dqt8", "fp4")
    found = linear.measure(session(tmp_path), 64, 3, recipes, ("qkv", "out"), True, backend="bf16")
    found.finish()
    assert not found.left_out
    assert not found.failed
    expected = [f"{kind}, {name}" for name in recipes
                for kind in ("qkv", "out", "geometric mean")]  # fmt: skip
    assert names(found) == expected
    kept = {name: row["kept bytes"] for name, row in zip(names(found), found.rows, strict=True)}
    assert kept["qkv, mxfp4"] == 2
    assert kept["qkv, mxfp4@packed"] == pytest.approx(17 / 32)
    row = found.rows[0]
    # The fake timer: base forward, backward, both; forward, backward; both anew; both; both of 8.
    assert row["forward x at 1"] == pytest.approx(1 / 6)
    assert row["both x at 1"] == pytest.approx(3 / 8)
    assert row["both x at 8"] == pytest.approx(8 * 3 / 9)
    assert row["forward x at 8"] == pytest.approx(1 / (4 + (6 - 4) / 8))
    flops = 3 * 2 * 64 * 64 * 128 / 1e9
    assert row["of roofline"] == pytest.approx(flops / CEILINGS["BF16 TFLOP/s"] / 8)
    assert found.rows[2]["both x at 1"] == pytest.approx(3 / 8)


def test_linear_without_all_shapes_has_no_mean() -> None:
    here = session(rows="qkv, mxfp4")
    found = linear.measure(here, 64, 1, ("mxfp4",), ("qkv", "out"), False, backend="bf16")
    assert names(found) == ["qkv, mxfp4"]


def test_linear_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown linear 'side'"):
        linear.measure(session(), 64, 1, ("mxfp4",), ("side",), False)
    with pytest.raises(ValueError, match="saved_as"):
        linear.measure(session(), 64, 1, ("mxfp4@boxed",), ("qkv",), False)


def test_tensor_cores_by_ledger() -> None:
    entry = {"a": "int8", "b": "ternary", "backend": "hopper"}
    assert product_of(entry) == "int8"
    assert product_of({**entry, "a": "mxfp4"}) == "fp8"
    assert product_of({**entry, "backend": "hopper/bf16"}) == "bf16"


TINY = Setup(
    preset="gpt-tiny",
    recipe="bf16",
    steps=20,
    layers=1,
    micro_batch=1,
    micro_batches=2,
    graph=False,
    backend="bf16",
    device="cpu",
)


@pytest.mark.parametrize("recipe", ["mxfp4", "dqt8"])
def test_a_step_runs(recipe: str) -> None:
    found = run(replace(TINY, recipe=recipe, steps=2, warm_up=1))
    assert len(found.step_ms) == 2
    assert len(found.losses) == 3
    assert all(map(math.isfinite, found.losses))
    assert found.products == {"bf16": 4 * 3 * 2 * 3}  # linears, GEMMs, micro-batches, steps
    assert found.state_bytes > 0


def outcome(setup: Setup, last: float, ms: float) -> Outcome:
    losses = [6.0] * 18 + [last] * 6
    steps = [ms * (1 + 0.01 * index) for index in range(setup.steps)]
    kind = "bf16" if setup.recipe == "bf16" else "fp8"
    return Outcome(steps, losses, {kind: 24}, 1000, 8000, 1.5, {"SM MHz": 1980.0})


def test_step_compares_with_bf16_whatever_is_asked_first(tmp_path: Path) -> None:
    asked: list[str] = []

    def fake(setup: Setup, seconds: float) -> Outcome:
        asked.append(setup.recipe)
        return outcome(setup, *{"bf16": (5.0, 4.0), "mxfp4": (5.2, 2.0)}[setup.recipe])

    found = step.measure(session(tmp_path), TINY, ("mxfp4", "bf16"), 0.05, fake)
    found.finish()
    assert asked == ["bf16", "mxfp4"]
    base, ours = found.rows
    assert ours["x BF16"] == pytest.approx(2.0)
    assert ours["p10 ms"] < ours["ms"] < ours["p90 ms"]
    assert ours["error"] == pytest.approx(0.04)
    assert base["error"] == pytest.approx(5 / 6)
    assert ours["outcome"]["sensors"] == {"SM MHz": 1980.0}
    assert base["MFU (half)"] == ""  # a CPU's peak is not known
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["peak GiB"] == 1.5


@pytest.mark.parametrize("last", [5.3, math.nan, math.inf])
def test_a_loss_outside_the_band_gets_no_speed(last: float) -> None:
    def fake(setup: Setup, seconds: float) -> Outcome:
        return outcome(setup, 5.0 if setup.recipe == "bf16" else last, 2.0)

    found = step.measure(session(), TINY, ("mxfp4",), 0.05, fake)
    assert found.rows[0]["tokens/s"] != FAILED
    assert found.rows[1]["tokens/s"] == FAILED
    assert found.failed


def test_step_says_what_did_not_run() -> None:
    def fake(setup: Setup, seconds: float) -> Outcome:
        if setup.recipe == "fp8":
            raise RuntimeError("it ended with status 1: out of memory")
        return outcome(setup, 5.0, 2.0)

    found = step.measure(session(), TINY, ("fp8", "mxfp4"), 0.05, fake)
    assert names(found) == ["bf16", "mxfp4"]
    assert found.left_out == [{"row": "fp8", "reason": "it ended with status 1: out of memory"}]
    assert found.failed
    with pytest.raises(ValueError, match="at least 20"):
        step.measure(session(), replace(TINY, steps=6), ("mxfp4",), 0.05, fake)


def test_a_process_of_its_own() -> None:
    found = step.in_a_process(replace(TINY, steps=2, warm_up=1), math.inf)
    assert len(found.step_ms) == 2
    assert len(found.losses) == 3
    with pytest.raises(RuntimeError, match=r"ended with status 1: .*no-such-preset"):
        step.in_a_process(replace(TINY, preset="no-such-preset"), math.inf)


def test_work_of_a_step() -> None:
    model = TINY.run_config().model
    plain, again = step.work_of(TINY), step.work_of(replace(TINY, recompute="full"))
    assert plain.half == flops_per_token(model, model.seq_len, "half")
    attention = plain.full - plain.half
    assert attention == 6 * model.layers * model.hidden * model.seq_len
    blocks = 12 * model.layers * model.hidden**2
    assert plain.linears == 6 * blocks
    assert plain.hardware == plain.half + attention / 6
    assert again.hardware == pytest.approx(plain.hardware + 2 * blocks + attention / 3)
    found = outcome(replace(TINY, recipe="mxfp4"), 5.0, 2.0)
    rest = plain.hardware - plain.linears
    expected = 100 * (plain.linears / 1500 + rest / 800) / 1e9 + (12e3 + 16e3) / 4.0 / 1e9
    assert step.least_ms(plain, 100, found, CEILINGS) == pytest.approx(expected)


def test_quantizers_are_held_to_the_specification(tmp_path: Path) -> None:
    """Triton decides when it is imported whether it interprets, hence a process of its own."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.quantizers_on_cpu", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["rows"]) == 31
    assert {row["error"] for row in written["rows"]} == {0.0}
    families = {row["roofline"]["family"] for row in written["rows"]}
    assert families == {"MXFP4", "8 bits", "NVFP4", "outliers", "amax"}
    assert (tmp_path / "roofline.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("command", ["quantize", "gemm", "linear", "step"])
def test_without_a_gpu(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([command]) == 2
    assert capsys.readouterr().err == (
        "error: no CUDA GPU is visible to torch: run this on an H100 or H200\n"
    )
