"""Ranks that fail as told: ``python -m tests.tools.breaking_ranks``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.processes import serve

from megafp4.errors import CommunicationError


def run(given: Mapping[str, Any]) -> str:
    """Rank 1 does what it is told, and rank 0 loses it or waits for ever."""
    if os.environ["RANK"] == "1":
        raise ValueError(given["cause"])
    if given["waits"]:
        time.sleep(600)
    raise CommunicationError("the others are gone")


if __name__ == "__main__":
    sys.exit(serve(run, sys.argv[1:]))
