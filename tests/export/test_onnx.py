"""ONNX files: equal to their students in ONNX Runtime, integer kernels, nothing unneeded inside."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.export import onnx as module
from fat.export.onnx import OPSETS, Onnx, OnnxRuntime
from fat.export.verify import compare_layers
from tests.export.students import (
    NAMES,
    SCHEMES,
    Everything,
    Heads,
    check_equal,
    clipped_student,
    structured,
    student_of,
    tiny_student,
    written,
)


@pytest.fixture(scope="module")
def tiny() -> Student:
    return tiny_student()


@pytest.fixture(scope="module")
def file(tiny: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    return written(tiny, folder, metadata={"fat.model": "TinyNet", "fat.classes": '["ä"]'})[0]


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}


def dequantized(model: onnx.ModelProto, kind: int) -> list[onnx.NodeProto]:
    stored = {x.name for x in model.graph.initializer if x.data_type == kind}
    return [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]


# ------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_every_kind_of_operation_is_equal_in_the_runtime(spec: QuantSpec, tmp_path: Path) -> None:
    check_equal(student_of(Everything(), spec), tmp_path)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_a_clip_per_channel_is_equal_in_the_runtime_and_in_integers(
    scheme: str, tmp_path: Path
) -> None:
    kernels = check_equal(clipped_student(scheme=scheme), tmp_path).kernels()
    assert not {"Min", "Add"} & set(kernels.operators)


@pytest.mark.parametrize("spec", SCHEMES, ids=NAMES)
def test_a_softmax_onto_a_grid_is_equal_in_the_runtime(spec: QuantSpec, tmp_path: Path) -> None:
    student = student_of(Heads(), spec)
    path, program = written(student, tmp_path)
    # The runtime's own integer softmax is up to a step too small.
    assert "QLinearSoftmax" not in OnnxRuntime(path).kernels().operators
    Onnx().write_with_integers(program, path, tmp_path / "tapped.onnx")
    runtime = OnnxRuntime(tmp_path / "tapped.onnx")
    # The last bit of real arithmetic is each library's own.
    found = compare_layers(student, runtime, program.tensors, structured(8, 32, 5), ties=2**-12)
    assert len(found) == len(student.activation_quantizers())
    assert [entry for entry in found if entry.steps] == []


class Pairs(nn.Module):
    """Sums and products of two channels that each run over all of their integers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (
            nn.ModuleList(nn.Conv2d(3, 1, 1) for _ in range(count)) for _ in range(2)
        )
        for layers, channel in ((self.first, 0), (self.second, 1)):
            for layer in layers:
                factor, shift = torch.rand(2, generator=generator) + 0.2
                layer.weight.data.zero_()
                layer.weight.data[0, channel] = factor
                layer.bias.data.fill_(float(factor * (shift - 0.7)))  # zero lies inside
        self.head = nn.Conv2d(2 * count, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for first, second in zip(self.first, self.second, strict=True):
            a, b = first(x), second(x)
            results += [a + b, a * b]
        return self.head(torch.cat(results, 1)).mean((2, 3))


def test_sums_and_products_of_all_pairs_of_integers_are_equal(tmp_path: Path) -> None:
    network = Pairs(4).eval()
    ramp = torch.linspace(-1.0, 1.0, 256).expand(256, 256)
    images = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)])[None].repeat(2, 1, 1, 1)
    student = fat.prepare(network, images)
    fat.calibrate(student, images)
    student.origin = {"preprocessing": {"size": [256, 256]}}
    path, program = written(student, tmp_path)
    Onnx().write_with_integers(program, path, tmp_path / "tapped.onnx")
    runtime = OnnxRuntime(tmp_path / "tapped.onnx")
    names = [grid.layer for grid in program.tensors]
    integers = dict(zip(names, runtime.run(images)[1:], strict=True))
    for number in range(4):
        a, b = (integers[f"{side}.{number}"][0].flatten() for side in ("first", "second"))
        assert len(set(zip(a.tolist(), b.tolist(), strict=True))) > 60000  # of 65536 pairs
    differences = compare_layers(student, runtime, program.tensors, images)
    assert len(differences) > 16
    assert [entry for entry in differences if entry.steps] == []


# ------------------------------------------------------------------------------------ the file


def test_the_file_is_standard_onnx(file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_weights_are_int8_and_biases_int32(file: Path, tiny: Student) -> None:
    model = onnx.load(file)
    count = len(tiny.layers())
    weights, biases = dequantized(model, TensorProto.INT8), dequantized(model, TensorProto.INT32)
    assert len(weights) == len(biases) == count
    stored = initializers(model)
    for node in weights:
        assert next(a.i for a in node.attribute if a.name == "axis") == 0
        assert stored[node.input[1]].shape == stored[node.input[0]].shape[:1]
        assert not stored[node.input[2]].any()
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.name for node in layers] == [layer.layer for layer in tiny.layers()]


def test_scalar_weights_have_one_step(tmp_path: Path) -> None:
    path, _ = written(tiny_student(QuantSpec(granularity="per_tensor")), tmp_path)
    model = onnx.load(path)
    stored = initializers(model)
    for node in dequantized(model, TensorProto.INT8):
        assert stored[node.input[1]].shape == ()


