"""Configuration files: round trip, precedence, and one sentence for every mistake."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megafp4 import settings
from megafp4.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from megafp4.errors import ConfigError

UNUSUAL = RunConfig(
    name="n",
    recipe="mxfp4",
    model=ModelConfig(layers=3, kv_heads=2, tie_embeddings=False, dropout=0.25),
    data=DataConfig(train=("0.7", "a b", "0.3", "c"), cache="elsewhere"),
    optim=OptimConfig(lr=1e-3 / 3, betas=(0.8, 0.99), decay_steps=7),
    train=TrainConfig(steps=17, seed=2**31),
)


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "config.json"
    settings.write_config(UNUSUAL, path)
    assert settings.read_config(path) == UNUSUAL
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_toml_and_json_override_only_what_they_name(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('recipe = "fp4"\n[optim]\nlr = 1\nbetas = [0.5, 0.75]\n[model]\nlayers = 2\n')
    table = {"recipe": "fp4", "optim": {"lr": 1, "betas": [0.5, 0.75]}, "model": {"layers": 2}}
    as_json.write_text(json.dumps(table))
    assert settings.read_table(toml) == settings.read_table(as_json) == table
    config = settings.override(UNUSUAL, table, "a.toml")
    assert config == dataclasses.replace(
        UNUSUAL,
        recipe="fp4",
        optim=dataclasses.replace(UNUSUAL.optim, lr=1.0, betas=(0.5, 0.75)),
        model=dataclasses.replace(UNUSUAL.model, layers=2),
    )
    assert type(config.optim.lr) is float


def test_null_clears_an_optional_field() -> None:
    assert settings.override(UNUSUAL, {"optim": {"decay_steps": None}}, "f").optim == (
        dataclasses.replace(UNUSUAL.optim, decay_steps=None)
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"stepz": 3}}, "unknown field of table [train] in f 'stepz': did you mean 'ste"),
        ({"recipes": "x"}, "unknown field of the top level in f 'recipes': did you mean 'recipe'?"),
        ({"steps": 3}, "field 'steps' of the top level in f: move it to table [train]"),
        ({"model": {"recipe": "x"}}, "field 'recipe' of table [model] in f: move it to the top le"),
        ({"train": 3}, "train in f is 3: give a table [train]"),
        ({"train": {"steps": "many"}}, "train.steps in f is 'many': give an integer"),
        ({"train": {"steps": True}}, "train.steps in f is True: give an integer"),
        ({"train": {"steps": 2.0}}, "train.steps in f is 2.0: give an integer"),
        ({"train": {"steps": None}}, "train.steps in f is None: give an integer"),
        ({"optim": {"lr": "1e-3"}}, "optim.lr in f is '1e-3': give a number"),
        ({"optim": {"betas": [0.9]}}, "optim.betas in f is [0.9]: give a list of 2 numbers"),
        ({"data": {"train": "prefix"}}, "data.train in f is 'prefix': give a list of strings"),
        ({"data": {"train": [1]}}, "data.train in f is 1: give a string"),
        ({"model": {"family": "gtp"}}, "unknown model.family in f 'gtp': did you mean 'gpt'?"),
        ({"model": {"subln": 1}}, "model.subln in f is 1: give true or false"),
        ({"model": {"kv_heads": "2"}}, "model.kv_heads in f is '2': give an integer"),
        ({"train": {"global_batch": 30}}, "f: train.global_batch 30 is not divisible by train.mic"),
    ],
)
def test_mistakes_are_one_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.override(RunConfig(), table, "f")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "steps = = 3", "is not valid TOML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "[1]", "holds a list: give a table"),
        ("a.yaml", "a: 1", "is neither .toml nor .json"),
        ("gone.toml", None, "cannot be read"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        settings.read_table(path)
    assert name in str(caught.value)


def test_differences_name_fields_and_both_values() -> None:
    other = dataclasses.replace(UNUSUAL, out="x", train=dataclasses.replace(UNUSUAL.train, steps=9))
    assert settings.differences(UNUSUAL, other, ()) == [
        "out 'runs/run' -> 'x'",
        "train.steps 17 -> 9",
    ]
    assert settings.differences(UNUSUAL, other, ("out",)) == ["train.steps 17 -> 9"]
    assert settings.differences(UNUSUAL, UNUSUAL, ()) == []
