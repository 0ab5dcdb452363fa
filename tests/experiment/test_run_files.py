"""The tables that a run leaves."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import QuantSpec
from fat.experiment.run_files import write_equalization, write_thresholds
from fat.graph.passes.equalization import EqualizeReport, PairReport


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


def test_steps_are_written_with_all_their_digits(
    tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    student = fat.prepare(
        tiny, images, QuantSpec(scheme="symmetric", thresholds="tqt", power_of_two=True)
    )
    fat.calibrate(student, images)
    write_thresholds(tmp_path / "thresholds.csv", student)
    rows = list(csv.DictReader((tmp_path / "thresholds.csv").open()))
    assert len(rows) == len(list(student.quantizers()))
    for row, (layer, kind, quantizer) in zip(rows, student.quantizers(), strict=True):
        assert (row["layer"], row["kind"]) == (layer, kind)
        scale, zero_point = quantizer.thresholds()
        assert torch.tensor(float(row["scale"])) == scale.max()
        assert int(row["zero_point"]) == int(zero_point.max()) == 0
