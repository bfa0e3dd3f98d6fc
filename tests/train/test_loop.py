"""Training end to end on a corpus that can be learnt: every kind of recipe, and what it records."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from megafp4.errors import DataError, DivergenceError, UnsupportedError
from megafp4.train import loop
from megafp4.train.build import build
from megafp4.train.loop import train
from megafp4.train.metrics import Screen, Workload, read_rows
from tests.train.tiny import rows, summary, tiny

FORMATS = {
    "bf16": ("bf16 x bf16", "bf16 x bf16", "bf16 x bf16"),
    "mxfp4": ("bf16 x bf16", "mxfp4 x mxfp4", "mxfp4 x mxfp4"),
    "fp4": ("fp4-vector x fp4-vector", "fp8-e5m2 x fp8-e4m3", "fp8-e5m2 x fp8-e4m3"),
    "dqt8": ("int8 x int8", "bf16 x bf16", "bf16 x bf16"),
    "bitnet": ("int8 x ternary", "bf16 x bf16", "bf16 x bf16"),
}


@pytest.mark.parametrize("recipe", FORMATS)
def test_the_loss_falls_and_the_run_folder_is_complete(
    corpus: str, tmp_path: Path, recipe: str
) -> None:
    steps = 8
    config = tiny(corpus, tmp_path, recipe, steps=steps, layers=1, micro_batch=4, stats_interval=4)
    progress = train(build(config, quiet=True))
    losses = [row["loss"] for row in rows(tmp_path, "train")]
    assert len(losses) == steps
    assert losses[0] == pytest.approx(5.55, abs=0.05)  # ln 257: a model that knows nothing
    assert losses[-1] < losses[0] - 1.0
    found = summary(tmp_path)
    assert (found["train_loss"], found["valid_loss"]) == (losses[-1], progress.valid_loss)
    assert found["valid_loss"] == rows(tmp_path, "eval")[-1]["loss"] < losses[0] - 1.0
    assert found["steps"] == steps
    # Four linears, once each in a step; evaluation is not counted.
    gemms = {gemm: found["ledger"][gemm] for gemm in ("fprop", "dgrad", "wgrad")}
    assert gemms == {
        gemm: {formats: 4 * steps} for gemm, formats in zip(gemms, FORMATS[recipe], strict=True)
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "ledger.json", "metrics.jsonl", "stats.jsonl",
        "summary.json", "tensorboard",
    }  # fmt: skip
    statistics = read_rows(tmp_path / "stats.jsonl")
    assert {row["step"] for row in statistics if recipe != "bf16"} <= {4, 8}
    assert bool(statistics) == (recipe != "bf16")
    assert len({(r["step"], r["layer"], r["gemm"], r["operand"]) for r in statistics}) == len(
        statistics
    )


def test_bytes_per_parameter_are_measured(corpus: str, tmp_path: Path) -> None:
    train(build(tiny(corpus, tmp_path / "a", "bf16", steps=1), quiet=True))
    train(build(tiny(corpus, tmp_path / "b", "dqt8", steps=1), quiet=True))
    dense, grid = summary(tmp_path / "a"), summary(tmp_path / "b")
    assert dense["bytes_per_parameter"] == {"weights": 4.0, "optimizer": 8.0, "total": 12.0}
    assert dense["parameters"] == grid["parameters"]
    # Linears at one byte and a scale per row; embeddings, norms and biases at four.
    linears = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    rows_of_linears = 2 * (192 + 64 + 256 + 64)
    others = dense["parameters"] - linears
    expected = (linears + 4 * rows_of_linears + 4 * others) / dense["parameters"]
    assert grid["bytes_per_parameter"]["weights"] == pytest.approx(expected, rel=1e-3)


def test_grid_recipes_record_how_codes_move(corpus: str, tmp_path: Path) -> None:
    train(build(tiny(corpus, tmp_path, "dqt8", steps=2), quiet=True))
    for row in rows(tmp_path, "train"):
        assert 0 < row["flip_rate"] < 1
        assert 0 <= row["saturation_rate"] < 1


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4"])
def test_micro_batches_do_not_change_the_result(corpus: str, tmp_path: Path, recipe: str) -> None:
    losses, weights = [], []
    for micro_batch in (4, 2):
        config = tiny(
            corpus, tmp_path / str(micro_batch), recipe, micro_batch=micro_batch, layers=1,
            steps=2, eval_batches=4 // micro_batch,
        )  # fmt: skip
        run = build(config, quiet=True)
        progress = train(run)
        losses.append(torch.tensor([progress.train_loss, progress.valid_loss]))
        weights.append(run.model.state_dict())
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    if recipe == "bf16":
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-3)


def test_random_bits_are_told_step_and_place_in_the_global_batch(
    corpus: str, tmp_path: Path
) -> None:
    """So that stochastic rounding draws the same bits for a token however the batch is cut."""
    run = build(tiny(corpus, tmp_path, steps=2, eval_batches=0), quiet=True)
    seen = []
    run.model.register_forward_pre_hook(
        lambda *_: seen.append((run.precision.step, run.precision.first_token))
    )
    train(run)
    assert seen == [(0, 0), (0, 64), (1, 0), (1, 64)]


def test_gradients_are_those_of_one_large_batch(corpus: str, tmp_path: Path) -> None:
    """Accumulation, against autograd on the whole batch at once and on uneven targets."""
    run = build(tiny(corpus, tmp_path, "bf16", global_batch=8), quiet=True)
    (tokens, targets) = (torch.cat(part) for part in zip(*run.data.training(0), strict=True))
    targets[0, 5:] = -1
    cut = [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])]
    loss = loop.accumulate_gradients(run, 0, cut)
    accumulated = [p.grad for p in run.model.parameters()]
    run.optimizer.zero_grad()
    whole = run.model(tokens, targets)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for mine, parameter in zip(accumulated, run.model.parameters(), strict=True):
        assert mine is not None
        assert parameter.grad is not None
        error = (mine - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.01  # wgrad rounds its operands to BF16, and their scale is the weight


def test_a_schedule_switches_the_recipe_in_the_ledger(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(
        corpus, tmp_path, "mxfp4", layers=1, micro_batch=4, steps=4,
        precision_schedule="mxfp4:0.5,bf16:0.5",
    )  # fmt: skip
    train(build(config))
    found = summary(tmp_path)
    assert found["recipe"] == "mxfp4:0.5,bf16:0.5"
    assert found["ledger"]["dgrad"] == {"mxfp4 x mxfp4": 8, "bf16 x bf16": 8}
    assert found["ledger"]["fprop"] == {"bf16 x bf16": 16}
    assert "recipe bf16 from step 3 on" in capsys.readouterr().out


def test_initial_weights_and_batches_do_not_depend_on_the_recipe(
    corpus: str, tmp_path: Path
) -> None:
    runs = [build(tiny(corpus, tmp_path / r, r), quiet=True) for r in ("bf16", "fp4", "bitnet")]
    for run in runs[1:]:
        torch.testing.assert_close(
            run.model.state_dict(), runs[0].model.state_dict(), rtol=0, atol=0
        )
        torch.testing.assert_close(run.data.training(3), runs[0].data.training(3), rtol=0, atol=0)


def test_evaluating_more_often_changes_nothing_else(corpus: str, tmp_path: Path) -> None:
    found = []
    for interval in (1, 0):
        out = tmp_path / str(interval)
        config = tiny(corpus, out, "fp4", layers=1, steps=3, eval_interval=interval, dropout=0.1)
        train(build(config, quiet=True))
        assert len(rows(out, "eval")) == (3 if interval else 1)
        found.append(
            [(row["loss"], row["grad_norm"]) for row in rows(out, "train")]
            + [summary(out)["valid_loss"], (out / "ledger.json").read_text()]
        )
    assert found[0] == found[1]


def test_a_run_may_have_no_evaluation(corpus: str, tmp_path: Path) -> None:
    train(build(tiny(corpus, tmp_path, steps=1, eval_batches=0), quiet=True))
    assert rows(tmp_path, "eval") == []
    assert summary(tmp_path)["valid_loss"] is None


def test_nan_in_the_weights_ends_the_run_and_names_the_layer(corpus: str, tmp_path: Path) -> None:
    run = build(tiny(corpus, tmp_path, "bf16"), quiet=True)
    with torch.no_grad():
        run.model.get_parameter("blocks.1.mlp.up.weight")[3, 5] = torch.nan
    with pytest.raises(
        DivergenceError, match=r"loss at step 1 is nan, first in the output of blocks\.1\.mlp\.up:"
    ):
        train(run)
    assert not (tmp_path / "summary.json").exists()


def test_a_bad_validation_loss_ends_the_run(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update may be the one that ruins the weights, and no later step notices."""
    run = build(tiny(corpus, tmp_path, "bf16", steps=1), quiet=True)
    monkeypatch.setattr(loop, "evaluate", lambda *_: float("nan"))
    with pytest.raises(DivergenceError, match="validation loss at step 1 is nan"):
        train(run)
    assert not (tmp_path / "summary.json").exists()


