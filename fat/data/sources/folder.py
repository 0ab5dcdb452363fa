"""Any folder of images, searched recursively."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from fat.data.sources.decoding import IMAGE_SUFFIXES, UNKNOWN, UnreadableImage, open_image
from fat.data.sources.listing import list_folder
from fat.utils.errors import FatError, nearest

__all__ = ["FolderSource", "check_folder", "folder_classes"]

log = logging.getLogger(__name__)


class FolderSource:
    """All images below a folder, in sorted order; labelled if its subfolders are classes.

    Every first-level subfolder must be a class: a name in ``classes`` (a WordNet id), or a class
    index below the number of classes. Otherwise the folder is unlabelled. Hidden files and folders
    are passed over, and so are links to folders that were seen already (loops). Names stay on disk
    (:mod:`fat.data.sources.listing`): memory does not grow with the number of images.

    Args:
        root: The folder.
        classes: Names of the classes in the order of the logits, or a mapping from name to index.
        num_classes: Number of logits; the number of ``classes`` by default.
        progress: Whether to show a progress bar if listing takes longer than two seconds.

    Raises:
        FatError: If the folder is missing or holds no image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        classes: Mapping[str, int] | Sequence[str] | None = None,
        num_classes: int | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.root = Path(root).expanduser()
        check_folder(self.root)
        self._listing = list_folder(self.root, progress=progress)
        if not len(self._listing):
            raise FatError(_no_images(self.root, self._listing.others))
        tops = list(dict.fromkeys(map(_top, self._listing.folders())))
        self._labels = _folder_labels(self.root, tops, classes, num_classes)

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._listing)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Decode the image; UnreadableImage if that fails."""
        name = self.name(index)
        return open_image(self.root / name, name, short_side)

    def label(self, index: int) -> int:
        """Return the class index, -1 if the folder is unlabelled."""
        if self._labels is None:
            return UNKNOWN
        return self._labels[_top(self._listing.entry(index).folder)]

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        return self._listing.entry(index).place.path

    def path(self, index: int) -> Path:
        """Return where the file lies."""
        return self.root / self.name(index)

    def content(self, index: int) -> bytes:
        """Return the file's bytes; UnreadableImage if that fails."""
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise UnreadableImage(self.name(index), str(error)) from error

    def stamp(self, index: int) -> bytes:
        """Return the file's size and time of change; nothing if it is gone."""
        try:
            status = os.stat(self.path(index))
        except OSError:
            return b""
        return f"{status.st_size} {status.st_mtime_ns}".encode()


def folder_classes(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of a folder's own classes: its first-level subfolders that hold images, sorted.

    Args:
        root: The folder.

    Raises:
        FatError: If it is missing, or some images are in no subfolder, or there are fewer than two.
    """
    place = Path(root).expanduser()
    check_folder(place)
    tops = dict.fromkeys(map(_top, list_folder(place).folders()))
    if "" in tops or len(tops) < 2:
        found = "images outside of subfolders" if "" in tops else f"{len(tops)} subfolder(s)"
        raise FatError(
            f"{place} has {found}, so its images have no classes. Wanted: at least two subfolders, "
            "one for each class, and every image in one of them."
        )
    return tuple(sorted(tops))


def _top(folder: str) -> str:
    return folder.split(os.sep)[0]


def check_folder(root: Path) -> None:
    """Raise a FatError that names the nearest folders unless this is one."""
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
    tops: Iterable[str],
    classes: Mapping[str, int] | Sequence[str] | None,
    num_classes: int | None,
) -> dict[str, int] | None:
    """Return the class of each first-level folder, or None unless all of them are classes."""
    index = _class_index(classes)
    total = num_classes if num_classes is not None else len(index) or None
    labels = {top: _label(top, index, total) for top in tops}
    unknown = [top or "(the folder itself)" for top, label in labels.items() if label < 0]
    if not unknown:
        return labels
    known = len(labels) - len(unknown)
    if known >= len(unknown):  # half of it is an ImageFolder: the rest looks like a mistake
        log.warning(
            "%s is treated as unlabelled: %d of its folders are classes, but not %s. Move these "
            "away to have accuracies reported.",
            root,
            known,
            ", ".join(unknown[:5]),
        )
    return None


def _class_index(classes: Mapping[str, int] | Sequence[str] | None) -> Mapping[str, int]:
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
