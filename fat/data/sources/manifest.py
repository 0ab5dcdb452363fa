"""Index of the images that a run uses, saved as images.csv so that other runs can reuse it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from fat.data.sources.archives import Place, Reader
from fat.data.sources.base import ImageSource
from fat.data.sources.decoding import UNKNOWN, UnreadableImage, open_image
from fat.data.sources.folder import check_folder
from fat.utils.errors import FatError, abbreviated, unknown_name
from fat.utils.io import write_atomic

__all__ = [
    "PHOTO_TESTS",
    "SPLITS",
    "ImageIndex",
    "IndexSource",
    "Record",
    "check_labels",
    "relative",
]

logger = logging.getLogger(__name__)

SPLITS = ("calibration", "train", "validation", "test")

PHOTO_TESTS = "photo_tests"
"""Option of an index: number of test images that are crops of installed photographs."""

_FORMAT = 1
_TITLE = "# Images of a FAT run"
_BAR_DELAY = 2.0  # seconds before a progress bar appears
_CHOOSE_AGAIN = "or omit data.index to choose images again"


@dataclass(frozen=True, slots=True)
class Record:
    """An image of a split; fields that do not apply are −1 or "".

    Attributes:
        split: One of :data:`SPLITS`.
        path: The file or archive, relative to the index's root (absolute if it is outside); "" for
            an image that is not a file.
        member: Name in the archive.
        offset: First byte in a tar file.
        size: Bytes in a tar file.
        row: Row of a parquet file.
        name: Name of the image in messages.
        label: Class index, −1 if unknown.
        sha256: SHA-256 of the content, 64 hexadecimal digits.
    """

    split: str
    path: str
    member: str
    offset: int
    size: int
    row: int
    name: str
    label: int
    sha256: str

    @property
    def place(self) -> Place:
        """Location of the image's bytes."""
        return Place(self.path, self.offset, self.size, self.row)


_COLUMNS = tuple(column.name for column in fields(Record))


class IndexSource:
    """The images of one split of an index. Images that have changed since are errors.

    Args:
        records: The images.
        root: Folder that their paths are relative to.

    Raises:
        FatError: If some are not files, such as crops of installed photographs.
    """

    def __init__(self, records: Sequence[Record], root: Path) -> None:
        for record in records:
            if not record.path:
                raise FatError(
                    f"The index has the image {record.name}, which is not a file. Omit data.index: "
                    "such images are determined by the options of the run."
                )
        self.root = root
        self._records = tuple(records)
        self._reader = Reader(root)

    @property
    def labelled(self) -> bool:
        """``True`` if every image has a class."""
        return all(record.label != UNKNOWN for record in self._records)

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Decode the image.

        Raises:
            UnreadableImage: If it has not changed, but cannot be decoded.
            FatError: If it is missing or has changed.
        """
        return open_image(io.BytesIO(self.content(index)), self.name(index), short_side)

    def label(self, index: int) -> int:
        """Return the class index, −1 if unknown."""
        return self._records[index].label

    def name(self, index: int) -> str:
        """Return the path relative to the root, with the name in the archive."""
        return self._records[index].name

    def content(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            UnreadableImage: If it cannot be read.
            FatError: If it is missing or has changed.
        """
        record = self._records[index]
        try:
            content = self._reader.read(record.place)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FatError(
                f"The image {record.name} of the index is not in {self.root}. Type data.root=DIR "
                f"if the images have moved, {_CHOOSE_AGAIN}."
            ) from error
        except OSError as error:
            raise UnreadableImage(record.name, error.strerror or str(error)) from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise FatError(
                f"The image {record.name} in {self.root} has changed since the index was written. "
                "Restore it, or type data.root=DIR with a folder of the same images, "
                f"{_CHOOSE_AGAIN}."
            )
        return content

    def stamp(self, index: int) -> bytes:
        """Return the recorded SHA-256."""
        return self._records[index].sha256.encode()


