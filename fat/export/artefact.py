"""Judge a file, whoever made it, with the measures that students are judged with."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fat.batches import Images, as_batches, split
from fat.errors import FatError
from fat.evaluate import accuracy_drop
from fat.export.target import Runtime
from fat.metrics import Comparison

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
        ``accuracy_drop`` and ``seconds``, as :func:`fat.evaluate` has them.

    Raises:
        FatError: If the file takes images of another size, or has another number of logits than the
            float network.
    """
    file, floats = Comparison(), Comparison()
    started, count = time.perf_counter(), 0
    for batch in tqdm(as_batches(images), progress, disable=progress is None, leave=False):
        pixels, labels = split(batch)
        _check_size(runtime, pixels)
        logits = runtime.run(pixels)[0]
        wanted = logits if reference is None else reference(pixels)
        if logits.dim() != 2 or logits.shape != wanted.shape:
            raise FatError(
                f"The file gives results of shape {list(logits.shape)}, the float network "
                f"{list(wanted.shape)} for the same images: they are not of one network, or not of "
                "one number of classes."
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


def _check_size(runtime: Runtime, pixels: Tensor) -> None:
    wanted, given = runtime.input_shape[1:], tuple(pixels.shape[1:])
    if any(w not in (None, g) for w, g in zip(wanted, given, strict=True)):
        raise FatError(
            f"The file takes images {list(wanted)}, these are {list(given)}: type "
            f"data.image_size={wanted[-1]}, or give the network or the run that the file is of."
        )
