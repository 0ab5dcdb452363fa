"""The coverage benchmark: what it keeps, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.tests.loading import load_coverage

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The module benchmarks/coverage.py."""
    return load_coverage()


def row(**changed: Any) -> dict[str, Any]:
    found = {
        "network": "net",
        "module": "resnet",
        "passed": ["trace"],
        "error": None,
        "timm": "1.0",
        "torch": "2.0",
        "parameters": 1_500_000,
        "size": [64, 96],
        "layers": 7,
        "folded": 5,
        "convolutions": 1,
        "differing": 0,
        "compared": 9,
        "seconds": 12.3,
        "peak_gb": 1.0,
        "operators": {"QLinearConv": 7, "Gelu": 2, "Transpose": 4, "LayerNormalization": 3},
    }
    return {**found, **changed}


def test_networks_are_of_the_module_that_lists_them(coverage: ModuleType) -> None:
    assert coverage.module_of("resnet18") == "resnet"
    assert coverage.module_of("skresnet18") == "sknet"  # its class is of the module resnet
    assert coverage.module_of("no_such_network") == "none"


def test_parameters_that_say_nothing_are_drawn(coverage: ModuleType) -> None:
    torch.manual_seed(0)
    for value in (0.0, 1.0, 1e-6):
        parameter = torch.full((50,), value)
        coverage.liven(parameter)
        assert parameter.unique().numel() > 40
    learned = torch.randn(50)
    before = learned.clone()
    coverage.liven(learned)
    assert torch.equal(learned, before)


def test_rows_are_kept_and_read_back(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "RESULTS", tmp_path / "results" / "coverage.json")
    assert coverage.read() == {}
    rows = {"b": row(network="b"), "a": row(network="a")}
    coverage.keep(rows)
    assert coverage.read() == rows
    assert list(json.loads(coverage.RESULTS.read_text())) == ["a", "b"]


def test_the_page_tells_what_is_in_float_and_what_fails(coverage: ModuleType) -> None:
    assert coverage.in_float(row()) == "3 LayerNormalization, 2 Gelu"
    assert coverage.in_float(row(operators={"QLinearConv": 7, "Reshape": 1})) == "nothing"
    failed = row(network="bad", error="'x' cannot | be traced", passed=["trace", "fold"])
    rows = [row(), row(network="resnet18"), row(module="sknet", differing=2), failed]
    text = coverage.page(rows, ["later"])
    assert text.endswith("## Not run\n\nlater\n")
    assert "3 of 4 networks pass all stages, from 2 of timm's" in text
    assert "In 2 of the files, every integer" in text
    assert "| resnet | net | 1.5 M | 64×96 | 7 | 5 | 1 | 0 of 9 |" in text
    assert "| bad | trace, fold | 'x' cannot / be traced |" in text
