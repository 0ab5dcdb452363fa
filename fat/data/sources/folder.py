"""Images of a folder, searched recursively."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from fat.data.sources.decoding import IMAGE_SUFFIXES, UNKNOWN, UnreadableImage, open_image
from fat.data.sources.listing import list_folder
from fat.utils.errors import FatError, abbreviated, nearest

__all__ = ["FolderSource", "check_folder", "folder_classes"]

logger = logging.getLogger(__name__)


class FolderSource:
    """All images below a folder in sorted order, labeled if its subfolders are classes.

    The images are labeled if every first-level subfolder is a name in ``classes`` (such as a
    WordNet id) or a class index. Hidden files and folders are ignored, as are links to folders that
    were already visited. Names are kept on disk (:mod:`fat.data.sources.listing`), so that memory
    use does not depend on the number of images.

    Args:
        root: The folder.
        classes: Names of the classes in the order of the logits, or a mapping from name to index.
        num_classes: Number of logits; the number of ``classes`` by default.
        progress: If ``True``, show a progress bar if listing takes longer than two seconds.

    Raises:
        FatError: If the folder is missing or holds no images.
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
        """``True`` if every image has a class."""
        return self._labels is not None

    def __len__(self) -> int:
        return len(self._listing)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Decode the image; raises UnreadableImage if that fails."""
        name = self.name(index)
        return open_image(self.root / name, name, short_side)

    def label(self, index: int) -> int:
        """Return the class index, −1 if the folder is not labeled."""
        if self._labels is None:
            return UNKNOWN
        return self._labels[_top(self._listing.entry(index).folder)]

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        return self._listing.entry(index).place.path

    def path(self, index: int) -> Path:
        """Return the path of the file."""
        return self.root / self.name(index)

    def content(self, index: int) -> bytes:
        """Return the file's bytes; raises UnreadableImage if that fails."""
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise UnreadableImage(self.name(index), str(error)) from error

    def stamp(self, index: int) -> bytes:
        """Return the file's size and modification time; nothing if it is gone."""
        try:
            status = os.stat(self.path(index))
        except OSError:
            return b""
        return f"{status.st_size} {status.st_mtime_ns}".encode()


def folder_classes(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of a folder's classes: its first-level subfolders with images, sorted.

    Args:
        root: The folder.

    Raises:
        FatError: If it is missing, has images outside of subfolders, or fewer than two subfolders.
    """
    place = Path(root).expanduser()
    check_folder(place)
    tops = dict.fromkeys(map(_top, list_folder(place).folders()))
    if "" in tops or len(tops) < 2:
        found = "images outside of subfolders" if "" in tops else f"{len(tops)} subfolder(s)"
        raise FatError(
            f"{place} has {found}, so its images have no classes. It must have at least two "
            "subfolders, one for each class, and every image in one of them."
        )
    return tuple(sorted(tops))


def _top(folder: str) -> str:
    return folder.split(os.sep)[0]


def check_folder(root: Path) -> None:
    """Raise a FatError that suggests similar folders if this is not a folder."""
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
        hint = f" {parent} has the folders: {abbreviated(siblings, 8) or 'none'}."
    raise FatError(f"The folder {root} does not exist.{hint} Type data.root=DIR.")


def _no_images(root: Path, others: Counter[str]) -> str:
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
    return (
        f"The folder {root} holds no images; found: {found or 'nothing'}. Allowed suffixes: "
        f"{' '.join(sorted(IMAGE_SUFFIXES))}. Type data.root=DIR with a folder of such files."
    )


def _folder_labels(
    root: Path,
    tops: Iterable[str],
    classes: Mapping[str, int] | Sequence[str] | None,
    num_classes: int | None,
) -> dict[str, int] | None:
    """Return the class of each first-level folder, or ``None`` unless all of them are classes."""
    index = _class_index(classes)
    total = num_classes if num_classes is not None else len(index) or None
    labels = {top: _label(top, index, total) for top in tops}
    unknown = [top or "(the folder itself)" for top, label in labels.items() if label < 0]
    if not unknown:
        return labels
    known = len(labels) - len(unknown)
    if known >= len(unknown):  # probably a mistake
        logger.warning(
            "Ignoring the labels of %s: %d of its folders are classes, but not %s. Move these "
            "elsewhere to get accuracies.",
            root,
            known,
            abbreviated(unknown),
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
