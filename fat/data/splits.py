"""Building blocks of the splits: datasets of any source, and the folders of a pool."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fat.data.config import DataOptions
from fat.data.dataset import ImageDataset
from fat.data.sources.base import ImageSource
from fat.data.transforms import DeviceCropTransform, EvalTransform, RandomCropTransform, Transform
from fat.utils.errors import FatError
from fat.utils.random import generator

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = ["CALIBRATION_DRAW", "SPLIT_DRAW", "DatasetFactory", "find_folders", "image_count"]

logger = logging.getLogger(__name__)

# Keys of the random streams that share one seed.
SPLIT_DRAW, CALIBRATION_DRAW = 1, 2

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
_HELD_OUT = ("val", "validation", "test")


@dataclass(frozen=True)
class DatasetFactory:
    """Creates datasets of image sources with the transforms and the seed of a run."""

    preprocessing: Preprocessing
    options: DataOptions
    seed: int

    def random_crops(self) -> RandomCropTransform:
        """Return the transform for random crops in the process that decodes the image."""
        options = self.options
        return RandomCropTransform(self.preprocessing, options.crop_scale, flip=options.flip)

    def training_crops(self) -> Transform:
        """Return the transform for random crops in the worker or on the device, see ``augment``."""
        options = self.options
        if options.augment == "worker":
            return self.random_crops()
        return DeviceCropTransform(self.preprocessing, options.crop_scale, flip=options.flip)

    def evaluation(self, source: ImageSource, indices: Indices, split: str) -> ImageDataset:
        """Return a dataset of images with the evaluation crop."""
        transform = EvalTransform(self.preprocessing)
        return ImageDataset(source, transform, indices=indices, split=split, seed=self.seed)

    def sampled_test(self, source: ImageSource, count: int | None) -> ImageDataset:
        """Return a dataset of at most ``count`` test images, drawn with the seed."""
        order = generator(self.seed, SPLIT_DRAW).permutation(len(source))
        return self.evaluation(source, np.sort(order[:count]), "test")


def image_count(total: int, fraction: float) -> int:
    """Return ``fraction`` of ``total`` images, rounded, at least 1."""
    return max(1, round(total * fraction))


def find_folders(root: Path, test_root: str | os.PathLike[str] | None) -> tuple[Path, Path | None]:
    """Return the folder of the pool, and that of the test images if there is one."""
    pool = root / "train" if (root / "train").is_dir() else root
    if test_root is not None:
        held_out = Path(test_root).expanduser()
        a, b = pool.resolve(), held_out.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise FatError(
                f"The test folder {held_out} and the training folder {pool} overlap. Type "
                "data.test_root=DIR with a folder outside of the training folder."
            )
        return pool, held_out
    if pool == root:
        return pool, None
    beside = [root / name for name in _HELD_OUT if (root / name).is_dir()]
    if len(beside) > 1:
        logger.info("Testing on %s; ignoring %s.", beside[0], ", ".join(map(str, beside[1:])))
    return pool, beside[0] if beside else None


def _earlier_options(options: Mapping[str, Any]) -> DataOptions:
    return DataOptions(**{key: value for key, value in options.items() if key != "seed"})


def _earlier_check(options: Mapping[str, Any]) -> Mapping[str, Any]:
    _earlier_options(options)
    return options


_EARLIER: dict[str, Any] = {
    "AUGMENT": ("worker", "device"),
    "Cut": lambda preprocessing, options: DatasetFactory(
        preprocessing, _earlier_options(options), options.get("seed", 0)
    ),
    "Feeding": dict,
    "Sampling": dict,
    "check_counts": lambda **counts: _earlier_check(counts) and None,
    "check_sampling": _earlier_check,
    "loading": lambda options: {
        "batch_size": options.get("batch_size", 16),
        "workers": options.get("workers"),
        "seed": options.get("seed", 0),
    },
    "share": image_count,
}
"""Names of version 0.1, whose options were dictionaries."""


def __getattr__(name: str) -> Any:
    if name not in _EARLIER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"{__name__}.{name} was replaced by fat.data.config.DataOptions."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return _EARLIER[name]
