"""Judge a student, and its float teacher, on held-out images."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm.auto import tqdm

from fat import distributed
from fat.batches import Images, as_batches, split
from fat.metrics import Comparison
from fat.student import Student

__all__ = ["accuracy_drop", "evaluate"]


@torch.no_grad()
def evaluate(student: Student, images: Images, *, progress: str | None = None) -> dict[str, Any]:
    """Compare the student with its float network.

    Args:
        student: Calibrated student.
        images: Batches that nothing was trained or chosen on, labelled or not. Of several processes
            each gives its own, and all get the figures of all.
        progress: Text before a progress bar; ``None`` shows none.

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
            quantized.update(student(pixels), teacher, labels)
            reference.update(teacher, teacher, labels)
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
