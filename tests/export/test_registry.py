"""Targets by name, runtimes by suffix, and errors for missing packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fat import FatError, QuantSpec
from fat.export.exporter import export
from fat.export.registry import TARGETS, make_target, open_artifact, runtimes
from tests.export.students import tiny_student

ROOT = Path(__file__).parents[2]


def test_every_target_has_its_name_and_a_runtime_for_its_files() -> None:
    for name in TARGETS:
        target = make_target(name)
        assert target.name == name
        assert name in runtimes()[target.suffix]
        assert (ROOT / "conf" / "export" / f"{name}.yaml").is_file()


def test_the_error_for_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(FatError, match=r"onxn.*onnx"):
        make_target("onxn")


def test_options_of_other_targets_are_rejected() -> None:
    with pytest.raises(
        FatError,
        match=r"export=onnx has no option export\.integer_io; it belongs to export=litert\.",
    ):
        make_target("onnx", integer_io=True)
    with pytest.raises(FatError, match=r"opset 9 .* 18 to 23"):
        make_target("openvino", opset=9)


@pytest.mark.parametrize("name", ["openvino", "litert", "executorch"])
def test_the_error_for_a_missing_package_says_what_to_type(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(FatError, match=rf"pip install -e '\.\[{name}\]'"):
        make_target(name).check()
    extras = (ROOT / "pyproject.toml").read_text()
    assert f"\n{name} = [" in extras


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_exports_a_student_and_opens_its_file(name: str, tmp_path: Path) -> None:
    target = make_target(name)
    try:
        target.check()
    except FatError as error:
        pytest.skip(str(error))
    student = tiny_student(QuantSpec(weight_bits=7))  # headroom for sums that saturate
    path = tmp_path / f"student{target.suffix}"
    report = export(student, path, target, beside_float=False)
    assert report["kernels"]["integer_layers"] == len(student.layers())
    runtime = open_artifact(path, None if runtimes()[target.suffix][0] == name else name)
    assert isinstance(runtime, target.runtime)
    assert runtime.metadata["fat.model"] == "TinyNet"


def test_files_of_other_kinds_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"file\.bin ends in '\.bin'; allowed are \.onnx, \.xml"):
        open_artifact(tmp_path / "file.bin")
    with pytest.raises(FatError, match=r"runtime for \.onnx files.*litert.*onnx, openvino"):
        open_artifact(tmp_path / "student.onnx", "litert")
