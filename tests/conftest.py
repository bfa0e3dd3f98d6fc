"""What every test shares: one thread, fixed seeds, a repeatable hypothesis profile."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "megafp4",
    derandomize=True,  # the same examples on every machine: a red run can be repeated
    deadline=None,  # no test may depend on how busy the machine is
    max_examples=30,
    database=None,
)
hypothesis.settings.load_profile("megafp4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    """Keep reductions in one order and leave the other cores to other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same global generator, whatever ran before it."""
    torch.manual_seed(20260)


@pytest.fixture
def generator() -> torch.Generator:
    """A private, seeded generator for test data."""
    return torch.Generator().manual_seed(1234)
