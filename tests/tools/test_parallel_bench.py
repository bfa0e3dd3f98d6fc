"""The commands of tools/bench.py that measure optimizers and several ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

# Imports the kernels, and so Triton.
bench = pytest.importorskip("bench", exc_type=ImportError)

from benchmarks import fit, meshes, optim, parallel, processes, reduce  # noqa: E402
from benchmarks.reduce_run import Found  # noqa: E402
from benchmarks.reduce_run import Setup as Sums  # noqa: E402
from benchmarks.report import FAILED  # noqa: E402
from benchmarks.train_run import Job, Trained, train  # noqa: E402

from megafp4.optim.states import CODECS  # noqa: E402
from tests.tools.fakes import CEILINGS, fake_timer, session  # noqa: E402

SUMS = Sums(elements=1 << 16, rounds=2, chunks=(1, 3), backend="gloo", device="cpu")
JOB = Job(
    preset="gpt-tiny",
    recipe="bf16",
    folder="",
    cache="",
    layers=1,
    micro_batch=1,
    steps=2,
    warm_up=1,
    backend="bf16",
    device="cpu",
    dtype="float32",
    lr=1e-3,
)


def test_sums_of_real_ranks(tmp_path: Path) -> None:
    report = reduce.measure(session(tmp_path), SUMS, 2)
    report.finish()
    assert not report.failed, report.rows
    rows = {row["reduction"]: row for row in report.rows}
    # Two sources; the library, fp8 in two ways and bf16, and fp8-lm where the sum is scattered.
    assert len(rows) == 2 * (5 + 4)
    library = rows["reduce-scatter from BF16, GLOO BF16"]
    ours = rows["reduce-scatter from BF16, fp8, 3 chunks"]
    assert library["x BF16"] == 1.0
    assert ours["x BF16"] == pytest.approx(library["ms"] / ours["ms"])
    assert library["sent MB"] == pytest.approx(2 * 2**16 / 2 / 1e6)
    assert ours["sent MB"] == pytest.approx(library["sent MB"] / 2 * 129 / 128, rel=1e-3)
    assert 0.02 < ours["error"] < 0.028
    assert ours["half-correlated"] < ours["error"]
    assert rows["all-reduce from FP32, fp8, 1 chunks"]["error"] > ours["error"]
    assert rows["all-reduce from FP32, GLOO FP32"]["error"] < 1e-6


def sums(error: float) -> dict[str, Found]:
    library = Found([2.0, 2.0], 100, 0.001, 0.001)
    names = [f"reduce-scatter from {one}, NCCL {one}" for one in ("BF16", "FP32")]
    exact = replace(library, independent=0.0, correlated=0.0)
    ours = Found([1.0, 1.0], 50, 0.026, error)
    return {
        names[0]: library,
        names[1]: replace(exact, ms=[4.0, 4.0]),
        "reduce-scatter from BF16, fp8, 1 chunks": ours,
    }


@pytest.mark.parametrize(
    ("ranks", "error", "fine"),
    [(4, 0.017, True), (4, 0.019, False), (2, 0.022, True), (2, math.nan, False)],
)
def test_an_error_that_correlation_does_not_excuse_gets_no_speed(
    ranks: int, error: float, fine: bool
) -> None:
    setup = replace(SUMS, backend="nccl")
    report = reduce.measure(session(), setup, ranks, lambda *_: sums(error))
    assert report.failed is not fine
    row = report.rows[2]
    assert (row["x BF16"], row["x FP32"]) == ((2.0, 4.0) if fine else (FAILED, FAILED))


def test_sums_need_two_ranks_and_say_why_they_failed() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        reduce.measure(session(), SUMS, 1)

    def breaks(*_: object) -> dict[str, Found]:
        raise RuntimeError("it ended with status 1: no memory")

    report = reduce.measure(session(), SUMS, 2, breaks)
    assert report.failed
    assert report.left_out == [{"row": "all", "reason": "it ended with status 1: no memory"}]


def test_every_codec_is_held_to_the_specification_and_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim, "WIDTH", 128)
    monkeypatch.setattr(optim, "_CHECKED", ((3, 129), (77,)))
    report = optim.measure(session(timer=fake_timer), 1 << 12, 1, matrices=2, fused=False)
    assert not report.failed
    assert not report.left_out
    rows = {row["states, gradients"]: row for row in report.rows}
    assert len(rows) == 2 * len(CODECS) + 5
    plain = rows["fp32, BF16"]
    assert plain["moved B"] == 2 * 12 + 2
    assert plain["allocated B"] == 12
    moved = 2**12 * 26
    assert plain["of copy"] == pytest.approx(moved / 1e9 / CEILINGS["copy TB/s"])
    assert plain["x torch"] == 2.0  # the fake timer: ours 1 ms, torch 2 ms
    lean = rows["fp8lm, FP32"]
    assert 5 < lean["allocated B"] <= 7.05
    assert lean["weight B"] == 2
    grid = rows["dqt4 coat, FP32"]
    assert 0.5 < grid["weight B"] < 0.6
    assert grid["states B"] == 2.125


def test_a_step_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_CHECKED", ((3, 129), (7,)))
    assert optim.difference(optim.Way("coat", torch.float32), "cpu", False) == 0.0
    assert optim.difference(optim.Way("coat", torch.float32, 4), "cpu", False) == 0.0
    monkeypatch.setattr(optim, "_kept", lambda one: [torch.ones(8) * one.fused])
    assert optim.difference(optim.Way("coat", torch.float32), "cpu", True) > 0.0


SPLIT = {"tp": 2, "sequence": True}


def test_meshes_are_read() -> None:
    assert meshes.parse("1") == ("1", 1, {}, False, False)
    assert meshes.parse("tp2:graph+sequence") == ("tp2:graph+sequence", 2, SPLIT, True, False)
    assert meshes.parse("dp4").parallel == {}
    assert meshes.parse("dp2:offload").offload
    found = meshes.parse("tp2xpp2xdp3:sequence+zero2+interleaved+chunks4+bf16")
    assert found.ranks == 12
    assert found.parallel == {
        "tp": 2, "pp": 2, "sequence": True, "zero": 2, "schedule": "interleaved", "chunks": 4,
        "wire": "bf16",
    }  # fmt: skip
    for wrong in ("dp0", "tp2xtp2", "ep2", "2", ""):
        with pytest.raises(ValueError, match="for an axis"):
            meshes.parse(wrong)
    with pytest.raises(ValueError, match="unknown option 'quick'"):
        meshes.parse("dp2:quick")


def test_real_meshes_agree(tmp_path: Path) -> None:
    layouts = [meshes.parse(one) for one in ("dp2", "tp2:sequence")]
    job = replace(JOB, cache=str(tmp_path / "data"))
    report = parallel.measure(session(tmp_path), job, layouts, ["bf16"], 0.02)
    report.finish()
    assert report.left_out == []
    assert not report.failed
    data, tensor = report.rows
    assert data["GPUs"] == tensor["GPUs"] == 2
    assert data["error"] < 0.999  # the loss fell
    assert tensor["error"] < 1e-3
    sent = tensor["outcome"]["sent"]
    assert sent["tp"] > 0
    assert set(data["outcome"]["sent"]) >= {"replicas"}
    assert data["x BF16"] == 1.0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["complete"] is True
    assert len(written["rows"][0]["outcome"]["losses"]) == 3


def fake(job: Job, seconds: float) -> Trained:
    if job.recipe == "fp8" and job.ranks == 1:
        raise RuntimeError("it ended with status 1: OutOfMemoryError: Tried to allocate 9 GiB")
    last = 2.5 if job.parallel.get("pp") else 2.0
    ms = {"bf16": 8.0, "fp8": 4.0}[job.recipe] * (1.0 if job.ranks == 1 else 1.25)
    tokens = job.ranks * 1000
    sent = {"replicas": 3e9, "tp": 1e9}
    return Trained([ms, ms], [3.0, last], tokens, 5000, 12.0, 13.0, sent)


def test_rates_are_compared_with_bf16_and_with_one_gpu(tmp_path: Path) -> None:
    layouts = [meshes.parse(one) for one in ("1", "dp2", "pp2")]
    report = parallel.measure(session(tmp_path), JOB, layouts, ["bf16", "fp8"], 0.02, None, fake)
    rows = {row["mesh and recipe"]: row for row in report.rows}
    assert rows["dp2, bf16"]["of one GPU"] == pytest.approx(0.8)
    assert rows["dp2, fp8"]["x BF16"] == pytest.approx(2.0)
    assert rows["dp2, fp8"]["of one GPU"] == ""
    assert rows["dp2, fp8"]["sent GB"] == 4.0
    assert rows["pp2, bf16"]["tokens/s/GPU"] == FAILED  # its loss is not dp2's
    assert report.failed
    assert report.left_out[0]["row"] == "1, fp8"
    assert report.left_out[0]["reason"].startswith("it does not fit")


def test_one_gpu_may_have_been_measured_before() -> None:
    before = {"rows": [{"mesh and recipe": "1, fp8", "tokens/s/GPU": 160e3}]}
    report = parallel.measure(
        session(), JOB, [meshes.parse("dp2")], ["bf16", "fp8"], 0.02, before, fake
    )
    assert report.rows[1]["of one GPU"] == pytest.approx(1.25)
    assert not report.failed


def test_memory_is_taken_apart(tmp_path: Path) -> None:
    job = replace(
        JOB, folder=str(tmp_path / "run"), cache=str(tmp_path / "data"), states="fp8lm",
        accounts=True,
    )  # fmt: skip
    found = train(job)
    assert len(found.losses) == 3
    per_parameter = {kind: count / found.parameters for kind, count in found.bytes.items()}
    assert per_parameter["gradients"] == pytest.approx(4, rel=1e-3)
    assert 2 <= per_parameter["weights"] < 2.1
    assert 4 < per_parameter["states"] < 4.2


def test_fitting_needs_a_falling_loss() -> None:
    job = replace(JOB, steps=19)

    def falls(job: Job, seconds: float) -> Trained:
        assert job.accounts
        assert job.offload == (job.states == "eco")
        slope = 0.1 if job.states == "fp8lm" else -0.1
        losses = [5 + slope * step for step in range(job.total)]
        kinds = {"weights": 10_000, "states": 20_000, "gradients": 20_000}
        return Trained([4.0] * 19, losses, 1000, 5000, 12.0, 13.0, {}, kinds)

    report = fit.measure(session(), job, ["coat", "fp8lm", "eco:offload"], falls)
    good, bad, offloaded = report.rows
    assert offloaded["states"] == "eco:offload"
    assert offloaded["tokens/s"] == 250e3
    assert good["weights B"] == 2.0
    assert good["activations B"] == ""
    assert good["tokens/s"] == 250e3
    assert bad["tokens/s"] == FAILED
    with pytest.raises(ValueError, match="at least 20"):
        fit.measure(session(), replace(JOB, steps=3), ["coat"], falls)
    with pytest.raises(ValueError, match=r"states 'coat:host': only `:offload`"):
        fit.measure(session(), job, ["coat:host"], falls)


@pytest.mark.parametrize("waits", [False, True])
def test_the_error_that_began_it_is_told(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 1.0)
    given = {"cause": "no room", "waits": waits}
    with pytest.raises(RuntimeError, match=r"ended with status -?\d+: ValueError: no room"):
        processes.in_processes("tests.tools.breaking_ranks", given, 2, 60.0)


def test_ranks_that_take_too_long_are_ended() -> None:
    with pytest.raises(RuntimeError, match="did not finish within the 0 s left"):
        processes.in_processes("benchmarks.train_run", {}, 1, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("command", ["optim", "fit", "reduce", "parallel"])
def test_without_a_gpu(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([command]) == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err
