"""The four splits of a run as a LightningDataModule, and the ways to fill them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch

from fat.data.dataset import Batch, EpochSampler, ImageDataset, ImageLoader, collate
from fat.data.images import UnreadableImage
from fat.data.sources import FolderSource, PhotoSource
from fat.data.transforms import EvalTransform, RandomCropTransform, generator
from fat.errors import FatError

if TYPE_CHECKING:
    from fat.models import Preprocessing

__all__ = ["TEST_PHOTOS", "TRAIN_PHOTOS", "VALIDATION_PHOTOS", "FatDataModule"]

log = logging.getLogger(__name__)

# scikit-image's photographs, sorted by hand. Training has the widest range of content: a person in
# saturated colours, a cluttered room with a machine, a grey outdoor scene, stained tissue (strong
# colours, fine texture), grass and brick (dense texture), coins (many objects on a plain ground)
# and a star field (small lights on black: extreme activations). Validation and test each have
# objects that ImageNet's classes know (cup; cat and rocket), so that a network has firm opinions to
# agree with, and content of another kind (stones; the moon). Left out: drawings and text (horse,
# logo, page, …), blurred or tiny pictures, and motorcycle_right, the same scene as its left twin.
TRAIN_PHOTOS = (
    "astronaut.png",
    "motorcycle_left.png",
    "camera.png",
    "ihc.png",
    "grass.png",
    "brick.png",
    "coins.png",
    "hubble_deep_field.jpg",
)
VALIDATION_PHOTOS = ("coffee.png", "gravel.png")
TEST_PHOTOS = ("chelsea.png", "rocket.jpg", "moon.png")

# Evaluation crops of photographs do not follow the run's seed: all runs are judged on the same.
_EVAL_SEED = 0
_HELD_OUT = ("val", "validation", "test")
# What separates the draws that share one seed.
_SPLIT_DRAW, _CALIBRATION_DRAW = 1, 2


class FatDataModule(pl.LightningDataModule):
    """Calibration, training, validation and test images, in batches of ``(images, labels)``.

    Images are float32 [N, 3, H, W], normalised; labels int64 [N], -1 where not known. Order and
    pixels depend on the seed and the epoch, neither on the number of workers nor on any global
    random state. An image that cannot be read is skipped and counted (`summary`).

    Args:
        calibration: Training images that give the thresholds their first values.
        train: Images to distil on.
        validation: Images to choose the best network by; none of the training images.
        test: Images to judge the result by; none of the others.
        batch_size: Images per batch. Training drops a short last batch if there is a full one.
        workers: Processes that decode images; by default one less than the usable cores, at most 8.
        seed: What the training order follows.

    Raises:
        FatError: If batch_size, workers or seed is out of range.
    """

    def __init__(
        self,
        calibration: ImageDataset,
        train: ImageDataset,
        validation: ImageDataset,
        test: ImageDataset,
        *,
        batch_size: int = 16,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise FatError(f"data.batch_size is {batch_size}; it must be at least 1.")
        if workers is not None and workers < 0:
            raise FatError(f"data.workers is {workers}; it must be 0 or more, or null to choose.")
        if seed < 0:
            raise FatError(f"The seed is {seed}; it must not be negative.")
        self.calibration = calibration
        self.train = train
        self.validation = validation
        self.test = test
        self.batch_size = batch_size
        self.workers = _usable_workers() if workers is None else workers
        self.seed = seed

    @classmethod
    def photos(
        cls,
        preprocessing: Preprocessing,
        *,
        train_images: int = 1000,
        calibration_images: int = 100,
        validation_images: int = 100,
        test_images: int = 300,
        batch_size: int = 16,
        workers: int | None = None,
        seed: int = 0,
        scale: tuple[float, float] = (0.35, 1.0),
    ) -> FatDataModule:
        """Random crops of the photographs inside scikit-image; each split has its own photographs.

        Training crops differ from epoch to epoch; the others are the same in every pass, and
        validation and test crops are the same for every seed.

        Args:
            preprocessing: How the network wants its images.
            train_images: Training crops per epoch.
            calibration_images: Crops of training photographs for calibration.
            validation_images: Validation crops.
            test_images: Test crops.
            batch_size: Images per batch.
            workers: Processes that decode images; None chooses.
            seed: What training and calibration crops follow.
            scale: Smallest and largest share of the photograph's area in a crop.

        Raises:
            FatError: If a photograph is not installed or a number is out of range.
        """
        _check_counts(
            train_images=train_images,
            calibration_images=calibration_images,
            validation_images=validation_images,
            test_images=test_images,
        )
        crops = RandomCropTransform(preprocessing, scale)

        def split(name: str, photos: Sequence[str], count: int, key: int) -> ImageDataset:
            return ImageDataset(PhotoSource(photos, count), crops, split=name, seed=key)

        return cls(
            split("calibration", TRAIN_PHOTOS, calibration_images, seed),
            split("training", TRAIN_PHOTOS, train_images, seed),
            split("validation", VALIDATION_PHOTOS, validation_images, _EVAL_SEED),
            split("test", TEST_PHOTOS, test_images, _EVAL_SEED),
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )

    @classmethod
    def folder(
        cls,
        root: str | os.PathLike[str],
        preprocessing: Preprocessing,
        *,
        test_root: str | os.PathLike[str] | None = None,
        classes: Mapping[str, int] | Sequence[str] | None = None,
        num_classes: int | None = None,
        train_images: int | None = None,
        calibration_images: int = 100,
        validation_images: int | None = None,
        test_images: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 16,
        workers: int | None = None,
        seed: int = 0,
        scale: tuple[float, float] = (0.35, 1.0),
    ) -> FatDataModule:
        """Any folder of images, searched recursively.

        With a subfolder ``train``, that is the pool of training images; the first of ``val``,
        ``validation``, ``test`` beside it is the test set. ``test_root`` overrides the latter.
        Without a test folder ``test_fraction`` of all images is set apart. Validation images are
        always taken from the pool. All samples are uniform and follow the seed.

        Args:
            root: The folder.
            preprocessing: How the network wants its images.
            test_root: A folder of test images, outside the pool.
            classes: Names of the class folders in the order of the logits, or name to index.
            num_classes: Number of logits.
            train_images: At most so many training images; None takes all.
            calibration_images: How many of the training images calibrate (fewer if there are
                fewer).
            validation_images: At most so many validation images; None takes the whole fraction.
            test_images: At most so many test images; None takes all.
            validation_fraction: Share of the images that is held out of the pool for validation.
            test_fraction: Share of the images that is set apart for the test if there is no test
                folder.
            batch_size: Images per batch.
            workers: Processes that decode images; None chooses.
            seed: What all samples, the order and the crops follow.
            scale: Smallest and largest share of the image's area in a training crop.

        Raises:
            FatError: If a folder is missing, empty or overlaps the other, there are fewer than
                three images (two with a test folder), or a number is out of range.
        """
        _check_counts(
            train_images=train_images,
            calibration_images=calibration_images,
            validation_images=validation_images,
            test_images=test_images,
        )
        for key, value in (
            ("validation", validation_fraction),
            ("test", test_fraction),
        ):
            if not 0 < value < 1:
                raise FatError(f"data.{key}_fraction is {value}; allowed: more than 0, below 1.")
        if validation_fraction + test_fraction >= 1:
            raise FatError(
                f"data.validation_fraction {validation_fraction} and data.test_fraction "
                f"{test_fraction} leave nothing to train on; their sum must be below 1."
            )
        pool_root, held_out = _find_folders(Path(root).expanduser(), test_root)
        pool = FolderSource(pool_root, classes, num_classes)
        order = generator(seed, _SPLIT_DRAW).permutation(len(pool))
        if held_out is None:
            test_source, taken = pool, _share(len(pool), test_fraction)
            tests, order = order[:taken], order[taken:]
        else:
            test_source = FolderSource(held_out, classes, num_classes)
            tests = generator(seed, _SPLIT_DRAW).permutation(len(test_source))
        held = _share(len(pool), validation_fraction)
        if len(order) - held < 1:
            least = 3 if held_out is None else 2
            raise FatError(
                f"The folder {pool_root} holds {len(pool)} image(s); training, validation and "
                f"test need at least {least}. Type data.root=DIR with more, or data=photos."
            )
        held_images, trains = order[:held], order[held:][:train_images]
        picks = generator(seed, _CALIBRATION_DRAW).permutation(trains)[:calibration_images]
        middle, crops = (
            EvalTransform(preprocessing),
            RandomCropTransform(preprocessing, scale),
        )
        return cls(
            ImageDataset(pool, middle, indices=picks, split="calibration", seed=seed),
            ImageDataset(pool, crops, indices=np.sort(trains), split="training", seed=seed),
            ImageDataset(
                pool,
                middle,
                indices=np.sort(held_images[:validation_images]),
                split="validation",
                seed=seed,
            ),
            ImageDataset(
                test_source,
                middle,
                indices=np.sort(tests[:test_images]),
                split="test",
                seed=seed,
            ),
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )

    @property
    def labelled(self) -> bool:
        """Whether the test images have labels, so that accuracies can be reported."""
        return self.test.source.labelled

    def setup(self, stage: str | None = None) -> None:
        """Say how many images there are. The splits exist from the start."""
        log.info(
            "Images: %s; %s.",
            ", ".join(f"{len(data)} {name}" for name, data in self._splits().items()),
            "labelled" if self.labelled else "without labels",
        )

    def calibration_dataloader(self) -> ImageLoader:
        """Return the calibration batches, in a fixed order."""
        return self._loader(self.calibration)

    def train_dataloader(self) -> ImageLoader:
        """Return the training batches, shuffled anew for each epoch that the sampler is set to."""
        return self._loader(self.train, EpochSampler(len(self.train), self.seed))

    def val_dataloader(self) -> ImageLoader:
        """Return the validation batches, in a fixed order."""
        return self._loader(self.validation)

    def test_dataloader(self) -> ImageLoader:
        """Return the test batches, in a fixed order."""
        return self._loader(self.test)

    def example_batch(self, count: int = 8) -> Batch:
        """Return the first readable calibration images and labels, loaded in this process.

        Raises:
            FatError: If none of the calibration images can be read.
        """
        items = []
        for position in range(len(self.calibration)):
            item = self.calibration[position]
            if not isinstance(item, UnreadableImage):
                items.append(item)
            if len(items) == count:
                break
        if not items:
            raise FatError("None of the calibration images can be read. Type data.root=DIR.")
        parts, labels, _ = collate(items)
        return self.calibration.transform.finish(*parts), labels

    def summary(self) -> dict[str, Any]:
        """Return counts, labels and skipped images of each split, as plain values for a report."""
        splits = {
            name: {
                "images": len(data),
                "labelled": data.source.labelled,
                "skipped": len(data.skipped),
                "first_skipped": list(data.skipped.reasons)[:5],
            }
            for name, data in self._splits().items()
        }
        return {
            "labelled": self.labelled,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "splits": splits,
        }

    def _splits(self) -> dict[str, ImageDataset]:
        return {
            "calibration": self.calibration,
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }

    def _loader(self, data: ImageDataset, sampler: EpochSampler | None = None) -> ImageLoader:
        return ImageLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=sampler is not None and len(data) >= self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Otherwise each pass would advance the global random state by one draw.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _usable_workers() -> int:
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # what this process may use, not what exists
    else:
        cores = os.cpu_count() or 1
    return min(max(cores - 1, 0), 8)


def _check_counts(**counts: int | None) -> None:
    for key, value in counts.items():
        if value is not None and value < 1:
            raise FatError(f"data.{key} is {value}; it must be at least 1, or left out.")


def _share(total: int, fraction: float) -> int:
    return max(1, round(total * fraction))


def _find_folders(root: Path, test_root: str | os.PathLike[str] | None) -> tuple[Path, Path | None]:
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
