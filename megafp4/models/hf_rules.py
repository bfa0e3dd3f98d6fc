"""How one parameter is called and laid out in transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megafp4.errors import CheckpointError

HEAD = "lm_head.weight"
"""Name of the output layer in every causal model of transformers."""


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the parameters of transformers that hold it."""

    ours: str
    """Our name."""
    theirs: tuple[str, ...]
    """Their names; several hold consecutive rows of ours."""
    shape: tuple[int, ...]
    """Our shape."""
    split: tuple[int, ...] = ()
    """Rows of each part; empty means one part."""
    transposed: bool = False
    """Whether they store [in, out] where we store [out, in]."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each part."""
        return self.split or (self.shape[0],)


def require(hf_config: Mapping[str, Any], key: str) -> Any:
    """Return a field that a configuration cannot do without.

    Raises:
        CheckpointError: It is missing.
    """
    if key not in hf_config:
        raise CheckpointError(
            f"the configuration has no {key!r}: give the config.json that belongs to the weights"
        )
    return hf_config[key]
