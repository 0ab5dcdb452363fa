"""A file imports only from rows above it, and each library has its place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fat"

# Folders whose files may import each other stand as one row.
ORDER = [
    "errors",
    "files",
    "memory",
    "distributed",
    "kernels/__init__",
    "spec",
    "layers",
    "batches",
    "quant/functional",
    "quant/observers",
    "quant/init",
    "quant/thresholds",
    "quant/placement",
    "quant/quantizers",
    "models",
    "graph/constants",
    "graph/patterns",  # knows torch and the layers; the passes below ask it
    "graph/inplace",
    "graph/tracer",
    "graph/plain",
    "graph/trace",
    "graph/fold",
    "graph/insert",
    "graph/integers",
    "graph/groups",
    "graph/sensitivity",
    "graph/balance",
    "graph/equalize",
    "graph/features",
    "losses",
    "schedule",
    "metrics",
    "memo",
    "student",
    "pipeline",
    "calibrate",
    "correct",
    "analysis",
    "blocks",
    "evaluate",
    "checkpoint",
    "sensitivity",
    "mixed",
    "parameters",
    "reconstruct",
    "data/*",
    "kept",
    "module",
    "loggers",
    "callbacks",
    "fit",
    "finetune",
    "export/lower",
    "export/target",
    "export/onnx",
    "export/openvino",
    "export/executorch",
    "export/litert",
    "export/targets",
    "export/verify",
    "export/export",
    "export/artefact",
    "report/*",
    "hub",
    "dashboard",
    "config",
    "inputs",
    "exports",
    "runs",
    "experiment",
    "sweeps",
    "analyses",
    "artefacts",
    "cli",
    "search",
]
WHERE = {
    "hydra": {"fat/config.py", "fat/cli.py", "fat/search.py", "train.py", "evaluate.py"},
    "omegaconf": {"fat/config.py", "fat/cli.py", "fat/search.py", "train.py", "evaluate.py"},
    "timm": {"fat/models.py", "fat/graph/tracer.py", "fat/graph/plain.py"},
    "pytorch_lightning": {
        "fat/data/datamodule.py",
        "fat/module.py",
        "fat/callbacks.py",
        "fat/fit.py",
        "fat/finetune.py",
        "fat/loggers.py",
        "fat/runs.py",
        "fat/experiment.py",
    },
}
FILES = sorted([*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str) -> set[str]:
    """Full names of all modules imported anywhere, but for those under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def own_modules(source: str) -> set[str]:
    """Files of the package that a source imports, as in ``quant/init``."""
    found = set()
    for name in imports(source):
        parts = name.split(".")
        if parts[0] != "fat":
            continue
        for length in range(len(parts), 0, -1):
            path = "/".join(parts[1:length])
            if path and (PACKAGE / f"{path}.py").is_file():
                found.add(path)
                break
            if (PACKAGE / path / "__init__.py").is_file():
                found.add(f"{path}/__init__".lstrip("/"))
                break
    return found


def row(module: str) -> int:
    folder = f"{module.rpartition('/')[0]}/*"
    return ORDER.index(folder) if folder in ORDER else ORDER.index(module)


MODULES = [
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in FILES
    if PACKAGE in path.parents
    and (path.name != "__init__.py" or path.parent == PACKAGE / "kernels")  # the others are empty
]


def test_what_the_reader_of_imports_finds() -> None:
    source = (
        "import os, hydra.core\n"
        "from typing import TYPE_CHECKING\n"
        "from fat.graph import fold\n"
        "from fat.spec import Grid\n"
        "if TYPE_CHECKING:\n    from fat.cli import main\n"
        "def f():\n    import timm\n    from fat.quant.init import STRATEGIES\n"
    )
    assert {"hydra.core", "timm", "fat.quant.config.Grid"} <= imports(source)
    assert own_modules(source) == {"graph/fold", "spec", "quant/init"}


def test_the_order_names_every_file_once() -> None:
    assert len(ORDER) == len(set(ORDER))
    for module in MODULES:
        row(module)  # ValueError: give the new file a row
    named = [entry for entry in ORDER if not entry.endswith("/*")]
    assert [entry for entry in named if entry not in MODULES] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_rows_above(module: str) -> None:
    source = (PACKAGE / f"{module}.py").read_text()
    below = [
        other
        for other in own_modules(source)
        if other not in MODULES  # the package as a whole is everything
        or row(other) > row(module)
        or other == module
    ]
    assert below == []


@pytest.mark.parametrize("library", WHERE)
def test_each_library_has_its_place(library: str) -> None:
    users = {
        name_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path.read_text()))
    }
    assert users <= WHERE[library]
    assert users  # else the test looks for the wrong name


def test_lightning_has_one_name() -> None:
    for path in FILES:
        assert not any(name.split(".")[0] == "lightning" for name in imports(path.read_text())), (
            path
        )