@pytest.mark.parametrize("opset", [OPSETS[0], 21])
def test_weights_of_four_bits_are_stored_in_four_from_opset_21(opset: int, tmp_path: Path) -> None:
    student = tiny_student(QuantSpec(weight_bits=4))
    runtime = check_equal(student, tmp_path, Onnx(opset))
    model = onnx.load(runtime.path)
    assert model.opset_import[0].version == opset
    narrow = {x.name: x for x in model.graph.initializer if x.data_type == TensorProto.INT4}
    if opset < 21:
        assert not narrow
        return
    for layer in student.layers():
        stored = narrow.pop(f"{layer.layer}.weight.int4")
        integers = layer.integers()[0].to(torch.int8).numpy()
        assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), integers)
        assert len(stored.raw_data) == (integers.size + 1) // 2
    assert not narrow


@pytest.mark.parametrize("opset", [9, 17, 99])
def test_unsupported_opsets_are_rejected(opset: int) -> None:
    with pytest.raises(FatError, match=rf"opset {opset} .* 18 to 23, as in export\.opset=21"):
        Onnx(opset)


def test_any_batch_gives_the_same_logits_image_by_image(file: Path) -> None:
    runtime, images = OnnxRuntime(file), structured(5, 16, seed=2)
    assert runtime.input_shape == (None, 3, 16, 16)
    together = runtime.run(images)[0]
    alone = torch.cat([runtime.run(image[None])[0] for image in images])
    assert together.shape == (5, 10)
    assert torch.equal(together, alone)


def test_metadata_are_stored_and_nothing_else(file: Path) -> None:
    runtime, model = OnnxRuntime(file), onnx.load(file)
    assert dict(runtime.metadata) == {"fat.model": "TinyNet", "fat.classes": '["ä"]'}
    assert model.producer_name == "FAT"
    assert not [x for x in model.graph.node if x.doc_string or x.metadata_props]
    assert b".py" not in file.read_bytes()  # the exporter notes which line each node came from


def test_the_same_student_gives_the_same_file(tiny: Student, tmp_path: Path) -> None:
    first, second = (written(tiny, tmp_path)[0].read_bytes() for _ in range(2))
    assert first == second


def test_uneven_padding_belongs_to_the_convolution(tmp_path: Path) -> None:
    path, _ = written(student_of(Everything()), tmp_path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["Pad"] == 0
    assert kinds["ReduceMean"] == 0
    assert kinds["GlobalAveragePool"] == 2
    uneven = next(node for node in onnx.load(path).graph.node if node.name == "right")
    assert next(list(a.ints) for a in uneven.attribute if a.name == "pads") == [0, 1, 0, 2]


def test_the_exporter_is_quiet(
    tiny: Student,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        written(tiny, tmp_path)
    assert caplog.text == ""
    assert capfd.readouterr().out == ""


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), Bessel(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    with pytest.raises(FatError, match=r"operator .*bessel_j0.* is not supported"):
        written(student_of(network, size=16), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- the runtime


def simple(
    path: Path, kind: int = TensorProto.FLOAT, shape: tuple[Any, ...] = ("N", 3, 8, 8)
) -> Path:
    """Another's float file: global average pooling and a linear layer."""
    weight = numpy_helper.from_array(np.eye(3, 4, dtype=np.float32), "weight")
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["f"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def test_layers_in_float_are_listed_by_name(tmp_path: Path) -> None:
    kernels = OnnxRuntime(simple(tmp_path / "other.onnx")).kernels()
    assert kernels.integer_layers == 0
    assert kernels.float_layers == ("head",)


def test_a_file_for_single_images_is_run_image_by_image(tmp_path: Path) -> None:
    runtime = OnnxRuntime(simple(tmp_path / "other.onnx", shape=(1, 3, 8, 8)))
    images = structured(3, 8)
    means = images.mean((2, 3))
    torch.testing.assert_close(runtime.run(images)[0][:, :3], means)


def test_the_error_for_another_batch_size_says_what_to_type(tmp_path: Path) -> None:
    runtime = OnnxRuntime(simple(tmp_path / "other.onnx", shape=(4, 3, 8, 8)))
    assert len(runtime.run(structured(4, 8))[0]) == 4
    assert len(runtime.run(structured(8, 8))[0]) == 8
    with pytest.raises(FatError, match=r"batches of 4 images; type data\.batch_size=4"):
        runtime.run(structured(3, 8))


def test_files_without_an_image_input_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"takes x tensor\(uint8\).*float32"):
        OnnxRuntime(simple(tmp_path / "bytes.onnx", TensorProto.UINT8))
    with pytest.raises(FatError, match="There is no file"):
        OnnxRuntime(tmp_path / "none.onnx")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999])
def test_a_damaged_file_is_rejected(fraction: float, file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(FatError, match=r"cannot open .*damaged or of another format"):
        OnnxRuntime(broken)


def test_only_processors_with_avx2_alone_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, vnni, expected in (
        ("AVX2", False, True),
        ("AVX2", True, False),
        ("AVX512", False, False),
        ("DEFAULT", False, False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr(module, "_vnni", lambda v=vnni: v)
        assert module.saturates() == expected
