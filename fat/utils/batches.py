"""Batches as users give them: images, or images with labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fat.utils import distributed
from fat.utils.errors import FatError

__all__ = [
    "AnyBatch",
    "Images",
    "as_batches",
    "counted",
    "first_images",
    "passes",
    "split",
    "to_device",
]

AnyBatch = Tensor | tuple[Tensor, ...] | list[Tensor]
Images = Tensor | Iterable[AnyBatch]
"""One batch [N, 3, H, W], or any iterable of batches, each with or without labels."""


def split(batch: AnyBatch) -> tuple[Tensor, Tensor]:
    """Split a batch into images and labels; labels are −1 if the batch has none.

    Returns:
        images [N, 3, H, W] and labels int64 [N].

    Raises:
        FatError: If the batch is neither a tensor nor (images, labels).

    Examples:
        >>> split(torch.zeros(2, 3, 8, 8))[1].tolist()
        [-1, -1]
    """
    parts = batch if isinstance(batch, tuple | list) and batch else (batch,)
    images = parts[0]
    if not isinstance(images, Tensor) or images.dim() != 4:
        came = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise FatError(
            f"A batch of images is {came}; it must be a tensor [N, 3, H, W] or (images, labels)."
        )
    labels = parts[1] if len(parts) > 1 else None
    if labels is None:
        labels = torch.full((len(images),), -1, device=images.device)
    if not isinstance(labels, Tensor):
        raise FatError(
            f"The labels of a batch are {type(labels).__name__}; they must be an int64 tensor [N], "
            "or left out."
        )
    return images, labels.to(images.device, non_blocking=True)


def to_device(batch: AnyBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Split a batch into images and labels on a device, see :func:`split`.

    Copies from pinned memory do not wait for the device. Copies to the CPU do: otherwise PyTorch
    returns tensors whose values have not arrived.
    """
    images, labels = split(batch)
    free = device.type != "cpu"
    return images.to(device, non_blocking=free), labels.to(device, non_blocking=free)


def as_batches(images: Images) -> Iterable[AnyBatch]:
    """Return an iterable of batches, also for a single batch."""
    return [images] if isinstance(images, Tensor) else images


def counted(
    what: str, images: Images, *, elsewhere: bool = False
) -> tuple[Iterable[AnyBatch], int]:
    """Return the batches and their number; an iterable without a length is counted by one pass.

    Args:
        what: The purpose of the images, for messages.
        images: Batches that can be iterated more than once.
        elsewhere: Accept that this process has no batches if another process has some.

    Raises:
        FatError: If the images come from an iterator, or there are none.

    Examples:
        >>> counted("training", [torch.zeros(4, 3, 8, 8)] * 3)[1]
        3
    """
    batches = as_batches(images)
    if isinstance(batches, Iterator):
        raise FatError(
            f"The {what} images come from an iterator, which is empty after one pass; give a list "
            "of batches, a DataLoader, or an object whose __iter__ starts again."
        )
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in batches)
    most = int(distributed.all_max(torch.tensor(count))) if elsewhere else count
    if not most:
        raise FatError(f"There are no {what} images; give at least one batch [N, 3, H, W].")
    return batches, count


def first_images(images: Images, count: int) -> Iterator[Tensor]:
    """Yield the first ``count`` images without labels, in batches; no further batch is drawn.

    Examples:
        >>> [len(part) for part in first_images([torch.zeros(4, 3, 8, 8)] * 3, 6)]
        [4, 2]
    """
    for batch in as_batches(images):
        pixels = split(batch)[0][:count]
        yield pixels
        count -= len(pixels)
        if count <= 0:
            return


class AtMost:
    """The first ``count`` images with their labels, as a re-iterable of batches.

    Args:
        images: Batches.
        count: Maximum number of images; no further batch is drawn.

    Examples:
        >>> [len(pixels) for pixels, _ in AtMost([torch.zeros(4, 3, 8, 8)] * 3, 6)]
        [4, 2]
    """

    def __init__(self, images: Images, count: int) -> None:
        self.images, self.count = images, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images and labels."""
        left = self.count
        for batch in as_batches(self.images):
            pixels, labels = split(batch)
            yield pixels[:left], labels[:left]
            left -= len(pixels)
            if left <= 0:
                return


def passes(images: Images) -> Iterator[AnyBatch]:
    """Yield batches epoch after epoch if epochs differ, otherwise those of one epoch.

    Epochs of a loader differ if its sampler has ``set_epoch``, which is called with 0, 1, …; they
    end with an epoch that has no batch. Other iterables would only repeat their images.

    Examples:
        >>> len(list(passes([torch.zeros(4, 3, 8, 8)] * 3)))
        3
    """
    inner = getattr(getattr(images, "batch_sampler", None), "sampler", None)
    set_epoch = getattr(getattr(images, "sampler", None), "set_epoch", None)
    set_epoch = set_epoch or getattr(inner, "set_epoch", None)
    if set_epoch is None:
        yield from as_batches(images)
        return
    for epoch in itertools.count():
        set_epoch(epoch)
        empty = True
        for batch in as_batches(images):
            empty = False
            yield batch
        if empty:
            return