def test_an_infinite_gradient_ends_the_run_before_it_moves_a_weight(
    corpus: str, tmp_path: Path
) -> None:
    run = build(tiny(corpus, tmp_path, "bf16"), quiet=True)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    weight = run.model.get_parameter("blocks.0.attention.qkv.weight")
    weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        DivergenceError, match=r"step 1 is (nan|inf), first in the gradient of blocks\.0\.attention"
    ):
        train(run)
    torch.testing.assert_close(run.model.state_dict(), before, rtol=0, atol=0)


def test_a_spike_skips_the_update(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tiny(corpus, tmp_path, "bf16", steps=3, eval_interval=0))
    real = loop.accumulate_gradients
    moved: list[bool] = []

    def spiking(run: object, step: int, batches: object) -> float:
        before = weight.detach().clone()
        seen.append(before)
        loss = real(run, step, batches)  # type: ignore[arg-type]
        return 100.0 if step == 1 else loss

    weight = run.model.get_parameter("embedding.weight")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(loop, "accumulate_gradients", spiking)
    train(run)
    seen.append(weight.detach().clone())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True, False, True]
    assert [row["spikes"] for row in rows(tmp_path, "train")] == [0, 1, 1]


def test_spikes_in_a_row_end_the_run(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tiny(corpus, tmp_path, "bf16", max_spikes=2), quiet=True)
    real = loop.accumulate_gradients
    monkeypatch.setattr(
        loop, "accumulate_gradients", lambda r, s, b: real(r, s, b) * (1.0 if s == 0 else 50.0)
    )
    with pytest.raises(DivergenceError, match=r"at step 3 .* spike number 2 in a row"):
        train(run)


