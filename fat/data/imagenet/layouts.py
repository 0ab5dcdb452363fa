"""Layouts in which ImageNet is distributed, recognized by the files in its folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fat.data.imagenet.labels import LABEL_FILES, find_labels, stem
from fat.data.sources.archives import Member, parquet_rows, tar_members
from fat.data.sources.decoding import UNKNOWN, is_image
from fat.data.sources.listing import Builder, Entry, Listing, list_folder
from fat.utils.errors import FatError, abbreviated

__all__ = ["TRAINING_FORMS", "VALIDATION_FORMS", "Part", "find_training", "find_validation"]

logger = logging.getLogger(__name__)

TRAINING_FORMS = (
    "class folders train/<wnid>/*.JPEG",
    "the original archive ILSVRC2012_img_train.tar",
    "one archive per class, train/<wnid>.tar or <wnid>.tar",
    "parquet as on the Hugging Face hub, train-*.parquet, here or in a folder data/",
    "WebDataset shards *train*0000.tar and so on, with members .jpg and .cls",
)
VALIDATION_FORMS = (
    "class folders val/<wnid>/*.JPEG (or validation/, test/)",
    "a flat folder val/*.JPEG with a label file",
    "the original archive ILSVRC2012_img_val.tar with a label file",
    "parquet, validation-*.parquet or val-*.parquet, here or in a folder data/",
    "WebDataset shards *val*00.tar and so on",
)

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_TRAINING, _VALIDATION = ("train",), ("validation", "val")
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_WNID = re.compile(r"n\d{8}")
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_OF = re.compile(r"-of-(\d+)")  # number of files of a split in the hub's file names

Images = Callable[[Path], Iterator[Entry]]
LabelOf = Callable[[Entry], int]


@dataclass(frozen=True)
class Part:
    """Training or validation images in one layout.

    Attributes:
        form: Name of the layout.
        base: Folder that entries of the listing are relative to.
        label: Function that returns the class of an entry, −1 if it has none.
        archives: Files in ``base`` that hold the images; none if they are single files.
        images: Function that yields the entries of an archive.
    """

    form: str
    base: Path
    label: LabelOf
    archives: tuple[str, ...] = ()
    images: Images | None = None

    def __str__(self) -> str:
        return f"{self.form} in {self.base}"

    def overlaps(self, other: Part) -> bool:
        """Return whether both have images in common."""
        if self.base.resolve() != other.base.resolve():
            return False
        return bool(set(self.archives) & set(other.archives)) or self.archives == other.archives

    def listing(self, progress: bool = True) -> Listing:
        """Return the listing of the images, from the cache if possible.

        Raises:
            FatError: If an archive is damaged, compressed, or holds something else.
        """
        images = self.images
        if images is None:
            return list_folder(self.base, progress=progress)

        def fill(builder: Builder) -> None:
            for archive in self.archives:
                path = self.base / archive
                builder.watch(archive)
                done = 0
                for entry in images(path):
                    builder.add(entry)
                    step = max(entry.size, 0)  # rows of parquet have no size of their own
                    builder.advance(step)
                    done += step
                builder.advance(path.stat().st_size - done)

        return Listing.of(
            self.base,
            "\0".join((self.form, *self.archives)),
            fill,
            total=sum((self.base / archive).stat().st_size for archive in self.archives),
            unit="B",
            progress=progress,
        )


def find_training(root: Path, classes: Sequence[str]) -> Part:
    """Find the training images below a folder.

    Args:
        root: The folder.
        classes: wnids in the order of the logits.

    Raises:
        FatError: If there are none in a known layout.
    """
    index = _positions(classes)
    found = [
        part
        for base in _bases(root)
        for folder in _existing(base / "train", base)
        for part in _training_forms(folder, index)
    ]
    found += _packed(root, _TRAINING)
    return _first(root, found, "training", TRAINING_FORMS, "data.root=DIR")


def find_validation(root: Path, classes: Sequence[str], val_root: Path | None = None) -> Part:
    """Find the validation images.

    Args:
        root: The folder with all of ImageNet, which may also hold a label file.
        classes: wnids in the order of the logits.
        val_root: The folder with the validation images, if it is another.

    Raises:
        FatError: If there are none in a known layout, or a flat folder has no label file.
    """
    index = _positions(classes)
    place = root if val_root is None else val_root
    bases = _bases(place)
    folders = _existing(*(base / name for base in bases for name in ("val", "validation")))
    if val_root is not None:
        folders.insert(0, val_root)
    tests = _existing(*(base / "test" for base in bases))
    found = [_class_folders(each, index) for each in (*folders, *tests) if _has_class(each, index)]
    flat: list[Part] = []
    if not found:
        flat = [Part("flat folder", each, _no_label) for each in folders if _has_image(each)]
        flat += [
            Part("flat archive", each, _no_label, (_VAL_TAR,), _members)
            for each in dict.fromkeys([*bases, *folders])
            if (each / _VAL_TAR).is_file()
        ]
    if flat:
        labels = find_labels([*folders, *bases, root], index)
        found = [] if labels is None else [_labelled(part, *labels) for part in flat]
    found += _packed(place, _VALIDATION)
    if flat and not found:
        raise FatError(
            f"The validation images, a {flat[0]}, have no label file. Put one of these in "
            f"{place}: {'; '.join(LABEL_FILES)}. Or sort the images into folders val/<wnid>/."
        )
    return _first(place, found, "validation", VALIDATION_FORMS, "data.test_root=DIR")


def _first(root: Path, found: Sequence[Part], what: str, forms: Sequence[str], option: str) -> Part:
    if not found:
        raise FatError(
            f"{root} holds no ImageNet {what} images in a known layout; it holds: "
            f"{_contents(root)}. Allowed: {'; '.join(forms)}. Type {option}."
        )
    logger.info("ImageNet %s images: %s.", what, found[0])
    for other in found[1:]:
        logger.info("Ignoring a second copy: %s.", other)
    return found[0]


def _contents(root: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in _scan(root))
    packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".zip"))]
    hint = f" (unpack {packed[0]}: single images cannot be read from it)" if packed else ""
    return (abbreviated(names, 12) or "nothing") + hint


# ------------------------------------------------------------------------------------ layouts


def _training_forms(folder: Path, index: Mapping[str, int]) -> Iterator[Part]:
    if _has_class(folder, index):
        yield _class_folders(folder, index)
    if (folder / _TRAIN_TAR).is_file():
        yield Part(
            "archive of class archives",
            folder,
            lambda entry: _class_of_tar(entry.member.partition("/")[0], index),
            (_TRAIN_TAR,),
            _nested_members,
        )
    tars = tuple(name for name in _archives(folder) if _class_of_tar(name, index) != UNKNOWN)
    if tars:
        yield Part(
            "class archives", folder, lambda entry: _class_of_tar(entry.file, index), tars, _members
        )


def _class_folders(folder: Path, index: Mapping[str, int]) -> Part:
    return Part(
        "class folders", folder, lambda entry: index.get(entry.folder.split(os.sep)[0], UNKNOWN)
    )


def _packed(root: Path, splits: Sequence[str]) -> list[Part]:
    """Find parquet files and shards of a split in the root, or the first subfolder with any."""
    split = "|".join(splits)
    forms = (
        ("parquet files", re.compile(rf"(?:{split})[^a-z].*\.parquet"), r".*\.parquet", _rows),
        ("WebDataset shards", re.compile(rf".*(?:{split}).*\d\.tar"), r".*\d\.tar", _samples),
    )
    below = sorted(e.name for e in _scan(root) if e.is_dir() and not _WNID.fullmatch(e.name))
    folders = [root, *(root / name for name in below)]
    found = []
    for form, named, anything, images in forms:
        for folder in folders:
            # In a folder named after the split, files may have other names.
            pattern = re.compile(anything) if folder.name in splits else named
            names = tuple(
                name
                for name in _archives(folder)
                if pattern.fullmatch(name) and not _CLASS_TAR.fullmatch(name)
            )
            if names:
                _warn_of_missing(folder, names)
                found.append(Part(form, folder, _own_label, names, images))
                break
    return found


def _warn_of_missing(folder: Path, names: Sequence[str]) -> None:
    counts = {int(match[1]) for name in names if (match := _OF.search(name))}
    if counts and len(names) != max(counts):
        logger.warning(
            "%s has only %d of %d files; images are chosen from these.",
            folder,
            len(names),
            max(counts),
        )


def _own_label(entry: Entry) -> int:
    return entry.label


def _no_label(entry: Entry) -> int:
    return UNKNOWN


def _labelled(part: Part, path: Path, labels: Mapping[str, int]) -> Part:
    """Return a copy of a flat part with the labels of a file."""

    def label(entry: Entry) -> int:
        name = entry.member or entry.file
        if stem(name) not in labels:
            raise FatError(
                f"{path} has no label for {name}; the first of its {len(labels)} labels is for "
                f"{next(iter(labels), 'no image')}. Remove the image, or use the label file that "
                "belongs to these images."
            )
        return labels[stem(name)]

    return replace(part, label=label)


def _class_of_tar(name: str, index: Mapping[str, int]) -> int:
    match = _CLASS_TAR.fullmatch(name)
    return index.get(match[1], UNKNOWN) if match else UNKNOWN


def _positions(classes: Sequence[str]) -> dict[str, int]:
    return {wnid: position for position, wnid in enumerate(classes)}


def _bases(root: Path) -> list[Path]:
    return [root, *_existing(*(root / name for name in _KAGGLE))]


def _existing(*folders: Path) -> list[Path]:
    return [folder for folder in folders if folder.is_dir()]


def _has_class(folder: Path, index: Mapping[str, int]) -> bool:
    return any(entry.name in index and entry.is_dir() for entry in _scan(folder))


def _has_image(folder: Path) -> bool:
    return any(_wanted(entry.name) and entry.is_file() for entry in _scan(folder))


def _archives(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in _scan(folder)
        if entry.name.endswith((".tar", ".parquet")) and entry.is_file()
    )


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder that are not hidden."""
    try:
        with os.scandir(str(folder)) as scan:
            for entry in scan:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        logger.warning("Skipping the folder %s, which cannot be listed: %s", folder, error)


