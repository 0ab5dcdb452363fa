"""Calibration sets thresholds from float activations of all forms of batches, or keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fat
from fat import FatError, InitSpec, QuantSpec, Student
from fat.graph.tracing.capture import layer_name


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    return fat.prepare(tiny, images, QuantSpec(activation_init=InitSpec("minmax")))


def float_ranges(student: Student, images: Tensor) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of every operation of the teacher by name."""
    ranges: dict[str, tuple[float, float]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                ranges[layer_name(n)] = (float(result.min()), float(result.max()))
            return result

    Watch(student.teacher).run(images.contiguous(memory_format=torch.channels_last))
    return ranges


def state(student: Student) -> list[Tensor]:
    return [value.clone() for value in student.state_dict().values()]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Again:
    """An iterable of batches without a length."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterable[Tensor]:
        return iter(self.batches)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: list(x.split(4)),
    "short last batch": lambda x: list(x.split(5)),
    "single images": lambda x: list(x.split(1)),
    "generator": lambda x: (batch for batch in x.split(4)),
    "labelled": lambda x: [(batch, torch.zeros(len(batch))) for batch in x.split(4)],
    "labelled lists": lambda x: [[batch, torch.zeros(len(batch))] for batch in x.split(7)],
    "iterable": lambda x: Again(list(x.split(3))),
    "loader": lambda x: torch.utils.data.DataLoader(x, batch_size=6),
}


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_minmax_thresholds_are_those_of_the_float_run(
    tiny: nn.Module, images: Tensor, scheme: str
) -> None:
    spec = QuantSpec(scheme=scheme, activation_init=InitSpec("minmax"))
    student = fat.prepare(tiny, images, spec)
    fat.calibrate(student, list(images.split(5)))
    ranges = float_ranges(student, images)
    for quantizer in student.activation_quantizers():
        low, high = ranges[quantizer.layer]
        wanted = {
            "symmetric": (-max(-low, high), max(-low, high)),
            "symmetric_unsigned": (0.0, high),
            "affine": (min(low, 0.0), max(high, 0.0)),
        }[quantizer.grid.kind]
        got = (float(quantizer.thresholds.low), float(quantizer.thresholds.high))
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for layer in student.layers():
        largest = layer.weight.abs().flatten(1).amax(1)
        torch.testing.assert_close(layer.weight_quantizer.thresholds.high, largest)


@pytest.mark.parametrize("form", FORMS)
def test_any_iterable_of_batches_gives_the_same(
    student: Student, images: Tensor, form: str
) -> None:
    ranges = float_ranges(student, images)
    fat.calibrate(student, FORMS[form](images))
    assert bool(student.is_calibrated)
    for quantizer in student.activation_quantizers():
        low, high = ranges[quantizer.layer]
        if quantizer.grid.kind == "symmetric":
            high = max(-low, high)
        assert float(quantizer.thresholds.high) == pytest.approx(max(high, 0.0), rel=1e-5, abs=1e-6)


def test_thresholds_do_not_depend_on_the_batches(tiny: nn.Module, images: Tensor) -> None:
    results = []
    for form in FORMS.values():
        student = fat.prepare(tiny, images, QuantSpec(activation_init=InitSpec("percentile", 99.0)))
        fat.calibrate(student, form(images))
        results.append(torch.stack([q.thresholds.high for q in student.activation_quantizers()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-5)


def test_calibrating_again_starts_anew(student: Student, images: Tensor) -> None:
    fat.calibrate(student, images)
    expected = state(student)
    with torch.no_grad():
        for thresholds in student.thresholds():
            for parameter in thresholds.parameters():
                parameter.fill_(0.6)
    fat.calibrate(student, 3 * images)
    assert not same(expected, state(student))
    fat.calibrate(student, images)
    assert same(expected, state(student))


def bad_batches(images: Tensor) -> dict[str, Any]:
    def raises() -> Iterable[Tensor]:
        yield images
        raise KeyboardInterrupt

    return {
        "nothing": ([], FatError, "no calibration images"),
        "nothing from a generator": (iter([]), FatError, "no calibration images"),
        "NaN": ([images, images * float("nan")], FatError, "'input' ranges from nan"),
        "infinity": ([images, images / 0.0], FatError, "'input' ranges from"),
        # The input is finite, and some quantizers are calibrated before the bad one.
        "overflow inside": ([images, images * 1e38], FatError, "ranges from"),
        "no batch": ([images, images[0]], FatError, r"\[3, 16, 16\]"),
        "wrong channels": ([images, images[:, :2]], RuntimeError, None),
        "interrupted": (raises(), KeyboardInterrupt, None),
    }


@pytest.mark.parametrize("calibrated_before", [False, True])
@pytest.mark.parametrize("case", list(bad_batches(torch.zeros(1, 3, 16, 16))))
def test_a_failure_leaves_the_student_as_it_was(
    student: Student, images: Tensor, case: str, calibrated_before: bool
) -> None:
    if calibrated_before:
        fat.calibrate(student, images)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.9)  # trained since
        expected = student(images)
    before = state(student)
    enabled = [quantizer.enabled for _, _, quantizer in student.quantizers()]
    batches, error, match = bad_batches(images)[case]

    with pytest.raises(error, match=match):
        fat.calibrate(student, batches)

    assert same(before, state(student))
    assert bool(student.is_calibrated) is calibrated_before
    assert [quantizer.enabled for _, _, quantizer in student.quantizers()] == enabled == [True] * 20
    if calibrated_before:
        assert torch.equal(student(images), expected)  # no quantizer observes any more
    else:
        with pytest.raises(FatError, match="not calibrated"):
            student(images)
    fat.calibrate(student, images)
    assert student(images).isfinite().all()


def test_the_float_run_sees_no_quantized_weight(tiny: nn.Module, images: Tensor) -> None:
    # At two bits, quantized weights would change every range.
    student = fat.prepare(tiny, images, QuantSpec(bits=2, scheme="symmetric"))
    fat.calibrate(student, images)
    ranges = float_ranges(student, images)
    classifier = student.activation_quantizers()[-1].thresholds
    assert float(classifier.high) == pytest.approx(max(map(abs, ranges["classifier"])), rel=1e-5)


def test_all_zero_images_are_welcome(tiny: nn.Module, images: Tensor) -> None:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, torch.zeros(2, 3, 16, 16))
    assert student(images).isfinite().all()
    assert student(torch.zeros(1, 3, 16, 16)).isfinite().all()
