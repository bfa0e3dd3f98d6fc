"""Training on a GPU: no waiting, compiled code, dropout's generator, one fused optimizer step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megafp4 import checkpoint
from megafp4.config import RunConfig
from megafp4.errors import CheckpointError
from megafp4.models import layers
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


def gradients(
    config: RunConfig, patch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of the first micro-batch; attention by a kernel that adds in one order."""
    patch.setattr(layers, "ATTENTION", (SDPBackend.MATH,))
    run = build(config, quiet=True)
    torch.manual_seed(3)
    loss = run.model(*run.data.training(0)[0])
    loss.backward()
    grads = [parameter.grad for parameter in run.model.parameters()]
    assert all(grad is not None for grad in grads)
    return loss.detach(), [grad.double() for grad in grads if grad is not None]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "mxfp4-fp8"])
def test_recomputing_changes_no_bit(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, recompute: str
) -> None:
    """The same kernels see the same tensors again, dropout's generator rewound."""
    changes = {"recipe": recipe, "dropout": 0.1, "compile": False}
    loss, grads = gradients(on_gpu(corpus, tmp_path / "none", **changes), monkeypatch)
    config = on_gpu(corpus, tmp_path / recompute, recompute=recompute, **changes)
    again_loss, again = gradients(config, monkeypatch)
    assert torch.equal(again_loss, loss)
    assert [torch.equal(a, b) for a, b in zip(again, grads, strict=True)].count(False) == 0


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("recipe", "bound"), [("bf16", 2**-8), ("mxfp4", 1e-2)])
def test_recomputing_compiled_pieces_changes_their_rounding_at_most(
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    bound: float,
    recompute: str,
) -> None:
    """Forward is the same code. What is recomputed without autograd is compiled apart and may sum
    in another order, so that inputs of linears differ by BF16's rounding, and MXFP4 draws by it."""
    changes = {"recipe": recipe, "compile": True}
    loss, grads = gradients(on_gpu(corpus, tmp_path / "none", **changes), monkeypatch)
    config = on_gpu(corpus, tmp_path / recompute, recompute=recompute, **changes)
    again_loss, again = gradients(config, monkeypatch)
    assert torch.equal(again_loss, loss)
    for mine, expected in zip(again, grads, strict=True):
        assert (mine - expected).norm() <= bound * expected.norm()


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
