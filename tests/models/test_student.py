"""Tests of Student: state, training and calibration."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    return student


def test_an_uncalibrated_student_does_not_run(tiny: nn.Module, images: Tensor) -> None:
    student = fat.prepare(tiny, images)
    with pytest.raises(FatError, match="not calibrated"):
        student(images)
    fat.calibrate(student, images)
    assert student(images).shape == (16, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_student_stays_float32(student: Student, images: Tensor, dtype: torch.dtype) -> None:
    before = student(images)
    with pytest.raises(FatError, match=f"has to stay float32, because {dtype} would change"):
        student.to(dtype)
    assert torch.equal(student.to("cpu", torch.float32)(images), before)


def test_teacher_is_frozen_and_not_in_the_state(student: Student, images: Tensor) -> None:
    assert not list(student.teacher.parameters())
    assert not [name for name in student.state_dict() if name.startswith("teacher")]
    assert not student.float_logits(images).requires_grad
    assert not student.training


@pytest.mark.parametrize("thresholds", ["fat", "lsq", "tqt", "frozen"])
@pytest.mark.parametrize("bias", ["trained", "frozen"])
def test_parameters_are_exactly_what_is_trained(
    tiny: nn.Module, images: Tensor, thresholds: str, bias: str
) -> None:
    spec = QuantSpec(thresholds=thresholds, bias=bias, scheme="symmetric", weights="frozen")
    student = fat.prepare(tiny, images, spec)
    names = {name for name, _ in student.named_parameters()}
    factors = {
        f"network.{name}.alpha"
        for name, _ in student.network.named_modules()
        if name.endswith("thresholds")
    }
    biases = {f"network.{layer.layer}.bias" for layer in student.layers()}
    assert len(factors) == 20
    assert names == (set() if thresholds == "frozen" else factors) | (
        biases if bias == "trained" else set()
    )


def test_layers_and_quantizers_in_the_order_of_the_graph(student: Student) -> None:
    assert [layer.layer for layer in student.layers()] == list(student.report.insert.layers)
    kinds = [(layer, kind) for layer, kind, _ in student.quantizers()]
    assert kinds[0] == ("input", "activation")
    assert kinds[-1] == ("classifier", "weight")
    assert len(kinds) == len(set(kinds)) == 20
    assert len(list(student.thresholds())) == 20


@pytest.mark.parametrize("bias", ["trained", "frozen"])
def test_trained_state_brings_everything_back(tiny: nn.Module, images: Tensor, bias: str) -> None:
    student = fat.prepare(tiny, images, QuantSpec(bias=bias))
    fat.calibrate(student, images)
    with torch.no_grad():
        expected = student(images)
        state = student.trained_state()
        for parameter in student.parameters():
            parameter.mul_(0.8)
        for layer in student.layers():
            layer.bias.add_(0.1)
        assert not torch.equal(student(images), expected)
        student.load_trained_state(state)
        assert torch.equal(student(images), expected)


def test_projection_brings_factors_back_to_their_edge(student: Student) -> None:
    with torch.no_grad():
        for index, thresholds in enumerate(student.thresholds()):
            thresholds.alpha.fill_((0.2, 0.7, 1.4)[index % 3])
    student.project()
    for index, thresholds in enumerate(student.thresholds()):
        edge = torch.full_like(thresholds.alpha, (0.5, 0.7, 1.0)[index % 3])
        assert torch.equal(thresholds.alpha, edge)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_saved_student_trains_on_with_lsqs_scale(
    tiny: nn.Module, images: Tensor, tmp_path: Path, granularity: str
) -> None:
    """The gradient's scale 1/√(N·q) is restored by loading, without calibration."""
    student = fat.prepare(tiny, images, QuantSpec(thresholds="lsq", granularity=granularity))
    fat.calibrate(student, images)
    path = tmp_path / "student.safetensors"
    fat.save(student, path)
    loaded = fat.load(path)
    gradients = []
    for one in (student, loaded):
        one(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert torch.equal(gradients[1][name], wanted), name
    counts = {q.layer: q.thresholds.elements.item() for q in loaded.activation_quantizers()}
    assert counts["input"] == 3 * 16 * 16
    assert counts["blocks.0.act1"] == 32 * 8 * 8
    assert counts["classifier"] == 10
    weights = {x.layer: x.weight_quantizer.thresholds.elements.item() for x in loaded.layers()}
    assert weights["blocks.0.conv_pw"] == (8 if granularity == "per_channel" else 8 * 32)


def test_memory_format_of_the_images_does_not_matter(student: Student, images: Tensor) -> None:
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(student(images), student(last))
    assert torch.equal(student.float_logits(images), student.float_logits(last))


def test_the_buffer_is_read_once(student: Student, images: Tensor) -> None:
    """Reading it would make every training step wait for a GPU."""
    student.is_calibrated.fill_(False)
    student.check_calibrated()  # calibrate() set the flag beside it
    twin = copy.deepcopy(student)
    with pytest.raises(FatError, match="not calibrated"):
        twin.check_calibrated()
    twin.is_calibrated.fill_(True)  # by hand
    twin.check_calibrated()
    assert twin(images).shape == (16, 10)


def test_calibration_is_known_after_loading(
    student: Student, tiny: nn.Module, images: Tensor
) -> None:
    other = fat.prepare(tiny, images)
    empty = {name: value.clone() for name, value in other.state_dict().items()}
    other.load_state_dict(student.state_dict())
    assert torch.equal(other(images), student(images))
    other.load_state_dict(empty)
    with pytest.raises(FatError, match="not calibrated"):
        other(images)
    other.mark_calibrated()
    assert bool(other.is_calibrated)
    other.check_calibrated()


def test_a_compiled_step_equals_an_eager_one(
    tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile traces the whole forward pass, in one graph that serves all steps."""
    student = fat.prepare(tiny, images, QuantSpec(thresholds="lsq", granularity="per_tensor"))
    fat.calibrate(student, images)
    # Modes belong to the default backend, which needs a C++ compiler and a minute.
    traced = torch._dynamo.optimize("aot_eager", nopython=True)
    monkeypatch.setattr(torch, "compile", lambda function, mode: traced(function))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = student.compiled()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(3):
        results = []
        for run in (forward, student):
            optimizer.zero_grad()
            logits = run(images)
            logits.square().mean().backward()
            gradients = [p.grad for p in student.parameters() if p.grad is not None]
            results.append([logits.detach(), *gradients])
        assert len(results[0]) == len(results[1]) > 1
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        optimizer.step()
        student.project()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
