"""Comparison of a file with its student, and the tolerances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fat import FatError, Student
from fat.export.base import Kernels, Tolerance
from fat.export.lowering import LoweringStyle, StoredGrid, lower
from fat.export.verify import (
    LayerDifference,
    check_kernels,
    check_layers,
    check_logits,
    compare,
    compare_layers,
    falls_short,
    latency,
    most_different,
)
from tests.export.students import structured, tiny_student

TOLERANCE = Tolerance(off_by_one=0.001, sqnr_db=40.0, agreement=99.5)


@pytest.fixture(scope="module")
def tiny() -> Student:
    return tiny_student()


class Simulated:
    """A runtime that computes the same as a student, with optional changes."""

    name = "simulation 1.0"
    input_shape = (None, 3, 16, 16)

    def __init__(self, student: Student) -> None:
        self.student, self.calls = student, 0
        self.metadata: dict[str, str] = {}
        self.off: dict[str, int] = {}

    def run(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        lowered = lower(self.student, images, LoweringStyle(torch.uint8))
        with torch.no_grad():
            _, *integers = lowered.network(images)
            logits = self.student(images)
        moved = []
        for grid, stored in zip(lowered.tensors, integers, strict=True):
            changed = stored.clone()
            if grid.layer in self.off:
                edge = changed.view(-1)[0]
                edge += self.off[grid.layer] if edge < 128 else -self.off[grid.layer]
            moved.append(changed)
        return [logits, *moved]

    def kernels(self) -> Kernels:
        return Kernels({}, len(self.student.layers()), (), 0)

    def tensors(self, images: Tensor) -> tuple[StoredGrid, ...]:
        return lower(self.student, images, LoweringStyle(torch.uint8)).tensors


def test_equal_logits_have_the_largest_sqnr(tiny: Student) -> None:
    labels = torch.arange(8)
    found = compare(tiny, Simulated(tiny), [(structured(8, 16, 3), labels)] * 2)
    assert found["simulation"] == {"agreement": 100.0, "sqnr_db": 200.0, "largest_step": 0.0}
    assert found["images"] == 16
    with torch.no_grad():
        right = (tiny(structured(8, 16, 3)).argmax(1) == labels).float().mean()
    assert found["quantized"]["top1"] == pytest.approx(100 * float(right))


def test_logits_of_another_shape_are_rejected(tiny: Student) -> None:
    runtime = Simulated(tiny)
    runtime.run = lambda images: [torch.zeros(len(images), 7)]  # type: ignore[method-assign]
    with pytest.raises(FatError, match=r"\[4, 7\] for 4 images, its student \[4, 10\]"):
        compare(tiny, runtime, structured(4, 16))


def test_a_difference_is_attributed_to_its_operation(tiny: Student) -> None:
    images, runtime = structured(4, 16, 3), Simulated(tiny)
    quantizers = [quantizer.layer for quantizer in tiny.activation_quantizers()]
    runtime.off = {quantizers[4]: 9}
    found = compare_layers(tiny, runtime, runtime.tensors(images), images)
    assert [entry.layer for entry in found][:4] == [
        "input",
        "stem",
        "blocks.0.conv_pw",
        "blocks.0.conv_dw",
    ]
    assert len(found) == len(quantizers)
    # Later operations are computed from the student's integers, which the runtime did not use.
    assert [entry.steps >= 8 for entry in found][:5] == [False] * 4 + [True]


def test_ties_may_be_rounded_either_way(tiny: Student) -> None:
    runtime = Simulated(tiny)
    quantizer = tiny.activation_quantizers()[0]
    scale = float(quantizer.thresholds()[0].detach())
    whole = (structured(4, 16, 3) / scale).round().clamp(-20, 20)
    for where, ties, right in ((0.5, 0.001, True), (0.5, 0.0, False), (0.49, 0.001, False)):
        images = (whole + where) * scale
        results = runtime.run(images)
        tensors = runtime.tensors(images)
        ours = results[1].to(torch.float32) - tensors[0].zero_point
        other = 2 * whole + 1 - ours + tensors[0].zero_point
        told = [results[0], other.to(torch.uint8), *results[2:]]
        runtime.run = lambda _, told=told: told  # type: ignore[method-assign, misc]
        found = compare_layers(tiny, runtime, tensors, images, ties=ties)
        assert found[0].fraction == 0.0 if right else found[0].fraction > 0.8
        assert found[0].tied > 0.8 if right else found[0].tied == 0.0
        del runtime.run


def test_integers_of_another_shape_are_rejected(tiny: Student) -> None:
    images, runtime = structured(4, 16, 3), Simulated(tiny)
    results = runtime.run(images)
    runtime.run = lambda _: [*results[:3], results[3][:, :1], *results[4:]]  # type: ignore[method-assign]
    with pytest.raises(FatError, match=r"integers of '.*' have shape"):
        compare_layers(tiny, runtime, runtime.tensors(images), images)


def test_single_steps_are_tolerated_up_to_a_fraction() -> None:
    few, many = LayerDifference("conv", 0.0009, 1), LayerDifference("conv", 0.0011, 1)
    check_layers([few, few], TOLERANCE)
    with pytest.raises(FatError, match=r"1 operation\(s\): 'conv': 0\.11 % .* by up to 1 "):
        check_layers([few, many], TOLERANCE)


def test_two_steps_are_never_tolerated() -> None:
    with pytest.raises(FatError, match=r"'fc': 0\.001 % of the integers by up to 2.* Do that\."):
        check_layers([LayerDifference("fc", 1e-5, 2)], TOLERANCE, "Do that.")


def test_logits_are_compared_with_the_tolerance() -> None:
    assert falls_short({"sqnr_db": 40.0, "agreement": 99.5}, TOLERANCE) == ""
    assert falls_short({"sqnr_db": 3.0, "agreement": 1.0}, Tolerance(off_by_one=0.0)) == ""
    assert falls_short({"sqnr_db": 200.0, "agreement": 99.0}, TOLERANCE).startswith("99.0 % agree")
    short = falls_short({"sqnr_db": 39.9, "agreement": 100.0}, TOLERANCE)
    with pytest.raises(
        FatError, match=r"have an SQNR of 39\.9 dB against the student's \(required: at least 40\)"
    ):
        check_logits(short)
    check_logits("")


def test_the_batch_with_the_largest_difference_is_returned(tiny: Student) -> None:
    class Off(Simulated):
        def run(self, images: Tensor) -> list[Tensor]:
            return [self.student(images) + images.amax((1, 2, 3))[:, None]]

    batches = [torch.full((2, 3, 16, 16), value) for value in (0.1, 0.3, 0.2)]
    assert torch.equal(most_different(tiny, Off(tiny), batches), batches[1])


def test_every_layer_must_have_an_integer_kernel(tiny: Student) -> None:
    check_kernels(Kernels({}, 8, (), 11), tiny)
    with pytest.raises(FatError, match="7 of 8 layers in integers; in float: none is named"):
        check_kernels(Kernels({}, 7, (), 11), tiny)
    with pytest.raises(FatError, match="in float: stem"):
        check_kernels(Kernels({}, 8, ("stem",), 11), tiny)


def test_latencies_are_taken_in_turns(tiny: Student) -> None:
    first, second = Simulated(tiny), Simulated(tiny)
    order: list[str] = []
    first.run = lambda images: order.append("a") or [images]  # type: ignore[method-assign,func-returns-value]
    second.run = lambda images: order.append("b") or [images]  # type: ignore[method-assign,func-returns-value]
    medians = latency(first, second, structured(1, 16))
    assert order.count("a") == order.count("b") == 33
    assert all(median > 0.0 for median in medians)
    assert "aaa" not in "".join(order)
    assert order[6:10] == ["b", "a", "a", "b"]
