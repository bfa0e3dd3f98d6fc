"""The precision ledger counts what ran and survives a round trip to disk."""

from __future__ import annotations

import pytest

from megafp4.backends import Ledger
from megafp4.errors import CheckpointError


def filled() -> Ledger:
    ledger = Ledger()
    for _ in range(3):
        ledger.record("blocks.0.qkv", "fprop", "bf16", "bf16", "reference")
    ledger.record("blocks.0.qkv", "dgrad", "mxfp4", "mxfp4", "reference", count=2)
    ledger.record("blocks.1.qkv", "dgrad", "mxfp4", "mxfp4", "reference")
    ledger.record("blocks.1.qkv", "wgrad", "fp8-e5m2", "fp8-e4m3", "bf16")
    return ledger


def test_rows_and_sums() -> None:
    ledger = filled()
    assert ledger.rows()[1] == {
        "layer": "blocks.0.qkv",
        "gemm": "dgrad",
        "a": "mxfp4",
        "b": "mxfp4",
        "backend": "reference",
        "count": 2,
    }
    assert ledger.by_format() == {"bf16 x bf16": 3, "mxfp4 x mxfp4": 3, "fp8-e5m2 x fp8-e4m3": 1}
    assert ledger.by_gemm() == {
        "fprop": {"bf16 x bf16": 3},
        "dgrad": {"mxfp4 x mxfp4": 3},
        "wgrad": {"fp8-e5m2 x fp8-e4m3": 1},
    }
    assert ledger.total() == 7


def test_json_round_trip_and_merge() -> None:
    ledger = Ledger.from_json(filled().to_json())
    assert ledger.rows() == filled().rows()
    ledger.merge(filled())
    assert ledger.total() == 14
    assert len(ledger.rows()) == len(filled().rows())


def test_empty() -> None:
    assert Ledger.from_json(Ledger().to_json()).rows() == []
    assert Ledger().by_gemm() == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"layer": "a"}]', "{}x", "null"])
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"ledger cannot be read .* restore ledger\.json"):
        Ledger.from_json(text)
