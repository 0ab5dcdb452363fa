"""Fixtures of the tests on a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.pretended import PretendedGpu


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
