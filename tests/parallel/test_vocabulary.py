"""Embedding, head and loss with a share of the words on each rank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megafp4.models import loss as whole_loss
from megafp4.models.layers import Head
from megafp4.parallel.collectives import Group
from megafp4.parallel.mesh import Mesh, MeshSizes
from megafp4.parallel.sequence import SequenceScatter
from megafp4.parallel.vocabulary import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_loss,
)
from tests.parallel.pool import Ranks

WORDS, WIDTH, SHAPE = 96, 32, (3, 20)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(*SHAPE, WIDTH, generator=generator)
    weight = torch.randn(WORDS, WIDTH, generator=generator)
    targets = torch.randint(WORDS, SHAPE, generator=generator)
    targets[1, :7] = -1
    return x, weight, targets


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def score(dtype: torch.dtype, chunk: int, sequence: bool, scale: float) -> list[float]:
    """Errors of loss, dx and dW against float64, on every rank."""
    with pytest.MonkeyPatch.context() as patch:  # other tests run in this process later
        patch.setattr(whole_loss, "CHUNK_ELEMENTS", chunk)
        return _score(dtype, sequence, scale)


def _score(dtype: torch.dtype, sequence: bool, scale: float) -> list[float]:
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    x, weight, targets = inputs()
    x, weight = (x * scale).to(dtype), weight.to(dtype).float()
    exact_x, exact_w = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.cross_entropy(
        (exact_x @ exact_w.t()).flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    (3 * exact).backward()
    head = VocabParallelHead(WIDTH, WORDS, group, tied=False, sequence=sequence)
    assert head.weight is not None
    head.weight.data.copy_(head.layouts["weight"].take(weight))
    own = group.own(x.flatten(0, 1)).view(SHAPE[0], -1, WIDTH) if sequence else x.clone()
    own.requires_grad_()
    loss = head(own, torch.empty(0), targets)
    (3 * loss).backward()
    dx, dw = exact_x.grad, exact_w.grad
    assert dx is not None
    assert dw is not None
    dx = group.own(dx.flatten(0, 1)) if sequence else dx.flatten(0, 1)
    assert own.grad is not None
    return [
        off(loss.detach(), exact.detach()),
        off(own.grad.flatten(0, 1), dx),
        off(head.weight.grad, head.layouts["weight"].take(dw)),
    ]


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("chunk", [2**27, 48 * 7], ids=["whole", "chunks"])
def test_loss_and_gradients(chunk: int, sequence: bool, two: Ranks) -> None:
    for errors in two.run(score, torch.float32, chunk, sequence, 1.0):
        assert max(errors) < 2e-6
    for errors in two.run(score, torch.bfloat16, chunk, sequence, 1.0):
        assert max(errors) < 1e-2


def test_large_logits_do_not_overflow(two: Ranks) -> None:
    for errors in two.run(score, torch.float32, 2**27, False, 100.0):
        assert max(errors) < 1e-5


def embed_and_predict() -> list[bool]:
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    x, weight, tokens = inputs()
    tokens = tokens.clamp(min=0)
    table = VocabParallelEmbedding(WORDS, WIDTH, group)
    table.weight.data.copy_(table.layouts["weight"].take(weight))
    found = table(tokens)
    answers = [torch.equal(found, F.embedding(tokens, weight))]
    found.backward(x)
    dense = weight.clone().requires_grad_()
    F.embedding(tokens, dense).backward(x)
    assert dense.grad is not None
    answers.append(torch.equal(table.weight.grad, table.layouts["weight"].take(dense.grad)))
    tied = VocabParallelHead(WIDTH, WORDS, group, tied=True)
    own = x.clone().requires_grad_()
    logits = tied(own, table.weight)
    whole = x.clone().requires_grad_()
    expected = Head(WIDTH, WORDS, tied=True)(whole, weight)
    answers.append(off(logits.detach(), expected.detach()) < 1e-6)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    logits.backward(slope)
    expected.backward(slope)
    assert whole.grad is not None
    answers.append(off(own.grad, whole.grad) < 1e-6)
    return answers


def test_embedding_and_logits(two: Ranks) -> None:
    assert two.run(embed_and_predict) == [[True] * 4] * 2


def embed_own_tokens() -> tuple[bool, list[int]]:
    """Whether output and gradient have the bits of a table that is whole; bytes sent for each."""
    group = Mesh(MeshSizes(tp=dist.get_world_size())).tp
    slope, weight, tokens = inputs()
    tokens, scatter = tokens.clamp(min=0), SequenceScatter(group)
    own, sent, outcomes = group.own(slope.flatten(0, 1)), [], []
    for sequence in (False, True):
        table = VocabParallelEmbedding(WORDS, WIDTH, group, sequence=sequence)
        table.weight.data.copy_(table.layouts["weight"].take(weight))
        before = group.ledger.copy()
        # As in a model of GPT's kind: something is added, and the type changes.
        found = scatter((table(tokens) + weight[0]).bfloat16())
        sent.append(group.ledger.since(before).total(what="activations"))
        found.backward(own.view_as(found))
        assert table.weight.grad is not None
        outcomes.append((found.detach(), table.weight.grad))
    expected = group.own((F.embedding(tokens, weight) + weight[0]).bfloat16().flatten(0, 1))
    same = torch.equal(outcomes[1][0].flatten(0, 1), expected)
    return same and all(map(torch.equal, *outcomes)), sent


def test_cut_sequences_take_half_of_the_bytes(two: Ranks) -> None:
    count = 4 * math.prod(SHAPE) * WIDTH
    assert two.run(embed_own_tokens) == [(True, [count, count // 2])] * 2


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one, which needs no processes, scores as many tokens at a time as fit."""
    seen: list[int] = []
    monkeypatch.setattr(whole_loss, "CHUNK_ELEMENTS", 10 * WORDS)
    monkeypatch.setattr(Group, "all_reduce", lambda self, x, *_: seen.append(x.shape[-1]) or x)
    x, weight, targets = inputs()
    vocab_parallel_loss(x.flatten(0, 1), weight, targets.flatten(), Group("tp"))
    assert max(seen) == 10
    assert sum(seen) == 2 * targets.numel()
