"""Evaluate a model file of any tool with the metrics of students."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fat.evaluation.evaluator import accuracy_drop
from fat.evaluation.metrics import Comparison
from fat.export.base import Runtime
from fat.utils.batches import Images, as_batches, split
from fat.utils.errors import FatError, first_line

__all__ = ["evaluate_file"]


@torch.no_grad()
def evaluate_file(
    runtime: Runtime,
    images: Images,
    reference: nn.Module | None = None,
    *,
    progress: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model file and compare it with a float network.

    Args:
        runtime: The opened file.
        images: Batches, with or without labels.
        reference: Float network in eval mode; if ``None``, metrics against it are ``None``.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        ``images``, ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement, sqnr_db, rmse},
        ``accuracy_drop`` and ``seconds``, as :func:`fat.evaluate` returns them.

    Raises:
        FatError: If the file takes images of another size, returns something other than logits
            [N, classes], or has another number of classes than the float network or the labels.
    """
    file, floats = Comparison(), Comparison()
    started, count = time.perf_counter(), 0
    for batch in tqdm(as_batches(images), progress, disable=progress is None, leave=False):
        pixels, labels = split(batch)
        _check_size(runtime, pixels)
        logits = _logits(runtime, pixels)
        expected = logits if reference is None else reference(pixels)
        if logits.shape != expected.shape:
            raise FatError(
                f"The file returns logits {list(logits.shape)}, the float network "
                f"{list(expected.shape)} for the same images: they are different networks or have "
                "different classes."
            )
        if labels is not None and int(labels.max()) >= logits.shape[1]:
            raise FatError(
                f"The images have the class {int(labels.max())}, but the file returns "
                f"{logits.shape[1]} logits: it is for a network with other classes."
            )
        file.update(logits, expected, labels)
        floats.update(expected, expected, labels)
        count += len(pixels)
    metrics, float_metrics = dict(file.compute()), dict(floats.compute())
    if reference is None:
        metrics |= dict.fromkeys(("agreement", "sqnr_db", "rmse"))
        float_metrics = dict.fromkeys(float_metrics)
    return {
        "images": count,
        "float": {key: float_metrics[key] for key in ("top1", "top5")},
        "quantized": metrics,
        "accuracy_drop": accuracy_drop(float_metrics["top1"], metrics["top1"]),
        "seconds": time.perf_counter() - started,
    }


def _logits(runtime: Runtime, pixels: Tensor) -> Tensor:
    """Run the file and return its first output, which must be float [N, classes]."""
    try:
        results = runtime.run(pixels)
    except FatError:
        raise
    except Exception as error:  # the exceptions of runtimes have no common base class
        raise FatError(
            f"{runtime.name} cannot run the file on these images: {first_line(error)} The file is "
            "damaged or not an image classifier."
        ) from error
    found = "nothing" if not results else f"{results[0].dtype} {list(results[0].shape)}"
    fits = bool(results) and results[0].dim() == 2 and len(results[0]) == len(pixels)
    if not fits or not results[0].is_floating_point() or not results[0].shape[1]:
        raise FatError(
            f"The file returns {found} for {len(pixels)} images; a classifier returns float logits "
            "[N, classes]."
        )
    return results[0]


def _check_size(runtime: Runtime, pixels: Tensor) -> None:
    expected, given = runtime.input_shape[1:], tuple(pixels.shape[1:])
    if any(e not in (None, g) for e, g in zip(expected, given, strict=True)):
        raise FatError(
            f"The file takes images {list(expected)}, these are {list(given)}: type "
            f"data.image_size={expected[-1]}, or name the network or the run of the file."
        )
