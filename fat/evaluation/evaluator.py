"""Evaluation of a student and its float teacher on held-out images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fat.evaluation.metrics import Comparison
from fat.models.student import Student
from fat.utils import distributed
from fat.utils.batches import Images, as_batches, split

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

    Only those with the most confident float predictions are kept.

    Args:
        keep: Maximum number of images to keep.

    Attributes:
        images: Number of images evaluated.
        differing: Number of images with different predictions.
        kept: The kept images in order of decreasing confidence; ties keep their order.
    """

    def __init__(self, keep: int = 8) -> None:
        self.keep = keep
        self.images = 0
        self.differing = 0
        self.kept: list[Disagreement] = []

    @torch.no_grad()
    def update(self, images: Tensor, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            images: float32 [N, 3, H, W].
            logits: [N, classes] of the quantized network.
            reference: [N, classes] of the float network.
            labels: int64 [N], −1 if unknown.
        """
        rows = (logits.argmax(1) != reference.argmax(1)).nonzero().flatten()
        sure = reference[rows].double().softmax(1).amax(1).nan_to_num(0.0)
        best = sure.sort(descending=True, stable=True).indices[: self.keep]
        for row, confidence in zip(rows[best].tolist(), sure[best].tolist(), strict=True):
            # Copies, because a view would keep its whole batch in memory.
            image, float_row, row_logits = (
                tensor[row].detach().to("cpu", torch.float32, copy=True)
                for tensor in (images, reference, logits)
            )
            self.kept.append(
                Disagreement(
                    self.images + row, image, int(labels[row]), float_row, row_logits, confidence
                )
            )
        self._rank()
        self.images += len(images)
        self.differing += len(rows)

    def add(self, others: Disagreements) -> None:
        """Add the images that others collected; their positions follow those of this one."""
        self.kept += [
            replace(entry, position=entry.position + self.images) for entry in others.kept
        ]
        self._rank()
        self.images += others.images
        self.differing += others.differing

    def gather(self) -> Disagreements:
        """Return the images that all processes collected, in the order of their ranks."""
        joined = Disagreements(self.keep)
        for collected in distributed.gather_objects(self):
            joined.add(collected)
        return joined

    def _rank(self) -> None:
        self.kept.sort(key=lambda entry: (-entry.confidence, entry.position))
        del self.kept[self.keep :]


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
        images: Held-out batches, labeled or not. With several processes, each passes its own and
            all get the metrics over all images.
        progress: Label of a progress bar; ``None`` shows none.
        differing: Collects the images for which the two networks predict different classes.

    Returns:
        ``images`` (their number), ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement,
        sqnr_db, rmse}, ``accuracy_drop`` (float top-1 − quantized top-1, points) and ``seconds``.
        Accuracies are in percent, or ``None`` if no image is labeled.

    Raises:
        FatError: If the student is not calibrated, or a batch does not hold images.
    """
    device = student.device
    quantized, reference = Comparison().to(device), Comparison().to(device)
    started, count = time.perf_counter(), 0
    batches = as_batches(images)
    was_training = student.training
    student.eval()
    try:
        for batch in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            pixels, labels = split(batch)
            teacher = student.float_logits(pixels)
            logits = student(pixels)
            quantized.update(logits, teacher, labels)
            reference.update(teacher, teacher, labels)
            if differing is not None:
                differing.update(pixels, logits, teacher, labels)
            count += len(pixels)
    finally:
        student.train(was_training)
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
