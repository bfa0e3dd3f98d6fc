"""Runs on several ranks against the same run on one: losses, results, checkpoints."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megafp4 import checkpoint
from megafp4.checkpoint import Box, ShardedReader
from megafp4.config import ParallelConfig, RunConfig
from megafp4.errors import CheckpointError, ConfigError, MegaFP4Error, UnsupportedError
from megafp4.optim.zero3 import Zero3Optimizer
from megafp4.train import loop, state
from megafp4.train.build import Run, build, check, make_mesh
from megafp4.train.loop import train
from tests.parallel.pool import Ranks
from tests.train.tiny import rows, summary, tiny, write_corpus

RECIPES = ("bf16", "mxfp4", "fp4", "dqt8", "nvfp4")
SHAPE: dict[str, Any] = {
    "layers": 1, "hidden": 128, "seq_len": 64, "vocab_size": 258, "steps": 10, "global_batch": 4,
    "micro_batch": 2, "eval_interval": 5, "eval_batches": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def small(corpus: str, out: Path, recipe: str = "bf16", **changes: Any) -> RunConfig:
    """A run whose learning rate does not blow up the noise of the formats."""
    config = tiny(corpus, out, recipe, **{**SHAPE, **changes})
    optim = dataclasses.replace(config.optim, lr=1e-3, min_lr=1e-4)
    return dataclasses.replace(config, optim=optim)


@pytest.fixture(scope="module")
def serial(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders on one rank, by recipe."""
    folder = tmp_path_factory.mktemp("serial")
    for recipe in RECIPES:
        train(build(small(corpus, folder / recipe, recipe), quiet=True))
    return {recipe: folder / recipe for recipe in RECIPES}


