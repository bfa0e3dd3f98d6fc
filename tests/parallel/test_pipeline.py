"""Pipelines train as one rank does, bit for bit: same losses, same codes, same GEMMs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from megafp4.errors import CommunicationError, ConfigError
from megafp4.models.factory import keep_input_as
from megafp4.recipes import get_recipe
from tests.parallel.pipeline_runs import (
    CUT,
    GPT,
    LLAMA,
    MICRO_BATCH,
    MICRO_BATCHES,
    Outcome,
    batches,
    connect_pipeline,
    first_tokens,
    piped,
    serial,
    tensor_parallel,
    zero,
)
from tests.parallel.pool import Ranks


def rows(ledgers: list[list[dict[str, str | int]]]) -> set[tuple[tuple[str, str | int], ...]]:
    """Entries of ledgers, which must have no layer in common."""
    found = [tuple(sorted(row.items())) for ledger in ledgers for row in ledger]
    assert len(found) == len(set(found))
    return set(found)


def check_equal(found: list[Outcome], expected: Outcome) -> None:
    """All ranks together did what one does."""
    assert expected.losses[-1] != expected.losses[0]
    for one in found:
        assert one.losses == expected.losses
        assert one.valid == expected.valid
        assert one.notes["deferred"] is None
        assert all(torch.equal(expected.weights[name], one.weights[name]) for name in one.weights)
    assert {name for one in found for name in one.weights} == expected.weights.keys()
    assert {key: one.codes[key] for one in found for key in one.codes} == expected.codes
    assert rows([one.ledger for one in found]) == rows([expected.ledger])


SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2)]


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4", "dqt8", "nvfp4"])
def test_every_recipe_trains_as_on_one_rank(recipe: str, two: Ranks) -> None:
    check_equal(two.run(piped, LLAMA, recipe, 10, "zero-bubble", 2), serial(LLAMA, recipe, 10))


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_every_schedule_trains_as_one_rank(schedule: str, chunks: int, two: Ranks) -> None:
    found = two.run(piped, LLAMA, "mxfp4", 2, schedule, chunks)
    check_equal(found, serial(LLAMA, "mxfp4", 2))
    stream = MICRO_BATCHES * MICRO_BATCH * LLAMA.seq_len * LLAMA.hidden * 2
    both_ways = 2 * (2 * chunks - 1) * stream * 2
    assert sum(one.notes["sent"] for one in found) == both_ways
    for one in found:
        begins = [call for call in one.notes["calls"] if isinstance(call, bool)]
        assert one.notes["calls"][0] is False
        assert begins == ([False, True] if schedule in ("gpipe", "1f1b") else [False])
        for name in one.notes["names"]:
            assert one.notes["calls"].count(name) == MICRO_BATCHES, name
        if True in begins:
            last = one.notes["calls"][one.notes["calls"].index(True) + 1 :]
            assert sorted(last) == sorted(one.notes["names"])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zero-bubble", 2)])
def test_recomputed_blocks_draw_the_same(
    recompute: str, schedule: str, chunks: int, two: Ranks
) -> None:
    # Stochastic rounding in fprop already, for wgrad: computed again, it must find its position.
    recipe = keep_input_as(get_recipe("mxfp4"), "operand")
    expected = serial(LLAMA, "mxfp4", 2)
    for one in two.run(piped, LLAMA, recipe, 2, schedule, chunks, (), 1, recompute):
        assert one.losses == expected.losses
        for name, value in one.weights.items():
            assert torch.equal(value, expected.weights[name]), name


def test_an_uneven_cut(two: Ranks) -> None:
    found = two.run(piped, LLAMA, "bf16", 10, "1f1b", 1, (1, 3))
    assert [sum("qkv" in name for name in one.weights) for one in found] == [1, 3]
    check_equal(found, serial(LLAMA, "bf16", 10))


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_a_tied_embedding_is_that_of_both_ends(schedule: str, two: Ranks) -> None:
    first, last = two.run(piped, GPT, "bf16", 6, schedule)
    expected = serial(GPT, "bf16", 6)
    assert torch.equal(first.weights["embedding.weight"], last.weights["embedding.weight"])
    assert "positions.weight" not in last.weights
    assert first.losses[0] == expected.losses[0]  # later, the table's gradient adds up otherwise
    for found, wanted in zip(first.losses, expected.losses, strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)
    assert first.losses == last.losses


@pytest.mark.parametrize(
    ("recipe", "schedule", "chunks"), [("nvfp4", "zero-bubble", 2), ("fp4", "1f1b", 1)]
)
def test_a_pipeline_of_cut_layers(
    recipe: str, schedule: str, chunks: int, two: Ranks, four: Ranks
) -> None:
    """What tensor parallelism computes stays what it is, to the bit."""
    alone = two.run(tensor_parallel, CUT, recipe, 2)
    found = four.run(piped, CUT, recipe, 2, schedule, chunks, (), 2)
    check_equal(found[0::2], alone[0])
    check_equal(found[1::2], alone[1])


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("zero-bubble", 2)])
def test_zero_takes_every_gradient_once(schedule: str, chunks: int, two: Ranks) -> None:
    expected = serial(LLAMA, "mxfp4", 3)
    for losses, norm, weights in two.run(zero, schedule, chunks, 1):
        assert losses == expected.losses
        assert norm == pytest.approx(expected.norm, rel=1e-6)
        for name, value in weights.items():
            assert torch.equal(value, expected.weights[name]), name


def test_two_pipelines_share_the_micro_batches(four: Ranks) -> None:
    expected = serial(LLAMA, "mxfp4", 3)
    found = four.run(zero, "1f1b", 1, 2)
    for losses, norm, _ in found:
        assert losses[0] == expected.losses[0]  # later, gradients have been added in another order
        assert sum(losses[-1]) == pytest.approx(sum(expected.losses[-1]), rel=2e-3)
        assert norm == found[0][1]


def wrong() -> list[str]:
    """What is said of batches that do not fit."""
    one, said = connect_pipeline(LLAMA, "bf16", "1f1b"), []
    found, shares = batches(LLAMA, 0)
    short = [(tokens[:, :8], targets[:, :8]) for tokens, targets in found]
    for given in (found[:3], short):
        with pytest.raises(ConfigError) as error:
            one.pipeline.step(given, shares, first_tokens(LLAMA))
        said.append(str(error.value))
    return said


def test_batches_that_do_not_fit_are_refused(two: Ranks) -> None:
    for said in two.run(wrong):
        assert "a step has 3 micro-batches and the pipeline was made for 4" in said[0]
        assert "micro-batches of [2, 32] tokens and got [2, 8]" in said[1]


def test_four_stages(four: Ranks) -> None:
    first, second, _, last = four.run(piped, GPT, "bf16", 3, "zero-bubble")
    assert second.losses == first.losses
    assert second.losses[0] == serial(GPT, "bf16", 3).losses[0]
    assert all(name.startswith("blocks.1.") for name in second.weights)
    assert torch.equal(first.weights["embedding.weight"], last.weights["embedding.weight"])


def die(victim: int) -> str:
    """What a survivor is told when the other rank dies within a step."""
    one = connect_pipeline(LLAMA, "bf16", "1f1b")
    found, shares = batches(LLAMA, 0)
    one.pipeline.step(found, shares, first_tokens(LLAMA))
    if one.mesh.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CommunicationError) as error:
        one.pipeline.step(found, shares, first_tokens(LLAMA))
    return str(error.value)


@pytest.fixture
def mortal() -> Iterator[Ranks]:
    """Processes of one test alone."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others(victim: int, mortal: Ranks) -> None:
    message = mortal.run(die, victim, dies=victim)[1 - victim]
    assert f"rank {1 - victim} of 2 in group 'pp' lost the others during 'pipeline'" in message
