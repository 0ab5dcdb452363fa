"""Export: the report, and files that differ from the student are deleted."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import fat
from fat import FatError, Student
from fat.export.base import Kernels, Program
from fat.export.exporter import export
from fat.export.onnx import Onnx, OnnxRuntime
from fat.utils.io import write_atomic
from tests.export.students import structured, tiny_student


@pytest.fixture(scope="module")
def tiny() -> Student:
    return tiny_student()


@pytest.fixture(scope="module")
def exported(tiny: Student, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file verified on labeled images, and its report."""
    path = tmp_path_factory.mktemp("export") / "student.onnx"
    images = [(structured(8, 16, seed), torch.arange(8)) for seed in (5, 6)]
    return path, fat.export_onnx(tiny, path, images, metrics={"accuracy_drop": 0.5})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_report_has_all_comparisons(exported: tuple[Path, Any], tiny: Student) -> None:
    path, report = exported
    assert list(report) == [
        "file",
        "runtime",
        "on",
        "images",
        "float",
        "quantized",
        "simulation",
        "layers",
        "kernels",
        "latency_ms",
        "size_mb",
        "seconds",
    ]
    assert (report["file"], report["on"], report["images"]) == ("student.onnx", "images", 16)
    assert report["runtime"].startswith("onnxruntime ")
    assert report["simulation"] == {"agreement": 100.0, "sqnr_db": 200.0, "largest_step": 0.0}
    quantizers = len(tiny.activation_quantizers())
    assert report["layers"] == {"compared": quantizers, "images": 8, "differing": 0, "worst": None}
    assert report["kernels"]["integer_layers"] == len(tiny.layers())
    assert report["kernels"]["float_layers"] == ()
    # Fused: 8 layers, 2 sums and the pool; what is left quantizes the images and gives the logits.
    assert report["kernels"]["integer_operators"] == len(tiny.layers()) + 3
    assert report["size_mb"]["quantized"] == pytest.approx(1e-6 * path.stat().st_size, abs=1e-3)
    for part in ("latency_ms", "size_mb"):
        figures = report[part]
        ratio = figures["quantized"] / figures["float"]
        assert figures["ratio"] == pytest.approx(ratio, rel=0.1)
        assert figures["float"] > 0.0
    json.dumps(report, allow_nan=False)


def test_accuracies_are_those_of_the_file(exported: tuple[Path, Any], tiny: Student) -> None:
    path, report = exported
    images = torch.cat([structured(8, 16, seed) for seed in (5, 6)])
    labels = torch.arange(8).repeat(2)
    logits = OnnxRuntime(path).run(images)[0]
    right = (logits.argmax(1) == labels).float().mean()
    same = (logits.argmax(1) == tiny.float_logits(images).argmax(1)).float().mean()
    assert report["quantized"]["top1"] == pytest.approx(100 * float(right))
    assert report["quantized"]["agreement"] == pytest.approx(100 * float(same))
    assert report["float"]["top1"] is not None


def test_the_metadata_describe_inputs_and_outputs(exported: tuple[Path, Any]) -> None:
    stored = OnnxRuntime(exported[0]).metadata
    assert stored["fat.model"] == "TinyNet"
    assert json.loads(stored["fat.preprocessing"])["size"] == [16, 16]
    assert json.loads(stored["fat.metrics"]) == {"accuracy_drop": 0.5}
    assert json.loads(stored["fat.quantization"])["bits"] == 8
    assert stored["fat.num_classes"] == "10"


def test_without_images_the_integers_are_compared_on_noise(tiny: Student, tmp_path: Path) -> None:
    report = fat.export_onnx(tiny, tmp_path / "student.onnx", beside_float=False)
    assert report["latency_ms"] is None
    assert report["size_mb"] is None
    assert report["on"] == "noise"
    assert report["quantized"]["top1"] is None
    assert report["simulation"]["sqnr_db"] == 200.0
    assert list(content(tmp_path)) == ["student.onnx"]


# ------------------------------------------------------------------------------------ refusals


