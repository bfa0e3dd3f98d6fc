"""Picking linears out of a model by name."""

from __future__ import annotations

import pytest

from megafp4.errors import ConfigError
from megafp4.recipes.exemptions import matching_linears

NAMES = [f"blocks.{b}.{slot}" for b in (0, 1, 10) for slot in ("attention.qkv", "mlp.down")]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (("blocks.0.*",), {"blocks.0.attention.qkv", "blocks.0.mlp.down"}),
        (("blocks.1",), {"blocks.1.attention.qkv", "blocks.1.mlp.down"}),
        (("blocks.?.mlp",), {"blocks.0.mlp.down", "blocks.1.mlp.down"}),
        (("*.mlp.down", "blocks.10.*"), set(NAMES[1::2]) | set(NAMES[4:])),
        (("blocks.[01].mlp.down",), {"blocks.0.mlp.down", "blocks.1.mlp.down"}),
        (("*",), set(NAMES)),
    ],
)
def test_patterns(patterns: tuple[str, ...], expected: set[str]) -> None:
    assert matching_linears(NAMES, patterns, "exempt") == expected


def test_each_pattern_must_match() -> None:
    with pytest.raises(ConfigError) as caught:
        matching_linears(NAMES, ["blocks.0.*", "blocks.0.mlp.dwon"], "exempt")
    assert str(caught.value) == (
        "exempt pattern 'blocks.0.mlp.dwon' matches none of the model's 6 linears "
        "(blocks.0.attention.qkv, blocks.0.mlp.down, blocks.1.attention.qkv, blocks.1.mlp.down, "
        "...): did you mean 'blocks.0.mlp.down'? correct or remove it"
    )
    with pytest.raises(ConfigError, match=r"1 linears \(head\): correct or remove it"):
        matching_linears(["head"], ["block*"], "skip")
    with pytest.raises(ConfigError, match="pattern '' matches none"):
        matching_linears(NAMES, [""], "exempt")
