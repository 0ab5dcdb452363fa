"""Judge a file, whoever made it, with the measures that students are judged with."""

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

__all__ = ["judge"]


@torch.no_grad()
def judge(
    runtime: Runtime,
    images: Images,
    reference: nn.Module | None = None,
    *,
    progress: str | None = None,
) -> dict[str, Any]:
    """Run a file on images and compare it with a float network.

    Args:
        runtime: The opened file.
        images: Batches, labelled or not.
        reference: The float network, in eval mode; ``None`` leaves what compares with it ``None``.
        progress: Text before a progress bar; ``None`` shows none.

    Returns:
        ``images``, ``float`` {top1, top5}, ``quantized`` {top1, top5, agreement, sqnr_db, rmse},
        ``accuracy_drop`` and ``seconds``, as :func:`fat.evaluation.evaluator` has them.

    Raises:
        FatError: If the file takes images of another size, or has another number of logits than the
            float network.
    """
    file, floats = Comparison(), Comparison()
    started, count = time.perf_counter(), 0
    for batch in tqdm(as_batches(images), progress, disable=progress is None, leave=False):
        pixels, labels = split(batch)
        _check_size(runtime, pixels)
        logits = _logits(runtime, pixels)
        wanted = logits if reference is None else reference(pixels)
        if logits.shape != wanted.shape:
            raise FatError(
                f"The file gives results of shape {list(logits.shape)}, the float network "
                f"{list(wanted.shape)} for the same images: they are not of one network, or not of "
                "one number of classes."
            )
        if labels is not None and int(labels.max()) >= logits.shape[1]:
            raise FatError(
                f"The images have the class {int(labels.max())}, and the file gives "
                f"{logits.shape[1]} logits: it is not of a network for these classes."
            )
        file.update(logits, wanted, labels)
        floats.update(wanted, wanted, labels)
        count += len(pixels)
    figures, float_figures = dict(file.compute()), dict(floats.compute())
    if reference is None:
        figures |= dict.fromkeys(("agreement", "sqnr_db", "rmse"))
        float_figures = dict.fromkeys(float_figures)
    return {
        "images": count,
        "float": {key: float_figures[key] for key in ("top1", "top5")},
        "quantized": figures,
        "accuracy_drop": accuracy_drop(float_figures["top1"], figures["top1"]),
        "seconds": time.perf_counter() - started,
    }


def _logits(runtime: Runtime, pixels: Tensor) -> Tensor:
    """The file's first result, which must be numbers [N, classes]."""
    try:
        results = runtime.run(pixels)
    except FatError:
        raise
    except Exception as error:  # runtimes have exceptions of their own, without a common class
        raise FatError(
            f"The file cannot be run on these images, {runtime.name} says: {first_line(error)} "
            "It is damaged, or of another kind of network."
        ) from error
    found = "nothing" if not results else f"{results[0].dtype} {list(results[0].shape)}"
    fits = bool(results) and results[0].dim() == 2 and len(results[0]) == len(pixels)
    if not fits or not results[0].is_floating_point() or not results[0].shape[1]:
        raise FatError(
            f"The file gives {found} for {len(pixels)} images; a classifier gives float logits "
            "[N, classes]."
        )
    return results[0]


def _check_size(runtime: Runtime, pixels: Tensor) -> None:
    wanted, given = runtime.input_shape[1:], tuple(pixels.shape[1:])
    if any(w not in (None, g) for w, g in zip(wanted, given, strict=True)):
        raise FatError(
            f"The file takes images {list(wanted)}, these are {list(given)}: type "
            f"data.image_size={wanted[-1]}, or give the network or the run that the file is of."
        )