def test_token_ids_outside_the_vocabulary_are_an_error(corpus: str, tmp_path: Path) -> None:
    """A file that changed behind its description's back, size and all."""
    prefix = tmp_path / "poisoned"
    for suffix in (".bin", ".idx", ".meta.json"):
        Path(f"{prefix}{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    tokens = bytearray(Path(f"{prefix}.bin").read_bytes())
    tokens[1::2] = b"\x7f" * len(tokens[1::2])
    Path(f"{prefix}.bin").write_bytes(tokens)
    run = build(tiny(str(prefix), tmp_path / "out"), quiet=True)
    with pytest.raises(DataError, match=r"holds token id 32\d\d\d .* but model.vocab_size is 257"):
        train(run)


def test_the_resolved_configuration_is_written(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path)
    build(config, quiet=True)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        ("", "mxfp4"),
        ("mxfp4:0.5,bf16:0.5", "mxfp4:0.5,bf16:0.5"),
        ("bf16@1", "mxfp4, bf16@1"),
    ],
)
def test_the_bar_is_labelled_with_preset_and_recipe(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, name: str
) -> None:
    labels = []

    class Seen(Screen):
        def __init__(self, label: str, work: Workload, *, quiet: bool) -> None:
            labels.append(label)
            super().__init__(label, work, quiet=quiet)

    monkeypatch.setattr("megafp4.train.build.Screen", Seen)
    config = tiny(corpus, tmp_path, "mxfp4", steps=2, layers=1, precision_schedule=schedule)
    assert build(config, quiet=True).recipe_name == name
    assert labels == [f"tiny-mxfp4, {name}"]


def test_a_run_that_is_refused_leaves_its_folder_free(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path / "run", "mxfp4", steps=1, cuda_graph=True)
    with pytest.raises(UnsupportedError, match=r"train\.cuda_graph needs backend 'hopper'"):
        build(config, quiet=True)
    assert not (tmp_path / "run").exists()
