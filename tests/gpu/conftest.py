"""Fixtures of the tests on a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.pretended import PretendedGpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests on a pretended GPU where there is a real one."""
    if not torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is a real GPU: see tests/gpu/test_real_gpu.py")
    folder = Path(__file__).parent
    for item in items:
        if item.path.parent == folder and item.path.name != "test_real_gpu.py":
            item.add_marker(skip)


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    """A pretended GPU for the duration of the test."""
    with PretendedGpu() as pretended:
        yield pretended


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums of threads would depend on their number, and the networks here are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
