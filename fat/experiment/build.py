"""Build what a config describes: the images, the float network's inputs, and the export backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat.data.config import DataConfig
from fat.data.datamodule import FatDataModule
from fat.data.distill.synthesis import distilled_folder
from fat.data.imagenet.subset import choose
from fat.data.sources import builtin, hub
from fat.data.sources.base import ImageSource
from fat.data.sources.folder import FolderSource, folder_classes
from fat.data.sources.manifest import ImageIndex
from fat.data.splits import find_folders
from fat.experiment.config import ExportConfig, missing_root
from fat.export.base import ExportBackend
from fat.export.exporter import export
from fat.export.registry import make_target
from fat.models.float_model import FloatNetwork, Preprocessing
from fat.models.labels import class_names
from fat.models.student import Student
from fat.training.config import FinetuneSpec
from fat.training.finetuning import FinetuneResult, finetune_cached
from fat.utils.batches import AtMost, Images
from fat.utils.errors import FatError

__all__ = [
    "STEM",
    "InputSpec",
    "export_backend",
    "export_student",
    "finetuned",
    "for_images",
    "make_data",
    "own_classes",
]


@dataclass(frozen=True)
class InputSpec:
    """Input requirements of the float model.

    Attributes:
        preprocessing: Size, normalization and crop of the images.
        num_classes: Number of logits.
        classes: Names of the classes in the order of the logits; ``None`` for ImageNet's.
        network: The float network itself, from which images can be distilled.
    """

    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    network: nn.Module | None = None

    @classmethod
    def of(cls, source: FloatNetwork) -> InputSpec:
        """Return those of a float network."""
        return cls(source.preprocessing, source.num_classes, source.classes, source.network)

    def names(self) -> list[str] | None:
        """Return the names that class folders may have; ``None`` if they are unknown."""
        return list(self.classes) if self.classes else class_names(self.num_classes)


@dataclass(frozen=True)
class _Request:
    config: DataConfig
    inputs: InputSpec
    seed: int
    device: torch.device | None
    progress: bool

    def root(self) -> Path:
        if not self.config.root:
            raise missing_root(self.config.source)
        return Path(self.config.root).expanduser()

    def folder(self, root: str | Path) -> FolderSource:
        return FolderSource(root, self.inputs.names(), self.inputs.num_classes)

    def real_test(self) -> ImageSource | None:
        """Return the images of ``test_root``, if there is one."""
        return self.folder(self.config.test_root) if self.config.test_root else None


def for_images(source: FloatNetwork, config: DataConfig) -> FloatNetwork:
    """Return the float network with the input size and the crop of the config."""
    preprocessing = source.preprocessing
    if config.image_size is not None:
        preprocessing = replace(preprocessing, size=(config.image_size, config.image_size))
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    return replace(source, preprocessing=preprocessing)


def own_classes(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the data's own classes, for fine-tuning a network on them.

    Raises:
        FatError: If the data has no labels.
    """
    if config.source in _BUILTIN:
        return _BUILTIN[config.source](config.root).classes
    if config.source == "folder" and config.root:
        pool, _ = find_folders(Path(config.root).expanduser(), config.test_root)
        return folder_classes(pool)
    if config.source == "imagenette":
        return folder_classes(builtin.imagenette(config.root) / "train")
    raise FatError(
        f"teacher=finetune needs images with classes, which data={config.source} lacks. Type "
        "data=folder data.root=DIR with one subfolder for each class, or data=digits."
    )


def finetuned(
    source: FloatNetwork,
    data: FatDataModule,
    spec: FinetuneSpec,
    classes: tuple[str, ...],
    *,
    seed: int,
    device: torch.device,
    progress: bool,
) -> tuple[FloatNetwork, FinetuneResult]:
    """Fine-tune the float network with a new classifier for the data's own classes.

    Args:
        source: The pretrained network.
        data: Labeled images.
        spec: Options of the training.
        classes: Names of the classes in the order of the labels.
        seed: Seed of the new classifier's initial weights.
        device: Device of the training.
        progress: Whether to show a progress bar.

    Raises:
        FatError: If labels are missing, or training fails.
    """
    return finetune_cached(
        source,
        data.train_dataloader().to(device),
        data.val_dataloader().to(device),
        spec,
        data_key=data.fingerprint(),
        classes=classes,
        seed=seed,
        progress=progress,
        trainer_options={"accelerator": "cpu" if device.type == "cpu" else "gpu"},
    )


