"""Names and label files of ImageNet's images."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from fat.utils.errors import FatError

__all__ = ["LABEL_FILES", "find_labels", "stem"]

LABEL_FILES = (
    "ILSVRC2012_validation_ground_truth.txt with meta.mat beside it (both are in the devkit: "
    "ILSVRC2012_devkit_t12/data/ or ILSVRC2012_devkit_t12.tar.gz)",
    'val.txt with lines "ILSVRC2012_val_00000001.JPEG 65"',
    "LOC_val_solution.csv (Kaggle)",
    "imagenet_2012_validation_synset_labels.txt with one wnid per line",
)
"""Descriptions of the label files that flat validation images may have."""

_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_MAX_BYTES = 1 << 26  # a hundred times the size of the devkit's files
_WNID = re.compile(r"_n\d{8}$")

Lines = Iterator[tuple[str, str]]  # stem and wnid (or class index) of each image


def stem(name: str) -> str:
    """Return the name of an image that is the same in every form of ImageNet.

    Folders, the suffix, and the wnid that the Hugging Face hub appends are removed.

    Examples:
        >>> stem("train/n01440764/n01440764_10026.JPEG")
        'n01440764_10026'
        >>> stem("n01440764_10026_n01440764.JPEG")
        'n01440764_10026'
    """
    base = name.rpartition("/")[2]
    return _WNID.sub("", base.rpartition(".")[0] or base)


def find_labels(
    folders: Sequence[Path], index: Mapping[str, int]
) -> tuple[Path, dict[str, int]] | None:
    """Return the first label file in the folders, and the class of each stem in it.

    Args:
        folders: Folders to search.
        index: Class index by wnid.

    Raises:
        FatError: If the file is damaged or names an unknown class.
    """
    readers: dict[str, Callable[[Path], Lines]] = {
        _TRUTH: _ground_truth,
        f"{_DEVKIT}/data/{_TRUTH}": _ground_truth,
        f"{_DEVKIT}.tar.gz": _packed_devkit,
        "val.txt": _pairs,
        "LOC_val_solution.csv": _kaggle,
        "imagenet_2012_validation_synset_labels.txt": _synsets,
    }
    for folder in folders:
        for name, read in readers.items():
            path = folder / name
            if path.is_file():
                return path, _labels(path, read, index)
    return None


def _labels(path: Path, read: Callable[[Path], Lines], index: Mapping[str, int]) -> dict[str, int]:
    labels: dict[str, int] = {}
    try:
        for number, (name, given) in enumerate(read(path), start=1):
            known = given.isascii() and given.isdigit() and int(given) < len(index)
            if given not in index and not known:
                raise FatError(
                    f"Image {number} in {path}, {name}, has the class {given!r}; allowed are "
                    f"ImageNet's wnids and indices from 0 to {len(index) - 1}."
                )
            labels[name] = index[given] if given in index else int(given)
    # Text in another encoding, a damaged tar.gz, or an unexpected meta.mat.
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        tarfile.TarError,
        zlib.error,
        csv.Error,
    ) as error:
        raise FatError(
            f"The label file {path} cannot be read: {error or type(error).__name__}. Copy it "
            "again, or replace it by another: " + "; ".join(LABEL_FILES) + "."
        ) from error
    return labels


def _pairs(path: Path) -> Lines:
    for line in _lines(path.read_text(encoding="utf-8")):
        name, label = line.split()
        yield stem(name), label


def _kaggle(path: Path) -> Lines:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield stem(row["ImageId"]), row["PredictionString"].split()[0]


def _synsets(path: Path) -> Lines:
    return _numbered(_lines(path.read_text(encoding="utf-8")))


def _ground_truth(path: Path) -> Lines:
    meta = path.with_name(_META)
    if not meta.is_file():
        raise FatError(
            f"{path} holds ILSVRC's own class numbers, but the devkit's {_META}, which maps them "
            f"to wnids, is not in the same folder. Copy it to {meta}."
        )
    return _truth(path.read_text(encoding="utf-8"), meta)


def _packed_devkit(path: Path) -> Lines:
    with tarfile.open(path, "r:gz") as tar:
        truth, meta = (tar.extractfile(f"{_DEVKIT}/data/{name}") for name in (_TRUTH, _META))
        assert truth is not None
        assert meta is not None
        for name in (_TRUTH, _META):
            if tar.getmember(f"{_DEVKIT}/data/{name}").size > _MAX_BYTES:
                raise ValueError(f"its {name} is larger than the devkit's")
        return _truth(truth.read().decode(), io.BytesIO(meta.read()))


def _truth(text: str, meta: Path | io.BytesIO) -> Lines:
    wnids = _devkit_classes(meta)
    return _numbered([wnids[int(line)] for line in _lines(text)])


def _devkit_classes(meta: Path | io.BytesIO) -> dict[int, str]:
    """Return the wnid of each of ILSVRC's class numbers (1 to 1000, not in the order of wnids)."""
    try:
        synsets: Any = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
        numbers, wnids = (np.atleast_1d(synsets[key]) for key in ("ILSVRC2012_ID", "WNID"))
    except Exception as error:  # scipy raises nearly anything for damaged files
        raise ValueError(f"{_META} is not the devkit's: {error}") from error
    return {int(number): str(wnid) for number, wnid in zip(numbers, wnids, strict=True)}


def _numbered(wnids: Sequence[str]) -> Lines:
    for number, wnid in enumerate(wnids, start=1):
        yield f"ILSVRC2012_val_{number:08d}", wnid


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
