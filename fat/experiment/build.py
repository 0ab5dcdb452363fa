"""What goes into a run: the images that a config asks for, and the float network they are for."""

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
from fat.data.sources import builtin as ready
from fat.data.sources import hub
from fat.data.sources.base import ImageSource
from fat.data.sources.folder import FolderSource, folder_classes
from fat.data.sources.manifest import ImageIndex
from fat.data.splits import find_folders
from fat.experiment.config import ExportConfig
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
    "asked_target",
    "export_student",
    "finetuned",
    "for_images",
    "make_data",
    "own_classes",
]


@dataclass(frozen=True)
class InputSpec:
    """Whom the images are for.

    Attributes:
        preprocessing: How the network wants them.
        num_classes: Number of its logits.
        classes: Names of the classes in the order of the logits, None for ImageNet's.
        network: The float network itself, for images that are made from it.
    """

    preprocessing: Preprocessing
    num_classes: int
    classes: tuple[str, ...] | None = None
    network: nn.Module | None = None

    @classmethod
    def of(cls, source: FloatNetwork) -> InputSpec:
        """That of a float network."""
        return cls(source.preprocessing, source.num_classes, source.classes, source.network)

    def names(self) -> list[str] | None:
        """Names that class folders may have, None where nobody knows them."""
        return list(self.classes) if self.classes else class_names(self.num_classes)


@dataclass(frozen=True)
class _Request:
    config: DataConfig
    target: InputSpec
    seed: int
    device: torch.device | None
    progress: bool

    def root(self) -> Path:
        if not self.config.root:
            source = self.config.source
            raise FatError(f"data={source} needs a folder: type data.root=DIR.")
        return Path(self.config.root).expanduser()

    def folder(self, root: str | Path) -> FolderSource:
        return FolderSource(root, self.target.names(), self.target.num_classes)

    def real_test(self) -> ImageSource | None:
        """The folder of test images that is asked for."""
        return self.folder(self.config.test_root) if self.config.test_root else None


def for_images(source: FloatNetwork, config: DataConfig) -> FloatNetwork:
    """Return the float network with the input size and the crop that ``data`` asks for."""
    preprocessing = source.preprocessing
    if config.image_size is not None:
        preprocessing = replace(preprocessing, size=(config.image_size, config.image_size))
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    return replace(source, preprocessing=preprocessing)


