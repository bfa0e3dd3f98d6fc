"""Linears that stay BF16 in whole runs: schedules, grids, resuming, files and command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megafp4 import settings
from megafp4.cli import main
from megafp4.config import RunConfig
from megafp4.errors import ConfigError
from megafp4.train.build import build, check
from megafp4.train.folder import finished_summary
from megafp4.train.loop import train
from tests.train.tiny import rows, summary, tiny

EXEMPT = ("blocks.0.*", "*.mlp.down")


def layers_in(out: Path, fmt: str) -> set[str]:
    """Layers of a finished run that multiplied operands of a format."""
    ledger: list[dict[str, Any]] = json.loads((out / "ledger.json").read_text())
    return {row["layer"] for row in ledger if fmt in (row["a"], row["b"])}


KEPT = {"blocks.1.attention.qkv", "blocks.1.attention.out", "blocks.1.mlp.up"}


def test_a_schedule_keeps_them_out(corpus: str, tmp_path: Path) -> None:
    config = tiny(
        corpus, tmp_path, steps=3, exempt=EXEMPT, precision_schedule="mxfp4@0,mxfp4-fp8@1,bf16@2"
    )
    train(build(config, quiet=True))
    assert layers_in(tmp_path, "mxfp4") == layers_in(tmp_path, "fp8-e4m3") == KEPT
    assert len(layers_in(tmp_path, "bf16")) == 8


def test_exempt_linears_stay_off_the_grid(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path / "some", "dqt8", exempt=EXEMPT)
    run = build(config, quiet=True)
    on_grid = {
        n.removesuffix(".weight") for n, p in run.model.named_parameters() if hasattr(p, "grid")
    }
    assert on_grid == KEPT
    train(run)
    assert layers_in(tmp_path / "some", "int8") == KEPT
    losses = [row["loss"] for row in rows(tmp_path / "some", "train")]
    assert losses[-1] < losses[0]
    train(build(tiny(corpus, tmp_path / "none", "dqt8"), quiet=True))
    bytes_used = [summary(tmp_path / n)["bytes_per_parameter"]["total"] for n in ("some", "none")]
    assert bytes_used[0] > bytes_used[1]


def test_they_are_part_of_what_a_folder_holds(corpus: str, tmp_path: Path) -> None:
    config = tiny(corpus, tmp_path, "mxfp4", steps=1, exempt=EXEMPT)
    train(build(config, quiet=True))
    assert finished_summary(config) is not None
    with pytest.raises(ConfigError, match=r"exempt \('blocks.0.\*', '\*.mlp.down'\) -> \(\)"):
        finished_summary(tiny(corpus, tmp_path, "mxfp4", steps=1))


def test_patterns_are_checked_before_any_work(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exempt pattern 'blocks.0.mlp.gate' .*did you mean"):
        check(tiny(corpus, tmp_path, "mxfp4", exempt=("blocks.0.mlp.gate",)))
    with pytest.raises(ConfigError, match="all of a model with 2"):
        check(tiny(corpus, tmp_path, "mxfp4", exempt=("*",)))


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('exempt = ["blocks.0.*", "*.mlp.down"]\n')
    assert settings.override(RunConfig(), settings.read_table(path), "file").exempt == EXEMPT
    path.write_text('exempt = "blocks.0.*"\n')
    with pytest.raises(ConfigError, match=r"exempt in file is 'blocks.0.\*': give a list of str"):
        settings.override(RunConfig(), settings.read_table(path), "file")


@pytest.mark.parametrize("command", [["train"], ["compare"]])
def test_from_the_command_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["gpt-tiny", "--out", str(tmp_path / "run"), "--exempt", "blocks.0.*", "*.mlp.dwon"]
    assert main([*command, *request]) == 2
    assert "exempt pattern '*.mlp.dwon' matches none of the model's" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
