"""Errors of layers against brute force with only that tensor quantized."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import EqualizeSpec, QuantSpec, Student
from fat.evaluation.layer_analysis import disabled, float_shift_db, layer_errors


@pytest.fixture(params=["symmetric", "asymmetric"])
def student(tiny: nn.Module, images: Tensor, request: pytest.FixtureRequest) -> Student:
    student = fat.prepare(tiny, images, QuantSpec(bits=5, scheme=request.param))
    fat.calibrate(student, images)
    with torch.no_grad():  # as after training
        for thresholds in student.thresholds():
            thresholds.alpha.uniform_(0.7, 1.0, generator=torch.Generator().manual_seed(2))
    return student


def outputs(student: Student, images: Tensor, on: Any) -> Tensor:
    """Return the output of the module of quantizer ``on``, with only that quantizer enabled."""
    for _, _, quantizer in student.quantizers():
        quantizer.enabled = quantizer is on
    module = next((layer for layer in student.layers() if layer.weight_quantizer is on), on)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda *args: seen.append(args[2].double()))
    with torch.no_grad():
        student.network(images.contiguous(memory_format=torch.channels_last))
    handle.remove()
    return seen[0]


def test_each_figure_equals_brute_force(student: Student, images: Tensor) -> None:
    errors = {(e.layer, e.kind): e.sqnr_db for e in layer_errors(student, list(images.split(6)))}
    quantizers = list(student.quantizers())
    assert errors.keys() == {(layer, kind) for layer, kind, _ in quantizers}
    for layer, kind, quantizer in quantizers:
        alone = outputs(student, images, quantizer)
        quantizer.enabled = False
        module = next((x for x in student.layers() if x.weight_quantizer is quantizer), quantizer)
        seen: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda *args, seen=seen: seen.append(args[2].double())
        )
        with torch.no_grad():
            student.network(images.contiguous(memory_format=torch.channels_last))
        handle.remove()
        signal = float(seen[0].square().sum())
        noise = float((seen[0] - alone).square().sum())
        assert errors[layer, kind] == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


def test_worst_first_and_independent_of_batches(student: Student, images: Tensor) -> None:
    errors = layer_errors(student, images)
    figures = [error.sqnr_db for error in errors]
    assert figures == sorted(figures)
    assert len(set(figures)) > 10
    for one, other in zip(errors, layer_errors(student, list(images.split(1))), strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=0.01)


def test_a_spoilt_layer_comes_first(student: Student, images: Tensor) -> None:
    layer = student.layers()[3]
    layer.weight_quantizer.thresholds.high.mul_(50)
    worst = layer_errors(student, images)[0]
    assert (worst.layer, worst.kind) == (layer.layer, "weight")
    assert worst.sqnr_db < 5


def test_nothing_is_left_behind(student: Student, images: Tensor) -> None:
    chosen = student.activation_quantizers()[2]
    chosen.enabled = False
    states = [quantizer.enabled for _, _, quantizer in student.quantizers()]
    expected = student(images)
    layer_errors(student, images)
    float_shift_db(student, images)
    with pytest.raises(RuntimeError):  # two channels instead of three
        layer_errors(student, [images, images[:, :2]])
    assert [quantizer.enabled for _, _, quantizer in student.quantizers()] == states
    assert states.count(False) == 1
    assert not any(module._forward_hooks for module in student.modules())
    assert torch.equal(student(images), expected)


def test_disabled_computes_in_float_and_comes_back(student: Student, images: Tensor) -> None:
    quantized = student(images).detach()
    with disabled(student), torch.no_grad():
        exact = student(images)
    torch.testing.assert_close(exact, student.float_logits(images), rtol=1e-4, atol=1e-4)
    assert float((exact - quantized).abs().max()) > 1e-2
    assert torch.equal(student(images), quantized)
    with pytest.raises(ZeroDivisionError), disabled(student):
        raise ZeroDivisionError
    assert torch.equal(student(images), quantized)


def test_float_shift_tells_how_far_equalization_moved(tiny: nn.Module, images: Tensor) -> None:
    spec = QuantSpec(equalize=EqualizeSpec("depthwise"))
    student = fat.prepare(tiny, images[:4], spec)
    fat.calibrate(student, images)
    unseen = 4 * images  # beyond the range that the caps were set for
    with disabled(student), torch.no_grad():
        z, moved = student.float_logits(unseen).double(), student(unseen).double()
    expected = 10 * math.log10(float(z.square().sum()) / float((z - moved).square().sum()))
    assert float_shift_db(student, list(unseen.split(5))) == pytest.approx(expected, abs=0.01)
    assert expected < 60 < float_shift_db(student, images[:4])
