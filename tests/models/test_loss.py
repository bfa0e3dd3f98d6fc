"""The chunked loss equals the plain one and never holds the logits of all tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megafp4.models import loss as loss_module
from megafp4.models.execution import Execution
from megafp4.models.loss import cross_entropy, linear_cross_entropy, score_chunk
from tests.models.small import batch, build, scatter, small_config

TOKENS, WIDTH, VOCAB = 50, 24, 101


@pytest.fixture
def _chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 16 * VOCAB)


pytestmark = pytest.mark.usefixtures("_chunks_of_16")


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator))
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[3:9] = -1
    return x.requires_grad_(), weight, targets


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(nn.functional.linear(x, weight.to(x.dtype)), targets)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_the_whole(dtype: torch.dtype, rtol: float) -> None:
    found, expected = [], []
    for results, function in ((found, chunked), (expected, plain)):
        x, weight, targets = operands(dtype)
        loss = function(x, weight, targets)
        (loss * 0.75).backward()
        assert x.grad is not None
        assert weight.grad is not None
        assert loss.dtype == weight.grad.dtype == torch.float32
        assert x.grad.dtype == dtype
        results += [loss.detach(), x.grad.float(), weight.grad]
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= rtol * other.norm()


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, score_chunk)


def test_ignored_targets_get_no_gradient_and_a_mean_of_none_is_nan() -> None:
    x, weight, targets = operands()
    chunked(x, weight, targets).backward()
    assert x.grad is not None
    assert not x.grad[3:9].any()
    assert x.grad[9:].any(-1).all()
    assert chunked(x, weight, torch.full_like(targets, -1)).isnan()


def test_without_gradients_only_the_loss_is_computed() -> None:
    x, weight, targets = operands()
    expected = chunked(x, weight, targets).detach()
    with torch.no_grad():
        assert torch.equal(chunked(x, weight, targets), expected)
    frozen = chunked(x.detach(), weight, targets)
    frozen.backward()
    assert weight.grad is not None


def test_a_second_derivative_and_a_second_backward_are_refused() -> None:
    x, weight, targets = operands()
    loss = chunked(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
    (slope,) = torch.autograd.grad(chunked(x, weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


class Largest(TorchDispatchMode):
    """Records the largest result of the vocabulary's width."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.dim() >= 2 and one.shape[-1] == VOCAB:
                self.rows = max(self.rows, one.numel() // VOCAB)
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_never_makes_all_logits(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(vocab_size=VOCAB, tie_embeddings=tied, hidden=8, ffn_hidden=16)
    model = build(config)
    scatter(model)
    tokens, targets = batch(config, rows=3, length=17)
    with Largest() as seen:
        model(tokens, targets).backward()
    assert 0 < seen.rows <= 16
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 2**27)
    with Largest() as seen:
        model(tokens, targets).backward()
    assert seen.rows == tokens.numel()
    for mine, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_gives_what_the_cpu_gives(dtype: torch.dtype, compiled: bool) -> None:
    results = []
    for device in ("cpu", "cuda"):
        x, weight, targets = (one.detach().to(device) for one in operands(dtype))
        x.requires_grad_()
        weight.requires_grad_()
        execution = Execution(compiled and device == "cuda")
        loss = linear_cross_entropy(
            x, weight, targets, lambda *parts, run=execution.run: run(score_chunk, *parts)
        )
        loss.backward()
        assert x.grad is not None
        assert weight.grad is not None
        results.append([one.detach().cpu().float() for one in (loss, x.grad, weight.grad)])
    for cpu, gpu in zip(*results, strict=True):
        assert (gpu - cpu).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-4) * cpu.norm()
