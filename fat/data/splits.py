"""Which images are taken for what, and how batches are made of them, whatever their source."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from fat.data.dataset import ImageDataset
from fat.data.sources.base import ImageSource
from fat.data.transforms import DeviceCropTransform, EvalTransform, RandomCropTransform, Transform
from fat.utils.errors import FatError, unknown_name
from fat.utils.random import generator

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = [
    "AUGMENT",
    "CALIBRATION_DRAW",
    "SPLIT_DRAW",
    "Cut",
    "Feeding",
    "Sampling",
    "check_counts",
    "check_sampling",
    "find_folders",
    "loading",
    "share",
]

log = logging.getLogger(__name__)

# What separates the draws that share one seed.
SPLIT_DRAW, CALIBRATION_DRAW = 1, 2

AUGMENT = ("worker", "device")
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
_HELD_OUT = ("val", "validation", "test")


class Feeding(TypedDict, total=False):
    """How batches are made of images, whatever their source.

    Attributes:
        batch_size: Images per batch, 16 by default. Training drops a short last batch if there is
            a full one.
        workers: Processes that decode images; by default one less than the usable cores, at most 8.
        seed: What the samples, the training order and the crops follow; 0 by default.
        scale: Smallest and largest share of an image's area in a training crop.
        flip: Probability that a training crop is mirrored, 0…1; 0.5 by default.
        augment: Where training crops are cut: ``"worker"`` (the default), or ``"device"``.
    """

    batch_size: int
    workers: int | None
    seed: int
    scale: tuple[float, float]
    flip: float
    augment: str


class Sampling(Feeding, total=False):
    """Which of the images of a source are taken for what.

    Attributes:
        train_images: At most so many training images; all by default.
        calibration_images: How many of the training images calibrate (fewer if there are fewer);
            100 by default.
        validation_images: At most so many validation images; the whole fraction by default.
        test_images: At most so many test images; all by default.
        validation_fraction: Share of the images that is held out of the pool for validation; 0.1
            by default.
        test_fraction: Share of the images that is set apart for the test if there is no test set;
            0.2 by default.
    """

    train_images: int | None
    calibration_images: int
    validation_images: int | None
    test_images: int | None
    validation_fraction: float
    test_fraction: float


class Loading(TypedDict):
    batch_size: int
    workers: int | None
    seed: int


class Cut:
    """What makes datasets of sources: the transforms and the seed that a `Feeding` asks for."""

    def __init__(self, preprocessing: Preprocessing, feeding: Feeding) -> None:
        self.preprocessing = preprocessing
        self.seed = feeding.get("seed", 0)
        self.scale = feeding.get("scale", (0.35, 1.0))
        self.flip = feeding.get("flip", 0.5)
        self.augment = feeding.get("augment", "worker")
        if self.augment not in AUGMENT:
            raise unknown_name("data.augment", self.augment, AUGMENT)

    def crop(self) -> RandomCropTransform:
        """Random crops, cut where the image is decoded."""
        return RandomCropTransform(self.preprocessing, self.scale, flip=self.flip)

    def train(self) -> Transform:
        """Random crops, cut where `augment` says."""
        if self.augment == "worker":
            return self.crop()
        return DeviceCropTransform(self.preprocessing, self.scale, flip=self.flip)

    def still(self, source: ImageSource, indices: Indices, split: str) -> ImageDataset:
        """Images with the crop that networks are judged by."""
        middle = EvalTransform(self.preprocessing)
        return ImageDataset(source, middle, indices=indices, split=split, seed=self.seed)

    def held_out(self, source: ImageSource, count: int | None) -> ImageDataset:
        """At most so many test images of a source, drawn by the seed."""
        order = generator(self.seed, SPLIT_DRAW).permutation(len(source))
        return self.still(source, np.sort(order[:count]), "test")


def loading(feeding: Feeding) -> Loading:
    """Those of the options that the module itself takes."""
    return {
        "batch_size": feeding.get("batch_size", 16),
        "workers": feeding.get("workers"),
        "seed": feeding.get("seed", 0),
    }


def check_sampling(options: Sampling) -> Sampling:
    """Raise a FatError if a number is out of range; return the options."""
    check_counts(
        train_images=options.get("train_images"),
        calibration_images=options.get("calibration_images"),
        validation_images=options.get("validation_images"),
        test_images=options.get("test_images"),
    )
    validation = options.get("validation_fraction", 0.1)
    test = options.get("test_fraction", 0.2)
    for key, value in (("validation", validation), ("test", test)):
        if not 0 < value < 1:
            raise FatError(f"data.{key}_fraction is {value}; allowed: more than 0, below 1.")
    if validation + test >= 1:
        raise FatError(
            f"data.validation_fraction {validation} and data.test_fraction {test} leave nothing to "
            "train on; their sum must be below 1."
        )
    return options


def check_counts(**counts: int | None) -> None:
    """Raise a FatError if a number of images is given and below 1."""
    for key, value in counts.items():
        if value is not None and value < 1:
            raise FatError(f"data.{key} is {value}; it must be at least 1, or left out.")


def share(total: int, fraction: float) -> int:
    """How many images a share is, at least one."""
    return max(1, round(total * fraction))


def find_folders(root: Path, test_root: str | os.PathLike[str] | None) -> tuple[Path, Path | None]:
    """Return the pool's folder and the test images' folder, None if they are to be set apart."""
    pool = root / "train" if (root / "train").is_dir() else root
    if test_root is not None:
        held_out = Path(test_root).expanduser()
        a, b = pool.resolve(), held_out.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise FatError(
                f"The test folder {held_out} and the training folder {pool} overlap, so the test "
                "would be on training images. Type data.test_root=DIR with a folder outside."
            )
        return pool, held_out
    if pool == root:
        return pool, None
    beside = [root / name for name in _HELD_OUT if (root / name).is_dir()]
    if len(beside) > 1:
        log.info("Testing on %s; not used: %s.", beside[0], ", ".join(map(str, beside[1:])))
    return pool, beside[0] if beside else None
