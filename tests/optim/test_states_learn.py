"""What training makes of the ways to keep state: a toy task, and moves that rounding holds up."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from megafp4.config import OptimConfig
from megafp4.optim import CODECS, AdamHyper, StepNumbers, build_optimizer, codec_step
from megafp4.optim.states import EcoStates, State, StateCodec, Step


class Student(nn.Module):
    """A tied embedding, two layers and a norm: next symbol from the last two."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embedding = nn.Parameter(torch.randn(32, 32, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(128, 64, generator=generator) * 0.1)
        self.down = nn.Parameter(torch.randn(32, 128, generator=generator) * 0.1)
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, tokens: Tensor) -> Tensor:
        embedding = self.embedding.float()
        hidden = embedding[tokens].flatten(1) @ self.up.float().T
        hidden = nn.functional.rms_norm(hidden.relu() @ self.down.float().T, (32,), self.gain)
        return hidden @ embedding.T


def losses_of(states: str, codec: StateCodec | None = None) -> tuple[float, float]:
    """Return the mean loss of 200 steps, and of the last 20."""
    model = Student()
    config = OptimConfig(states=states, weight_decay=0.01)
    optimizer = build_optimizer(model.named_parameters(), config, 0)
    for name, dense in optimizer._dense.items():
        if codec is not None and dense.codec.name == states:
            optimizer._dense[name] = dataclasses.replace(dense, codec=codec)
    generator = torch.Generator().manual_seed(9)
    losses = []
    for at in range(200):
        tokens = torch.randint(32, (64, 2), generator=generator)
        target = (tokens[:, 0] * 3 + tokens[:, 1] // 8) % 32
        loss = nn.functional.cross_entropy(model(tokens), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(at, 4e-3 * (1 - at / 200))
        losses.append(loss.item())
    return sum(losses) / 200, sum(losses[-20:]) / 20


def test_every_codec_learns_what_fp32_learns() -> None:
    """Mean loss within 1 %, last losses within 3 % (weights rounded at random: 5 %, eco: 15 %)."""
    allowed = {"bf16-sr": 0.05, "coat-sr": 0.05, "eco": 0.15}
    mean, last = losses_of("fp32")
    assert last < 0.5 < 1.0 < mean
    for states in CODECS.keys() - {"fp32"}:
        found_mean, found_last = losses_of(states)
        assert abs(found_mean / mean - 1) < 0.01, states
        assert abs(found_last / last - 1) < allowed.get(states, 0.03), states


class Nearest(EcoStates):
    """ECO without its error: BF16 weights rounded to nearest, and nothing kept of the rest."""

    def encode(
        self, moved: tuple[Tensor, Tensor, Tensor], weight: Tensor, state: State, step: Step
    ) -> None:
        super().encode(
            moved, weight, state, step._replace(numbers=step.numbers._replace(feedback=0.0))
        )


def test_eco_loses_less_than_rounding_to_nearest_without_a_master() -> None:
    """What [2601.22101] claims, on the toy task: hardly half of the excess in the last losses."""
    _, exact = losses_of("fp32")
    _, eco = losses_of("eco")
    _, nearest = losses_of("eco", Nearest())
    assert nearest / exact - 1 > 0.2
    assert eco - exact < 0.6 * (nearest - exact)


def test_eco_gets_through_what_rounding_to_nearest_holds_up() -> None:
    """600 moves of a twentieth of a BF16 step arrive to within 10 %, or none does.

    After 200 of them a third is still missing.
    """
    distance = {}
    for codec in (EcoStates(), Nearest()):
        param = nn.Parameter(torch.ones(4, 128))
        state = codec.adopt(param)
        for at in range(600):
            numbers = StepNumbers.of(AdamHyper(4e-4, (0.9, 0.95), 1e-8, 0.0), at)
            codec_step(codec, param.detach(), torch.full((4, 128), -0.5), state, numbers)
        distance[type(codec)] = (param.detach().float() - 1).mean().item()
    assert distance[Nearest] == 0
    assert distance[EcoStates] == pytest.approx(600 * 4e-4, rel=0.1)
