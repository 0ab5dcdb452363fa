"""The subset of ImageNet that a run uses."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fat.data.config import DataConfig
from fat.data.dataset import check_seed
from fat.data.imagenet.labels import stem
from fat.data.imagenet.layouts import Part, find_training, find_validation
from fat.data.imagenet.sampling import Digests, Ints, digest, distinct
from fat.data.sources.archives import Place, Reader
from fat.data.sources.decoding import UNKNOWN
from fat.data.sources.folder import check_folder
from fat.data.sources.listing import Entry, Hashes, Listing
from fat.data.sources.manifest import ImageIndex, Record, check_labels, relative
from fat.utils.errors import FatError, abbreviated

__all__ = ["choose"]

logger = logging.getLogger(__name__)

_COMMIT_EVERY = 100  # hashes that an interruption may lose
_BAR_DELAY = 2.0  # seconds before a progress bar appears


def choose(
    root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None,
    num_classes: int,
    fraction: float = DataConfig.fraction,
    train_images: int | None = None,
    calibration_images: int = DataConfig.calibration_images,
    validation_images: int = 1000,
    test_images: int | None = None,
    seed: int = 0,
    val_root: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ImageIndex:
    """Choose a class-balanced sample of ImageNet that is the same for every layout.

    Within each class, images are ranked by a hash of the seed and their name, and classes take
    turns. The calibration, validation and training images are taken in this order from ImageNet's
    training images. Test images are its validation images. Duplicates are left out.

    Args:
        root: The folder, in a layout of :mod:`fat.data.imagenet.layouts`.
        classes: wnids in the order of the logits.
        num_classes: Number of logits.
        fraction: Fraction of ImageNet's training images to train on, above 0, up to 1.
        train_images: Number of training images in place of the fraction.
        calibration_images: Number of images for calibration.
        validation_images: Number of images for choosing the best epoch.
        test_images: Number of test images, class-balanced too; ``None`` takes all.
        seed: Seed of the choice.
        val_root: Folder of ImageNet's validation images, if not below the root.
        progress: If ``True``, show progress bars for steps longer than two seconds.

    Returns:
        The index: calibration, train and validation images in balanced order, test images in
        storage order.

    Raises:
        FatError: If a number is out of range, the images are in no known layout, an archive is
            damaged, there are too few images, or labels are outside the network's classes.
    """
    options: dict[str, Any] = {
        "fraction": fraction,
        "train_images": train_images,
        "test_images": test_images,
        "calibration_images": calibration_images,
        "validation_images": validation_images,
    }
    DataConfig(source="imagenet", **options)  # checks them
    check_seed(seed)
    if classes is None or len(classes) != num_classes:
        raise FatError(
            f"The network has {num_classes} classes that are not ImageNet's. Type model.name=NAME "
            "with a network of ImageNet's 1000 classes, or data=folder data.root=DIR."
        )
    place = _folder(root)
    val_place = None if val_root is None else _folder(val_root)
    parts = find_training(place, classes), find_validation(place, classes, val_place)
    if parts[0].overlaps(parts[1]):
        raise FatError(
            f"The training images ({parts[0]}) and the validation images ({parts[1]}) overlap. "
            "Type data.test_root=DIR with ImageNet's validation images."
        )
    pool, held = (_Pool.of(part, num_classes, seed, progress) for part in parts)
    _warn_of_missing_classes(held, classes)
    if val_place is not None and val_place.is_relative_to(place):
        val_place = None

    held_out = calibration_images + validation_images
    wanted = max(1, round(fraction * pool.size)) if train_images is None else train_images
    hashes = Hashes()
    try:
        tests = held.take(test_images or held.size, "test", (), hashes, progress)
        taken = pool.take(held_out + wanted, "training", set(tests.values()), hashes, progress)
    finally:
        hashes.close()
    _check_enough(pool, len(taken), calibration_images, validation_images, wanted)
    order = list(taken)
    splits = {
        "calibration": order[:calibration_images],
        "train": order[held_out:],
        "validation": order[calibration_images:held_out],
    }
    records = [
        record
        for split, images in splits.items()
        for record in pool.records(split, images, taken, place)
    ]
    records += held.records("test", sorted(tests), tests, val_place or place)
    forms = {"training_form": parts[0].form, "validation_form": parts[1].form}
    return ImageIndex(place, tuple(records), seed, {**options, **forms}, val_place)


@dataclass(frozen=True)
class _Pool:
    """The images of a part with a class.

    Attributes:
        part: The part.
        listing: All images of the part.
        seed: Seed of the choice.
        indices: Indices of the images in the listing [N].
        labels: Their classes [N].
        digests: Their ranks [N].
    """

    part: Part
    listing: Listing
    seed: int
    indices: Ints
    labels: Ints
    digests: Digests

    @classmethod
    def of(cls, part: Part, num_classes: int, seed: int, progress: bool) -> _Pool:
        listing = part.listing(progress)
        # Arrays, to need only 24 bytes per image.
        indices, labels, digests = array("q"), array("q"), array("Q")
        skipped, examples = 0, list[str]()
        bar = tqdm(
            listing.entries(),
            "Rank images",
            len(listing),
            leave=False,
            disable=not progress,
            delay=_BAR_DELAY,
        )
        for index, entry in enumerate(bar):
            label = part.label(entry)
            if label == UNKNOWN:
                skipped += 1
                examples += [_name(entry)] if skipped <= 5 else []
                continue
            if not 0 <= label < num_classes:
                check_labels([(_name(entry), label)], num_classes)
            indices.append(index)
            labels.append(label)
            digests.append(digest(seed, stem(entry.member or entry.file)))
        if not indices:
            raise FatError(
                f"The {part} hold no image with a class; images without one: "
                f"{skipped} ({', '.join(examples) or 'none'}). Type data.root=DIR."
            )
        if skipped:
            logger.warning(
                "Skipping %d images of the %s, which have no class: %s.",
                skipped,
                part,
                ", ".join(examples),
            )
        return cls(
            part,
            listing,
            seed,
            np.array(indices, dtype=np.int64),
            np.array(labels, dtype=np.int64),
            np.array(digests, dtype=np.uint64),
        )

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.indices)

    def entry(self, image: int) -> Entry:
        """Return the listing's entry of an image."""
        return self.listing.entry(int(self.indices[image]))

    def take(
        self, count: int, what: str, taken: Collection[str], hashes: Hashes, progress: bool
    ) -> dict[int, str]:
        """Return the hashes of the chosen images' contents by image, in balanced order."""
        contents = _Contents(self, hashes, what, progress)
        chosen, repeated = distinct(self.labels, self.digests, self.seed, count, contents, taken)
        if repeated:
            logger.info(
                "Leaving out %d %s images, which are duplicates: %s.",
                len(repeated),
                what,
                abbreviated([_name(self.entry(image)) for image in repeated]),
            )
        unreadable = [image for image, content in contents.known.items() if content is None]
        if unreadable:
            logger.warning(
                "Leaving out %d %s images, which are empty or cannot be read: %s.",
                len(unreadable),
                what,
                abbreviated([_name(self.entry(image)) for image in unreadable]),
            )
        return {image: str(contents.known[image]) for image in chosen}

    def records(
        self, split: str, images: Iterable[int], contents: Mapping[int, str], base: Path
    ) -> list[Record]:
        """Return the index's records of images."""
        records = []
        for image in images:
            entry = self.entry(image)
            place = entry.place
            path = relative(self.part.base / place.path, base)
            records.append(
                Record(
                    split,
                    path,
                    entry.member,
                    place.offset,
                    place.size,
                    place.row,
                    f"{path}/{entry.member}" if entry.member else path,
                    int(self.labels[image]),
                    contents[image],
                )
            )
        return records


