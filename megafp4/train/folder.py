"""The run folder: whose it is, and whether the run in it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megafp4 import settings
from megafp4.config import RunConfig
from megafp4.errors import ConfigError
from megafp4.report.load import read_object
from megafp4.train.summary import SUMMARY

_NO_NUMBER = {
    "out", "data.cache", "train.checkpoint_interval", "train.keep_checkpoints",
    "train.memory_report", "train.recompute", "saved_as", "optim.offload",
}  # fmt: skip
_MESH = {name for name in settings.field_names(RunConfig()) if name.startswith("parallel.")}
MAY_CHANGE = _NO_NUMBER | _MESH
"""Fields with which a run may be continued: they influence no number, or, those of ``parallel``, no
more than the order of sums and the rounding of gradients on their way."""


def check_folder(config: RunConfig) -> None:
    """Refuse a run folder that holds another run.

    Raises:
        ConfigError: Names the fields that differ.
    """
    changed = _changes(config, MAY_CHANGE)
    if changed:
        raise ConfigError(
            f"{config.out} holds a run with another configuration ({', '.join(changed)}): choose "
            "another --out, or delete the folder to start over"
        )


def mesh_changes(config: RunConfig) -> list[str]:
    """Fields of ``parallel`` that are not as when the run in the folder was last started."""
    names = settings.field_names(config)
    return _changes(config, [name for name in names if name not in _MESH])


def _changes(config: RunConfig, ignored: settings.Names) -> list[str]:
    path = Path(config.out) / "config.json"
    if not path.exists():
        return []
    return settings.differences(settings.read_config(path), config, ignored)


def claim_folder(config: RunConfig) -> None:
    """Write ``config.json`` into the run folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        settings.write_config(config, Path(config.out) / "config.json")
    except OSError as error:
        raise ConfigError(
            f"run folder {config.out} cannot be written ({error}): choose another --out"
        ) from error


def finished_summary(config: RunConfig) -> dict[str, Any] | None:
    """Summary of this very run, if its folder says that it took its last step.

    Raises:
        ConfigError: The folder holds another run.
        DataError: The summary is damaged.
    """
    check_folder(config)
    path = Path(config.out) / SUMMARY
    return read_object(path) if path.exists() else None