def job(config: RunConfig, stop_at: int | None = None) -> None:
    """Train on one rank of several, until the last of them is asked to stop after a step."""
    run = build(config, make_mesh(config), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        if run.mesh.rank == run.mesh.world.size - 1:
            patch.setattr(loop, "take_step", stopping(stop_at))
        progress = train(run)
    assert progress.done == (stop_at or run.steps)
    assert progress.stopped_by == (None if stop_at is None else signal.SIGTERM)


def stopping(stop_at: int | None) -> Callable[[Run, int], Any]:
    real = loop.take_step

    def take_step(run: Run, step: int) -> Any:
        if step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    return take_step


def on_ranks(config: RunConfig, **parallel: Any) -> RunConfig:
    return dataclasses.replace(config, parallel=ParallelConfig(**parallel))


def curve(folder: Path, kind: str = "train") -> list[float]:
    return [row["loss"] for row in rows(folder, kind)]


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return checkpoint.load(folder / "checkpoints").tensors


def assert_equal(found: Path, expected: Path) -> None:
    """Losses, validation losses, weights and optimizer state, bit for bit."""
    assert len(curve(found)) == 10
    assert curve(found) == curve(expected)
    assert curve(found, "eval") == curve(expected, "eval")
    torch.testing.assert_close(tensors(found), tensors(expected), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dp_and_zero_2_give_the_serial_bits(
    recipe: str, corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    config = small(corpus, tmp_path, recipe)
    two.run(job, on_ranks(config, wire="fp32", zero=2))
    assert_equal(tmp_path, serial[recipe])
    last = rows(tmp_path, "train")[-1]
    assert last["sent_bytes_replicas"] > last["sent_bytes_dp"] > 0
    assert last["tokens_per_s_per_rank"] == last["tokens_per_s"] / 2
    found, alone = summary(tmp_path), summary(serial[recipe])
    assert (found["ranks"], found["mesh"]) == (2, "pp 1 x dp 2 x cp 1 x tp 1")
    assert found["parameters"] == alone["parameters"]
    # One ledger for all ranks.
    assert found["ledger"] == alone["ledger"]
    assert found["bytes_per_parameter"]["optimizer"] == pytest.approx(
        alone["bytes_per_parameter"]["optimizer"] / 2, rel=0.2
    )


def test_zero_1_gives_the_serial_bits_of_one_micro_batch_a_rank(
    corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    two.run(job, on_ranks(small(corpus, tmp_path, "mxfp4"), wire="fp32"))
    assert_equal(tmp_path, serial["mxfp4"])


# Relative error of the losses. Gradients over FP8 carry its noise, a few percent of each bucket,
# which ten steps of Adam turn into this; sums in another order flip codes of the 4-bit formats.
BOUNDS = {"bf16": 2e-3, "mxfp4": 1e-2, "fp4": 1e-2, "dqt8": 1e-2, "nvfp4": 1e-2}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "mesh",
    [
        {"wire": "fp8"},
        {"tp": 2, "wire": "fp32"},
        {"tp": 2, "sequence": True, "wire": "fp32"},
    ],
    ids=["fp8", "tp", "sequence"],
)
def test_two_ranks_follow_the_serial_run(
    mesh: dict[str, Any],
    recipe: str,
    corpus: str,
    serial: dict[str, Path],
    tmp_path: Path,
    two: Ranks,
) -> None:
    two.run(job, on_ranks(small(corpus, tmp_path, recipe), **mesh))
    bound = BOUNDS[recipe]
    assert curve(tmp_path) == pytest.approx(curve(serial[recipe]), rel=bound)
    assert curve(tmp_path, "eval") == pytest.approx(curve(serial[recipe], "eval"), rel=bound)
    # Slices of a GEMM count as the GEMM.
    assert summary(tmp_path)["ledger"] == summary(serial[recipe])["ledger"]
    assert tensors(tmp_path)["model"].keys() == tensors(serial[recipe])["model"].keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_tp_and_dp_together_follow_the_serial_run(
    recipe: str, corpus: str, serial: dict[str, Path], tmp_path: Path, four: Ranks
) -> None:
    config = small(corpus, tmp_path, recipe)
    four.run(job, on_ranks(config, tp=2, sequence=True, zero=2), 4)
    assert curve(tmp_path) == pytest.approx(curve(serial[recipe])[:4], rel=BOUNDS[recipe])


def test_a_run_goes_on_with_another_number_of_ranks(
    corpus: str, tmp_path: Path, two: Ranks, four: Ranks
) -> None:
    once, often = (small(corpus, tmp_path / name, "mxfp4", global_batch=8) for name in ("a", "b"))
    train(build(once, quiet=True))
    exact = on_ranks(often, wire="fp32", zero=2)
    job(often, 2)
    two.run(job, exact, 6)
    four.run(job, exact, 8)
    job(often)
    assert_equal(tmp_path / "b", tmp_path / "a")
    assert summary(tmp_path / "b")["ledger"] == summary(tmp_path / "a")["ledger"]


def test_the_scales_of_fp8_lm_go_on(corpus: str, tmp_path: Path, two: Ranks) -> None:
    once, twice = (small(corpus, tmp_path / name) for name in ("once", "twice"))
    two.run(job, on_ranks(once, wire="fp8-lm"))
    two.run(job, on_ranks(twice, wire="fp8-lm"), 5)
    saved = tensors(tmp_path / "twice")["reducer-1"]
    assert saved
    # It has grown in five steps, so a run that began anew would end in other bits.
    assert all(0.5**0.5 < float(mu) < 1 for mu in saved.values())
    two.run(job, on_ranks(twice, wire="fp8-lm"))
    assert_equal(tmp_path / "twice", tmp_path / "once")


def test_zero_3_goes_on_on_one_rank_and_under_zero_1(
    corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    config = small(corpus, tmp_path, "dqt8")
    two.run(job, on_ranks(config, zero=3, wire="fp32"), 4)
    job(config, 6)
    two.run(job, on_ranks(config, zero=1, wire="fp32"), 8)
    two.run(job, on_ranks(config, zero=3, wire="fp32"))
    assert_equal(tmp_path, serial["dqt8"])


def save_and_restore(config: RunConfig) -> tuple[int, float, int, int]:
    """Bytes sent, bytes owned to bytes written, and elements read and owned."""
    run = build(config, make_mesh(config), quiet=True)
    progress = state.Progress(done=1)
    before = run.mesh.ledger.copy()
    state.save(run, progress)
    own = run.folder.glob(f"checkpoints/*/rank_0000{run.mesh.rank}_*")
    written = sum(path.stat().st_size for path in own)
    assert isinstance(run.optimizer, Zero3Optimizer)
    kept = [one.memory.numel() for one in run.optimizer.owned_weights()]
    kept += [one.memory.numel() for one in run.optimizer.owned_states() if one.memory is not None]
    share = (run.optimizer.weight_bytes() + run.optimizer.state_bytes()) / written
    read, real = [0], ShardedReader._read

    def counting(reader: ShardedReader, file: str, key: str, box: Box) -> Tensor:
        read[0] += box.numel
        return real(reader, file, key, box)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedReader, "_read", counting)
        assert state.restore(run).done == 1
    return run.mesh.ledger.since(before).total(), share, read[0], sum(kept)


def test_under_zero_3_a_rank_saves_and_reads_what_it_owns(
    corpus: str, tmp_path: Path, two: Ranks
) -> None:
    config = small(corpus, tmp_path, "dqt8")
    for sent, share, read, owned in two.run(save_and_restore, on_ranks(config, zero=3)):
        assert sent == 0
        assert share == pytest.approx(1, abs=0.05)
        assert read == owned > 0


def test_a_run_goes_on_with_another_tp(
    corpus: str, serial: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    config = small(corpus, tmp_path, "dqt8")
    two.run(job, on_ranks(config, tp=2), 5)
    job(config)
    assert curve(tmp_path) == pytest.approx(curve(serial["dqt8"]), rel=BOUNDS["dqt8"])


def test_scales_of_a_tp_rank_stay_its_own(corpus: str, tmp_path: Path, two: Ranks) -> None:
    config = small(corpus, tmp_path, "bf16")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, states="coat"))
    two.run(job, on_ranks(config, tp=2), 2)
    two.run(job, on_ranks(config, tp=2), 4)
    with pytest.raises(CheckpointError, match="tp 2 and this run has tp 1: continue with the tp"):
        job(config)


def test_a_spike_is_skipped_by_all_and_divergence_ends_all(
    corpus: str, tmp_path: Path, two: Ranks
) -> None:
    config = small(corpus, tmp_path, spike_factor=0.5, max_spikes=2)
    answers = two.run(fails, on_ranks(config, zero=2))
    assert answers[0] == answers[1]
    assert answers[0].startswith("the loss at step 2 is 5.")
    assert "spike number 2 in a row" in answers[0]


def test_a_folder_that_cannot_be_written_ends_all(corpus: str, tmp_path: Path, two: Ranks) -> None:
    (tmp_path / "file").write_text("")
    answers = two.run(fails, small(corpus, tmp_path / "file" / "out"))
    assert answers[0] == answers[1]
    assert "cannot be written" in answers[0]


def fails(config: RunConfig) -> str:
    """The sentence with which a run ends."""
    try:
        job(config)
    except MegaFP4Error as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("parallel", "changes", "ranks", "sentence"),
    [
        ({"tp": 3}, {}, 2, "needs a multiple of 3 ranks, and the job has 2"),
        ({}, {}, 3, "2 micro-batches of 2, which dp 3 does not divide"),
        ({"tp": 4}, {}, 4, "tp 4 does not divide model.heads 2"),
        ({}, {"dropout": 0.1}, 2, "model.dropout 0.1 on 2 ranks"),
        ({"cp": 2}, {"cuda_graph": True}, 2, "cannot record a rank whose part of a micro-batch"),
        ({"zero": 3}, {"cuda_graph": True}, 2, "cannot record weights that come and go"),
        ({"wire": "fp8-peers"}, {"cuda_graph": True}, 2, "cannot record wire fp8-peers"),
        ({"tp": 2, "sequence": True}, {"micro_batch": 1, "recipe": "mxfp4"}, 2, "over 32 tokens"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_built(
    parallel: Any, changes: Any, ranks: int, sentence: str, corpus: str, tmp_path: Path
) -> None:
    config = on_ranks(small(corpus, tmp_path / "out", **changes), **parallel)
    with pytest.raises((ConfigError, UnsupportedError), match=sentence):
        check(config, ranks)
    assert not (tmp_path / "out").exists()
