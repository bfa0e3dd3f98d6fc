"""Runs on pipelines, with cut sequences and with cut weights, against the same run on one rank."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from megafp4.config import RunConfig
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.train.build import build, check, make_mesh
from megafp4.train.loop import StepResult, take_step, train
from tests.parallel.pool import Ranks
from tests.parallel.test_train import RECIPES, assert_equal, curve, job, on_ranks, small, tensors
from tests.train.tiny import rows, summary, write_corpus

LLAMA: dict[str, Any] = {"family": "llama", "layers": 2, "ffn_hidden": 256, "micro_batch": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def serial(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of Llama on one rank, by recipe."""
    folder = tmp_path_factory.mktemp("serial")
    for recipe in RECIPES:
        train(build(llama(corpus, folder / recipe, recipe), quiet=True))
    return {recipe: folder / recipe for recipe in RECIPES}


def llama(corpus: str, out: Path, recipe: str, **changes: Any) -> RunConfig:
    return small(corpus, out, recipe, **{**LLAMA, **changes})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pipeline_gives_the_serial_bits(
    recipe: str, corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    schedule = "zero-bubble" if recipe in ("mxfp4", "dqt8") else "1f1b"
    config = llama(corpus, tmp_path, recipe)
    two.run(job, on_ranks(config, pp=2, wire="fp32", schedule=schedule))
    assert_equal(tmp_path, serial[recipe])
    # One ledger for all stages.
    assert summary(tmp_path)["ledger"] == summary(serial[recipe])["ledger"]
    assert rows(tmp_path, "train")[-1]["sent_bytes_pp"] > 0


def test_an_interleaved_pipeline_with_statistics_resumes_to_the_serial_bits(
    corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    config = llama(corpus, tmp_path, "mxfp4")
    options: dict[str, Any] = {"pp": 2, "wire": "fp32"}
    two.run(job, on_ranks(config, **options), 5)
    # Another cut of the same blocks, and then one rank.
    two.run(job, on_ranks(config, **options, schedule="gpipe"), 8)
    train(build(config, quiet=True))
    assert_equal(tmp_path, serial["mxfp4"])


def test_a_tied_pipeline_rounds_as_the_serial_run(corpus: str, tmp_path: Path, two: Ranks) -> None:
    # One micro-batch: of several, the two copies' gradients would add up in another order.
    changes: dict[str, Any] = {"layers": 2, "global_batch": 2}
    alone, piped = (small(corpus, tmp_path / name, "mxfp4", **changes) for name in ("one", "two"))
    alone, piped = (
        dataclasses.replace(one, optim=dataclasses.replace(one.optim, states="bf16-sr"))
        for one in (alone, piped)
    )
    train(build(alone, quiet=True))
    copies = two.run(table, on_ranks(piped, pp=2, wire="fp32", schedule="gpipe"))
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert copies[0] == copies[1]


def table(config: RunConfig) -> list[list[float]]:
    """Train, and return the copy of the tied embedding that this stage holds."""
    run = build(config, make_mesh(config), quiet=True)
    train(run)
    assert isinstance(run.model.embedding.weight, torch.Tensor)
    found: list[list[float]] = run.model.embedding.weight.tolist()
    return found


def test_a_tied_pipeline_with_tp_follows_the_serial_run(
    corpus: str, tmp_path: Path, four: Ranks
) -> None:
    changes: dict[str, Any] = {"layers": 2, "micro_batch": 1}
    train(build(small(corpus, tmp_path / "one", **changes), quiet=True))
    config = small(corpus, tmp_path / "four", **changes)
    four.run(job, on_ranks(config, pp=2, tp=2, sequence=True, wire="fp32"))
    assert curve(tmp_path / "four") == pytest.approx(curve(tmp_path / "one"), rel=2e-3)
    found, expected = tensors(tmp_path / "four")["model"], tensors(tmp_path / "one")["model"]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape


@pytest.mark.parametrize(
    ("recipe", "attention"),
    [*((recipe, "all-gather") for recipe in RECIPES), ("bf16", "ring"), ("mxfp4", "ring")],
)
def test_cut_sequences_follow_the_serial_run(
    recipe: str, attention: str, corpus: str, tmp_path: Path, two: Ranks
) -> None:
    changes: dict[str, Any] = {"seq_len": 256, "steps": 4, "eval_interval": 4}
    train(build(llama(corpus, tmp_path / "one", recipe, **changes), quiet=True))
    config = llama(corpus, tmp_path / "two", recipe, **changes)
    two.run(job, on_ranks(config, cp=2, attention=attention, wire="fp32"))
    found, expected = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert len(found) == 4
    assert found[0] == pytest.approx(expected[0], rel=1e-6 if attention == "all-gather" else 1e-3)
    assert found == pytest.approx(expected, rel=2e-3 if recipe == "bf16" else 0.01)
    valid = curve(tmp_path / "two", "eval"), curve(tmp_path / "one", "eval")
    assert valid[0] == pytest.approx(valid[1], rel=0.01)


def without_early_targets(config: RunConfig, parallel: dict[str, Any]) -> list[float]:
    """Losses of two steps on sequences whose first and last quarter have no targets."""
    run = build(on_ranks(config, **parallel) if parallel else config, quiet=True)
    real = run.data.training

    def training(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = real(step)
        for _, targets in found:
            targets[:, :64] = -1
            targets[:, -64:] = -1
        return found

    run.data.training = training  # type: ignore[method-assign]
    losses = []
    for step in range(2):
        result = take_step(run, step)
        assert isinstance(result, StepResult)
        losses.append(result.loss)
    return losses


def test_a_cp_rank_may_hold_no_target(corpus: str, tmp_path: Path, two: Ranks) -> None:
    changes: dict[str, Any] = {"seq_len": 256}
    expected = without_early_targets(llama(corpus, tmp_path / "one", "bf16", **changes), {})
    config = llama(corpus, tmp_path / "two", "bf16", **changes)
    for found in two.run(without_early_targets, config, {"cp": 2, "wire": "fp32"}):
        assert found == pytest.approx(expected, rel=1e-4)


def test_gradients_are_summed_within_nodes_first(
    corpus: str, serial: dict[str, Path], tmp_path: Path, four: Ranks
) -> None:
    sent = {}
    for nodes in (1, 2):
        folder = tmp_path / str(nodes)
        four.run(job, on_ranks(llama(corpus, folder, "mxfp4"), nodes=nodes), 8)
        # FP8 rounds the gradients on their way.
        assert curve(folder) == pytest.approx(curve(serial["mxfp4"])[:8], rel=0.01)
        sent[nodes] = {n: b for n, b in rows(folder, "train")[-1].items() if "sent_bytes" in n}
    within, between = (sent[2][f"sent_bytes_{name}"] for name in ("within_node", "between_nodes"))
    # Of four shards a rank sends one to its neighbour for each node, and one to the other node.
    assert within == pytest.approx(2 * between)
    others = sent[2]["sent_bytes_replicas"]
    assert sent[1]["sent_bytes_replicas"] - others == pytest.approx(3 * between)


@pytest.mark.parametrize("recipe", RECIPES)
def test_zero_3_gives_the_serial_bits(
    recipe: str, corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    config = llama(corpus, tmp_path, recipe)
    two.run(job, on_ranks(config, zero=3, wire="fp32"), 6)
    two.run(job, on_ranks(config, zero=3, wire="fp32"))
    assert_equal(tmp_path, serial[recipe])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not installed")
def test_deepspeed_follows_the_serial_run(
    corpus: str, serial: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as launch code does
    config = llama(corpus, tmp_path, "mxfp4", spike_factor=0.0)
    options: dict[str, Any] = {"engine": "deepspeed", "zero": 2, "wire": "fp32"}
    for stop in (5, None):
        ranks = Ranks(2)  # DeepSpeed keeps its groups for as long as a process lives
        try:
            ranks.run(job, on_ranks(config, **options), stop)
        finally:
            ranks.stop()
    assert curve(tmp_path) == pytest.approx(curve(serial["mxfp4"]), rel=0.01)


@pytest.mark.parametrize(
    ("parallel", "changes", "sentence"),
    [
        ({"pp": 3}, {}, r"needs a multiple of 3 ranks"),
        ({"pp": 2, "schedule": "interleaved", "chunks": 2}, {}, "needs at least 4 blocks"),
        ({"pp": 2}, {"micro_batch": 4}, "needs at least 2 micro-batches"),
        ({"pp": 2, "layers": (1, 2)}, {}, "add up to model.layers 2"),
        ({"pp": 2, "zero": 3}, {}, "parallel.zero 3 cuts the weights over dp x cp alone"),
        ({"cp": 2}, {"memory_report": True}, "train.memory_report runs the model by itself"),
        ({"cp": 2}, {"seq_len": 66}, "cannot be cut into 2 x cp 2 equal chunks"),
        ({"zero": 3}, {"precision_schedule": "mxfp4:0.5,bf16:0.5"}, "has a precision_schedule"),
        ({"engine": "deepspeed"}, {}, "parallel.wire fp8 is not DeepSpeed's"),
        ({"engine": "deepspeed", "wire": "fp32"}, {}, "train.spike_factor 3.0 skips updates"),
        ({"engine": "deepspeed", "tp": 2}, {}, "shares a model by dp alone"),
        ({"nodes": 2}, {}, "parallel.nodes 2 does not part the 2 ranks of dp 2 x cp 1"),
        ({"nodes": 2, "tp": 2}, {}, "does not part the 1 ranks"),
    ],
)
def test_what_a_mesh_cannot_do_is_refused(
    parallel: Any, changes: Any, sentence: str, corpus: str, tmp_path: Path
) -> None:
    config = on_ranks(llama(corpus, tmp_path / "out", "bf16", **changes), **parallel)
    with pytest.raises((ConfigError, UnsupportedError), match=sentence):
        check(config, 2)


def test_what_is_for_several_ranks_is_refused_on_one(corpus: str, tmp_path: Path) -> None:
    config = on_ranks(llama(corpus, tmp_path, "bf16"), zero=2)
    with pytest.raises(ConfigError, match=r"parallel.zero 2 .* is for several ranks"):
        check(config, 1)
