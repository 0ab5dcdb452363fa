"""Targets by name, runtimes by suffix, and errors for missing packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import fat
from fat import FatError
from fat.export.onnx import OnnxRuntime
from fat.export.registry import RUNTIMES, TARGETS, make_target, open_artifact
from tests.export.students import tiny_student

ROOT = Path(__file__).parents[2]


def test_every_target_has_its_name_and_a_runtime_for_its_files() -> None:
    for name in TARGETS:
        target = make_target(name)
        assert target.name == name
        assert name in RUNTIMES[target.suffix]
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


def test_files_are_opened_by_their_suffix(tmp_path: Path) -> None:
    fat.export_onnx(tiny_student(), tmp_path / "student.onnx", beside_float=False)
    assert isinstance(open_artifact(tmp_path / "student.onnx"), OnnxRuntime)
    with pytest.raises(FatError, match=r"file\.bin ends in '\.bin'; allowed are \.onnx, \.xml"):
        open_artifact(tmp_path / "file.bin")
    with pytest.raises(FatError, match=r"runtime for \.onnx files.*litert.*onnx, openvino"):
        open_artifact(tmp_path / "student.onnx", "litert")
