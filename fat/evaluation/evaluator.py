"""Evaluation of a student and its float teacher on held-out images."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fat.evaluation.metrics import BEFORE_UPDATE, Comparison
from fat.models.self_test import self_test
from fat.models.student import Student
from fat.utils import distributed
from fat.utils.batches import Images, as_batches, to_device

__all__ = ["Disagreement", "Disagreements", "accuracy_drop", "evaluate"]


@dataclass(frozen=True)
class Disagreement:
    """An image for which the two networks predict different classes.

    Attributes:
        position: Index of the image among all evaluated images.
        image: Normalized input, float32 [3, H, W], on the CPU.
        label: Class of the image, −1 if unknown.
        reference: Logits of the float network, float32 [classes], on the CPU.
        logits: Logits of the quantized network, float32 [classes], on the CPU.
        confidence: Largest probability that the float network assigns, 0…1.
    """

    position: int
    image: Tensor
    label: int
    reference: Tensor
    logits: Tensor
    confidence: float


class Disagreements:
    """Collects the images for which two networks predict different classes.

    Only those with the most confident float predictions are kept. :meth:`update` does not wait for
    the logits' device: candidates stay there until one of the attributes is read.

    Args:
        keep: Maximum number of images to keep.

    Attributes:
        images: Number of images evaluated.
    """

    def __init__(self, keep: int = 8) -> None:
        self.keep = keep
        self.images = 0
        self._differing = 0
        self._kept: list[Disagreement] = []
        self._candidates: _Candidates | None = None

    @property
    def differing(self) -> int:
        """Number of images with different predictions."""
        self._read()
        return self._differing

    @property
    def kept(self) -> list[Disagreement]:
        """The kept images in order of decreasing confidence; ties keep their order."""
        self._read()
        return self._kept

    @torch.no_grad()
    def update(self, images: Tensor, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            images: float32 [N, 3, H, W].
            logits: [N, classes] of the quantized network.
            reference: [N, classes] of the float network.
            labels: int64 [N], −1 if unknown.
        """
        differs = logits.argmax(1) != reference.argmax(1)
        confidence = reference.double().softmax(1).amax(1).nan_to_num(0.0)
        position = torch.arange(self.images, self.images + len(images), device=logits.device)
        new = _Candidates(
            differs.sum(),
            confidence.masked_fill(~differs, SAME),
            (position, images, labels, reference, logits),
        ).best(self.keep)
        if self._candidates is not None and not self._candidates.joins(new):
            self._read()
        held = self._candidates
        self._candidates = new if held is None else held.joined(new).best(self.keep)
        self.images += len(images)

    def add(self, others: Disagreements) -> None:
        """Add the images that others collected; their positions follow those of this one."""
        self._read()
        self._kept += [
            replace(entry, position=entry.position + self.images) for entry in others.kept
        ]
        self._rank()
        self.images += others.images
        self._differing += others.differing

    def gather(self) -> Disagreements:
        """Return the images that all processes collected, in the order of their ranks."""
        self._read()
        joined = Disagreements(self.keep)
        for collected in distributed.gather_objects(self):
            joined.add(collected)
        return joined

    def _read(self) -> None:
        """Move the candidates from their device to the list."""
        candidates, self._candidates = self._candidates, None
        if candidates is None:
            return
        self._differing += int(candidates.differing)
        position, images, labels, reference, logits = candidates.rows
        known = zip(candidates.confidence.tolist(), position.tolist(), labels.tolist(), strict=True)
        for row, (confidence, place, label) in enumerate(known):
            if confidence == SAME:
                continue
            # Copies, because a view would keep all candidates in memory.
            image, float_row, row_logits = (
                tensor[row].to("cpu", torch.float32, copy=True)
                for tensor in (images, reference, logits)
            )
            self._kept.append(Disagreement(place, image, label, float_row, row_logits, confidence))
        self._rank()

    def _rank(self) -> None:
        self._kept.sort(key=lambda entry: (-entry.confidence, entry.position))
        del self._kept[self.keep :]