# ------------------------------------------------------------------------------ inside archives


def _wanted(name: str) -> bool:
    return is_image(name) and not name.rpartition("/")[2].startswith(".")


def _entry(path: Path, member: Member, folder: str = "", label: int = UNKNOWN) -> Entry:
    return Entry("", path.name, folder + member.name, member.offset, member.size, label=label)


def _members(path: Path) -> Iterator[Entry]:
    """Yield the images of a tar."""
    for member in tar_members(path):
        if _wanted(member.name):
            yield _entry(path, member)


def _nested_members(path: Path) -> Iterator[Entry]:
    """Yield the images of the tars in a tar."""
    for inner in tar_members(path):
        if inner.name.endswith(".tar"):
            for member in tar_members(path, inner.offset, inner.size):
                if _wanted(member.name):
                    yield _entry(path, member, f"{inner.name.rpartition('/')[2]}/")


def _rows(path: Path) -> Iterator[Entry]:
    """Yield the images of a parquet file."""
    for row, name, label in parquet_rows(path):
        yield Entry("", path.name, name or f"{path.stem}-{row}", row=row, label=label)


def _samples(path: Path) -> Iterator[Entry]:
    """Yield the images of a WebDataset shard: adjacent members of one name up to the first dot."""
    with path.open("rb") as file:
        for key, sample in _grouped(path):
            images = [member for ending, member in sample.items() if is_image(f"{key}.{ending}")]
            if not images:
                continue
            if "cls" not in sample:
                raise FatError(
                    f"The image {key} in {path} has no class: it has "
                    f"{', '.join(f'.{ending}' for ending in sample)}, but not .cls, a class index."
                )
            label = sample["cls"]
            text = os.pread(file.fileno(), label.size, label.offset).decode("ascii", "replace")
            try:
                yield _entry(path, images[0], label=int(text))
            except ValueError as error:
                raise FatError(
                    f"{label.name} in {path} holds {text[:20]!r}, not a class index."
                ) from error


def _grouped(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    last, sample = "", dict[str, Member]()
    for member in tar_members(path):
        folder, slash, name = member.name.rpartition("/")
        if name.startswith("."):
            continue
        head, _, ending = name.partition(".")
        key = folder + slash + head
        if key != last and sample:
            yield last, sample
            sample = {}
        last = key
        sample[ending.lower()] = member
    if sample:
        yield last, sample
