"""Where images come from: an indexed collection that loads one image at a time."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fat.data.images import IMAGE_SUFFIXES, UNKNOWN, is_image, open_image
from fat.errors import FatError, nearest

__all__ = ["FolderSource", "ImageSource", "PhotoSource"]

log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """An indexed collection of images. It must survive pickling: workers get a copy."""

    @property
    def labelled(self) -> bool:
        """Whether the images have labels, which are indices of the network's logits."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the image in mode RGB.

        Args:
            index: Which.
            short_side: The image may come smaller than it is, as long as its shorter side keeps so
                many pixels: see :func:`fat.data.images.open_image`. None asks for all of them.

        Raises:
            UnreadableImage: If it cannot be decoded.
        """
        ...

    def label(self, index: int) -> int:
        """Return the class index, or -1 if it is not known."""
        ...

    def name(self, index: int) -> str:
        """Return what to call the image in messages, unique within the source."""
        ...


class PhotoSource:
    """Photographs that ship inside the scikit-image wheel, each repeated to be cropped many times.

    Index i is photograph i mod n, so that any run of n indices shows every photograph once. Nothing
    is downloaded. The crops themselves are made by a random transform.

    Args:
        names: File names in scikit-image's data folder, such as ``"chelsea.png"``.
        count: Number of images that the source pretends to hold.

    Raises:
        FatError: If scikit-image or one of the files is not installed, or nothing is asked for.
    """

    labelled = False

    def __init__(self, names: Sequence[str], count: int) -> None:
        if not names or count < 1:
            raise FatError(f"{len(names)} photographs, {count} crops: ask for at least one each.")
        folder = _photo_folder()
        self._files = [folder / name for name in names]
        missing = [file.name for file in self._files if not file.is_file()]
        if missing:
            present = sorted(entry.name for entry in folder.iterdir() if is_image(entry.name))
            raise FatError(
                f"The installed scikit-image has no photograph {', '.join(missing)}. It has: "
                f"{', '.join(present)}. Type pip install 'scikit-image>=0.22', or bring images "
                "of your own: data=folder data.root=DIR."
            )
        self._count = count
        self._decoded: dict[int, Image.Image] = {}  # a few MB, decoded once per process

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_decoded": {}}

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the whole photograph that the index stands for."""
        which = index % len(self._files)
        if which not in self._decoded:
            self._decoded[which] = open_image(self._files[which])
        return self._decoded[which]

    def label(self, index: int) -> int:
        """Return -1: the photographs have no labels."""
        return UNKNOWN

    def name(self, index: int) -> str:
        """Return the photograph and the crop's number, such as ``"chelsea.png#3"``."""
        repeat, which = divmod(index, len(self._files))
        return f"{self._files[which].name}#{repeat}"


