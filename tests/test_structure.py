"""The package keeps its shape: few entries at the top, and imports in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fat"
FILES = sorted([*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"])


def test_few_entries_at_the_top() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 12, sorted(entries)


def test_imports_keep_the_contracts() -> None:
    pytest.importorskip("importlinter", reason="needs import-linter: pip install -e '.[lint]'")
    # The contracts are in pyproject.toml: layers, no cycles, each library in its place.
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"]
    result = subprocess.run(
        [*words, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " kept, 0 broken." in result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_say_where_a_name_comes_from(path: Path) -> None:
    relative = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_no_formatting_is_switched_off() -> None:
    sources = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    marker = "# fmt: " + "skip"
    assert [path.name for path in sources if marker in path.read_text(encoding="utf-8")] == []
