"""Ranks that all tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.parallel.pool import Ranks


def _ranks(count: int) -> Iterator[Ranks]:
    ranks = Ranks(count)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two connected processes."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four connected processes."""
    yield from _ranks(4)
