"""Errors that a user can act on.

Every message is one sentence: what was given, what is allowed, what to do. All of them are
``ValueError``s; ``assert`` is kept for invariants that only a bug can break.
"""

import difflib
from collections.abc import Iterable


class MegaFP4Error(ValueError):
    """Base of every error raised on purpose by megafp4."""


class ConfigError(MegaFP4Error):
    """A run was asked for that cannot exist: unknown name, impossible size, misspelt field."""


class UnsupportedError(MegaFP4Error):
    """A legal request that this backend, format or platform does not implement."""


class DataError(MegaFP4Error):
    """A token file, tokenizer or tensor holds something that must not be trained on."""


class CheckpointError(MegaFP4Error):
    """A checkpoint is damaged, unsafe, or belongs to another run."""


class DivergenceError(MegaFP4Error):
    """Training produced a loss or gradient from which it cannot go on."""


class CommunicationError(MegaFP4Error):
    """Another rank of the job ended or stopped answering."""


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a list, suggesting the nearest one.

    Args:
        kind: What the name names, e.g. ``"recipe"``.
        given: The name that was asked for.
        allowed: Every name that exists.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"unknown {kind} {given!r}: {hint}choose one of {', '.join(names)}")
