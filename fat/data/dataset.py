"""Datasets, samplers and loaders for the images of a split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fat.data.sources.base import ImageSource
from fat.data.sources.decoding import UnreadableImage
from fat.data.transforms import Parts, Transform
from fat.utils import distributed
from fat.utils.errors import FatError, abbreviated
from fat.utils.random import generator

__all__ = [
    "Batch",
    "DistributedBatchSampler",
    "EpochSampler",
    "ImageDataset",
    "ImageLoader",
    "SequentialBatchSampler",
    "SkippedImages",
    "check_seed",
    "collate",
]

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images float32 [N, 3, H, W], labels int64 [N]
Item = tuple[Parts, int] | FatError
Key = int | tuple[int, int]

MAX_UNREADABLE = 0.05
"""Largest accepted fraction of unreadable images of a split."""


def check_seed(seed: int) -> None:
    """Raise a FatError if a seed is negative."""
    if seed < 0:
        raise FatError(f"seed is {seed}; allowed are whole numbers from 0, as in seed=0.")


class SkippedImages:
    """The unreadable images of a split, collected in the main process.

    Args:
        split: Name of the split.
        total: Number of images in the split.
    """

    def __init__(self, split: str, total: int) -> None:
        self.split = split
        self.total = total
        self.reasons: dict[str, str] = {}  # by name, in the order of discovery
        self._reported = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Add pairs of name and reason; repeated images count once.

        Raises:
            FatError: If more than 5 % of the split are unreadable.
        """
        self.reasons.update(skipped)
        if len(self) > MAX_UNREADABLE * self.total:
            raise FatError(
                f"At least {len(self)} of the {self.total} {self.split} images cannot be read, "
                f"more than {MAX_UNREADABLE:.0%}: {self.summary()}. Repair or remove them, or type "
                "data.root=DIR with another folder."
            )

    def warn(self) -> None:
        """Log a warning if images were added since the last warning."""
        if len(self) > self._reported:
            self._reported = len(self)
            logger.warning(
                "Skipped %d of the %d %s images, which cannot be read: %s.",
                len(self),
                self.total,
                self.split,
                self.summary(),
            )

    def summary(self) -> str:
        """Return the first names with their reasons as text."""
        return abbreviated([f"{name} ({reason})" for name, reason in self.reasons.items()])


class ImageDataset(Dataset[Item]):
    """Images of a source, transformed with random draws that depend only on (seed, epoch, index).

    A key is a position, or a pair (epoch, position), by which persistent workers learn the epoch.

    Args:
        source: Source of the images.
        indices: Indices of the images in the source; all by default.
        transform: Transform to the network's input.
        split: Name of the split in messages.
        seed: Seed of the random draws.

    Raises:
        FatError: If there are no images, or the seed is negative.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        *,
        indices: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]] | None = None,
        split: str = "given",
        seed: int = 0,
    ) -> None:
        chosen = np.arange(len(source)) if indices is None else indices
        self.source = source
        self.transform = transform
        self.indices = np.asarray(chosen, dtype=np.int64)
        self.split = split
        self.seed = seed
        self.epoch = 0
        if len(self.indices) == 0:
            raise FatError(f"The {split} split has no images. Give more images to choose from.")
        check_seed(seed)
        self.skipped = SkippedImages(split, len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def keep(self, wanted: Sequence[bool]) -> None:
        """Remove images permanently.

        Args:
            wanted: For each position, ``True`` to keep its image.

        Raises:
            FatError: If no image remains.
        """
        self.indices = self.indices[np.asarray(wanted, dtype=bool)]
        if len(self.indices) == 0:
            raise FatError(f"No {self.split} image is left. Give more images to choose from.")
        self.skipped = SkippedImages(self.split, len(self.indices))

    def readable_names(self) -> list[str]:
        """Return the names of the images in order, without those found to be unreadable so far."""
        names = (self.source.name(int(index)) for index in self.indices)
        return [name for name in names if name not in self.skipped.reasons]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of keys that are plain positions. It does not reach running workers."""
        self.epoch = epoch

    def __getitem__(self, key: Key) -> Item:
        """Return tensors and label, or the error as a value.

        An error raised in a worker would end it and arrive as another process's traceback.
        """
        epoch, position = key if isinstance(key, tuple) else (self.epoch, key)
        index = int(self.indices[position])
        try:
            image = self.source.load(index, self.transform.short_side)
        except FatError as error:
            return error
        parts = self.transform(image, generator(self.seed, epoch, index))
        return parts, self.source.label(index)