def own_classes(config: DataConfig) -> tuple[str, ...]:
    """Names of the data's own classes, for a network that is fine-tuned on them.

    Raises:
        FatError: If the data has no labels.
    """
    if config.source in _READY:
        return _READY[config.source](config.root).classes
    if config.source == "folder" and config.root:
        pool, _ = find_folders(Path(config.root).expanduser(), config.test_root)
        return folder_classes(pool)
    if config.source == "imagenette":
        return folder_classes(ready.imagenette(config.root) / "train")
    raise FatError(
        f"teacher=finetune needs images with classes, which data={config.source} has not. Type "
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
    """The float network with a classifier for the data's own classes, trained on its labels.

    Args:
        source: The pretrained network.
        data: Labelled images.
        spec: The recipe.
        classes: Names of the classes in the order of the labels.
        seed: What the new classifier's first weights follow.
        device: Where it is trained.
        progress: Whether to show a bar.

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
    target: InputSpec,
    seed: int,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> FatDataModule:
    """The four splits that a config asks for.

    Args:
        config: conf/data.
        target: Whom they are for.
        seed: What samples, order and crops follow.
        device: Where images are made that are made from the network; None: where that is.
        progress: Whether to show bars while images are listed, made or cached.

    Raises:
        FatError: For anything the user can mend.
    """
    if config.source not in _MAKE:
        raise FatError(f"data={config.source} is for evaluate.py. Type data={'|'.join(_MAKE)}.")
    request = _Request(config, target, seed, device, progress)
    if config.index is None:
        data = _MAKE[config.source](request)
    else:
        data = _of_index(request, _load_index(config))
    if config.cache != "none":
        data.cache(config.cache, config.cache_dir, config.cache_side, progress=progress)
    return data


def _photos(request: _Request) -> FatDataModule:
    return FatDataModule.photos(
        request.target.preprocessing, request.config, test=request.real_test(), seed=request.seed
    )


def _folder(request: _Request) -> FatDataModule:
    return FatDataModule.folder(
        request.root(),
        request.target.preprocessing,
        request.config,
        test_root=request.config.test_root,
        classes=request.target.names(),
        num_classes=request.target.num_classes,
        progress=request.progress,
        seed=request.seed,
    )


def _imagenette(request: _Request) -> FatDataModule:
    root = ready.imagenette(request.config.root)
    return _folder(replace(request, config=replace(request.config, root=str(root))))


def _imagenet(request: _Request) -> FatDataModule:
    config, target = request.config, request.target
    names = target.names()
    if names is None or len(names) != 1000:
        raise FatError(
            f"data=imagenet has 1000 classes, the network has {target.num_classes}. Type "
            "data=folder data.root=DIR, or take a network with ImageNet's classes."
        )
    if config.validation_images is None:
        raise FatError("data=imagenet needs a number: type data.validation_images=1000.")
    root = hub.fetch(config.root) if hub.is_hub_root(config.root) else request.root()
    index = choose(
        root,
        classes=names,
        num_classes=target.num_classes,
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
    """The index, and where its images lie now if ``data.root`` says so."""
    assert config.index is not None
    if config.source == "distilled":
        try:
            return ImageIndex.load(config.index, None, config.test_root)
        except FatError as error:
            raise FatError(
                f"{error} The images of data=distilled were made from the network; to judge on "
                "others, type data=folder data.root=DIR or data=photos."
            ) from error
    if config.root is None or config.source == "imagenet":
        return ImageIndex.load(config.index, config.root, config.test_root)
    root = ready.imagenette(config.root) if config.source == "imagenette" else Path(config.root)
    pool, held_out = find_folders(root.expanduser(), config.test_root)
    return ImageIndex.load(config.index, pool, held_out)


def _of_index(request: _Request, index: ImageIndex) -> FatDataModule:
    index.check_labels(request.target.num_classes)
    return FatDataModule.of_index(
        index, request.target.preprocessing, request.config, seed=request.seed
    )


def _ready(request: _Request) -> FatDataModule:
    config, target = request.config, request.target
    found = _READY[config.source](config.root)
    if target.num_classes != len(found.classes):
        raise FatError(
            f"data={config.source} has {len(found.classes)} classes of its own, the network has "
            f"{target.num_classes} logits. Type teacher=finetune to give it a new classifier, or "
            "model.weights=PATH with weights for these classes."
        )
    return FatDataModule.of_sources(
        found.train, found.test, target.preprocessing, config, seed=request.seed
    )


def _distilled(request: _Request) -> FatDataModule:
    network = request.target.network
    if network is None:
        raise FatError(
            "data=distilled makes images from a float network with batch norms, which a finished "
            "run no longer has. Type data=folder data.root=DIR, or data=photos."
        )
    images = distilled_folder(
        network,
        request.target.preprocessing,
        request.config.distill,
        seed=request.seed,
        device=request.device,
        progress=request.progress,
    )
    return FatDataModule.distilled(
        images,
        request.target.preprocessing,
        request.config,
        test=request.real_test(),
        seed=request.seed,
    )


_READY: dict[str, Callable[[str | None], ready.LabeledSet]] = {
    "digits": lambda root: ready.digits(),
    "cifar10": ready.cifar10,
}
_MAKE: dict[str, Callable[[_Request], FatDataModule]] = {
    "photos": _photos,
    "folder": _folder,
    "imagenet": _imagenet,
    "imagenette": _imagenette,
    "distilled": _distilled,
    **dict.fromkeys(_READY, _ready),
}


STEM = "student"
"""Name of the file in the run directory, without its suffix."""


def asked_target(config: ExportConfig) -> ExportBackend | None:
    """What a config asks to export to, ``None`` for nothing.

    Raises:
        FatError: If there is no such target, it is not installed, or an option is out of range.
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
    """Write a student into a run directory and verify the file.

    Args:
        student: Calibrated; it is moved to the CPU, where runtimes are.
        target: From :func:`asked_target`.
        directory: The run directory.
        images: Test images, on the CPU.
        config: conf/export.
        metrics: The run's metrics; its figures are kept in the file.
        progress: Whether to show a bar.

    Returns:
        What :func:`fat.export.exporter.export` returns.
    """
    kept = ("float", "calibrated", "trained", "accuracy_drop")
    return export(
        student.to("cpu"),
        directory / f"{STEM}{target.suffix}",
        target,
        AtMost(images, config.images),
        metrics={key: metrics[key] for key in kept},
        progress=f"Verify {target.name}" if progress else None,
    )
