"""Loads benchmarks/coverage.py for tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_coverage"]


def load_coverage() -> ModuleType:
    """Return benchmarks/coverage.py under a name that the measuring tool coverage does not have."""
    path = Path(__file__).parents[1] / "coverage.py"
    spec = importlib.util.spec_from_file_location("fat_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fat_coverage"] = module
    spec.loader.exec_module(module)
    return module
