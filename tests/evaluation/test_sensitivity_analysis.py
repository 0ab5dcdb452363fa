"""The analysis against full passes with quantizers enabled by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.evaluation.sensitivity_analysis import sensitivity as measure
from fat.quant.metrics import agreement, logits_sqnr_db
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer


def calibrated(network: nn.Module, images: Tensor, spec: QuantSpec) -> Student:
    student = fat.prepare(network, images, spec)
    fat.calibrate(student, images)
    return student


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    return calibrated(tiny, images, QuantSpec(weight_bits=4, activation_bits=5))


@torch.no_grad()
def logits(student: Student, images: Tensor, on: list[Any]) -> Tensor:
    """Return the logits with only these quantizers enabled."""
    quantizers = [quantizer for *_, quantizer in student.quantizers()]
    for quantizer in quantizers:
        quantizer.enabled = any(quantizer is other for other in on)
    result = student(images)
    for quantizer in quantizers:
        quantizer.enabled = True
    return result


def snapshot(student: Student) -> dict[str, Any]:
    return {
        "modules": {name: id(module) for name, module in student.named_modules()},
        "state": {name: tensor.clone() for name, tensor in student.state_dict().items()},
        "trained": [id(parameter) for parameter in student.parameters()],
        "enabled": [quantizer.enabled for *_, quantizer in student.quantizers()],
        "training": student.training,
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    ours, theirs = before.pop("state"), after.pop("state")
    return (
        before == after
        and list(ours) == list(theirs)
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def test_every_tensor_is_measured_alone_and_left_out(student: Student, images: Tensor) -> None:
    rows = measure(student, images)
    quantizers = {(layer, kind): q for layer, kind, q in student.quantizers()}
    assert {(row.layer, row.kind) for row in rows} == set(quantizers)
    assert len(rows) == len(quantizers)
    reference = logits(student, images, [])
    for row in rows:
        own = quantizers[row.layer, row.kind]
        alone = logits(student, images, [own])
        rest = logits(student, images, [q for q in quantizers.values() if q is not own])
        assert row.alone_db == pytest.approx(logits_sqnr_db(reference, alone), abs=1e-6)
        assert row.without_db == pytest.approx(logits_sqnr_db(reference, rest), abs=1e-6)
        assert row.alone_agreement == agreement(reference, alone)
        assert row.without_agreement == agreement(reference, rest)
        assert row.bits == own.grid.bits
    assert {row.bits for row in rows} == {4, 5}
    assert min(row.without_agreement for row in rows) < 100  # four bits give visible errors


def test_weights_are_counted(student: Student, images: Tensor) -> None:
    rows = {(row.layer, row.kind): row for row in measure(student, images)}
    stem = rows["stem", "weight"]
    assert (stem.parameters, stem.biases) == (8 * 3 * 3 * 3, 8)
    last = rows["classifier", "weight"]
    assert (last.parameters, last.biases) == (80, 10)
    activations = [row for row in rows.values() if row.kind == "activation"]
    assert {(row.parameters, row.biases, len(row.bits_db)) for row in activations} == {(0, 0, 0)}


@pytest.mark.parametrize("init", ["minmax", "percentile"])
def test_every_width_is_that_of_a_network_quantized_so(
    tiny: nn.Module, images: Tensor, init: Any
) -> None:
    """Thresholds are the initial thresholds of a run at that bit-width."""
    options: dict[str, Any] = {"weight_init": fat.InitSpec(init, 98.0)}
    student = calibrated(tiny, images, QuantSpec(**options))
    rows = {row.layer: row for row in measure(student, images) if row.kind == "weight"}
    for bits in range(2, 9):
        other = calibrated(tiny, images, QuantSpec(weight_bits=bits, **options))
        reference = logits(other, images, [])
        for layer in other.layers():
            alone = logits(other, images, [layer.weight_quantizer])
            expected = logits_sqnr_db(reference, alone)
            assert rows[layer.layer].bits_db[bits] == pytest.approx(expected, abs=1e-4)
    assert all(list(row.bits_db) == list(range(2, 9)) for row in rows.values())


def test_the_widest_damage_comes_first(tiny: nn.Module, images: Tensor) -> None:
    student = calibrated(tiny, images, QuantSpec(layer_bits={"blocks.1.conv_dw": 2}))
    rows = measure(student, images)
    assert (rows[0].layer, rows[0].kind) == ("blocks.1.conv_dw", "weight")
    assert max(rows, key=lambda row: row.without_db) == rows[0]
    assert [row.alone_db for row in rows] == sorted(row.alone_db for row in rows)
    in_the_graph = sorted((r for r in rows if r.kind == "weight"), key=lambda r: r.position)
    assert [row.layer for row in in_the_graph] == [layer.layer for layer in student.layers()]
    assert sorted(row.position for row in rows) == list(range(len(rows)))


def test_batches_add_up_and_repeat(student: Student, images: Tensor) -> None:
    whole = {(r.layer, r.kind): r for r in measure(student, images)}
    parts = measure(student, [(images[:7], torch.zeros(7)), images[7:]])
    assert parts == measure(student, [images[:7], images[7:]])
    for row in parts:
        other = whole[row.layer, row.kind]
        assert row.alone_db == pytest.approx(other.alone_db, abs=1e-3)
        assert row.without_db == pytest.approx(other.without_db, abs=1e-3)
        assert row.alone_agreement == pytest.approx(other.alone_agreement)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_a_trained_student_changes(
    student: Student, images: Tensor, training: bool
) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    student.activation_quantizers()[2].enabled = False
    student.layers()[1].weight_quantizer.enabled = False
    student.train(training)
    before = snapshot(student)
    expected = student(images)
    rows = measure(student, images)
    assert torch.equal(student(images), expected)
    assert same(before, snapshot(student))
    # A quantizer that was disabled is measured like the others.
    assert all(row.alone_db < 200 for row in rows)


def test_nothing_changes_when_it_breaks_off(
    student: Student, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(student)
    for broken, name, after in (
        (WeightQuantizer, "scale", 90),
        (ActivationQuantizer, "forward", 200),
    ):
        calls, method = 0, getattr(broken, name)

        def interrupted(self: Any, *x: Tensor, method: Any = method, after: int = after) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return method(self, *x)

        with monkeypatch.context() as patched:
            patched.setattr(broken, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                measure(student, images)
        assert same(dict(before), snapshot(student))


def test_pointwise_factors_belong_to_the_reference(tiny: nn.Module, images: Tensor) -> None:
    """Disabled quantizers do not round, but trained factors apply."""
    student = calibrated(tiny, images, QuantSpec())
    layer = student.layers()[-1]
    assert layer.factor is not None
    with torch.no_grad():
        layer.factor.fill_(1.25)
    row = next(r for r in measure(student, images) if (r.layer, r.kind) == ("classifier", "weight"))
    # Without the factor in reference and thresholds the error would be a quarter of the signal,
    # 12 dB, or the largest weights would saturate.
    assert row.bits_db[8] > 30
    assert row.bits_db[8] > row.bits_db[4] > row.bits_db[2]


def test_the_progress_bar_ends_full(
    student: Student, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Bar:
        def __init__(self, total: int, disable: bool, **_: Any) -> None:
            self.total, self.disable, self.done = total, disable, 0
            bars.append(self)

        def update(self, count: int = 1) -> None:
            self.done += count

        def close(self) -> None:
            pass

    # The function is available from the package.
    monkeypatch.setattr(sys.modules["fat.evaluation.sensitivity_analysis"], "tqdm", Bar)
    measure(student, [images[:8], images[8:]], progress="Sensitivity")
    measure(student, images)
    activations, layers = len(student.activation_quantizers()), len(student.layers())
    assert bars[0].total == 2 * (2 * activations + 9 * layers)
    assert [bar.done for bar in bars] == [bar.total for bar in bars]
    assert [bar.disable for bar in bars] == [False, True]


def test_what_cannot_be_measured_is_refused(student: Student, tiny: nn.Module) -> None:
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(FatError, match="not calibrated"):
        measure(fat.prepare(tiny, images), images)
    for nothing in ([], images[:0]):
        with pytest.raises(FatError, match="There are no images to measure on"):
            measure(student, nothing)
