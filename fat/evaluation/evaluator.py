"""Judge a student, and its float teacher, on held-out images."""

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
    """An image on which the two networks' largest logits differ.

    Attributes:
        position: Which image it was, counted from 0 over all that were looked at.
        image: What the networks saw, float32 [3, H, W], normalised, on the CPU.
        label: Its class, −1 where unknown.
        reference: Logits of the float network, float32 [classes], on the CPU.
        logits: Logits of the quantized network, the same.
        confidence: Largest probability that the float network gave, 0…1.
    """

    position: int
    image: Tensor
    label: int
    reference: Tensor
    logits: Tensor
    confidence: float


class Disagreements:
    """Counts images on which two networks differ, and keeps those where the float one was surest.

    Memory holds ``keep`` images, however many come.

    Args:
        keep: How many images to keep at most.

    Attributes:
        images: How many images were looked at.
        differing: On how many of them the largest logits differ.
        kept: The most confident of these, the surest first; of equal ones the earlier.
    """

    def __init__(self, keep: int = 8) -> None:
        self.keep = keep
        self.images = 0
        self.differing = 0
        self.kept: list[Disagreement] = []

    @torch.no_grad()
    def update(self, images: Tensor, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Take in one batch.

        Args:
            images: float32 [N, 3, H, W].
            logits: [N, classes] of the quantized network.
            reference: [N, classes] of the float network.
            labels: int64 [N], −1 where unknown.
        """
        rows = (logits.argmax(1) != reference.argmax(1)).nonzero().flatten()
        sure = reference[rows].double().softmax(1).amax(1).nan_to_num(0.0)
        best = sure.sort(descending=True, stable=True).indices[: self.keep]
        for row, confidence in zip(rows[best].tolist(), sure[best].tolist(), strict=True):
            # Copies: a view would keep its whole batch alive.
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
        """Take in what others collected, such as another process; their images come after these."""
        self.kept += [
            replace(entry, position=entry.position + self.images) for entry in others.kept
        ]
        self._rank()
        self.images += others.images
        self.differing += others.differing

    def shared(self) -> Disagreements:
        """What all processes collected, the first one's images first; this one stays as it is."""
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
        images: Batches that nothing was trained or chosen on, labelled or not. Of several processes
            each gives its own, and all get the figures of all.
        progress: Text before a progress bar; ``None`` shows none.
        differing: Takes in the images that the two networks see differently.

    Returns:
        ``images`` (how many), ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement,
        sqnr_db, rmse}, ``accuracy_drop`` (float top-1 − quantized top-1, points) and ``seconds``.
        Accuracies are in percent and ``None`` where no image is labelled.

    Raises:
        FatError: If the student is not calibrated, or a batch is not one of images.
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
    floats, figures = reference.compute(), quantized.compute()
    return {
        "images": int(distributed.all_sum(torch.tensor(count))),
        "float": {"top1": floats["top1"], "top5": floats["top5"]},
        "quantized": dict(figures),
        "accuracy_drop": accuracy_drop(floats["top1"], figures["top1"]),
        "seconds": time.perf_counter() - started,
    }


def accuracy_drop(reference: float | None, quantized: float | None) -> float | None:
    """Points of top-1 lost against the float network, ``None`` where there are no labels."""
    if reference is None or quantized is None:
        return None
    return reference - quantized