@dataclass(frozen=True)
class ImageIndex:
    """The images of the four splits.

    Attributes:
        root: Folder that the records' paths are relative to.
        records: The images, split by split.
        seed: Seed of the choice.
        options: Other options of the choice, as plain values.
        val_root: Folder that paths of the test split are relative to, if it is another.
        shared: Pairs of splits that may have images in common.
    """

    root: Path
    records: tuple[Record, ...]
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    val_root: Path | None = None
    shared: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(
        cls,
        splits: Mapping[str, tuple[ImageSource, Sequence[int]]],
        *,
        root: str | os.PathLike[str],
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        val_root: str | os.PathLike[str] | None = None,
        shared: frozenset[tuple[str, str]] = frozenset(),
        progress: bool = True,
    ) -> ImageIndex:
        """Create an index of images of any sources.

        Unreadable images are left out with a warning. The index can load images again if their
        source has a method ``path`` (:class:`fat.data.sources.folder.FolderSource`).

        Args:
            splits: Source and indices of each split.
            root: Folder that paths are relative to.
            seed: Seed of the choice.
            options: Other options of the choice, as plain values.
            val_root: Folder that paths of the test split are relative to, if it is another.
            shared: Pairs of splits that may have images in common.
            progress: If ``True``, show a progress bar if it takes longer than two seconds.
        """
        _check_splits(splits)
        place = Path(root).expanduser().absolute()
        val_place = None if val_root is None else Path(val_root).expanduser().absolute()
        records: list[Record] = []
        unreadable: list[str] = []
        total = sum(len(indices) for _, indices in splits.values())
        with tqdm(
            desc="Hash images", total=total, leave=False, disable=not progress, delay=_BAR_DELAY
        ) as bar:
            for split, (source, indices) in splits.items():
                base = val_place if val_place and split == "test" else place
                for index in map(int, indices):
                    bar.update()
                    try:
                        content = source.content(index)
                    except UnreadableImage as error:
                        unreadable.append(error.name)
                        continue
                    path = getattr(source, "path", None)
                    where = "" if path is None else relative(path(index), base)
                    records.append(
                        Record(
                            split,
                            where,
                            "",
                            -1,
                            -1,
                            -1,
                            source.name(index),
                            source.label(index),
                            hashlib.sha256(content).hexdigest(),
                        )
                    )
        if unreadable:
            logger.warning("Leaving out images that cannot be read: %s.", abbreviated(unreadable))
        return cls(place, tuple(records), seed, options or {}, val_place, shared)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        val_root: str | os.PathLike[str] | None = None,
    ) -> ImageIndex:
        """Read a file that :meth:`save` wrote.

        Args:
            path: The file.
            root: Another folder with the same images.
            val_root: Another folder with the test images, if they are not below ``root``.

        Raises:
            FatError: If the file or the folder of images is missing, or the file is damaged.
        """
        head, records = _read(Path(path))
        place = Path(head["root"] if root is None else root).expanduser().absolute()
        check_folder(place)
        other = head["val_root"] if val_root is None else val_root
        val_place = None if other is None else Path(other).expanduser().absolute()
        if val_place is not None and not val_place.is_dir():
            raise FatError(
                f"The index {path} has its test images in {val_place}, which is not a folder. Type "
                "data.test_root=DIR."
            )
        shared = frozenset((a, b) for a, b in head["shared"])
        return cls(place, records, head["seed"], head["options"], val_place, shared)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a CSV file with one line per image, atomically.

        Raises:
            FatError: If it cannot be written.
        """
        return write_atomic(path, lambda temporary: _write(self, temporary))

    def source(self, split: str) -> IndexSource:
        """Return the images of a split as a source.

        Raises:
            FatError: If the split has none, or they are not files.
        """
        records = self.of_split(split)
        if not records:
            raise FatError(
                f"The index has no {split} images; it has: "
                + ", ".join(f"{count} {name}" for name, count in self.counts().items())
                + ". Omit data.index to choose images again."
            )
        elsewhere = self.val_root if split == "test" else None
        return IndexSource(records, elsewhere or self.root)

    def of_split(self, split: str) -> tuple[Record, ...]:
        """Return the records of a split, in order."""
        return tuple(record for record in self.records if record.split == split)

    def counts(self) -> dict[str, int]:
        """Return the number of images of each split."""
        counted = Counter(record.split for record in self.records)
        return {split: counted[split] for split in SPLITS}

    def check_disjoint(self) -> None:
        """Raise a FatError if two splits have an image in common, by content, unless allowed."""
        where: dict[str, dict[str, Record]] = {}
        allowed = {frozenset(pair) for pair in self.shared}
        common: dict[tuple[str, str], list[str]] = {}
        for record in self.records:
            others = where.setdefault(record.sha256, {})
            for split, other in others.items():
                if split != record.split and frozenset((split, record.split)) not in allowed:
                    pair = split, record.split
                    common.setdefault(pair, []).append(f"{other.name} = {record.name}")
            others.setdefault(record.split, record)
        for (a, b), names in common.items():
            raise FatError(
                f"{len(names)} images are in both the {a} and the {b} split, by content: "
                f"{abbreviated(names)}. The splits must be disjoint. Remove one of each, "
                f"{_CHOOSE_AGAIN}."
            )

    def without_copies(self, precedence: Sequence[str]) -> tuple[ImageIndex, tuple[Record, ...]]:
        """Remove images that another split has too, by content, from all splits but the first.

        Args:
            precedence: Splits in order of precedence; the others follow.

        Returns:
            The index without these images, and their records.
        """
        order = list(dict.fromkeys((*precedence, *SPLITS)))
        allowed = {frozenset(pair) for pair in self.shared}
        owners: dict[str, str] = {}
        for record in sorted(self.records, key=lambda record: order.index(record.split)):
            owners.setdefault(record.sha256, record.split)
        copies = tuple(
            record
            for record in self.records
            if (owner := owners[record.sha256]) != record.split
            and frozenset((owner, record.split)) not in allowed
        )
        removed = {(record.split, record.name) for record in copies}
        kept = tuple(
            record for record in self.records if (record.split, record.name) not in removed
        )
        return replace(self, records=kept), copies

    def check_labels(self, num_classes: int) -> None:
        """Raise a FatError if a label is not a class of the network, of ``num_classes`` logits."""
        check_labels(((r.name, r.label) for r in self.records), num_classes)


def relative(path: Path, base: Path) -> str:
    """Return a path with slashes, relative to the base if it is inside and else absolute."""
    path = Path(os.path.abspath(path))
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def check_labels(named: Iterable[tuple[str, int]], num_classes: int) -> None:
    """Raise a FatError if a label is neither a class of the network nor −1 (unknown).

    Args:
        named: Name and label of each image.
        num_classes: Number of logits.
    """
    wrong = [f"{name} ({k})" for name, k in named if not UNKNOWN <= k < num_classes]
    if wrong:
        raise FatError(
            f"{len(wrong)} images have labels that are not classes of the network, which are 0 to "
            f"{num_classes - 1}: {abbreviated(wrong)}. Type model.name=NAME with the network that "
            "these images are for, or data.root=DIR with others."
        )


def _check_splits(splits: Iterable[str]) -> None:
    for split in splits:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)


# ----------------------------------------------------------------------------------- the file


def _head(index: ImageIndex) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "images": len(index.records),
        "root": str(index.root),
        "val_root": None if index.val_root is None else str(index.val_root),
        "seed": index.seed,
        "options": dict(index.options),
        "shared": sorted(map(list, index.shared)),
    }


def _write(index: ImageIndex, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(f"{_TITLE}\n")
        for key, value in _head(index).items():
            file.write(f"# {key}: {json.dumps(value)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(map(astuple, index.records))


def _read(path: Path) -> tuple[dict[str, Any], tuple[Record, ...]]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise FatError(
            f"The index {path} cannot be read: {error.strerror or error}. Type data.index=FILE "
            "with the images.csv of a run."
        ) from error
    stream = io.StringIO(text, newline="")
    if stream.readline().strip() != _TITLE:
        raise FatError(
            f"{path} is not an index of images: its first line is not {_TITLE!r}. Type "
            "data.index=FILE with the images.csv of a run."
        )
    records: list[Record] = []
    try:
        head, columns = _read_head(stream)
        if tuple(next(csv.reader([columns]), ())) != _COLUMNS:
            raise ValueError(f"its columns are not {','.join(_COLUMNS)}")
        for row in csv.reader(stream):
            records.append(_record(row))
        if len(records) != head["images"]:
            raise ValueError(f"its head says that there are {head['images']}")
    except (ValueError, csv.Error) as error:
        raise FatError(
            f"The index {path} is damaged after {len(records)} images: {error}. Copy it again, "
            f"{_CHOOSE_AGAIN}."
        ) from error
    return head, tuple(records)


def _read_head(stream: io.StringIO) -> tuple[dict[str, Any], str]:
    """Read the comments; return them and the line after."""
    head: dict[str, Any] = {}
    while (line := stream.readline()).startswith("# "):
        key, _, value = line[2:].partition(": ")
        head[key] = json.loads(value)
    _check_head(head)
    return head, line


def _check_head(head: Mapping[str, Any]) -> None:
    wanted = {
        "format": int,
        "images": int,
        "root": str,
        "val_root": str | None,
        "seed": int,
        "options": dict,
        "shared": list,
    }
    for key, kind in wanted.items():
        if key not in head:
            raise ValueError(f"its head has no {key}")
        if not isinstance(head[key], kind) or "\0" in str(head[key]):
            raise ValueError(f"its {key} is {head[key]!r}")
    if head["format"] != _FORMAT:
        raise ValueError(f"its format is {head['format']}; this version of FAT reads {_FORMAT}")
    if not isinstance(head["options"].get(PHOTO_TESTS, 1), int):
        raise ValueError(f"its option {PHOTO_TESTS} is {head['options'][PHOTO_TESTS]!r}")
    pairs = [pair for pair in head["shared"] if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) < len(head["shared"]) or any(name not in SPLITS for p in pairs for name in p):
        raise ValueError(f"its shared splits are {head['shared']}")


def _record(row: Sequence[str]) -> Record:
    if len(row) != len(_COLUMNS):
        raise ValueError(f"{len(row)} columns, expected {len(_COLUMNS)}")
    split, path, member, offset, size, place, name, label, sha256 = row
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256[:70]!r} is not a SHA-256")
    if "\0" in path:
        raise ValueError(f"{path[:70]!r} is not a path")
    record = Record(
        split, path, member, int(offset), int(size), int(place), name, int(label), sha256
    )
    numbers = (record.offset, record.size, record.row, record.label)
    if not all(-(1 << 62) < number < 1 << 62 for number in numbers):
        raise ValueError(f"{numbers} are not a valid offset, size, row and label")
    return record
