"""The tables that a run leaves."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from fat.graph.equalize import EqualizeReport, PairReport
from fat.report.run import write_equalization


def test_one_row_per_equalized_pair(tmp_path: Path) -> None:
    pairs = (
        PairReport("exact", "a + b", "c", 8, 0, 123.4567891, 4.5, 1.0, 2.0),
        PairReport("exact", "c", "d", 16, 3, 1e6, 1.5, 7.0, 7.25),
    )
    write_equalization(tmp_path / "equalization.csv", EqualizeReport(pairs))
    rows = list(csv.DictReader((tmp_path / "equalization.csv").open()))
    assert list(rows[0]) == [field.name for field in fields(PairReport)]
    for row, pair in zip(rows, pairs, strict=True):
        for name, value in asdict(pair).items():
            if isinstance(value, str):
                assert row[name] == value
            else:
                assert float(row[name]) == pytest.approx(value, rel=1e-5)


def test_every_column_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(PairReport) if f"`{field.name}`" not in text] == []