def make_data(
    config: DataConfig,
    inputs: InputSpec,
    seed: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> FatDataModule:
    """Return the data module that a config describes.

    Args:
        config: Options of conf/data.
        inputs: Input requirements of the float model.
        seed: Seed of samples, training order and crops.
        device: Device on which images are distilled; ``None`` takes the network's.
        progress: Whether to show progress bars while images are listed, distilled or cached.

    Raises:
        FatError: For anything that the user can fix.
    """
    if config.source not in _BUILDERS:
        raise FatError(f"data={config.source} is for evaluate.py. Type data={'|'.join(_BUILDERS)}.")
    request = _Request(config, inputs, seed, device, progress)
    if config.index is None:
        data = _BUILDERS[config.source](request)
    else:
        data = _of_index(request, _load_index(config))
    if config.cache != "none":
        data.cache(config.cache, config.cache_dir, config.cache_side, progress=progress)
    return data


def _photos(request: _Request) -> FatDataModule:
    return FatDataModule.photos(
        request.inputs.preprocessing, request.config, test=request.real_test(), seed=request.seed
    )


def _folder(request: _Request) -> FatDataModule:
    return FatDataModule.folder(
        request.root(),
        request.inputs.preprocessing,
        request.config,
        test_root=request.config.test_root,
        classes=request.inputs.names(),
        num_classes=request.inputs.num_classes,
        progress=request.progress,
        seed=request.seed,
    )


def _imagenette(request: _Request) -> FatDataModule:
    root = builtin.imagenette(request.config.root)
    return _folder(replace(request, config=replace(request.config, root=str(root))))


def _imagenet(request: _Request) -> FatDataModule:
    config, inputs = request.config, request.inputs
    names = inputs.names()
    if names is None or len(names) != 1000:
        raise FatError(
            f"data=imagenet has 1000 classes, the network has {inputs.num_classes}. Type "
            "data=folder data.root=DIR, or use a network with ImageNet's classes."
        )
    if config.validation_images is None:
        raise FatError(
            "data=imagenet needs a number of validation images: type data.validation_images=1000."
        )
    root = hub.fetch(config.root) if hub.is_hub_root(config.root) else request.root()
    index = choose(
        root,
        classes=names,
        num_classes=inputs.num_classes,
        fraction=config.fraction,
        train_images=config.train_images,
        calibration_images=config.calibration_images,
        validation_images=config.validation_images,
        test_images=config.test_images,
        seed=request.seed,
        val_root=config.test_root,
        progress=request.progress,
    )
    return _of_index(request, index)


def _load_index(config: DataConfig) -> ImageIndex:
    """Read the index; ``data.root`` overrides where its images are."""
    assert config.index is not None
    if config.source == "distilled":
        try:
            return ImageIndex.load(config.index, None, config.test_root)
        except FatError as error:
            raise FatError(
                f"{error} The images of data=distilled were made from the network; to use "
                "others, type data=folder data.root=DIR or data=photos."
            ) from error
    if config.root is None or config.source == "imagenet":
        return ImageIndex.load(config.index, config.root, config.test_root)
    root = builtin.imagenette(config.root) if config.source == "imagenette" else Path(config.root)
    pool, held_out = find_folders(root.expanduser(), config.test_root)
    return ImageIndex.load(config.index, pool, held_out)


def _of_index(request: _Request, index: ImageIndex) -> FatDataModule:
    index.check_labels(request.inputs.num_classes)
    return FatDataModule.of_index(
        index, request.inputs.preprocessing, request.config, seed=request.seed
    )


def _builtin(request: _Request) -> FatDataModule:
    config, inputs = request.config, request.inputs
    found = _BUILTIN[config.source](config.root)
    if inputs.num_classes != len(found.classes):
        raise FatError(
            f"data={config.source} has {len(found.classes)} classes of its own, the network has "
            f"{inputs.num_classes} logits. Type teacher=finetune to give it a new classifier, or "
            "model.weights=PATH with weights for these classes."
        )
    return FatDataModule.of_sources(
        found.train, found.test, inputs.preprocessing, config, seed=request.seed
    )


def _distilled(request: _Request) -> FatDataModule:
    network = request.inputs.network
    if network is None:
        raise FatError(
            "data=distilled needs a float network with batch norms, which a finished run no longer "
            "has. Type data=folder data.root=DIR, or data=photos."
        )
    images = distilled_folder(
        network,
        request.inputs.preprocessing,
        request.config.distill,
        seed=request.seed,
        device=request.device,
        progress=request.progress,
    )
    return FatDataModule.distilled(
        images,
        request.inputs.preprocessing,
        request.config,
        test=request.real_test(),
        seed=request.seed,
    )


_BUILTIN: dict[str, Callable[[str | None], builtin.LabeledSet]] = {
    "digits": lambda root: builtin.digits(),
    "cifar10": builtin.cifar10,
}
_BUILDERS: dict[str, Callable[[_Request], FatDataModule]] = {
    "photos": _photos,
    "folder": _folder,
    "imagenet": _imagenet,
    "imagenette": _imagenette,
    "distilled": _distilled,
    **dict.fromkeys(_BUILTIN, _builtin),
}


STEM = "student"
"""Name of the exported file in the run directory, without its suffix."""


def export_backend(config: ExportConfig) -> ExportBackend | None:
    """Return the export backend that a config names; ``None`` for ``none``.

    Raises:
        FatError: If it is not installed, or does not support an option.
    """
    if config.target == "none":
        return None
    target = make_target(config.target, opset=config.opset, integer_io=config.integer_io)
    target.check()
    return target


def export_student(
    student: Student,
    target: ExportBackend,
    directory: Path,
    images: Images,
    config: ExportConfig,
    metrics: Mapping[str, Any],
    *,
    progress: bool,
) -> dict[str, Any]:
    """Export a student into a run directory and verify the file.

    Args:
        student: Calibrated student; it is moved to the CPU, where the runtimes run.
        target: Result of :func:`export_backend`.
        directory: The run directory.
        images: Test images, on the CPU.
        config: Options of conf/export.
        metrics: The run's metrics, which are stored in the file.
        progress: Whether to show a progress bar.

    Returns:
        The result of :func:`fat.export.exporter.export`.
    """
    stored = ("float", "calibrated", "trained", "accuracy_drop")
    return export(
        student.to("cpu"),
        directory / f"{STEM}{target.suffix}",
        target,
        AtMost(images, config.images),
        metrics={key: metrics[key] for key in stored},
        progress=f"Verify {target.name}" if progress else None,
    )
