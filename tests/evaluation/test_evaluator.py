"""Metrics against brute force over all images at once."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student
from fat.evaluation.evaluator import Disagreements, accuracy_drop
from tests.gpu.pretended import PretendedGpu


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(
        tiny, images, QuantSpec(weight_bits=2)
    )  # a finer grid avoids ties of logits
    fat.calibrate(student, images)
    return student


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(10, (16,), generator=torch.Generator().manual_seed(5))


def by_hand(student: Student, images: Tensor, labels: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        z, q = student.float_logits(images).double(), student(images).double()
    known = labels >= 0

    def top(logits: Tensor, k: int) -> float | None:
        if not bool(known.any()):
            return None
        hits = (logits.topk(k).indices == labels[:, None]).any(1)[known]
        return 100 * float(hits.double().mean())

    noise = float((z - q).square().sum())
    return {
        "images": len(images),
        "float": {"top1": top(z, 1), "top5": top(z, 5)},
        "quantized": {
            "top1": top(q, 1),
            "top5": top(q, 5),
            "agreement": 100 * float((z.argmax(1) == q.argmax(1)).double().mean()),
            "sqnr_db": 10 * math.log10(float(z.square().sum()) / noise),
            "rmse": math.sqrt(noise / z.numel()),
        },
    }


def close(got: dict[str, float | None], expected: dict[str, float | None]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] is None if value is None else got[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_figures_equal_brute_force(
    student: Student, images: Tensor, labels: Tensor, known: str
) -> None:
    if known == "some":
        labels[::3] = -1
    if known == "none":
        labels[:] = -1
    expected = by_hand(student, images, labels)
    batches = [(images[a:b], labels[a:b]) for a, b in ((0, 7), (7, 14), (14, 16))]
    result = fat.evaluate(student, (batch for batch in batches))
    assert result["images"] == 16
    close(result["float"], expected["float"])
    close(result["quantized"], expected["quantized"])
    assert 0 < result["quantized"]["agreement"] < 100  # two bits give visible errors
    if known == "none":
        assert result["accuracy_drop"] is None
    else:
        drop = expected["float"]["top1"] - expected["quantized"]["top1"]
        assert result["accuracy_drop"] == pytest.approx(drop)
    assert result["seconds"] >= 0


def test_images_without_labels(student: Student, images: Tensor) -> None:
    result = fat.evaluate(student, images)
    assert result["images"] == 16
    assert result["float"] == {"top1": None, "top5": None}
    assert result["accuracy_drop"] is None
    expected = by_hand(student, images, torch.full((16,), -1))
    close(result["quantized"], expected["quantized"])


def test_the_teacher_agrees_with_itself_when_nothing_is_quantized(
    tiny: nn.Module, images: Tensor
) -> None:
    student = fat.prepare(tiny, images)
    fat.calibrate(student, images)
    for _, _, quantizer in student.quantizers():
        quantizer.enabled = False
    figures = fat.evaluate(student, images)["quantized"]
    assert figures["agreement"] == 100
    assert figures["sqnr_db"] > 100


@pytest.mark.filterwarnings("ignore:.*was called before")
def test_no_images_give_no_figures(student: Student) -> None:
    result = fat.evaluate(student, [])
    assert result["images"] == 0
    assert set(result["quantized"].values()) == {None}


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_changes(student: Student, images: Tensor, mode: bool) -> None:
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student.train(mode)
    fat.evaluate(student, images)
    assert student.training is mode
    with pytest.raises(FatError, match=r"\[3, 16, 16\]"):
        fat.evaluate(student, [images, images[0]])
    assert student.training is mode
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_an_uncalibrated_student_is_refused(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(FatError, match="not calibrated"):
        fat.evaluate(fat.prepare(tiny, images), images)


def test_accuracy_drop() -> None:
    assert accuracy_drop(75.0, 74.5) == 0.5
    assert accuracy_drop(None, 3.0) is None
    assert accuracy_drop(3.0, None) is None


def test_images_of_several_sizes_are_ranked_together() -> None:
    """The most confident are kept, whatever the sizes; ties keep their order."""
    collected = Disagreements(keep=3)
    for size, confidence in ((4, [2.0, 5.0]), (6, [3.0, 5.0]), (4, [1.0, 4.0])):
        reference = torch.tensor([[value, 0.0] for value in confidence])
        logits = torch.tensor([[0.0, 1.0]]).repeat(2, 1)
        pixels = torch.full((2, 3, size, size), float(size))
        collected.update(pixels, logits, reference, torch.tensor([7, 8]))
    assert (collected.images, collected.differing) == (6, 6)
    assert [(entry.position, entry.label) for entry in collected.kept] == [(1, 8), (3, 8), (5, 8)]
    assert [entry.image.shape[1] for entry in collected.kept] == [4, 6, 4]


def test_a_gpu_is_read_once_for_all_batches(
    student: Student, images: Tensor, labels: Tensor
) -> None:
    """The results are those of the CPU."""

    def evaluated(batches: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], list[Any]]:
        differing = Disagreements(keep=4)
        result = fat.evaluate(student, batches, differing=differing)
        del result["seconds"]
        kept = [(x.position, x.label, x.confidence, x.logits.tolist()) for x in differing.kept]
        return result, [differing.images, differing.differing, *kept]

    batches = list(zip(images.split(4), labels.split(4), strict=True))
    wanted = evaluated(batches)
    assert len(wanted[1]) == 6
    with PretendedGpu() as gpu:
        student.to("cuda")
        evaluated(batches[:1])  # with the self-test
        reads = []
        for count in (2, 4):
            with gpu.counting() as counts:
                found = evaluated(batches[:count])
            reads.append(counts.reads.total())
        assert found == wanted
        assert reads[0] == reads[1]


def test_a_process_without_batches_gets_no_warning(student: Student) -> None:
    class Nothing:
        def __iter__(self) -> Any:
            return iter(())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = fat.evaluate(student, Nothing())
    assert metrics["images"] == 0
    assert metrics["quantized"]["agreement"] is None
