"""LightningDataModule with the four splits of a run, and constructors for each kind of source."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch

from fat.data.cache import build_cache
from fat.data.config import DataOptions
from fat.data.dataset import (
    Batch,
    DistributedBatchSampler,
    EpochSampler,
    ImageDataset,
    ImageLoader,
    SequentialBatchSampler,
    check_seed,
    collate,
)
from fat.data.sources.base import ImageSource, PhotoSource
from fat.data.sources.decoding import UnreadableImage
from fat.data.sources.folder import FolderSource
from fat.data.sources.manifest import PHOTO_TESTS, ImageIndex
from fat.data.splits import CALIBRATION_DRAW, SPLIT_DRAW, DatasetFactory, find_folders, image_count
from fat.data.transforms import DeviceCropTransform
from fat.utils import distributed
from fat.utils.errors import FatError, abbreviated, unknown_name
from fat.utils.io import cache_folder
from fat.utils.random import generator

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = [
    "BATCH_SIZE",
    "TEST_PHOTOS",
    "TRAIN_PHOTOS",
    "VALIDATION_PHOTOS",
    "FatDataModule",
    "usable_workers",
]

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
"""Images per batch where no number is given."""

# Photographs of scikit-image, assigned by hand. Training covers the widest range of content: a
# person in saturated colors, a cluttered room, a gray outdoor scene, stained tissue (strong colors,
# fine texture), grass and brick (dense texture), coins (many objects on a plain background) and a
# star field (extreme activations). Validation and test each have objects of ImageNet classes (cup;
# cat and rocket), for confident predictions, and other content (stones; the moon). Drawings, text
# and small or blurred pictures are left out, and motorcycle_right, which shows the same scene as
# motorcycle_left.
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

# Evaluation crops of photographs do not depend on the run's seed, so that runs are comparable.
_EVAL_SEED = 0

# Default numbers of crops of photographs.
_TRAIN_CROPS, _VALIDATION_CROPS, _TEST_CROPS = 1000, 100, 300


class FatDataModule(pl.LightningDataModule):
    """Calibration, training, validation and test images, in batches of ``(images, labels)``.

    Images are normalized, float32 [N, 3, H, W]; labels are int64 [N], −1 if unknown. Order and
    pixels depend on the seed and the epoch, but not on the number of workers or the global random
    state. Unreadable images are skipped and counted (see :meth:`summary`).

    Args:
        calibration: Training images for calibration.
        train: Training images.
        validation: Images for choosing the best epoch, disjoint from the training images.
        test: Test images, disjoint from the others.
        batch_size: Images per batch over all processes, 16 by default. Training drops a short last
            batch if there is a full one.
        workers: Number of decoding processes, see :func:`usable_workers` for the default.
        seed: Seed of the training order.

    Attributes:
        index: Index of the images, if they are files. Its splits are disjoint by content.

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
        batch_size: int | None = None,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        DataOptions(batch_size=batch_size, workers=workers)  # checks them
        check_seed(seed)
        self.calibration = calibration
        self.train = train
        self.validation = validation
        self.test = test
        self.batch_size = BATCH_SIZE if batch_size is None else batch_size
        self.workers = usable_workers() if workers is None else workers
        self.seed = seed
        self.index: ImageIndex | None = None

    @classmethod
    def photos(
        cls,
        preprocessing: Preprocessing,
        spec: DataOptions | None = None,
        *,
        test: ImageSource | None = None,
        seed: int = 0,
        **options: Any,
    ) -> FatDataModule:
        """Create splits of random crops of scikit-image's photographs.

        Each split has its own photographs. Training crops change with the epoch. Calibration crops
        do not, and validation and test crops do not depend on the seed either.

        Args:
            preprocessing: Input requirements of the network.
            spec: Options; by default 1000 training crops per epoch, 100 validation crops and 300
                test crops.
            test: Test images in place of the photographs, at most ``test_images`` of them.
            seed: Seed of samples, training order and crops.
            **options: Single options of :class:`~fat.data.config.DataOptions`, over ``spec``.

        Raises:
            FatError: If a photograph is not installed or an option is not allowed.
        """
        spec = replace(spec or DataOptions(), **options)
        factory = _factory(preprocessing, spec, seed)

        def split(name: str, photos: Sequence[str], count: int, seed: int) -> ImageDataset:
            crops = factory.training_crops() if name == "training" else factory.random_crops()
            return ImageDataset(PhotoSource(photos, count), crops, split=name, seed=seed)

        train_crops = spec.train_images or _TRAIN_CROPS
        validation_crops = spec.validation_images or _VALIDATION_CROPS
        test_images = spec.test_images or _TEST_CROPS
        return cls(
            split("calibration", TRAIN_PHOTOS, spec.calibration_images, seed),
            split("training", TRAIN_PHOTOS, train_crops, seed),
            split("validation", VALIDATION_PHOTOS, validation_crops, _EVAL_SEED),
            _photo_tests(factory, test_images)
            if test is None
            else factory.sampled_test(test, test_images),
            **_loading(spec, seed),
        )

    @classmethod
    def folder(
        cls,
        root: str | os.PathLike[str],
        preprocessing: Preprocessing,
        spec: DataOptions | None = None,
        *,
        test_root: str | os.PathLike[str] | None = None,
        classes: Mapping[str, int] | Sequence[str] | None = None,
        num_classes: int | None = None,
        progress: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> FatDataModule:
        """Create splits of the images of a folder, searched recursively.

        The training pool is the subfolder ``train`` if there is one, or else the whole folder. The
        test images are those of ``test_root``, or the first subfolder of ``val``, ``validation``
        and ``test`` beside ``train``, or else ``test_fraction`` of the pool. Validation images are
        always taken from the pool. All samples are uniform and depend on the seed. Duplicates of
        test images are removed from training and validation.

        Args:
            root: The folder.
            preprocessing: Input requirements of the network.
            test_root: A folder of test images, outside the pool.
            classes: Names of the class folders in the order of the logits, or name to index.
            num_classes: Number of logits.
            progress: If ``True``, show progress bars for listing and hashing that take long.
            spec: Options.
            seed: Seed of samples, training order and crops.
            **options: Single options of :class:`~fat.data.config.DataOptions`, over ``spec``.

        Raises:
            FatError: If a folder is missing, empty or overlaps the other, there are fewer than
                three images (two with a test folder), or a number is out of range.
        """
        pool_root, held_out = find_folders(Path(root).expanduser(), test_root)
        spec = replace(spec or DataOptions(), **options)
        pool = FolderSource(pool_root, classes, num_classes, progress=progress)
        test = None
        if held_out is not None:
            test = FolderSource(held_out, classes, num_classes, progress=progress)
        data = cls.of_sources(
            pool, test, preprocessing, spec, what=f"The folder {pool_root}", seed=seed
        )
        data._create_index(pool_root, held_out, progress)
        return data

    @classmethod
    def of_sources(
        cls,
        pool: ImageSource,
        test: ImageSource | None,
        preprocessing: Preprocessing,
        spec: DataOptions | None = None,
        *,
        what: str = "The source",
        seed: int = 0,
        **options: Any,
    ) -> FatDataModule:
        """Create splits that are uniform samples of a source and depend on the seed.

        Args:
            pool: Source of training, calibration and validation images.
            test: Source of test images; ``None`` takes ``test_fraction`` of the pool.
            preprocessing: Input requirements of the network.
            what: Name of the pool in errors.
            spec: Options.
            seed: Seed of samples, training order and crops.
            **options: Single options of :class:`~fat.data.config.DataOptions`, over ``spec``.

        Raises:
            FatError: If there are fewer than three images (two with a test source), or a number
                is out of range.
        """
        spec = replace(spec or DataOptions(), **options)
        factory = _factory(preprocessing, spec, seed)
        order = generator(seed, SPLIT_DRAW).permutation(len(pool))
        if test is None:
            test_source, taken = pool, image_count(len(pool), spec.test_fraction)
            tests, order = order[:taken], order[taken:]
        else:
            test_source = test
            tests = generator(seed, SPLIT_DRAW).permutation(len(test))
        held = image_count(len(pool), spec.validation_fraction)
        if len(order) - held < 1:
            raise FatError(
                f"{what} holds {len(pool)} image(s); training, validation and test need at least "
                f"{3 if test is None else 2}. Type data.root=DIR with more, or data=photos."
            )
        validation, train = (
            order[:held][: spec.validation_images],
            order[held:][: spec.train_images],
        )
        calibration = generator(seed, CALIBRATION_DRAW).permutation(train)
        crops = factory.training_crops()
        return cls(
            factory.evaluation(pool, calibration[: spec.calibration_images], "calibration"),
            ImageDataset(pool, crops, indices=np.sort(train), split="training", seed=seed),
            factory.evaluation(pool, np.sort(validation), "validation"),
            factory.evaluation(test_source, np.sort(tests[: spec.test_images]), "test"),
            **_loading(spec, seed),
        )

    @classmethod
    def of_index(
        cls,
        index: ImageIndex,
        preprocessing: Preprocessing,
        spec: DataOptions | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> FatDataModule:
        """Create splits with exactly the images of an index.

        Args:
            index: The images of each split.
            preprocessing: Input requirements of the network.
            spec: Options; numbers and fractions of images have no effect.
            seed: Seed of training order and crops.
            **options: Single options of :class:`~fat.data.config.DataOptions`, over ``spec``.
        """
        spec = replace(spec or DataOptions(), **options)
        factory = _factory(preprocessing, spec, seed)

        def evaluation(split: str) -> ImageDataset:
            source = index.source(split)
            return factory.evaluation(source, np.arange(len(source)), split)

        index.check_disjoint()
        crops = factory.training_crops()
        train = ImageDataset(index.source("train"), crops, split="training", seed=seed)
        count = index.options.get(PHOTO_TESTS)
        test = evaluation("test") if count is None else _photo_tests(factory, count)
        data = cls(
            evaluation("calibration"), train, evaluation("validation"), test, **_loading(spec, seed)
        )
        data.index = index
        return data

    @classmethod
    def distilled(
        cls,
        images: str | os.PathLike[str],
        preprocessing: Preprocessing,
        spec: DataOptions | None = None,
        *,
        test: ImageSource | None = None,
        seed: int = 0,
        **options: Any,
    ) -> FatDataModule:
        """Create calibration, training and validation splits of synthesized images.

        Args:
            images: The folder of synthesized images.
            preprocessing: Input requirements of the network.
            test: Real test images; ``None`` takes crops of photographs.
            spec: Options; ``test_images`` is the number of crops of photographs, 300 by default.
            seed: Seed of samples, training order and crops.
            **options: Single options of :class:`~fat.data.config.DataOptions`, over ``spec``.

        Raises:
            FatError: If there are fewer than two images, or a number is out of range.
        """
        synthesized = FolderSource(images)
        spec = replace(spec or DataOptions(), **options)
        if test is None:
            factory = _factory(preprocessing, spec, seed)
            photos = _photo_tests(factory, spec.test_images or _TEST_CROPS)
            data = cls.of_sources(synthesized, photos.source, preprocessing, spec, seed=seed)
            data.test = photos
        else:
            data = cls.of_sources(synthesized, test, preprocessing, spec, seed=seed)
        held_out = test.root if isinstance(test, FolderSource) else None
        data._create_index(Path(images), held_out, progress=False)
        return data

    def cache(
        self,
        mode: str,
        folder: str | os.PathLike[str] | None = None,
        short_side: int = 256,
        *,
        progress: bool = False,
    ) -> None:
        """Read the training images from a cache of resized images, which is built if necessary.

        Args:
            mode: ``"jpeg"``, ``"pixels"`` or ``"squares"``, see :func:`fat.data.cache.build_cache`.
            folder: Folder of the caches; ``~/.cache/fat/images`` by default.
            short_side: Length of the shorter side of cached images, pixels.
            progress: If ``True``, show a progress bar.

        Raises:
            FatError: If the cache cannot be built, or the mode is unknown.
        """
        if mode == "squares" and not isinstance(self.train.transform, DeviceCropTransform):
            raise FatError(
                "data.cache=squares is for crops on the device: type data.augment=device, or "
                "data.cache=pixels."
            )
        place = cache_folder("images") if folder is None else Path(folder).expanduser()
        self.train.source = build_cache(
            self.train.source,
            [int(i) for i in self.train.indices],
            mode=mode,
            short_side=short_side,
            folder=place,
            workers=self.workers,
            progress=progress,
        )

    def _create_index(self, root: Path, test_root: Path | None, progress: bool) -> None:
        """Hash the images, and remove duplicates of test and validation images."""
        splits = {
            "test": self.test,
            "validation": self.validation,
            "train": self.train,
            "calibration": self.calibration,
        }
        options = {}
        if isinstance(self.test.source, PhotoSource):  # not files; their number determines them
            options[PHOTO_TESTS] = len(splits.pop("test"))
        index = ImageIndex.of(
            {name: (data.source, data.indices.tolist()) for name, data in splits.items()},
            root=root,
            val_root=test_root,
            seed=self.seed,
            options=options,
            progress=progress,
            shared=frozenset({("calibration", "train")}),
        )
        kept, copies = index.without_copies(("test", "validation", "train"))
        if copies:
            logger.warning(
                "Leaving out %d images that are duplicates of test or validation images: %s.",
                len(copies),
                abbreviated([record.name for record in copies]),
            )
            removed = {(record.split, record.name) for record in copies}
            for name, data in splits.items():
                data.keep([(name, data.source.name(int(i))) not in removed for i in data.indices])
        self.index = kept

    @property
    def labelled(self) -> bool:
        """``True`` if the test images have labels, so that accuracies can be reported."""
        return self.test.source.labelled

    def setup(self, stage: str | None = None) -> None:
        """Log the number of images of each split. The splits exist from the start."""
        logger.info(
            "Images: %s; %s.",
            ", ".join(f"{len(data)} {name}" for name, data in self._splits().items()),
            "labeled" if self.labelled else "without labels",
        )

    def calibration_dataloader(self) -> ImageLoader:
        """Return the calibration batches, in a fixed order."""
        return self._loader(self.calibration)

    def train_dataloader(self) -> ImageLoader:
        """Return the training batches, shuffled differently in each epoch of the sampler."""
        return self._loader(self.train, EpochSampler(len(self.train), self.seed))

    def val_dataloader(self) -> ImageLoader:
        """Return the validation batches, in a fixed order."""
        return self._loader(self.validation)

    def test_dataloader(self) -> ImageLoader:
        """Return the test batches, in a fixed order."""
        return self._loader(self.test)

    def example_batch(self, count: int = 8, split: str = "calibration") -> Batch:
        """Return the first readable images of a split and their labels, loaded in this process.

        Args:
            count: Maximum number of images.
            split: ``"calibration"``, ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            FatError: If there is no such split, or none of its images can be read.
        """
        splits = self._splits()
        if split not in splits:
            raise unknown_name("split", split, splits)
        data, items = splits[split], []
        for position in range(len(data)):
            item = data[position]
            if not isinstance(item, UnreadableImage):
                items.append(item)
            if len(items) == count:
                break
        if not items:
            raise FatError(f"None of the {split} images can be read. Type data.root=DIR.")
        parts, labels, _, fatal = collate(items)
        if fatal:
            raise FatError(fatal)
        return data.transform.finish(*parts), labels

    def fingerprint(self) -> str:
        """Return a hash of the training and validation images, their labels, order and crops."""
        digest = hashlib.sha256()
        for data in (self.train, self.validation):
            about = (data.split, data.seed, self.batch_size, data.transform.settings())
            digest.update(repr(about).encode())
            for index in data.indices.tolist():
                content = hashlib.sha256(data.source.content(index)).hexdigest()
                digest.update(f"{content} {data.source.label(index)}".encode())
        return digest.hexdigest()

    def share_skipped(self) -> None:
        """Share the names of unreadable images among all processes."""
        for data in self._splits().values():
            for reasons in distributed.gather_objects(dict(data.skipped.reasons)):
                data.skipped.reasons.update(reasons)

    def summary(self) -> dict[str, Any]:
        """Return counts, labels and skipped images of each split as plain values for reports."""
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
        batches: DistributedBatchSampler | SequentialBatchSampler = SequentialBatchSampler(
            len(data), self.batch_size
        )
        if sampler is not None:
            processes = distributed.size()
            if self.batch_size % processes or len(data) < processes:
                raise FatError(
                    f"data.batch_size is {self.batch_size}, the images per step over all "
                    f"{processes} processes, and there are {len(data)} images: it must be a "
                    f"multiple of {processes}, and each process needs an image."
                )
            drop_last = len(data) >= self.batch_size
            batches = DistributedBatchSampler(sampler, self.batch_size, drop_last=drop_last)
        return ImageLoader(
            data,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            # Those of evaluation would idle most of the time; forking them again is cheap.
            persistent_workers=self.workers > 0 and (sampler is not None or not _forks()),
            # Without a generator each pass would advance the global random state.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _forks() -> bool:
    return multiprocessing.get_start_method() == "fork"


def _factory(preprocessing: Preprocessing, spec: DataOptions, seed: int) -> DatasetFactory:
    check_seed(seed)
    return DatasetFactory(preprocessing, spec, seed)


def _loading(spec: DataOptions, seed: int) -> dict[str, Any]:
    """Return the options that the data module itself takes."""
    return {"batch_size": spec.batch_size, "workers": spec.workers, "seed": seed}


def _photo_tests(factory: DatasetFactory, count: int) -> ImageDataset:
    source = PhotoSource(TEST_PHOTOS, count)
    return ImageDataset(source, factory.random_crops(), split="test", seed=_EVAL_SEED)


def usable_workers() -> int:
    """Return the default number of decoding processes: one less than the cores, at most 8.

    The cores are those that this process may use; several training processes on a machine divide
    them.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores - 1, 0), 8)
