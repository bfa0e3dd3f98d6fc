"""Two results of one command side by side: did anything become faster or slower?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import text

_CONTEXT = ("gpu", "driver", "torch", "cuda", "triton", "commit")


def load(path: Path) -> dict[str, Any]:
    """Read ``results.json``, or the one in a folder.

    Raises:
        ValueError: There is none, or it is not a result of this tool.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}): give a results.json") from None
    if not isinstance(found, dict) or not {"title", "environment", "rows"} <= found.keys():
        raise ValueError(f"{file} is not a result of this tool: give a results.json")
    return found


def ratios(
    before: dict[str, Any], after: dict[str, Any]
) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Pairs of measured values by row and column, for the rows that both results hold.

    Raises:
        ValueError: The results are of different commands, or share no row.
    """
    names = [next(iter(one["rows"][0])) if one["rows"] else "" for one in (before, after)]
    if names[0] != names[1] or not names[0]:
        raise ValueError(
            f"the first column is {names[0]!r} in one and {names[1]!r} in the other: compare "
            "results of the same command"
        )
    key = names[0]
    later = {row[key]: row for row in after["rows"]}
    found = []
    for row in before["rows"]:
        other = later.get(row[key], {})
        pairs = {
            column: (float(value), float(other[column]))
            for column, value in row.items()
            if column not in (key, "error", "limit")
            and _is_number(value)
            and _is_number(other.get(column))
        }
        if pairs:
            found.append((row[key], pairs))
    if not found:
        raise ValueError("the results share no measured row: compare results of the same shapes")
    return found


def show(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print both values and their ratio for each row, and what the two runs differ in."""
    console = Console(width=180)
    found = ratios(before, after)
    columns = list(dict.fromkeys(column for _, pairs in found for column in pairs))
    table = Table(title=f"{after['title']}: before -> after (after / before)")
    table.add_column(next(iter(before["rows"][0])))
    for column in columns:
        table.add_column(column, justify="right")
    for name, pairs in found:
        table.add_row(name, *(_cell(pairs.get(column)) for column in columns))
    console.print(table)
    for field in _CONTEXT:
        old, new = (one["environment"].get(field, "unknown") for one in (before, after))
        if old != new:
            console.print(f"{field}: {old} -> {new}", markup=False)
    mine, theirs = ({name for name, _ in _named(one)} for one in (before, after))
    for name in sorted(mine ^ theirs):
        console.print(f"only {'before' if name in mine else 'after'}: {name}", markup=False)


def _named(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(row[next(iter(row))], row) for row in found["rows"]]


def _cell(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return ""
    old, new = pair
    ratio = f"{new / old:.3f}" if old else "-"
    return f"{text(old)} -> {text(new)} ({ratio})"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
