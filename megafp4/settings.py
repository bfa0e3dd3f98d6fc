"""Configuration files and command lines to and from :class:`~megafp4.config.RunConfig`.

A file is TOML or JSON with one table per part of the run, named like the fields::

    recipe = "mxfp4"
    [train]
    steps = 2000

It may name any subset of the fields. Precedence is preset, then file, then command line. A run
writes its resolved configuration as JSON, which this module reads back to an equal ``RunConfig``.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megafp4.config import RunConfig
from megafp4.errors import ConfigError, unknown_name

Table = Mapping[str, Any]
Names = typing.Collection[str]


def read_table(path: str | Path) -> dict[str, Any]:
    """Read a TOML or JSON file into nested dictionaries, unchecked.

    Raises:
        ConfigError: The file is missing, is neither TOML nor JSON, or does not parse.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"configuration file {path} is neither .toml nor .json: rename it")
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = path.suffix[1:].upper()
        raise ConfigError(f"configuration file {path} is not valid {kind}: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"configuration file {path} holds a {type(table).__name__}: give a table")
    return table


def override(config: RunConfig, table: Table, source: str) -> RunConfig:
    """Replace the fields of ``config`` that ``table`` names.

    Args:
        config: The values to start from, e.g. a preset.
        table: Nested fields, as read by :func:`read_table`.
        source: Where the table comes from, for error messages.

    Raises:
        ConfigError: A field is misspelt, in the wrong table or of the wrong type, or the values
            do not fit together.
    """
    return typing.cast(RunConfig, _override(config, table, source, ""))


def read_config(path: str | Path) -> RunConfig:
    """Read a resolved configuration, as :func:`write_config` wrote it."""
    return override(RunConfig(), read_table(path), str(path))


def write_config(config: RunConfig, path: str | Path) -> None:
    """Write every field as JSON; a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(to_table(config), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def to_table(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries holding every field of ``config``, ready for JSON."""
    return dataclasses.asdict(config)


def differences(saved: RunConfig, given: RunConfig, ignored: Names) -> list[str]:
    """Name the fields in which two configurations differ, with both values.

    Args:
        saved: One configuration.
        given: The other.
        ignored: Dotted field names that may differ.

    Returns:
        One entry a field, e.g. ``"train.steps 100 -> 200"``.
    """
    before, after = _flatten(to_table(saved)), _flatten(to_table(given))
    return [
        f"{name} {before[name]!r} -> {after[name]!r}"
        for name in before
        if name not in ignored and before[name] != after[name]
    ]


def field_names(config: RunConfig) -> list[str]:
    """Dotted names of all fields, ``"train.steps"`` say."""
    return list(_flatten(to_table(config)))


def _flatten(table: Table, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _override(config: Any, table: Table, source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for name, value in table.items():
        if name not in hints:
            raise _misspelt(name, type(config), source, prefix)
        where = f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where} in {source} is {value!r}: give a table [{where}]")
            changes[name] = _override(getattr(config, name), value, source, f"{where}.")
        else:
            changes[name] = _checked(value, hints[name], where, source)
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _misspelt(name: str, owner: type, source: str, prefix: str) -> ConfigError:
    table = f"table [{prefix[:-1]}]" if prefix else "the top level"
    homes = [home for home in _homes(name) if home != prefix[:-1]]
    if homes:
        home = f"table [{homes[0]}]" if homes[0] else "the top level"
        return ConfigError(f"field {name!r} of {table} in {source}: move it to {home}")
    fields = [field.name for field in dataclasses.fields(owner)]
    return unknown_name(f"field of {table} in {source}", name, fields)


def _homes(name: str) -> list[str]:
    """Tables of a RunConfig that have a field of this name; ``""`` is the top level."""
    paths = [path.rpartition(".") for path in _flatten(to_table(RunConfig()))]
    return [table for table, _, field in paths if field == name]


def _checked(value: Any, hint: Any, where: str, source: str) -> Any:
    """Return ``value`` as the type ``hint``, or say in one sentence what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _checked(value, inner, where, source)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise unknown_name(f"{where} in {source}", str(value), map(str, arguments))
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_checked(v, k, where, source) for v, k in zip(value, kinds, strict=True))
    # bool is an int to Python but never to a user; an int is a legal way to write a float.
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{where} in {source} is {value!r}: give {_spoken(hint)}")


def _spoken(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        count = "a list of" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}"
        return f"{count} {'strings' if kinds[0] is str else 'numbers'}"
    spoken = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return spoken[hint]
