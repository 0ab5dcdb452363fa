"""export= and artifact= as a user types them, on a tiny network with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import fat
from fat.export.onnx import OnnxRuntime
from tests.integration.running import command

RUN = [
    "model.name=test_efficientnet",
    "model.weights=random",
    "data.batch_size=8",
    "data.calibration_images=16",
    "data.train_images=32",
    "data.validation_images=16",
    "data.test_images=24",
    "optim.epochs=1",
    "trainer.threads=1",
    "logger=none",
    "export=onnx",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that exported at its end, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "here"
    result = command("train.py", *RUN, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout + result.stderr


@pytest.fixture
def copied(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The run's directory, to change something in."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_leaves_a_file_that_was_proven_equal(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    report = metrics["exported"]["onnx"]
    assert report["images"] == 24
    assert report["simulation"] == {"agreement": 100.0, "sqnr_db": 200.0, "largest_step": 0.0}
    assert report["kernels"]["integer_layers"] == 18
    assert report["quantized"]["agreement"] == metrics["trained"]["agreement"]
    assert report["quantized"]["sqnr_db"] == metrics["trained"]["sqnr_db"]
    assert metrics["seconds"]["export"] > 0.0
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    line = next(row for row in documented.splitlines() if row.startswith("| `exported` |"))
    assert all(f"`{key}`" in line for key in report)
    assert "student.onnx in onnxruntime" in printed
    assert "all integers equal" in printed
    assert "Removed" not in printed  # the exporter's own talk
    student, images = fat.load(folder / "student.safetensors"), torch.randn(4, 3, 160, 160)
    with torch.no_grad():
        expected = student(images)
    assert torch.equal(OnnxRuntime(folder / "student.onnx").run(images)[0], expected)


def test_what_is_calibrated_only_is_exported_too(tmp_path: Path) -> None:
    result = command("train.py", *RUN, "optim.epochs=0", f"hydra.run.dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["exported"]["onnx"]["simulation"]["sqnr_db"] == 200.0
    stored = onnx.load(tmp_path / "student.onnx")
    texts = {entry.key: entry.value for entry in stored.metadata_props}
    figures = json.loads(texts["fat.metrics"])
    assert figures["trained"] is None
    assert figures["calibrated"] == metrics["calibrated"]


def test_a_finished_run_is_exported_later(copied: Path) -> None:
    before = (copied / "student.onnx").read_bytes()
    (copied / "student.onnx").unlink()
    result = command("evaluate.py", f"run={copied}", "export=onnx", "export.images=8")
    assert result.returncode == 0, result.stderr
    stored, first = onnx.load(copied / "student.onnx"), onnx.load_from_string(before)
    assert stored.graph == first.graph
    metrics = json.loads((copied / "metrics.json").read_text())
    assert metrics["exported"]["onnx"]["images"] == 8


def test_a_file_is_judged_on_the_images_of_its_run(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    result = command("evaluate.py", f"artifact={folder / 'student.onnx'}", f"run={folder}")
    assert result.returncode == 0, result.stderr
    trained = json.loads((folder / "metrics.json").read_text())["trained"]
    printed = result.stdout + result.stderr
    assert f"{trained['sqnr_db']:.2f}" in printed
    assert "18 convolutions and linear layers in integers, 0 in float" in printed


def test_an_interrupted_run_is_exported_on_demand_only(copied: Path) -> None:
    metrics = json.loads((copied / "metrics.json").read_text())
    (copied / "metrics.json").write_text(json.dumps({**metrics, "training": None}))
    before = (copied / "student.onnx").read_bytes()
    result = command("evaluate.py", f"run={copied}", "export=onnx")
    assert result.returncode == 2
    assert "was interrupted" in result.stderr
    assert "export.unfinished=true" in result.stderr
    assert "Traceback" not in result.stderr
    assert (copied / "student.onnx").read_bytes() == before


def another(path: Path, size: int = 160) -> Path:
    """Another's float file of a network with 1000 classes."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 1000], [0.0] * 3000)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1000])],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    return path


def test_anothers_file_is_judged_against_the_network_that_is_named(tmp_path: Path) -> None:
    path = another(tmp_path / "other.onnx")
    result = command(
        "evaluate.py",
        f"artifact={path}",
        "model.name=test_efficientnet",
        "model.weights=random",
        "data=photos",
        "data.test_images=8",
    )
    assert result.returncode == 0, result.stderr
    assert "0 convolutions and linear layers in integers, 1 in float" in (
        result.stdout + result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export=tensorrt"], ["tensorrt", "onnx", "openvino"]),
        (["export=onnx"], ["No run was given.", "run=DIR"]),
        (["artifact=none.onnx"], ["There is no file none.onnx"]),
        (["artifact=file.txt"], ["file.txt ends in '.txt'", ".onnx"]),
        (["artifact=x.onnx", "export=onnx"], ["artifact= and export=", "one at a time"]),
    ],
)
def test_what_cannot_be_asked_is_answered(arguments: list[str], told: list[str]) -> None:
    result = command("evaluate.py", *arguments)
    assert result.returncode != 0
    assert all(text in result.stderr for text in told), result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_does_not_say_its_images_needs_to_be_told(tmp_path: Path) -> None:
    path = another(tmp_path / "other.onnx")
    asked = command("evaluate.py", f"artifact={path}")
    assert "No images were given" in asked.stderr
    asked = command("evaluate.py", f"artifact={path}", "data=photos")
    assert "model.name=NAME" in asked.stderr


def test_an_old_opset_is_refused_before_anything_is_loaded() -> None:
    result = command("train.py", *RUN, "export.opset=11")
    assert result.returncode == 2
    assert "18 to 23, as in export.opset=21" in result.stderr
    assert "Folded" not in result.stderr
