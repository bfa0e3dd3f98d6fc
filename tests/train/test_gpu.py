"""Training on a GPU: no waiting, compiled code, dropout's generator, one fused optimizer step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megafp4 import checkpoint
from megafp4.errors import CheckpointError
from megafp4.models.execution import Execution
from megafp4.train import loop
from megafp4.train.ahead import DeviceGuard
from megafp4.train.build import build
from megafp4.train.loop import train
from tests.train.test_resume import run_killed_at
from tests.train.tiny import rows, summary, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(corpus: str, out: Path, **changes: Any) -> Any:
    shared = {"device": "cuda", "backend": "bf16", "dtype": "bfloat16", "layers": 1}
    return tiny(corpus, out, **{**shared, **changes})


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_never_waits_for_the_device(corpus: str, tmp_path: Path, recompute: str) -> None:
    run = build(on_gpu(corpus, tmp_path, recompute=recompute), quiet=True)
    run.device_guard = DeviceGuard(run.guard, run.device)
    loop.take_step(run, 0)
    loop.read(run)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.take_step(run, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loop.read(run).loss > 0


def test_dropout_goes_on_where_a_killed_run_was(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"dropout": 0.2, "checkpoint_interval": 2, "compile": False}
    once, often = (on_gpu(corpus, tmp_path / name, **changes) for name in ("once", "often"))
    train(build(once, quiet=True))
    run_killed_at(often, 3, "saved", monkeypatch)
    torch.cuda.manual_seed(99)
    train(build(often, quiet=True))
    for mine, other in zip(
        rows(tmp_path / "once", "train"), rows(tmp_path / "often", "train"), strict=True
    ):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    # Attention's backward may add in another order each time, but the draws are the same ones.
    saved = [
        checkpoint.load(tmp_path / n / "checkpoints").tensors["rng"] for n in ("once", "often")
    ]
    assert torch.equal(saved[0]["torch_cuda"], saved[1]["torch_cuda"])


def test_the_generator_of_the_gpu_is_restored() -> None:
    device = torch.device("cuda")
    state = checkpoint.capture_rng(device)
    drawn = torch.rand(5, device=device)
    checkpoint.restore_rng(state, device)
    assert torch.equal(torch.rand(5, device=device), drawn)
    with pytest.raises(CheckpointError, match="torch_cuda' is missing"):
        checkpoint.restore_rng(checkpoint.capture_rng(), device)


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4"])
def test_compiled_and_uncompiled_runs_agree(corpus: str, tmp_path: Path, recipe: str) -> None:
    losses = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        train(build(on_gpu(corpus, out, recipe=recipe, compile=compiled), quiet=True))
        losses.append(summary(out)["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_gpu_and_cpu_runs_agree(corpus: str, tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        config = tiny(corpus, tmp_path / device, "bf16", device=device, backend="bf16")
        train(build(config, quiet=True))
        losses.append(summary(tmp_path / device)["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_grouped_query_attention_needs_no_copies_of_heads(corpus: str, tmp_path: Path) -> None:
    """The fused kernel takes fewer key heads than query heads and gives what repetition gives."""
    changes = {"family": "llama", "heads": 4, "kv_heads": 2, "compile": False}
    run = build(on_gpu(corpus, tmp_path, **changes), quiet=True)
    tokens, targets = run.data.training(0)[0]
    mixed = run.model(tokens, targets)
    other = build(tiny(corpus, tmp_path / "cpu", backend="bf16", dtype="bfloat16", layers=1,
                       family="llama", heads=4, kv_heads=2), quiet=True)  # fmt: skip
    assert mixed.item() == pytest.approx(other.model(tokens.cpu(), targets.cpu()).item(), rel=2e-3)
    run.model.execute(Execution(compiled=True))
    assert run.model(tokens, targets).item() == pytest.approx(mixed.item(), rel=2e-3)