class FolderSource:
    """All images below a folder, in sorted order; labelled if its subfolders are classes.

    Every first-level subfolder must be a class: a name in ``classes`` (a WordNet id), or a class
    index below the number of classes. Otherwise the folder is unlabelled. Hidden files and folders
    are passed over, and so are links to folders that were seen already (loops). Paths are kept as
    one block of bytes: about 30 bytes an image.

    Args:
        root: The folder.
        classes: Names of the classes in the order of the logits, or a mapping from name to index.
        num_classes: Number of logits; the number of ``classes`` by default.

    Raises:
        FatError: If the folder is missing or holds no image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes: Mapping[str, int] | Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        _check_folder(self.root)
        others: Counter[str] = Counter()
        folders: list[str] = []
        names: list[bytes] = []
        counts: list[int] = []
        for folder, files in sorted(_walk(self.root)):
            images = [file for file in files if is_image(file)]
            others.update(_suffix(file) or "(none)" for file in files if not is_image(file))
            if images:
                folders.append(folder)
                counts.append(len(images))
                names += map(os.fsencode, images)
        if not names:
            raise FatError(_no_images(self.root, others))
        self._folders = folders
        self._first = np.concatenate([[0], np.cumsum(counts)])  # of each folder, then the total
        self._blob = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])
        self._labels = _folder_labels(self.root, folders, classes, num_classes)

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._ends)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Decode the image; UnreadableImage if that fails."""
        name = self.name(index)
        return open_image(self.root / name, name, short_side)

    def label(self, index: int) -> int:
        """Return the class index, -1 if the folder is unlabelled."""
        return UNKNOWN if self._labels is None else self._labels[self._folder(index)]

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        file = os.fsdecode(self._blob[start : int(self._ends[index])])
        return os.path.join(self._folders[self._folder(index)], file)

    def stamp(self, index: int) -> bytes:
        """Return the file's size and time of change; nothing if it is gone."""
        try:
            status = os.stat(self.root / self.name(index))
        except OSError:
            return b""
        return f"{status.st_size} {status.st_mtime_ns}".encode()

    def _folder(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1


def _photo_folder() -> Path:
    # Found without importing scikit-image, which would take a second.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FatError(
            "data=photos needs scikit-image, which is not installed. Type pip install "
            "scikit-image, or bring images of your own: data=folder data.root=DIR."
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below the root, relative to it, and its files in sorted order."""
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        # Links last: a folder that is also reached directly goes by its own name.
        folder = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as scan:
                entries = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            log.warning("The folder %s cannot be listed and is passed over: %s", path, error)
            continue
        entries.sort(key=lambda entry: entry.name)
        below = [entry for entry in entries if entry.is_dir()]
        for entry in below:
            target = links if entry.is_symlink() else folders
            target.append(os.path.join(folder, entry.name))
        yield folder, [entry.name for entry in entries if entry.is_file()]


def _check_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise FatError(f"{root} is a file, not a folder of images. Type data.root=DIR.")
    parent = root.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    missing = root.relative_to(parent).parts[0] if parent in root.parents else root.name
    siblings = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    close = nearest(missing, siblings)
    hint = f" Did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""
    if not close:
        hint = f" {parent} has the folders: {', '.join(siblings[:8]) or 'none'}."
    raise FatError(f"The folder {root} does not exist.{hint} Type data.root=DIR.")


def _no_images(root: Path, others: Counter[str]) -> str:
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
    return (
        f"The folder {root} holds no image; found: {found or 'nothing'}. Images end in "
        f"{' '.join(sorted(IMAGE_SUFFIXES))}. Type data.root=DIR with a folder of such files."
    )


def _folder_labels(
    root: Path,
    folders: Sequence[str],
    classes: Mapping[str, int] | Sequence[str] | None,
    num_classes: int | None,
) -> list[int] | None:
    """Return the class of each folder, or None unless all first-level folders are classes."""
    tops = [folder.split(os.sep)[0] for folder in folders]
    index = _class_index(classes)
    total = num_classes if num_classes is not None else len(index) or None
    labels = [_label(top, index, total) for top in tops]
    unknown = _distinct(
        top or "(the folder itself)" for top, k in zip(tops, labels, strict=True) if k < 0
    )
    if not unknown:
        return labels
    known = len(set(tops)) - len(unknown)
    if known >= len(unknown):  # half of it is an ImageFolder: the rest looks like a mistake
        log.warning(
            "%s is treated as unlabelled: %d of its folders are classes, but not %s. Move these "
            "away to have accuracies reported.",
            root,
            known,
            ", ".join(unknown[:5]),
        )
    return None


def _class_index(
    classes: Mapping[str, int] | Sequence[str] | None,
) -> Mapping[str, int]:
    if classes is None:
        return {}
    if isinstance(classes, Mapping):
        return classes
    return {name: position for position, name in enumerate(classes)}


def _label(folder: str, index: Mapping[str, int], total: int | None) -> int:
    if folder in index:
        return index[folder]
    if folder.isascii() and folder.isdigit() and (total is None or int(folder) < total):
        return int(folder)
    return UNKNOWN


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