class EpochSampler(Sampler[tuple[int, int]]):
    """Samples every position once, in an order that depends only on (seed, epoch).

    Call :meth:`set_epoch` before each epoch, as Lightning does.

    Args:
        length: Number of positions.
        seed: Seed of the order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order and the crops of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, position)."""
        epoch = self.epoch
        for position in generator(self.seed, epoch).permutation(self.length):
            yield epoch, int(position)


class DistributedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of training images, each split among the processes.

    Together, the processes see in each step the batch that a single process would see.

    Args:
        sampler: Sampler of the order.
        batch_size: Images per step over all processes, a multiple of their number.
        drop_last: If ``True``, drop a short last batch.

    Attributes:
        skip: Number of batches to skip at the start of the next pass only.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, *, drop_last: bool) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.skip = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + (0 if self.drop_last or not rest else 1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (epoch, position)."""
        skip, self.skip = self.skip, 0
        # Here and not in __init__, because loaders are often built before the process group.
        rank, size = distributed.rank(), distributed.size()
        order = list(self.sampler)
        for number in range(skip, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch[rank::size]


class SequentialBatchSampler(Sampler[list[int]]):
    """Batches in a fixed order, assigned to the processes in turn.

    Every image is seen exactly once, also when the number of batches is not a multiple of the
    number of processes, and all batches are those of a single process.

    Args:
        length: Number of positions.
        batch_size: Positions per batch; the last may have fewer.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        self.length, self.batch_size = length, batch_size

    def _starts(self) -> range:
        step = self.batch_size * distributed.size()
        return range(self.batch_size * distributed.rank(), self.length, step)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of positions."""
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.length)))


StepBatches, WholeBatches = DistributedBatchSampler, SequentialBatchSampler
"""The names in FAT 0.1."""


def collate(items: Sequence[Item]) -> tuple[Parts, Tensor, list[tuple[str, str]], str]:
    """Stack the readable items, and list the names and reasons of the others.

    Returns:
        The stacked tensors of N images (an empty tuple if N is 0); labels int64 [N]; name and
        reason of each unreadable image; and the text of any other error, or ``""``.
    """
    # Exceptions are passed as text, because pinning memory walks through a batch's containers.
    skipped = [(item.name, item.reason) for item in items if isinstance(item, UnreadableImage)]
    others = [item for item in items if isinstance(item, FatError)]
    fatal = [str(error) for error in others if not isinstance(error, UnreadableImage)]
    good = [item for item in items if not isinstance(item, FatError)]
    columns = zip(*(parts for parts, _ in good), strict=True)
    return (
        tuple(torch.stack(column) for column in columns),
        torch.tensor([label for _, label in good], dtype=torch.int64),
        skipped,
        fatal[0] if fatal else "",
    )


class ImageLoader(DataLoader[Any]):
    """DataLoader of an :class:`ImageDataset` that yields ``(images, labels)``.

    It applies the second part of the transform to whole batches, and skips batches without a
    readable image. Requires ``collate_fn=collate``.
    """

    device = torch.device("cpu")
    drawn = 0
    """Number of batches drawn in this pass, including empty ones."""
    _start = 0

    def start_at(self, batch: int) -> None:
        """Start the next pass (only) at a later batch, without loading the earlier ones."""
        if not isinstance(self.batch_sampler, DistributedBatchSampler):
            raise FatError("Only a loader of training images can start in the middle of a pass.")
        self.batch_sampler.skip = batch
        self._start = batch

    def to(self, device: torch.device | str) -> ImageLoader:
        """Move batches to a device, where the transform is finished. Returns the loader itself."""
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.pin_memory = True
            if self.num_workers:  # decoding one large JPEG may take longer than a step
                self.prefetch_factor = 4
        return self

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            FatError: If more than 5 % of the split's images are unreadable, or an image differs
                from the recorded one.
        """
        dataset = self.dataset
        assert isinstance(dataset, ImageDataset)
        batches = len(self)
        start, self._start = self._start, 0
        for number, (parts, labels, skipped, fatal) in enumerate(super().__iter__(), start + 1):
            self.drawn = number
            if fatal:
                raise FatError(fatal)
            dataset.skipped.add(skipped)
            if number == batches:  # before the last yield, as a caller may not exhaust the iterator
                dataset.skipped.warn()
            shared = distributed.size() > 1 and isinstance(
                self.batch_sampler, DistributedBatchSampler
            )
            if shared and not len(labels):
                raise FatError(
                    "One process cannot read any of its images of a training step, and the others "
                    f"would wait for it: {dataset.skipped.summary()}. Repair them, or train in one "
                    "process."
                )
            if len(labels):
                moved = (part.to(self.device, non_blocking=True) for part in parts)
                images = dataset.transform.finish(*moved)
                yield images, labels.to(self.device, non_blocking=True)
