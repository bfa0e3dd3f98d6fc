"""A run of grid linears that goes on from a checkpoint ends on the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import megafp4
from megafp4 import checkpoint
from megafp4.config import OptimConfig
from megafp4.optim import Optimizer, build_optimizer, clip_grad_norm, learning_rate

STEPS = 8
CONFIG = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)


class Run:
    """Two grid linears around a norm, and dropout, which draws from the global generator."""

    def __init__(self, recipe: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.precision = megafp4.Precision(seed=3)
        linears = [
            megafp4.Linear(32, 64, recipe=recipe, precision=self.precision, layer=0),
            megafp4.Linear(64, 32, recipe=recipe, precision=self.precision, layer=1),
        ]
        for linear in linears:
            linear.to_grid()
        self.model = nn.Sequential(linears[0], nn.LayerNorm(64), nn.Dropout(0.1), linears[1])
        self.optimizer: Optimizer = build_optimizer(self.model.named_parameters(), CONFIG, seed=3)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.precision.step = step
            x = torch.randn(32, 32, generator=torch.Generator().manual_seed(step))
            (self.model(x) - x).square().mean().backward()
            _, scale = clip_grad_norm(self.model.parameters(), CONFIG.clip_grad)
            self.optimizer.step(step, learning_rate(step, CONFIG, STEPS), scale)
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.capture_rng(),
        }


@pytest.mark.parametrize("recipe", ["dqt8", "dqt3", "dqt-ternary"])
def test_resume_is_exact(tmp_path: Path, recipe: str) -> None:
    straight = Run(recipe, seed=1)
    straight.train(0, 3)
    checkpoint.save(tmp_path, 3, straight.tensors(), {})
    straight.train(3, STEPS)

    resumed = Run(recipe, seed=2)
    saved = checkpoint.load(tmp_path)
    checkpoint.check_compatible(
        checkpoint.signature(resumed.model.state_dict()),
        checkpoint.signature(saved.tensors["model"]),
    )
    resumed.model.load_state_dict(saved.tensors["model"])
    resumed.optimizer.load_state_dict(saved.tensors["optimizer"])
    checkpoint.restore_rng(saved.tensors["rng"])
    resumed.train(saved.step, STEPS)

    for group, named in straight.tensors().items():
        found = resumed.tensors()[group]
        assert [name for name in named if not torch.equal(named[name], found[name])] == []
    codes = [name for name in straight.model.state_dict() if name.endswith("weight_codes")]
    assert len(codes) == 2
    assert any(
        not torch.equal(saved.tensors["model"][name], straight.model.state_dict()[name])
        for name in codes
    )
