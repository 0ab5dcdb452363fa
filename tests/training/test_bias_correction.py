"""Bias correction: equal channel means, checked against independent float runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.evaluation.layer_analysis import disabled
from fat.quant.quantized_layers import QuantLayer
from fat.training.bias_correction import correct_biases


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def prepared(network: nn.Module, images: Tensor, **options: object) -> Student:
    student = fat.prepare(network.eval(), images, QuantSpec(**options))
    fat.calibrate(student, images)
    return student


def outputs(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Every layer's own output, before activation and quantizer, in float64 [values, channels]."""
    seen: dict[str, Tensor] = {}

    def note(layer: QuantLayer, _: object, output: Tensor) -> None:
        flat = output if output.dim() == 2 else output.permute(0, 2, 3, 1).flatten(0, 2)
        seen[layer.layer] = flat.double()

    handles = [layer.register_forward_hook(note) for layer in student.layers()]
    with torch.no_grad():
        student.network(images.contiguous(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    return seen


def half_steps(layer: QuantLayer) -> Tensor:
    scale = layer.weight_quantizer.scale() * layer.input_quantizer.thresholds()[0]
    return scale.detach().double() / 2


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_one_layer_has_its_float_means_after_it(images: Tensor, granularity: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten())
    student = prepared(network, images, weight_bits=3, granularity=granularity)
    expected = network[0](images).double().mean((0, 2, 3))
    before = outputs(student, images)["0"].mean(0)

    correct_biases(student, list(images.split(5)))

    after = outputs(student, images)["0"].mean(0)
    (layer,) = student.layers()
    limit = half_steps(layer) + 1e-6
    assert bool(((after - expected).abs() <= limit).all())
    before, after = before - expected.detach(), after - expected.detach()
    assert float(before.abs().max()) > 5 * float(after.abs().max())


def test_a_linear_layer_too(images: Tensor) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    student = prepared(network, images, bits=3)
    correct_biases(student, images)
    error = outputs(student, images)["1"].mean(0) - network(images).double().mean(0)
    assert bool((error.abs() <= half_steps(student.layers()[0]) + 1e-6).all())


@pytest.mark.parametrize("bias", ["trained", "frozen"])
def test_every_layer_of_a_network_has_its_float_means(
    tiny: nn.Module, images: Tensor, bias: str
) -> None:
    student = prepared(tiny, images, weight_bits=4, bias=bias)
    with disabled(student):
        expected = outputs(student, images)  # before: biases move afterwards
    before = outputs(student, images)

    correct_biases(student, list(images.split(6)))

    after = outputs(student, images)
    was = left = 0.0
    for layer in student.layers():
        wanted = expected[layer.layer].mean(0)
        error = (after[layer.layer].mean(0) - wanted).abs()
        assert bool((error <= half_steps(layer) + 1e-5).all()), layer.layer
        was += float((before[layer.layer].mean(0) - wanted).abs().sum())
        left += float(error.sum())
    assert was > 5 * left > 0


def test_only_so_many_images_are_used(tiny: nn.Module, images: Tensor) -> None:
    few, all_of_them = prepared(tiny, images, bits=4), prepared(tiny, images, bits=4)
    drawn = []

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for batch in images.split(4):
            drawn.append(len(batch))
            yield batch, torch.zeros(len(batch))

    correct_biases(few, batches(), count=6)
    assert drawn == [4, 4]
    correct_biases(all_of_them, images[:6])
    for one, other in zip(few.layers(), all_of_them.layers(), strict=True):
        torch.testing.assert_close(one.bias, other.bias)


def test_nothing_but_biases_changes(tiny: nn.Module, images: Tensor) -> None:
    student = prepared(tiny, images, bits=4)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    teacher = student.float_logits(images)
    correct_biases(student, images)
    changed = {k for k, value in student.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {f"network.{layer.layer}.bias" for layer in student.layers()}
    assert torch.equal(student.float_logits(images), teacher)
    assert all(quantizer.enabled for _, _, quantizer in student.quantizers())


def test_layers_without_bias_are_passed_over(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    )
    student = prepared(network, images, bits=4)
    first, second = (outputs_float(network, images, index) for index in (0, 2))
    correct_biases(student, images)
    assert student.layers()[0].bias is None
    after = outputs(student, images)
    error = (after["2"].mean(0) - second.mean((0, 2, 3))).abs()
    assert bool((error <= half_steps(student.layers()[1]) + 1e-5).all())
    assert float((after["0"].mean(0) - first.mean((0, 2, 3))).abs().max()) > 1e-4


def outputs_float(network: nn.Sequential, images: Tensor, index: int) -> Tensor:
    return copy.deepcopy(network[: index + 1]).double()(images.double()).detach()


def test_missing_images_and_thresholds_are_rejected(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(FatError, match="There are no images"):
        correct_biases(prepared(tiny, images), [])
    with pytest.raises(FatError, match="not calibrated"):
        correct_biases(fat.prepare(tiny, images), images)
