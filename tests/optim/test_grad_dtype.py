"""Gradients in BF16: half the memory, one rounding, for one micro-batch a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megafp4.config import OptimConfig
from megafp4.errors import UnsupportedError
from megafp4.models import QuantizedFactory
from megafp4.optim import build_optimizer, clip_grad_norm, clip_grad_norm_on_device
from megafp4.optim.optimizer import storage_bytes
from megafp4.precision import Precision
from megafp4.train.build import build, check
from megafp4.train.loop import train
from tests.models.small import build as build_small
from tests.models.small import small_config
from tests.train.tiny import rows, tiny, write_corpus


@pytest.mark.parametrize("states", ["fp32", "fp8lm", "coat-sr"])
def test_a_gradient_is_the_fp32_one_rounded_once(states: str) -> None:
    config = small_config()
    found = {}
    for dtype in ("float32", "bfloat16"):
        precision = Precision(seed=1, accumulates=True)
        model = build_small(
            config, QuantizedFactory("mxfp4", "reference", precision, config.layers)
        )
        optim = OptimConfig(states=states, grad_dtype=dtype)  # type: ignore[arg-type]
        build_optimizer(model.named_parameters(), optim, seed=1)
        tokens = torch.arange(2 * config.seq_len).view(2, -1) % config.vocab_size
        model(tokens, tokens.roll(1, 1)).backward()
        found[dtype] = {name: param.grad for name, param in model.named_parameters()}
        norm, _ = clip_grad_norm(model.parameters(), 1.0)
        assert float(clip_grad_norm_on_device(model.parameters(), 1.0)[0]) == pytest.approx(norm)
    for name, exact in found["float32"].items():
        rounded = found["bfloat16"][name]
        assert exact is not None
        assert rounded is not None
        if exact.dim() < 2:
            assert torch.equal(rounded, exact)
            continue
        assert rounded.dtype == torch.bfloat16
        if name == "embedding.weight":  # tied: what the head and the table give is added in BF16
            torch.testing.assert_close(rounded.float(), exact, rtol=2**-6, atol=2e-4)
        else:
            assert torch.equal(rounded, exact.bfloat16()), name


@pytest.mark.parametrize(("states", "most"), [("fp8lm", 8.1), ("coat-sr", 6.2)])
def test_bytes_of_a_parameter_that_is_trained(states: str, most: float) -> None:
    config = small_config(hidden=256, ffn_hidden=1024)
    precision = Precision(accumulates=True)
    model = build_small(config, QuantizedFactory("bf16", "reference", precision, config.layers))
    optim = OptimConfig(states=states, grad_dtype="bfloat16")  # type: ignore[arg-type]
    optimizer = build_optimizer(model.named_parameters(), optim, seed=1)
    tokens = torch.arange(config.seq_len).view(1, -1) % config.vocab_size
    model(tokens, tokens).backward()
    optimizer.step(0, 1e-3)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    held = [t for p in matrices.values() for t in (p, p.grad) if t is not None]
    held += [t for name in matrices for t in optimizer.states[name].values()]
    count = sum(param.numel() for param in matrices.values())
    assert count > 1_000_000
    assert storage_bytes(held) / count <= most


def test_a_run_learns_and_micro_batches_are_not_added_up(tmp_path: Path) -> None:
    config = tiny(write_corpus(tmp_path), tmp_path / "run", "mxfp4-fp8", micro_batch=4, steps=12)
    config = replace(config, optim=replace(config.optim, states="fp8lm", grad_dtype="bfloat16"))
    train(build(config, quiet=True))
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses[-1] < 0.9 * losses[0]
    two = replace(config, train=replace(config.train, micro_batch=2), out=str(tmp_path / "two"))
    with pytest.raises(UnsupportedError, match="would add up 2 micro-batches on 1 ranks in BF16"):
        check(two)
    with pytest.raises(UnsupportedError, match="would add up 1 micro-batches on 2 ranks in BF16"):
        check(config, 2)