class _Contents:
    """SHA-256 of images, ``None`` for those that are empty or unreadable. Each is read once."""

    def __init__(self, pool: _Pool, hashes: Hashes, what: str, progress: bool) -> None:
        self.known: dict[int, str | None] = {}
        self._pool = pool
        self._hashes = hashes
        self._what = what
        self._progress = progress
        self._base = pool.part.base
        self._reader = Reader(self._base)

    def __call__(self, images: Sequence[int]) -> Mapping[int, str | None]:
        new = sorted(set(images) - self.known.keys())  # storage order
        bar = tqdm(
            new,
            f"Hash {self._what} images",
            leave=False,
            disable=not self._progress,
            delay=_BAR_DELAY,
        )
        for count, image in enumerate(bar, start=1):
            try:
                self.known[image] = self._hash(self._pool.entry(image).place)
            except OSError:
                self.known[image] = None
            if count % _COMMIT_EVERY == 0:
                self._hashes.commit()
        self._hashes.commit()
        return self.known

    def _hash(self, place: Place) -> str | None:
        stored = self._hashes.find(self._base, place)
        if stored is not None:
            return stored
        content = self._reader.read(place)
        if not content:
            return None
        sha256 = hashlib.sha256(content).hexdigest()
        self._hashes.keep(self._base, place, sha256)
        return sha256


def _name(entry: Entry) -> str:
    path = entry.place.path
    return f"{path}/{entry.member}" if entry.member else path


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.abspath(Path(path).expanduser()))
    check_folder(folder)
    return folder


def _check_enough(pool: _Pool, got: int, calibration: int, validation: int, wanted: int) -> None:
    left = got - calibration - validation
    if left < 1:
        raise FatError(
            f"The {pool.part} hold {got} different images; data.calibration_images={calibration} "
            f"and data.validation_images={validation} leave none to train on. Type smaller "
            "numbers, or data.root=DIR with more images."
        )
    if left < wanted:
        logger.warning(
            "Training on %d of %d requested images: there are no more besides those for "
            "calibration and validation.",
            left,
            wanted,
        )


def _warn_of_missing_classes(held: _Pool, classes: Sequence[str]) -> None:
    missing = sorted(set(range(len(classes))) - set(held.labels.tolist()))
    if missing:
        logger.warning(
            "The %s have no images of %d of the %d classes, so that accuracies exclude these: %s.",
            held.part,
            len(missing),
            len(classes),
            abbreviated([classes[k] for k in missing], 10),
        )
