"""Files of a sensitivity analysis, written and read."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat import FatError, QuantSpec
from fat.evaluation.sensitivity_analysis import TensorSensitivity
from fat.evaluation.sensitivity_file import (
    COLORS,
    SensitivityReport,
    format_bits,
    format_worst,
    read_sensitivity,
    write_plot,
    write_sensitivity,
)


@pytest.fixture
def report() -> SensitivityReport:
    bits_db = {bits: 6.02 * bits - 10 for bits in range(2, 9)}
    rows = [
        TensorSensitivity(
            2, "blocks.0.conv_dw", "weight", 4, -3.25, 50.0, 12.0, 90.0, 288, 32, bits_db
        ),
        TensorSensitivity(1, "stem", "activation", 8, 31.5, 100.0, 11.0, 87.5),
        TensorSensitivity(0, "stem", "weight", 4, 200.0, 100.0, -200.0, 0.0, 216, 8, bits_db),
    ]
    images = {"source": "photos", "root": None, "split": "calibration", "count": 16}
    spec = QuantSpec(weight_bits=4, layer_bits={"stem": 4})
    return SensitivityReport(rows, "tinynet", "random", images, spec)


def test_what_is_written_is_read_back(report: SensitivityReport, tmp_path: Path) -> None:
    write_sensitivity(tmp_path, report)
    assert read_sensitivity(tmp_path) == report
    assert read_sensitivity(str(tmp_path / "sensitivity.json")) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sensitivity.csv",
        "sensitivity.json",
    ]


def test_the_table_has_a_row_for_each_tensor(report: SensitivityReport, tmp_path: Path) -> None:
    write_sensitivity(tmp_path, report)
    rows = list(csv.DictReader((tmp_path / "sensitivity.csv").open()))
    assert rows[0] == {
        "rank": "1",
        "layer": "blocks.0.conv_dw",
        "kind": "weight",
        "bits": "4",
        "alone_db": "-3.250",
        "alone_agreement": "50.000",
        "without_db": "12.000",
        "without_agreement": "90.000",
        "parameters": "288",
    }
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert [row["parameters"] for row in rows] == ["288", "0", "216"]


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda text: text[:100], "is not a valid sensitivity report"),
        (lambda text: "[]", "is not a valid sensitivity report"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "fat-sensitivity 9"),
        (lambda text: text.replace("fat-sensitivity", "coco"), "has the format coco 1"),
        (lambda text: text.replace('"alone_db"', '"alone"'), "'alone_db'"),
        (lambda text: text.replace('"8": ', '"9": '), "bits_db of blocks.0.conv_dw has"),
        (lambda text: text.replace('"bits_db": {}', '"bits_db": 3'), "AttributeError"),
        (lambda text: text.replace('"biases": 0', '"biases": [1]', 1), r"biases of .* is \[1\]"),
        (lambda text: "[" * 100_000, "RecursionError"),
    ],
)
def test_other_files_are_refused(
    report: SensitivityReport, tmp_path: Path, damage: object, wanted: str
) -> None:
    write_sensitivity(tmp_path, report)
    file = tmp_path / "sensitivity.json"
    assert callable(damage)
    file.write_text(damage(file.read_text()))
    with pytest.raises(FatError, match=wanted) as raised:
        read_sensitivity(tmp_path)
    assert "analysis=sensitivity" in str(raised.value)


def test_a_directory_without_a_measurement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"python evaluate\.py run=DIR analysis=sensitivity"):
        read_sensitivity(tmp_path)


def test_texts(report: SensitivityReport) -> None:
    lines = format_worst(report.rows, 2).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [
        "blocks.0.conv_dw",
        "weight",
        "4",
        "-3.25",
        "50.00",
        "12.00",
        "90.00",
    ]
    assert [len(line) for line in lines] == [len(lines[0])] * 3
    text = format_bits({"a": 3, "b": 8, "c": 3, "d": 5})
    assert text == "8 bits: b\n5 bits: d\n3 bits: a, c"


def color_rows(file: Path, color: str) -> int:
    """Count the rows of pixels that contain a color."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(pixels - wanted).sum(2) < 8).any(1).sum())


def test_the_plot_has_a_bar_for_each_tensor(report: SensitivityReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert write_plot(tmp_path, report)
    few = tmp_path / "sensitivity.png"
    assert Image.open(few).format == "PNG"
    heights = {kind: color_rows(few, color) for kind, color in COLORS.items()}
    assert min(heights.values()) > 10
    weights = [replace(report.rows[0], position=i, layer=f"layer{i}") for i in range(50)]
    assert write_plot(tmp_path, replace(report, rows=weights))
    # Thirty bars of the same height, and the legend.
    assert color_rows(few, COLORS["weight"]) > 10 * heights["weight"]


def test_without_matplotlib_there_is_no_plot(
    report: SensitivityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not write_plot(tmp_path, report)
    assert list(tmp_path.iterdir()) == []


def test_figures_are_json(report: SensitivityReport, tmp_path: Path) -> None:
    write_sensitivity(tmp_path, report)
    content = json.loads((tmp_path / "sensitivity.json").read_text())
    assert content["model"] == "tinynet"
    assert content["images"]["count"] == 16
    first = content["tensors"][0]
    assert first["parameters"] == 288
    assert set(first["bits_db"]) == set("2345678")
