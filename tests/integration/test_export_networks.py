"""ONNX files of timm networks equal their students in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat import QuantSpec
from tests.export.students import check_equal, student_of


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("test_resnet", QuantSpec(granularity="per_tensor")),
        ("test_efficientnet", QuantSpec(scheme="symmetric")),
        ("test_efficientnet", QuantSpec(bits=4, power_of_two=True)),
        ("lcnet_035", QuantSpec(weight_bits=7)),
    ],
)
def test_networks_of_timms_are_equal_in_the_runtime(
    name: str, spec: QuantSpec, tmp_path: Path
) -> None:
    check_equal(student_of(name, spec), tmp_path)
