"""A run that takes a second: two layers, 64 wide, on text that can be learnt."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megafp4.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from megafp4.data.preprocess import encode_texts, write_tokens
from megafp4.data.tokenizer import get_tokenizer
from megafp4.train.metrics import read_rows

MODEL = ModelConfig(layers=2, hidden=64, heads=2, vocab_size=257, seq_len=32)


def write_corpus(folder: Path) -> str:
    """Write a token file of numbered sentences and return its prefix."""
    texts = [
        (f"document {index}", f"{index} times {index} is {index * index}. " * 6)
        for index in range(80)
    ]
    tokenizer = get_tokenizer("bytes")
    prefix = str(folder / "corpus")
    write_tokens(prefix, tokenizer, [encode_texts(texts, tokenizer)], append_eod=True)
    return prefix


def tiny(corpus: str, out: Path, recipe: str = "bf16", **changes: Any) -> RunConfig:
    """Configure a run of a few steps.

    Args:
        corpus: Prefix of the token file.
        out: Run folder.
        recipe: Recipe.
        changes: Fields of any part; those of ``RunConfig`` itself by name.
    """
    model: dict[str, Any] = {}
    order: dict[str, Any] = {"steps": 6, "global_batch": 4, "micro_batch": 2, "eval_interval": 2}
    order |= {"eval_batches": 1, "log_interval": 1}
    top: dict[str, Any] = {}
    for name, value in changes.items():
        homes = ((ModelConfig, model), (TrainConfig, order), (RunConfig, top))
        next(home for kind, home in homes if name in {f.name for f in dataclasses.fields(kind)})[
            name
        ] = value
    return RunConfig(
        name=f"tiny-{recipe}",
        recipe=recipe,
        out=str(out),
        model=dataclasses.replace(MODEL, **model),
        data=DataConfig(train=(corpus,), split="90,10,0", cache=str(Path(corpus).parent)),
        optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=1),
        train=TrainConfig(**order),
        **top,
    )


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of one kind in a run folder's metrics."""
    return [row for row in read_rows(out / "metrics.jsonl") if row["kind"] == kind]


def summary(out: Path) -> dict[str, Any]:
    """The summary of a finished run."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found
