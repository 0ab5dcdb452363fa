"""Programs of ExecuTorch: the same integers as the student, in XNNPACK's int8 kernels."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fat import FatError, QuantSpec, Student
from fat.export.base import Kernels, Program
from fat.export.executorch import ExecuTorch
from fat.export.lowering import lower
from fat.export.verify import LayerDifference, check_kernels, check_layers, compare_layers
from tests.export.students import (
    NAMES,
    SCHEMES,
    Everything,
    clipped_student,
    structured,
    student_of,
    tiny_student,
)

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="needs ExecuTorch: pip install -e '.[executorch]'",
)
TARGET = ExecuTorch()
TEXTS = {"fat.model": "tiny", "fat.classes": json.dumps(["größer", "a 'b' \"c\""] * 1000)}


def lowered(student: Student, size: int, metadata: dict[str, str] | None = None) -> Program:
    example = structured(2, size)
    made = lower(student, example, TARGET.style)
    return Program(made.network, example, made.tensors, made.weight_bits, metadata or {})


def differences(student: Student, size: int, folder: Path) -> tuple[list[LayerDifference], Kernels]:
    program, path = lowered(student, size), folder / "tapped.pte"
    TARGET.write_with_integers(program, folder / "shipped.pte", path)
    runtime = TARGET.open(path)
    images = structured(4, size, seed=1)
    return compare_layers(student, runtime, program.tensors, images), runtime.kernels()


@pytest.fixture(scope="module")
def tiny() -> Student:
    return tiny_student()


@pytest.fixture(scope="module")
def shipped(tiny: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a TinyNet."""
    path = tmp_path_factory.mktemp("shipped") / "tiny.pte"
    TARGET.write(lowered(tiny, 16, TEXTS), path)
    return path


@needs_executorch
@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_every_layer_computes_the_students_integers(spec: QuantSpec, tmp_path: Path) -> None:
    student = student_of("test_efficientnet.r160_in1k", spec)
    found, kernels = differences(student, 32, tmp_path)
    check_layers(found, TARGET.tolerance)
    check_kernels(kernels, student)
    layers = {layer.layer for layer in student.layers()}
    assert not [entry for entry in found if entry.layer in layers and entry.fraction > 0.0]


@needs_executorch
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_everything_between_layers_computes_the_students_integers(
    scheme: str, tmp_path: Path
) -> None:
    student = student_of(Everything(), QuantSpec(scheme=scheme))
    found, kernels = differences(student, 32, tmp_path)
    check_layers(found, TARGET.tolerance)
    check_kernels(kernels, student)


@needs_executorch
def test_a_clip_per_channel_computes_the_students_integers(tmp_path: Path) -> None:
    student = clipped_student()
    found, kernels = differences(student, 16, tmp_path)
    check_layers(found, TARGET.tolerance)
    check_kernels(kernels, student)


@needs_executorch
def test_what_lies_between_two_integers_is_rounded_as_the_student_does(tmp_path: Path) -> None:
    student = student_of(Everything(), QuantSpec(power_of_two=True))  # where much lies there
    found, kernels = differences(student, 32, tmp_path)
    assert not [entry for entry in found if entry.fraction > 0.0]
    check_kernels(kernels, student)


@needs_executorch
def test_narrow_grids_keep_their_bounds(tmp_path: Path) -> None:
    student = tiny_student(QuantSpec(bits=4))
    found, kernels = differences(student, 16, tmp_path)
    check_layers(found, TARGET.tolerance)
    check_kernels(kernels, student)


@needs_executorch
def test_the_file_computes_the_student(tiny: Student, shipped: Path) -> None:
    images = structured(5, 16, seed=1)
    runtime = TARGET.open(shipped)
    assert runtime.name.startswith("executorch ")
    assert runtime.input_shape == (1, 3, 16, 16)
    (logits,) = runtime.run(images)
    assert logits.shape == (5, 10)
    step = tiny.activation_quantizers()[-1].thresholds()[0]
    assert (logits - tiny(images)).abs().max() <= step


@needs_executorch
def test_all_that_computes_runs_in_integers(tiny: Student, shipped: Path) -> None:
    kernels = TARGET.open(shipped).kernels()
    check_kernels(kernels, tiny)
    in_float = {name for name in kernels.operators if name.endswith("float")}
    assert in_float == {"Convert float"}  # onto the input's grid, and off the logits'
    assert kernels.operators["Convert float"] == 2
    assert kernels.integer_operators == sum(kernels.operators.values()) - 2