class Corrupt(Onnx):
    """Changes a few weights of one layer."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def build(self, program: Program) -> onnx.ModelProto:
        model = super().build(program)
        for tensor in model.graph.initializer:
            if tensor.name == f"{self.layer}.weight":
                values = np.array(numpy_helper.to_array(tensor))
                values.reshape(-1)[:3] ^= 64
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return model


def test_a_file_that_differs_is_deleted_and_the_layer_named(tiny: Student, tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_text("an earlier file")
    with pytest.raises(FatError, match=r"in 1 operation\(s\): 'blocks\.0\.conv_dw'.*was not kept"):
        export(tiny, tmp_path / "student.onnx", Corrupt("blocks.0.conv_dw"), structured(8, 16, 5))
    assert content(tmp_path) == {"student.onnx": b"an earlier file"}


class InFloat(Onnx):
    """A runtime that computes one layer in float."""

    def open(self, path: Path, *, threads: int | None = None) -> Any:
        runtime = OnnxRuntime(path, threads=threads)
        runtime.kernels = lambda: Kernels({"Conv": 1}, 7, ("stem",), 10)  # type: ignore[method-assign]
        return runtime


def test_layers_in_float_are_rejected_by_name(tiny: Student, tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"7 of 8 layers in integers; in float: stem"):
        export(tiny, tmp_path / "student.onnx", InFloat())
    assert content(tmp_path) == {}


class WrongFloat(Onnx):
    """Writes a float network without its first layer's weights."""

    def build(self, program: Program) -> onnx.ModelProto:
        model = super().build(program)
        if not program.tensors:
            stem = next(x for x in model.graph.initializer if x.name == "stem.weight")
            zeros = np.zeros_like(numpy_helper.to_array(stem))
            stem.CopyFrom(numpy_helper.from_array(zeros, stem.name))
        return model


def test_a_wrong_float_file_is_rejected(tiny: Student, tmp_path: Path) -> None:
    with pytest.raises(
        FatError, match=r"computes the float network with an SQNR of -?[\d.]+ dB only"
    ):
        export(tiny, tmp_path / "student.onnx", WrongFloat())
    assert content(tmp_path) == {}


class FullDisk(Onnx):
    """Writes half of a file, then the disk is full."""

    def write(self, program: Program, path: Path) -> None:
        def half(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomic(path, half)


def test_a_full_disk_leaves_nothing_behind(tiny: Student, tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_text("an earlier file")
    with pytest.raises(FatError, match="No space left on device"):
        export(tiny, tmp_path / "student.onnx", FullDisk())
    assert content(tmp_path) == {"student.onnx": b"an earlier file"}


def test_paths_that_cannot_be_written_are_rejected_at_once(tiny: Student, tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"is a folder; give the name of a file"):
        fat.export_onnx(tiny, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FatError, match="Cannot write"):
        fat.export_onnx(tiny, tmp_path / "file" / "student.onnx")


def test_uncalibrated_and_half_trained_students_are_rejected(
    tiny: Student, tmp_path: Path, images: torch.Tensor
) -> None:
    raw = fat.prepare(tiny.teacher, images)
    raw.origin = dict(tiny.origin)
    with pytest.raises(FatError, match="not calibrated"):
        fat.export_onnx(raw, tmp_path / "student.onnx")
    half = tiny_student().train()
    with pytest.raises(FatError, match="half trained"):
        fat.export_onnx(half, tmp_path / "student.onnx")
    assert content(tmp_path) == {}


def test_a_student_without_an_input_size_needs_images(tiny: Student, tmp_path: Path) -> None:
    student = copy.copy(tiny)
    student.origin = {}
    with pytest.raises(FatError, match=r"unknown: pass held-out images, as in fat\.export_onnx"):
        fat.export_onnx(student, tmp_path / "student.onnx")
    report = fat.export_onnx(
        student, tmp_path / "student.onnx", structured(4, 16), beside_float=False
    )
    assert report["images"] == 4
