"""The ONNX file in OpenVINO: layers in int8, integers of single operations."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="needs OpenVINO: pip install -e '.[openvino]'")

from fat import FatError, QuantSpec
from fat.export.base import Program
from fat.export.exporter import export
from fat.export.onnx import Onnx, saturates
from fat.export.openvino import OpenVino, OpenVinoRuntime
from tests.export.students import (
    NAMES,
    SCHEMES,
    Heads,
    clipped_student,
    structured,
    student_of,
    tiny_student,
)


@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_files_are_proven_equal(spec: QuantSpec, tmp_path: Path) -> None:
    # Where sums of int8 products saturate, 7 bits leave room for them.
    bits = 7 if saturates() else 8
    spec = QuantSpec(granularity=spec.granularity, scheme=spec.scheme, weight_bits=bits)
    student = tiny_student(spec)
    report = export(student, tmp_path / "student.onnx", OpenVino(), structured(16, 16, 5))
    assert report["runtime"].startswith("openvino ")
    assert report["kernels"]["integer_layers"] == len(student.layers())
    assert report["kernels"]["float_layers"] == ()


def test_a_clip_per_channel_is_proven_equal(tmp_path: Path) -> None:
    student = clipped_student(weight_bits=7)
    report = export(student, tmp_path / "student.onnx", OpenVino(), structured(16, 16, 5))
    assert report["kernels"]["integer_layers"] == len(student.layers())


def test_a_softmax_onto_a_grid_is_proven_equal(tmp_path: Path) -> None:
    student = student_of(Heads(), QuantSpec(weight_bits=7))
    report = export(student, tmp_path / "student.onnx", OpenVino(), structured(16, 32, 5))
    assert report["layers"]["compared"] == len(student.activation_quantizers())


def test_its_file_is_that_of_onnx(tmp_path: Path) -> None:
    spec = QuantSpec(weight_bits=7)
    for target in (Onnx(), OpenVino()):
        export(tiny_student(spec), tmp_path / f"{target.name}.onnx", target)
    first, second = ((tmp_path / f"{name}.onnx").read_bytes() for name in ("onnx", "openvino"))
    assert first == second


@pytest.mark.skipif(not saturates(), reason="needs a processor with AVX2 and without VNNI")
def test_saturating_sums_are_found_and_the_error_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"saturate at 16 bits.*quant\.weight\.bits=7"):
        export(tiny_student(), tmp_path / "student.onnx", OpenVino(), structured(16, 16, 5))
    assert list(tmp_path.iterdir()) == []


def test_metadata_and_shape_are_read(tmp_path: Path) -> None:
    student = tiny_student(QuantSpec(weight_bits=7))
    export(student, tmp_path / "student.onnx", OpenVino())
    runtime = OpenVinoRuntime(tmp_path / "student.onnx")
    assert runtime.input_shape == (None, 3, 16, 16)
    assert runtime.metadata["fat.model"] == "TinyNet"
    assert runtime.run(structured(3, 16))[0].shape == (3, 10)


def test_float_layers_are_listed(tmp_path: Path) -> None:
    student = tiny_student()
    Onnx().write(Program(student.teacher, structured(2, 16)), tmp_path / "float.onnx")
    kernels = OpenVinoRuntime(tmp_path / "float.onnx").kernels()
    assert kernels.integer_layers == 0
    assert len(kernels.float_layers) == len(student.layers())


def test_a_damaged_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(FatError, match=r"OpenVINO cannot open .*damaged"):
        OpenVinoRuntime(tmp_path / "broken.onnx")
    with pytest.raises(FatError, match="There is no file"):
        OpenVinoRuntime(tmp_path / "none.onnx")
