"""Datasets by name: digits (installed), CIFAR-10 and Imagenette (downloaded)."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Imagenette
from torchvision.datasets.utils import download_and_extract_archive

from fat.data.sources.base import ImageSource
from fat.data.sources.decoding import UNKNOWN
from fat.utils.errors import FatError, first_line
from fat.utils.io import cache_folder
from fat.utils.random import generator

__all__ = ["ArraySource", "LabeledSet", "cifar10", "digits", "imagenette"]

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_DIGITS_TEST = 0.25
_DIGITS_SEED = 0  # not the run's seed, so that all runs have the same test images
# Not torchvision's reader, which unpickles.
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"


@dataclass(frozen=True)
class LabeledSet:
    """A labeled dataset with its own test split.

    Attributes:
        train: Images for training and validation.
        test: Test images.
        classes: Names of the classes in the order of the labels.
    """

    train: ImageSource
    test: ImageSource
    classes: tuple[str, ...]


class ArraySource:
    """Images in memory.

    Args:
        pixels: uint8 [N, H, W, 3], or [N, H, W] for grayscale.
        labels: Class indices [N].
        name: Name of the dataset; image i is called ``"name#i"``.

    Raises:
        FatError: If a shape or type is wrong.
    """

    labelled = True

    def __init__(self, pixels: Pixels, labels: Labels, name: str) -> None:
        gray = pixels.ndim == 3
        if pixels.dtype != np.uint8 or not (gray or (pixels.ndim == 4 and pixels.shape[3] == 3)):
            raise FatError(
                f"Images of {name} are {pixels.dtype} {list(pixels.shape)}; expected uint8 "
                "[N, H, W, 3] or [N, H, W]."
            )
        if labels.shape != (len(pixels),) or (len(labels) and labels.min() < UNKNOWN):
            raise FatError(
                f"Labels of {name} are {list(labels.shape)}; expected one class index per image, "
                f"{len(pixels)} in total."
            )
        self._pixels = pixels
        self._labels = labels
        self._name = name

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the image."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def label(self, index: int) -> int:
        """Return the class index."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Return the name of the dataset and the index, such as ``"digits#7"``."""
        return f"{self._name}#{index}"

    def content(self, index: int) -> bytes:
        """Return the pixels in NumPy's file format."""
        stream = io.BytesIO()
        np.save(stream, self._pixels[index], allow_pickle=False)
        return stream.getvalue()


def digits() -> LabeledSet:
    """Return the 1,797 handwritten digits of scikit-learn, 8 × 8 gray pixels.

    A quarter of each class is the test set, the same for every run.

    Raises:
        FatError: If scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise FatError(
            "data=digits needs scikit-learn, which is not installed. Type pip install scikit-learn."
        )
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = np.round(loaded.images * (255 / 16)).astype(np.uint8)  # from values 0 to 16
    labels = loaded.target.astype(np.int64)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        indices = np.flatnonzero(labels == digit)
        order = generator(_DIGITS_SEED, digit).permutation(indices)
        test[order[: round(_DIGITS_TEST * len(indices))]] = True
    return LabeledSet(
        ArraySource(pixels[~test], labels[~test], "digits/train"),
        ArraySource(pixels[test], labels[test], "digits/test"),
        tuple(str(digit) for digit in range(10)),
    )


def cifar10(root: str | os.PathLike[str] | None = None) -> LabeledSet:
    """Return CIFAR-10, 50,000 + 10,000 images of 32 × 32 pixels; downloads 163 MB once.

    Args:
        root: Folder of the dataset; by default in the cache folder.

    Raises:
        FatError: If it cannot be downloaded.
    """
    place = _place(root, "cifar10")
    folder = place / "cifar-10-batches-bin"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    if not all((folder / name).is_file() for name in names):
        _download("cifar10", place, _CIFAR10, _CIFAR10_MD5)
    *train, test = (_cifar_batch(folder / name) for name in names)
    return LabeledSet(
        _joined(train, "cifar10/train"),
        _joined([test], "cifar10/test"),
        tuple(_CIFAR10_CLASSES.split()),
    )


def imagenette(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of Imagenette, 13,000 images of 10 ImageNet classes; downloads 326 MB once.

    Args:
        root: Folder of the dataset; by default in the cache folder.

    Returns:
        The folder with train/<wnid>/ and val/<wnid>/. The labels are ImageNet's.

    Raises:
        FatError: If it cannot be downloaded.
    """
    place = _place(root, "imagenette")
    url, md5 = Imagenette._ARCHIVES["320px"]
    folder = place / Path(url).stem
    if not all((folder / part).is_dir() for part in ("train", "val")):
        _download("imagenette", place, url, md5)
    return folder


def _place(root: str | os.PathLike[str] | None, name: str) -> Path:
    return cache_folder("downloads", name) if root is None else Path(root).expanduser()


def _download(name: str, place: Path, url: str, md5: str) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(url, str(place), md5=md5)
    # No route, no certificate, a wrong checksum, a full disk: the advice is the same for all.
    except Exception as error:
        reason = first_line(error)
        raise FatError(
            f"data={name} is not in {place} and could not be downloaded: {reason:.200}. Download "
            f"{url} elsewhere, unpack it and type data.root=DIR with the folder that it was "
            "unpacked in; or use data=photos or data=digits, which need no network."
        ) from error


def _cifar_batch(path: Path) -> tuple[Pixels, Labels]:
    """Read one file: a label byte and 3 × 32 × 32 pixel bytes per image."""
    content = np.fromfile(path, dtype=np.uint8)
    size = 1 + 3 * 32 * 32
    if len(content) == 0 or len(content) % size:
        raise FatError(
            f"{path} has {len(content)} bytes, not a whole number of CIFAR-10 images. Delete its "
            "folder to have it downloaded again."
        )
    rows = content.reshape(-1, size)
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), rows[:, 0].astype(np.int64)


def _joined(batches: Sequence[tuple[Pixels, Labels]], name: str) -> ArraySource:
    pixels, labels = zip(*batches, strict=True)
    return ArraySource(np.concatenate(pixels), np.concatenate(labels), name)
