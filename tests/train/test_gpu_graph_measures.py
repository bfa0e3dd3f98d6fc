"""Replayed graphs measure the gradients that they write, in every step."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4.backends.hopper import device_capability
from megafp4.linear import Linear
from megafp4.optim import clip_grad_norm_on_device, global_norm
from megafp4.train import loop
from megafp4.train.build import build
from tests.train.tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_capability() != (9, 0), reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_norm_of_what_was_written(
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda_graph: bool,
    micro_batches: int,
) -> None:
    known: list[int] = []

    def compared(params: Iterable[Tensor], limit: float, squares: Any) -> tuple[Tensor, Tensor]:
        params = list(params)
        known.append(sum(squares(one) is not None for one in params))
        norm, scale = clip_grad_norm_on_device(params, limit, squares)
        expected = global_norm(one.grad for one in params if one.grad is not None)
        assert float(norm) == pytest.approx(expected, rel=1e-6)
        return norm, scale

    monkeypatch.setattr(loop, "clip_grad_norm_on_device", compared)
    config = tiny(
        corpus,
        tmp_path,
        "mxfp4-fp8",
        device="cuda",
        backend="hopper",
        dtype="bfloat16",
        steps=6,
        cuda_graph=cuda_graph,
        micro_batch=2,
        global_batch=2 * micro_batches,
        stats_interval=4,  # the fourth step is eager, and the fifth records anew
    )
    run = build(config, quiet=True)
    linears = [one for one in run.model.modules() if isinstance(one, Linear)]
    quantized = sum(one.recipe.name == "mxfp4-fp8" for one in linears)
    loop.train(run)
    assert known == [quantized] * 6
    torch.cuda.empty_cache()
