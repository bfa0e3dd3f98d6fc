"""Configurations that cannot exist are refused when they are built."""

from typing import Any

import pytest

from megafp4.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megafp4.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (ModelConfig, "layers", 0),
        (ModelConfig, "kv_heads", 0),
        (ModelConfig, "kv_heads", -2),
        (ModelConfig, "ffn_hidden", 0),
        (ModelConfig, "norm_eps", -1.0),
        (ModelConfig, "rope_theta", 0.0),
        (ModelConfig, "init_std", NAN),
        (ModelConfig, "dropout", NAN),
        (OptimConfig, "lr", float("inf")),
        (OptimConfig, "lr", NAN),
        (OptimConfig, "eps", -1.0),
        (OptimConfig, "clip_grad", NAN),
        (OptimConfig, "weight_decay", -0.1),
        (OptimConfig, "warmup_steps", -1),
        (TrainConfig, "global_batch", 0),
        (TrainConfig, "eval_interval", -1),
        (TrainConfig, "eval_batches", -1),
        (TrainConfig, "log_interval", -1),
        (TrainConfig, "stats_interval", -1),
        (TrainConfig, "checkpoint_interval", -1),
        (TrainConfig, "spike_factor", -1.0),
        (TrainConfig, "max_spikes", 0),
        (TrainConfig, "seed", -1),
        (TrainConfig, "seed", 2**32),
        (ParallelConfig, "tp", 0),
        (ParallelConfig, "pp", -1),
        (ParallelConfig, "cp", 0),
        (ParallelConfig, "chunks", 0),
        (ParallelConfig, "layers", (3, 0)),
        (RunConfig, "out", ""),
    ],
)
def test_impossible_values_name_their_field(part: Any, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"\b{field}\b") as error:
        part(**{field: value})
    assert ": give" in str(error.value) or ": name" in str(error.value)


def test_zero_switches_off() -> None:
    TrainConfig(eval_interval=0, eval_batches=0, log_interval=0, checkpoint_interval=0)
    OptimConfig(clip_grad=0.0, weight_decay=0.0, min_lr=0.0)
    ModelConfig(kv_heads=None, ffn_hidden=None)


def test_parts_of_a_mesh_that_need_others() -> None:
    with pytest.raises(ConfigError, match=r"sequence needs parallel\.tp of at least 2"):
        ParallelConfig(sequence=True)
    with pytest.raises(ConfigError, match=r"interleaved needs parallel\.chunks of at least 2"):
        ParallelConfig(schedule="interleaved", pp=2)