SAME = -1.0
"""Confidence that marks an image with equal predictions."""


@dataclass(frozen=True)
class _Candidates:
    """Images of which the most confident may be kept, as tensors on the device.

    Attributes:
        differing: Number of images with different predictions, int64 0-dim.
        confidence: float64 [K]; :data:`SAME` for equal predictions.
        rows: Position, image, label, reference and logits, each [K, ...].
    """

    differing: Tensor
    confidence: Tensor
    rows: tuple[Tensor, ...]

    def joins(self, other: _Candidates) -> bool:
        """Return True if the tensors of both can be concatenated."""
        pairs = zip(self.rows, other.rows, strict=True)
        return all(a.shape[1:] == b.shape[1:] and a.device == b.device for a, b in pairs)

    def joined(self, other: _Candidates) -> _Candidates:
        """Return the candidates of both, these first."""
        return _Candidates(
            self.differing + other.differing,
            torch.cat([self.confidence, other.confidence]),
            tuple(torch.cat(pair) for pair in zip(self.rows, other.rows, strict=True)),
        )

    def best(self, count: int) -> _Candidates:
        """Return those with the largest confidence; ties keep their order."""
        confidence, order = self.confidence.sort(descending=True, stable=True)
        order = order[:count]
        return _Candidates(
            self.differing, confidence[:count], tuple(tensor[order] for tensor in self.rows)
        )


@torch.no_grad()
def evaluate(
    student: Student,
    images: Images,
    *,
    progress: str | None = None,
    differing: Disagreements | None = None,
) -> dict[str, Any]:
    """Compare the student with its float network.

    Args:
        student: Calibrated student.
        images: Held-out batches, labeled or not, on any device; they are moved to the student's.
            With several processes, each passes its own and all get the metrics over all images.
        progress: Label of a progress bar; ``None`` shows none.
        differing: Collects the images for which the two networks predict different classes.

    Returns:
        ``images`` (their number), ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement,
        sqnr_db, rmse}, ``accuracy_drop`` (float top-1 − quantized top-1, points) and ``seconds``.
        Accuracies are in percent, or ``None`` if no image is labeled.

    Raises:
        FatError: If the student is not calibrated, its device fails the self-test, or a batch does
            not hold images.
    """
    student.check_calibrated()
    self_test(student)
    device = student.device
    quantized, reference = Comparison().to(device), Comparison().to(device)
    started, count = time.perf_counter(), 0
    batches = as_batches(images)
    was_training = student.training
    student.eval()
    try:
        with student.cached_integers():
            for batch in tqdm(batches, desc=progress, disable=progress is None, leave=False):
                pixels, labels = to_device(batch, device)
                teacher = student.float_logits(pixels)
                logits = student(pixels)
                quantized.update(logits, teacher, labels)
                reference.update(teacher, teacher, labels)
                if differing is not None:
                    differing.update(pixels, logits, teacher, labels)
                count += len(pixels)
    finally:
        student.train(was_training)
    with warnings.catch_warnings():
        # A process may have no batch: there are fewer of them than processes.
        warnings.filterwarnings("ignore", BEFORE_UPDATE)
        float_metrics, metrics = reference.compute(), quantized.compute()
    return {
        "images": int(distributed.all_sum(torch.tensor(count))),
        "float": {"top1": float_metrics["top1"], "top5": float_metrics["top5"]},
        "quantized": dict(metrics),
        "accuracy_drop": accuracy_drop(float_metrics["top1"], metrics["top1"]),
        "seconds": time.perf_counter() - started,
    }


def accuracy_drop(reference: float | None, quantized: float | None) -> float | None:
    """Return float top-1 − quantized top-1 in points, or ``None`` without labels."""
    if reference is None or quantized is None:
        return None
    return reference - quantized
