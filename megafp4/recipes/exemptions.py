"""What stays out of 4 bits: the parts that no recipe touches, and linears picked out by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from megafp4.errors import ConfigError

NEVER_QUANTIZED = ("embedding", "norms", "head")
"""Parts of a model that keep their precision under every recipe."""


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern matches a linear's dotted name, or that of a module above it.

    ``*.mlp.down``, ``blocks.3.*`` and ``blocks.3`` all match ``blocks.3.mlp.down``; ``*``, ``?``
    and ``[...]`` match dots, too.
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def matching_linears(names: Sequence[str], patterns: Iterable[str], kind: str) -> set[str]:
    """Find the linears that glob patterns name.

    Args:
        names: Dotted names of all linears of a model.
        patterns: What to look for, see :func:`matches`.
        kind: What the patterns are for, in the error.

    Raises:
        ConfigError: A pattern matches none of the names; the nearest one is suggested.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if matches(name, pattern)}
        if not matched:
            raise _unmatched(names, pattern, kind)
        found |= matched
    return found


def _unmatched(names: Sequence[str], pattern: str, kind: str) -> ConfigError:
    close = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    examples = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return ConfigError(
        f"{kind} pattern {pattern!r} matches none of the model's {len(names)} linears "
        f"({examples}): {hint}correct or remove it"
    )
