"""Files for LiteRT equal their students, in integers, in the usual mobile form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fat import FatError, QuantSpec, Student
from fat.export import litert
from fat.export.base import Program
from fat.export.litert import LiteRT, LiteRTRuntime
from fat.export.lowering import lower
from fat.export.verify import check_kernels, check_layers, compare, compare_layers
from tests.export.students import (
    NAMES,
    SCHEMES,
    Everything,
    Heads,
    clipped_student,
    structured,
    student_of,
    tiny_student,
)

INSTALLED = all(importlib.util.find_spec(name) for name in ("ai_edge_litert", "litert_torch"))
needs_litert = pytest.mark.skipif(
    not INSTALLED, reason="LiteRT is not installed (pip install -e '.[litert]')"
)
IMAGES = structured(4, 16, 1)


def program_of(student: Student, images: torch.Tensor = IMAGES, **metadata: str) -> Program:
    lowered = lower(student, images, LiteRT.style)
    return Program(lowered.network, images, lowered.tensors, lowered.weight_bits, metadata)


class Written:
    """A tiny student with its file."""

    def __init__(self, folder: Path, target: LiteRT, student: Student | None = None) -> None:
        self.student = student or tiny_student()
        self.program = program_of(self.student, **{"fat.model": "tiny", "fat.classes": '["é"]'})
        self.target, self.path, self.tapped = target, folder / "x.tflite", folder / "t.tflite"
        target.write(self.program, self.path)
        target.write_with_integers(self.program, self.path, self.tapped)

    def check(self) -> None:
        """The file's integers are the student's, and so are its logits."""
        tapped = self.target.open(self.tapped, threads=1)
        found = compare_layers(self.student, tapped, self.program.tensors, IMAGES)
        assert len(found) == len(self.program.tensors)
        check_layers(found, self.target.tolerance)
        runtime = self.target.open(self.path, threads=1)
        assert torch.equal(tapped.run(IMAGES)[0], runtime.run(IMAGES)[0])
        assert compare(self.student, runtime, [IMAGES])["simulation"]["sqnr_db"] > 40.0


@pytest.fixture(scope="module")
def in_floats(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("float"), LiteRT())


@pytest.fixture(scope="module")
def in_integers(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("int8"), LiteRT(integer_io=True))


@needs_litert
@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_every_operation_equals_the_students(spec: QuantSpec, tmp_path: Path) -> None:
    written = Written(tmp_path, LiteRT(), tiny_student(spec))
    written.check()
    kernels = LiteRTRuntime(written.path).kernels()
    check_kernels(kernels, written.student)
    assert "TRANSPOSE" not in kernels.operators
    assert kernels.integer_operators == sum(kernels.operators.values()) - 2  # but for both ends


@needs_litert
def test_a_clip_per_channel_equals_the_students(tmp_path: Path) -> None:
    written = Written(tmp_path, LiteRT(), clipped_student())
    written.check()
    check_kernels(LiteRTRuntime(written.path).kernels(), written.student)


@needs_litert
@pytest.mark.parametrize("network", [Everything, Heads])
@pytest.mark.parametrize("bits", [8, 4])
def test_everything_that_stands_between_layers_equals_the_students(
    network: type[nn.Module], bits: int, tmp_path: Path
) -> None:
    images, student = structured(4, 32, 1), student_of(network(), QuantSpec(bits=bits))
    program, target = program_of(student, images), LiteRT()
    target.write(program, tmp_path / "x.tflite")
    target.write_with_integers(program, tmp_path / "x.tflite", tmp_path / "t.tflite")
    tapped = target.open(tmp_path / "t.tflite", threads=1)
    check_layers(compare_layers(student, tapped, program.tensors, images), target.tolerance)
    check_kernels(target.open(tmp_path / "x.tflite").kernels(), student)


@needs_litert
def test_layers_of_one_shape_keep_their_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(width, 64, 3, padding=1, bias=False) for width in (3, *[64] * 7)]
    network = torch.fx.symbolic_trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    LiteRT().write(Program(network.eval(), IMAGES), tmp_path / "float.tflite")
    logits = LiteRTRuntime(tmp_path / "float.tflite").run(IMAGES)[0]
    torch.testing.assert_close(logits, network(IMAGES).detach(), rtol=1e-4, atol=1e-6)


@needs_litert
def test_equal_arrays_are_stored_once(in_integers: Written) -> None:
    import flatbuffers

    content = in_integers.path.read_bytes()
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(litert._File(content).model.Pack(builder), litert.IDENTIFIER)
    layers = in_integers.student.layers()
    zeros = 2 * 8 * sum(layer.weight.shape[0] for layer in layers)  # of weights and biases
    assert len(content) < len(builder.Output()) - zeros // 2


@needs_litert
def test_a_file_takes_and_returns_float32(in_floats: Written) -> None:
    runtime = LiteRTRuntime(in_floats.path, threads=1)
    assert runtime.input_shape == (1, 3, 16, 16)
    assert runtime.name.startswith("litert 2.")
    (logits,) = runtime.run(IMAGES)
    assert (logits.shape, logits.dtype) == ((4, 10), torch.float32)
    file = litert._File(in_floats.path.read_bytes())
    kinds = [file.kind(operator) for operator in file.graph.operators]
    assert (kinds[0], kinds[-1]) == ("QUANTIZE", "DEQUANTIZE")
    assert [file.type(int(i)) for i in (*file.graph.inputs, *file.graph.outputs)] == ["FLOAT32"] * 2


@needs_litert
def test_integers_at_both_ends_are_the_same_network(
    in_floats: Written, in_integers: Written
) -> None:
    in_integers.check()
    file = litert._File(in_integers.path.read_bytes())
    assert [file.type(int(i)) for i in (*file.graph.inputs, *file.graph.outputs)] == ["INT8"] * 2
    kernels = file.kernels()
    assert kernels.integer_operators == sum(kernels.operators.values())
    runtimes = [LiteRTRuntime(written.path) for written in (in_floats, in_integers)]
    assert torch.equal(*(runtime.run(IMAGES)[0] for runtime in runtimes))


@needs_litert
def test_metadata_and_names_are_kept(in_floats: Written) -> None:
    assert LiteRTRuntime(in_floats.path).metadata == in_floats.program.metadata
    assert LiteRTRuntime(in_floats.tapped).metadata == in_floats.program.metadata
    file = litert._File(in_floats.path.read_bytes())
    names = {litert._text(tensor.name) for tensor in file.graph.tensors}
    assert {"images", "logits", *(grid.key for grid in in_floats.program.tensors)} <= names


@needs_litert
@pytest.mark.parametrize("integer_io", [False, True])
def test_a_float_network_stays_float(integer_io: bool, tmp_path: Path) -> None:
    teacher = tiny_student().teacher
    LiteRT(integer_io).write(Program(teacher, IMAGES), tmp_path / "f.tflite")
    runtime = LiteRTRuntime(tmp_path / "f.tflite", threads=1)
    torch.testing.assert_close(runtime.run(IMAGES)[0], teacher(IMAGES), rtol=1e-4, atol=1e-5)
    kernels = runtime.kernels()
    assert (kernels.integer_layers, len(kernels.float_layers)) == (0, 8)
    assert "TRANSPOSE" not in kernels.operators


def save(file: Any, path: Path) -> LiteRTRuntime:
    path.write_bytes(file.packed())
    return LiteRTRuntime(path, threads=1)


@needs_litert
def test_files_of_other_tools_may_have_channels_first(in_floats: Written, tmp_path: Path) -> None:
    file = litert._File(in_floats.path.read_bytes())
    images = file.add_tensor("x", (1, 3, 16, 16), "FLOAT32")
    order = file.add_constant("order", litert.TO_NHWC)
    file.add_operator("TRANSPOSE", [images, order], int(file.graph.inputs[0]), 0)
    file.set_ends(images, [int(file.graph.outputs[0])])
    runtime = save(file, tmp_path / "nchw.tflite")
    assert runtime.input_shape == (1, 3, 16, 16)
    expected = LiteRTRuntime(in_floats.path, threads=1).run(IMAGES)
    assert torch.equal(runtime.run(IMAGES)[0], expected[0])


@needs_litert
def test_files_of_other_tools_may_take_uint8(in_integers: Written, tmp_path: Path) -> None:
    file = litert._File(in_integers.path.read_bytes())
    old = int(file.graph.inputs[0])
    grid = file.schema.QuantizationParametersT()
    grid.scale = file.graph.tensors[old].quantization.scale
    grid.zeroPoint = np.asarray(file.graph.tensors[old].quantization.zeroPoint) + 128
    images = file.add_tensor("x", (1, 16, 16, 3), "UINT8", grid)
    file.add_operator("QUANTIZE", [images], old, 0)
    file.set_ends(images, [int(file.graph.outputs[0])])
    runtime = save(file, tmp_path / "uint8.tflite")
    expected = LiteRTRuntime(in_integers.path, threads=1).run(IMAGES)
    assert torch.equal(runtime.run(IMAGES)[0], expected[0])


@needs_litert
def test_more_than_one_input_is_rejected(in_floats: Written, tmp_path: Path) -> None:
    file = litert._File(in_floats.path.read_bytes())
    file.graph.inputs = [*file.graph.inputs, file.add_tensor("mask", (1, 2), "FLOAT32")]
    file.model.signatureDefs = []
    with pytest.raises(FatError, match=r"mask float32 \[1, 2\].*FAT feeds one"):
        save(file, tmp_path / "two.tflite")


@needs_litert
def test_a_truncated_file_is_rejected(in_floats: Written, tmp_path: Path) -> None:
    content = in_floats.path.read_bytes()
    for length in (0, 6, 40, len(content) // 2, len(content) - 1):
        (tmp_path / "half.tflite").write_bytes(content[:length])
        with pytest.raises(FatError, match=r"cannot open .*half\.tflite.*damaged"):
            LiteRT().open(tmp_path / "half.tflite")
    with pytest.raises(FatError, match="There is no file"):
        LiteRT().open(tmp_path / "none.tflite")


@needs_litert
def test_an_unsupported_operator_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x).mean((2, 3))

    program = Program(torch.fx.symbolic_trace(Odd()), IMAGES)
    with pytest.raises(FatError, match="bessel_j0"):
        LiteRT().write(program, tmp_path / "x.tflite")
    assert not list(tmp_path.iterdir())


def test_the_error_for_a_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FatError, match=r"pip install -e '\.\[litert\]'"):
        LiteRT().check()
