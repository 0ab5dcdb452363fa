"""A split: which images of a source, cut how, and which of them could not be read."""

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
from fat.utils.errors import FatError
from fat.utils.random import generator

__all__ = [
    "Batch",
    "EpochSampler",
    "ImageDataset",
    "ImageLoader",
    "SkippedImages",
    "StepBatches",
    "WholeBatches",
    "collate",
]

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images float32 [N, 3, H, W], labels int64 [N]
Item = tuple[Parts, int] | FatError
Key = int | tuple[int, int]

MAX_UNREADABLE = 0.05  # share of a split above which going on would judge by other images


class SkippedImages:
    """Which images of a split could not be read. Kept by the main process only.

    Args:
        split: What the split is called.
        total: Number of images in it.
    """

    def __init__(self, split: str, total: int) -> None:
        self.split = split
        self.total = total
        self.reasons: dict[str, str] = {}  # by name, in the order of discovery
        self._told = 0

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Note names and reasons; an image that is met again in a later epoch counts once.

        Raises:
            FatError: As soon as more than 5 % of the split are unreadable.
        """
        self.reasons.update(skipped)
        if len(self) > MAX_UNREADABLE * self.total:
            raise FatError(
                f"At least {len(self)} of the {self.total} {self.split} images cannot be read, "
                f"more than {MAX_UNREADABLE:.0%}: {self.first()}. Repair or remove them, or type "
                "data.root=DIR with another folder."
            )

    def tell(self) -> None:
        """Warn of the images that were skipped, if there are any the last warning had not."""
        if len(self) > self._told:
            self._told = len(self)
            log.warning(
                "Skipped %d of the %d %s images, which cannot be read: %s.",
                len(self),
                self.total,
                self.split,
                self.first(),
            )

    def first(self, count: int = 5) -> str:
        """Return the first names with their reasons, for people."""
        named = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:count]]
        more = f" and {len(self) - count} more" if len(self) > count else ""
        return ", ".join(named) + more


class ImageDataset(Dataset[Item]):
    """Some images of a source, transformed with draws that depend on (seed, epoch, index) alone.

    A key is a position 0…len-1, or a pair (epoch, position): the pair lets a sampler tell workers
    that live through several epochs which one it is.

    Args:
        source: Where the images come from.
        indices: Which of them, by index in the source; all of them by default.
        transform: Image and random generator to 8-bit pixels, and those to the network's input.
        split: What the split is called in messages.
        seed: First part of the key of the draws.

    Raises:
        FatError: If there is no image, or the seed is negative.
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
            raise FatError(f"The {split} split has no image; give more images to choose from.")
        if seed < 0:
            raise FatError(f"The seed is {seed}; it must not be negative.")
        self.skipped = SkippedImages(split, len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def keep(self, wanted: Sequence[bool]) -> None:
        """Leave images out for good.

        Args:
            wanted: For each position whether its image stays.

        Raises:
            FatError: If none stays.
        """
        self.indices = self.indices[np.asarray(wanted, dtype=bool)]
        if len(self.indices) == 0:
            raise FatError(f"No {self.split} image is left; give more images to choose from.")
        self.skipped = SkippedImages(self.split, len(self.indices))

    def readable_names(self) -> list[str]:
        """Names of the images in the order of a loader that does not shuffle.

        Images that could not be read are left out, as far as a pass over them has found out.
        """
        names = (self.source.name(int(index)) for index in self.indices)
        return [name for name in names if name not in self.skipped.reasons]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of keys that are plain positions. Workers already running do not see it."""
        self.epoch = epoch

    def __getitem__(self, key: Key) -> Item:
        """Return tensors and label, or the error as a value.

        Raised in a worker, it would end it, and come as a traceback of another process.
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
    """Every position once, in an order that depends on (seed, epoch) alone.

    Lightning's loop calls `set_epoch`; so must any other loop over epochs.

    Args:
        length: Number of positions.
        seed: First part of the order's key.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, and the crops, of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, position)."""
        epoch = self.epoch
        for position in generator(self.seed, epoch).permutation(self.length):
            yield epoch, int(position)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of training images, of each of which every process has its share.

    What the processes have of a step is together the batch that one process would have had.

    Args:
        sampler: The order.
        batch_size: Images of a step, a multiple of the number of processes.
        drop_last: Whether a short last batch is left out.

    Attributes:
        skip: So many batches of the next pass, and only of that, are left out.
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
        # Asked for when it is needed: a loader is often built before the processes know each other.
        rank, size = distributed.rank(), distributed.size()
        order = list(self.sampler)
        for number in range(skip, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch[rank::size]


class WholeBatches(Sampler[list[int]]):
    """The positions of whole batches in a fixed order, every n-th of which is one process's.

    No image comes twice and none is left out, whether or not the batches can be shared evenly, and
    each batch is one that a single process would have.

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


def collate(items: Sequence[Item]) -> tuple[Parts, Tensor, list[tuple[str, str]], str]:
    """Stack the readable items; list the names and reasons of the others.

    Returns:
        The stacked parts of N images, none where N is 0; labels int64 [N]; the unreadable; and the
        text of an error that none of the images is to blame for, ``""`` without one.
    """
    # The exceptions go on as text: pinning memory walks through a batch's containers.
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
    """A DataLoader over an ImageDataset that yields ``(images, labels)`` and counts the rest.

    The second half of the transform runs here, once for a batch. A batch in which nothing could be
    read is left out. To be built with ``collate_fn=collate``.
    """

    device = torch.device("cpu")
    drawn = 0
    """How many batches of this pass were drawn so far, empty ones included."""
    _start = 0

    def start_at(self, batch: int) -> None:
        """Begin the next pass, and only that, with a later batch; loads none of those before."""
        if not isinstance(self.batch_sampler, StepBatches):
            raise FatError("Only a loader of training images can start in the middle of a pass.")
        self.batch_sampler.skip = batch
        self._start = batch

    def to(self, device: torch.device | str) -> ImageLoader:
        """Have the batches finished on a device, where they stay. Returns the loader itself."""
        self.device = torch.device(device)
        return self

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            FatError: As soon as more than 5 % of the split's images are unreadable, or an image is
                not what it should be.
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
            if number == batches:  # now, as a caller that counts batches never asks for the end
                dataset.skipped.tell()
            shared = distributed.size() > 1 and isinstance(self.batch_sampler, StepBatches)
            if shared and not len(labels):
                raise FatError(
                    "None of the images that one process had of a training step can be read, and "
                    f"the others would wait for it: {dataset.skipped.first()}. Repair them, or "
                    "train in one process."
                )
            if len(labels):
                moved = (part.to(self.device, non_blocking=True) for part in parts)
                images = dataset.transform.finish(*moved)
                yield images, labels.to(self.device, non_blocking=True)
