"""Options of the images: where they come from, which split they go to, and how they are batched."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from fat.quant.config import MOST_PIXELS
from fat.utils.errors import FatError
from fat.utils.options import Options, nested, option

__all__ = ["DataConfig", "DataOptions", "DistillSpec"]

# Upper bounds: larger values would exhaust the machine before anything else failed.
MOST_IMAGES = 100_000_000
MOST_PROCESSES = 1024

Source = Literal[
    "photos", "folder", "imagenet", "imagenette", "digits", "cifar10", "distilled", "of_run"
]
_IN_FOLDERS = ("source", ("folder", "imagenet", "imagenette"))
_OF_RUN = ("source", ("of_run",))


@dataclass(frozen=True)
class DistillSpec(Options, prefix="data.distill"):
    """Options of distilling images from a network, see :mod:`fat.data.distill.synthesis`."""

    images: int = option(192, "number of images", at_least=1, at_most=MOST_IMAGES)
    batch_size: int = option(
        32,
        "images distilled together: their common statistics match the network's; the images are "
        "spread evenly over the batches",
        at_least=1,
    )
    coarse_steps: int = option(60, "steps per batch at half the network's resolution", at_least=0)
    steps: int = option(12, "steps per batch at full resolution after these", at_least=1)
    lr: float = option(
        0.01,
        "Adam's learning rate for pixels 0…1, annealed to 0 at each resolution",
        above=0,
        at_most=1,
    )
    smoothness: float = option(
        0.2, "weight of the mean absolute difference between neighboring pixels", at_least=0
    )
    class_weight: float = option(
        0.003, "weight of the cross-entropy with each image's random class", at_least=0
    )

    @property
    def batches(self) -> list[range]:
        """The indices of the images of each batch.

        Examples:
            >>> DistillSpec(images=5, batch_size=2).batches
            [range(0, 1), range(1, 3), range(3, 5)]
        """
        count = math.ceil(self.images / self.batch_size)
        ends = [self.images * i // count for i in range(count + 1)]
        return [range(first, end) for first, end in itertools.pairwise(ends)]


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options, prefix="data"):
    """Options of :class:`fat.data.datamodule.FatDataModule`: splits, crops and batches."""

    batch_size: int | None = option(
        None,
        "images per step, of all processes together; training drops a short last batch; null: 64 "
        "on a GPU, otherwise 16",
        at_least=1,
        at_most=MOST_IMAGES,
        example=16,
    )
    workers: int | None = option(
        None,
        "processes that decode images, for each training process; null: one less than its part of "
        "the usable cores, at most 8",
        at_least=0,
        at_most=MOST_PROCESSES,
        example=4,
    )
    train_images: int | None = option(
        None,
        "maximum number of training images; null takes all (photos: 1000 crops per epoch)",
        at_least=1,
        at_most=MOST_IMAGES,
        example=1000,
        unless=_OF_RUN,
    )
    calibration_images: int = option(
        100,
        "number of training images that give the initial thresholds",
        at_least=1,
        at_most=MOST_IMAGES,
        unless=_OF_RUN,
    )
    validation_images: int | None = option(
        None,
        "maximum number of images that select the best network, none of the training images; null "
        "takes validation_fraction (photos: 100)",
        at_least=1,
        at_most=MOST_IMAGES,
        example=100,
        unless=_OF_RUN,
    )
    test_images: int | None = option(
        None,
        "maximum number of test images; null takes all (photos: 300)",
        at_least=1,
        at_most=MOST_IMAGES,
        example=100,
        unless=_OF_RUN,
    )
    validation_fraction: float = option(
        0.1,
        "fraction of the training images that is held out for validation",
        above=0,
        below=1,
        only=("source", ("folder", "imagenette", "digits", "cifar10", "distilled")),
    )
    test_fraction: float = option(
        0.2,
        "fraction of all images that is held out for the test if there is no test folder",
        above=0,
        below=1,
        only=("source", ("folder",)),
    )
    crop_scale: tuple[float, float] = option(
        (0.35, 1.0),
        "smallest and largest fraction of an image's area in a training crop",
        above=0,
        at_most=1,
        earlier=("scale",),
        unless=_OF_RUN,
    )
    flip: float = option(
        0.5, "probability that a training crop is mirrored", at_least=0, at_most=1, unless=_OF_RUN
    )
    augment: Literal["worker", "device"] = option(
        "worker",
        "where training crops are cut: worker (the process that decodes) or device (the network's)",
        unless=_OF_RUN,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_fraction + self.test_fraction >= 1:
            raise FatError(
                f"data.validation_fraction {self.validation_fraction} and data.test_fraction "
                f"{self.test_fraction} leave nothing to train on; their sum must be below 1."
            )


@dataclass(frozen=True)
class DataConfig(DataOptions, prefix="data"):
    """Options of conf/data: :class:`DataOptions`, and where the images come from."""

    source: Source = option(meaning="where the images come from; data=CHOICE sets it")
    root: str | None = option(
        None,
        "folder of the images; imagenet: also hub:OWNER/NAME, a dataset of the Hugging Face hub; "
        "imagenette, cifar10: null is ~/.cache/fat/downloads",
        only=("source", ("folder", "imagenet", "imagenette", "cifar10")),
    )
    test_root: str | None = option(
        None,
        "folder of test images in place of the source's own",
        only=("source", ("folder", "imagenet", "photos", "distilled")),
    )
    index: str | None = option(
        None, "images.csv of an earlier run, to use exactly its images", only=_IN_FOLDERS
    )
    fraction: float = option(
        0.1,
        "fraction of the training images to train on, the same from each class",
        above=0,
        at_most=1,
        only=("source", ("imagenet",)),
    )
    cache: Literal["none", "jpeg", "pixels", "squares"] = option(
        "none",
        "store training images small once, as jpeg, pixels (decoded) or squares (with "
        "augment=device)",
        only=_IN_FOLDERS,
    )
    cache_dir: str | None = option(
        None, "folder of caches; null is ~/.cache/fat/images", only=_IN_FOLDERS
    )
    cache_side: int = option(
        256,
        "shorter side of cached images in pixels",
        at_least=1,
        at_most=MOST_PIXELS,
        only=_IN_FOLDERS,
    )
    image_size: int | None = option(
        None,
        "side of the network's input in pixels; null takes the network's own",
        at_least=1,
        at_most=MOST_PIXELS,
        example=224,
        unless=_OF_RUN,
    )
    crop_pct: float | None = option(
        None,
        "fraction of a resized test image's side that the crop keeps; null takes the network's own",
        at_least=0.01,
        at_most=1,
        example=0.9,
        unless=_OF_RUN,
    )
    distill: DistillSpec = nested(
        DistillSpec, "images distilled from the network", only=("source", ("distilled",))
    )
