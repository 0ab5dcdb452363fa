"""A made-up sweep that many tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat.report.run_page import write_run
from tests.report.fake_runs import fake_sweep


@pytest.fixture(scope="session")
def sweep_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 36 jobs, of which only the first has a page. Not to be written to."""
    directory = fake_sweep(tmp_path_factory.mktemp("pages") / "sweep")
    write_run(directory / "0-mobilenet_v2")
    return directory
