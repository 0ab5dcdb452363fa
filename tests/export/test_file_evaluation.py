"""Files of FAT and other tools are evaluated with the metrics of students."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import fat
from fat import FatError, Student
from fat.experiment.evaluate import _stored_target
from fat.export.base import Program
from fat.export.file_evaluation import evaluate_file
from fat.export.onnx import Onnx, OnnxRuntime
from tests.export.students import structured, tiny_student


@pytest.fixture(scope="module")
def tiny() -> Student:
    return tiny_student()


@pytest.fixture(scope="module")
def ours(tiny: Student, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntime:
    path = tmp_path_factory.mktemp("ours") / "student.onnx"
    fat.export_onnx(tiny, path, beside_float=False)
    return OnnxRuntime(path)


@pytest.fixture(scope="module")
def theirs(tiny: Student, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntime:
    """The same network as ONNX Runtime's own tool quantizes it."""
    folder = tmp_path_factory.mktemp("theirs")
    Onnx().write(Program(tiny.teacher, structured(2, 16)), folder / "float.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(structured(16, 16).split(4))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.images, None)
            return None if batch is None else {"input": batch.numpy()}

    quantize_static(
        folder / "float.onnx", folder / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ
    )
    return OnnxRuntime(folder / "int8.onnx")


def labeled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(structured(8, 16, seed), torch.arange(8)) for seed in (5, 6)]


def test_our_file_has_the_students_metrics(ours: OnnxRuntime, tiny: Student) -> None:
    metrics, expected = (
        evaluate_file(ours, labeled(), tiny.teacher),
        fat.evaluate(tiny, labeled()),
    )
    assert metrics["quantized"] == expected["quantized"]
    assert metrics["float"] == expected["float"]
    assert metrics["accuracy_drop"] == expected["accuracy_drop"]
    assert metrics["images"] == 16


def test_files_of_other_tools_have_the_same_metrics(theirs: OnnxRuntime, tiny: Student) -> None:
    metrics = evaluate_file(theirs, labeled(), tiny.teacher)
    assert set(metrics["quantized"]) == {"top1", "top5", "agreement", "sqnr_db", "rmse"}
    assert 5.0 < metrics["quantized"]["sqnr_db"] < 60.0
    kernels = theirs.kernels()
    assert kernels.integer_layers + len(kernels.float_layers) == len(tiny.layers())
    assert kernels.float_layers  # ReLU6 stays between a convolution and its result's grid
    assert "fat.preprocessing" not in theirs.metadata


def test_without_a_float_network_there_are_only_accuracies(ours: OnnxRuntime) -> None:
    metrics = evaluate_file(ours, labeled())
    assert metrics["quantized"]["top1"] is not None
    assert metrics["quantized"]["agreement"] is None
    assert metrics["quantized"]["sqnr_db"] is None
    assert metrics["float"] == {"top1": None, "top5": None}
    assert metrics["accuracy_drop"] is None


def test_images_without_labels_are_compared_with_the_float_network(
    ours: OnnxRuntime, tiny: Student
) -> None:
    metrics = evaluate_file(ours, structured(8, 16, 5), tiny.teacher)
    assert metrics["quantized"]["top1"] is None
    assert metrics["quantized"]["agreement"] is not None


def test_images_of_another_size_are_rejected(ours: OnnxRuntime) -> None:
    with pytest.raises(FatError, match=r"\[3, 16, 16\], these are \[3, 24, 24\].*image_size=16"):
        evaluate_file(ours, structured(4, 24))


def test_a_float_network_with_other_classes_is_rejected(ours: OnnxRuntime) -> None:
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7)).eval()
    with pytest.raises(FatError, match=r"\[4, 10\], the float network \[4, 7\]"):
        evaluate_file(ours, structured(4, 16), other)


def test_a_file_without_logits_is_rejected(ours: OnnxRuntime, tmp_path: Path) -> None:
    model = onnx.load(ours.path)
    features = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    model.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info(features.output[0], onnx.TensorProto.UINT8, None)
    )
    onnx.save(model, tmp_path / "features.onnx")
    with pytest.raises(FatError, match=r"returns torch.uint8 \[4, 3, 16, 16\] for 4"):
        evaluate_file(OnnxRuntime(tmp_path / "features.onnx"), structured(4, 16))


def test_classes_beyond_the_logits_are_rejected(ours: OnnxRuntime) -> None:
    with pytest.raises(FatError, match="have the class 10, but the file returns 10 logits"):
        evaluate_file(ours, [(structured(4, 16), torch.arange(7, 11))])


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ({"fat.num_classes": "x"}, "invalid literal"),
        ({"fat.num_classes": "-1"}, "fat.num_classes is -1"),
        ({"fat.classes": "{}"}, "fat.classes is '{}'"),
        ({"fat.preprocessing": "{"}, "property name"),
        ({"fat.preprocessing": "[" * 100_000}, "recursion"),
        ({"fat.preprocessing": "3"}, "must be a mapping of fields"),
    ],
)
def test_texts_in_a_file_are_checked(texts: dict[str, str], wanted: str) -> None:
    fields = {
        "size": [16, 16],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    stored = {"fat.preprocessing": json.dumps(fields), "fat.num_classes": "10"}
    assert _stored_target(stored).num_classes == 10
    with pytest.raises(FatError, match=wanted):
        _stored_target({**stored, **texts})
