"""Run folders as training writes them, without training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run folder ``tmp_path/runs/<name>``."""

    def make(
        name: str,
        *,
        recipe: str | None = None,
        excess: float = 0.0,
        steps: int = 100,
        finished: bool = True,
        stats: bool = False,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        model = {"family": "gpt", "layers": 2, "hidden": 64}
        train = {"steps": 100, "seed": 1}
        record = {"name": name, "recipe": recipe or name, "model": model, "train": train, **config}
        (folder / "config.json").write_text(json.dumps(record))

        def loss(step: int) -> float:
            return (2 + 3 * math.exp(-step / 30)) * (1 + excess)

        rows = [{"kind": "train", "step": s, "loss": loss(s)} for s in range(5, steps + 1, 5)]
        rows += [{"kind": "eval", "step": s, "loss": loss(s)} for s in range(20, steps + 1, 20)]
        write_jsonl(folder / "metrics.jsonl", rows)
        if stats:
            write_jsonl(
                folder / "stats.jsonl", [stat(step, i) for step in (50, 100) for i in (0, 1)]
            )
        if finished:
            summary = {
                "name": name, "recipe": recipe or name, "steps": steps, "parameters": 12345,
                "valid_loss": loss(100), "train_loss": loss(100), "tokens_per_s": 4321.9,
                "bytes_per_parameter": {"weights": 4.0, "optimizer": 8.0, "total": 12.0},
                "ledger": {
                    "fprop": {"bf16 x bf16": 800},
                    "dgrad": {"mxfp4 x mxfp4": 1600, "bf16 x bf16": 7},
                    "wgrad": {"mxfp4 x bf16": 1600},
                },
                "wall_s": 12.5, "torch": "2.13.0", "megafp4": "0.1.0", "threads": 1,
            }  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stat(step: int, block: int) -> dict[str, Any]:
    return {
        "step": step, "layer": f"blocks.{block}.attention.qkv", "gemm": "dgrad", "operand": "a",
        "format": "mxfp4", "clip_rate": 0.001, "underflow_rate": 0.1, "snr_db": 18.5 + block,
        "octave_span": None,
    }  # fmt: skip
