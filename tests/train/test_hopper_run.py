"""A run on backend hopper, its kernels by twins: windows are saved, raised blocks are reported."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels import it")

from megafp4 import checkpoint
from megafp4.backends import HopperBackend, hopper
from megafp4.errors import CheckpointError
from megafp4.train import state
from megafp4.train.build import build
from megafp4.train.loop import train
from megafp4.train.metrics import read_rows
from tests.backends import kernel_twins
from tests.train.test_resume import assert_same, run_killed_at
from tests.train.tiny import summary, tiny

CHANGES = {
    "backend": "hopper",
    "dtype": "bfloat16",
    "layers": 1,
    "micro_batch": 4,
    "checkpoint_interval": 2,
    "stats_interval": 3,
}


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_twins, "OCTAVES", -8)  # many blocks are raised
    kernel_twins.install(monkeypatch)


def test_a_killed_run_raises_the_same_blocks(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, often = (tiny(corpus, tmp_path / n, "mxfp4", **CHANGES) for n in ("once", "often"))
    train(build(once, quiet=True))
    run_killed_at(often, 3, "saved", monkeypatch)
    train(build(often, quiet=True))
    assert_same(tmp_path / "once", tmp_path / "often")
    windows = checkpoint.load(tmp_path / "often" / "checkpoints").tensors["backend"]
    assert len(windows) == 4 * 4  # dgrad.a, dgrad.b, wgrad.a, wgrad.b of four linears
    raised = summary(tmp_path / "often")["raised_blocks"]
    assert raised == summary(tmp_path / "once")["raised_blocks"] > 0
    counts = [row["raised_blocks"] for row in read_rows(tmp_path / "often" / "stats.jsonl")]
    assert len(counts) == 2 * len(windows)
    assert sum(counts[len(windows) :]) == raised  # statistics of the last step
    assert 0 < sum(counts[: len(windows)]) < raised


def test_ordinary_steps_do_not_ask_for_raised_blocks(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = HopperBackend.raised_blocks
    monkeypatch.setattr(HopperBackend, "raised_blocks", lambda b: (asked.append(0), real(b))[1])
    train(build(tiny(corpus, tmp_path, "mxfp4", **{**CHANGES, "stats_interval": 0}), quiet=True))
    assert len(asked) == 1  # the summary


def test_windows_of_another_backend_are_refused(corpus: str, tmp_path: Path) -> None:
    changes = {**CHANGES, "steps": 2}
    train(build(tiny(corpus, tmp_path, "mxfp4", **changes), quiet=True))
    (tmp_path / "config.json").unlink()
    other = build(tiny(corpus, tmp_path, "mxfp4", **{**changes, "backend": "bf16"}), quiet=True)
    with pytest.raises(CheckpointError, match="backend 'bf16' keeps no state: continue with"):
        state.restore(other)


@pytest.mark.parametrize("often", [{"eval_interval": 1}, {"memory_report": True}])
def test_looking_at_a_run_leaves_no_trace(
    corpus: str, tmp_path: Path, often: dict[str, int]
) -> None:
    shared = {**CHANGES, "steps": 3, "checkpoint_interval": 3, "eval_interval": 0}
    found = []
    for name, changes in (("plain", {}), ("watched", often)):
        out = tmp_path / name
        train(build(tiny(corpus, out, "mxfp4-fp8", **{**shared, **changes}), quiet=True))
        found.append((checkpoint.load(out / "checkpoints").tensors, summary(out)["raised_blocks"]))
    (plain, raised), (watched, again) = found
    assert raised == again > 0
    assert plain["backend"].keys() == watched["backend"].keys()
    assert all(torch.equal(plain["backend"][k], watched["backend"][k]) for k in plain["backend"])