@needs_executorch
def test_metadata_are_stored(shipped: Path) -> None:
    assert TARGET.open(shipped).metadata == TEXTS


@needs_executorch
def test_images_of_another_size_are_rejected(shipped: Path) -> None:
    with pytest.raises(FatError, match=r"takes images \[3, 16, 16\], these are \[3, 20, 20\]"):
        TARGET.open(shipped).run(structured(2, 20))


@needs_executorch
def test_channels_last_images_give_the_same(shipped: Path) -> None:
    images, runtime = structured(2, 16), TARGET.open(shipped)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(runtime.run(images)[0], runtime.run(channels_last)[0])


@needs_executorch
def test_a_float_network_has_float_kernels(tiny: Student, tmp_path: Path) -> None:
    images, path = structured(3, 16), tmp_path / "float.pte"
    TARGET.write(Program(tiny.teacher, images), path)
    runtime = TARGET.open(path)
    torch.testing.assert_close(
        runtime.run(images)[0], tiny.float_logits(images), rtol=1e-4, atol=1e-4
    )
    kernels = runtime.kernels()
    assert kernels.integer_layers == kernels.integer_operators == 0
    assert len(kernels.float_layers) == len(tiny.layers())
    assert runtime.metadata == {}


@needs_executorch
def test_writing_is_silent_and_leaves_the_log_alone(
    tiny: Student, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.root.manager.disable
    TARGET.write(Program(tiny.teacher, structured(1, 16)), tmp_path / "float.pte")
    TARGET.open(tmp_path / "float.pte").run(structured(1, 16))
    assert (root.handlers, root.level, logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


@needs_executorch
@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.99])
def test_a_damaged_file_is_named(shipped: Path, tmp_path: Path, kept: float) -> None:
    content, path = shipped.read_bytes(), tmp_path / "damaged.pte"
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(FatError, match=r"cannot open .*damaged\.pte: .*The file is damaged"):
        TARGET.open(path)


@needs_executorch
def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pte"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(FatError, match="of another format"):
        TARGET.open(path)


@needs_executorch
def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"There is no file .*none\.pte"):
        TARGET.open(tmp_path / "none.pte")


class TwoImages(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@needs_executorch
@pytest.mark.parametrize(
    ("network", "inputs", "said"),
    [
        (TwoImages(), (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)), "num_inputs=2"),
        (nn.Flatten(), (torch.ones(1, 3, 8, 8, dtype=torch.int32),), "dtype=Int"),
        (nn.ReLU(), (torch.ones(1, 3),), r"sizes=\[1, 3\]"),
    ],
    ids=["two", "integers", "rank"],
)
def test_files_without_an_image_input_are_rejected(
    network: nn.Module, inputs: tuple[torch.Tensor, ...], said: str, tmp_path: Path
) -> None:
    from executorch.exir import to_edge_transform_and_lower

    path = tmp_path / "other.pte"
    edge = to_edge_transform_and_lower(torch.export.export(network, inputs))
    path.write_bytes(edge.to_executorch().buffer)
    with pytest.raises(FatError, match=rf"{said}.*one float32 tensor of normalized images"):
        TARGET.open(path)


@needs_executorch
def test_layers_that_are_not_delegated_are_float_layers(tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    path = tmp_path / "portable.pte"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    edge = to_edge_transform_and_lower(torch.export.export(network, (torch.ones(1, 3, 8, 8),)))
    path.write_bytes(edge.to_executorch().buffer)
    kernels = TARGET.open(path).kernels()
    assert kernels.integer_layers == 0
    assert set(kernels.float_layers) == {"aten::convolution", "aten::addmm"}


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1(x).flatten(1)


@needs_executorch
def test_an_unsupported_operator_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    network = torch.fx.symbolic_trace(Unknown())
    with pytest.raises(FatError, match=r"operator aten\S+special_i1\S* is not supported"):
        TARGET.write(Program(network, torch.ones(2, 3, 4, 4)), tmp_path / "network.pte")
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_missing_package_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (TARGET.check, lambda: TARGET.open(tmp_path / "network.pte")):
        with pytest.raises(FatError, match=r"not installed: type pip install -e '\.\[execut"):
            call()
