"""Listings of the images below a folder, made once in constant memory and cached in SQLite.

Each listing is a file in the cache folder that never changes, so that it can be used while another
process creates a new one. It is valid as long as the folders and archives that it was made from
have the same modification time and size.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fat.data.sources.archives import Place
from fat.data.sources.decoding import UNKNOWN, is_image
from fat.utils.errors import FatError
from fat.utils.io import cache_folder, write_atomic

__all__ = ["Builder", "Entry", "Hashes", "Listing", "list_folder"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_SECOND = 1_000_000_000  # nanoseconds
# File systems round times, so a change just before the listing may hide another one after it.
_RECENT = 2 * _SECOND
_UNUSED = 30 * 24 * 3600  # seconds after which an unused listing is deleted
_BATCH = 1000  # rows per insertion
_BAR_DELAY = 2.0  # seconds before a progress bar appears

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE watched (path BLOB, changed INTEGER, size INTEGER);
CREATE TABLE folders (id INTEGER PRIMARY KEY, folder BLOB UNIQUE);
CREATE TABLE images (
    id INTEGER PRIMARY KEY, folder INTEGER, file BLOB, member BLOB,
    start INTEGER, size INTEGER, row INTEGER, label INTEGER);
CREATE TEMP TABLE found (
    folder BLOB, file BLOB, member BLOB,
    start INTEGER, size INTEGER, row INTEGER, label INTEGER);
"""
_SORT = """
INSERT INTO folders (folder) SELECT DISTINCT folder FROM found ORDER BY folder;
INSERT INTO images (folder, file, member, start, size, row, label)
    SELECT folders.id, file, member, start, size, row, label
    FROM found JOIN folders ON folders.folder = found.folder
    ORDER BY folders.id, file, start, row;
"""
_SELECT = """
SELECT folders.folder, file, member, start, size, row, label
FROM images JOIN folders ON folders.id = images.folder
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a listing; fields that do not apply are −1 or "".

    Attributes:
        folder: Folder of the file, relative to the listing's root; "" for the root itself.
        file: Name of the file or archive.
        member: Name inside the archive.
        offset: First byte in a tar file.
        size: Bytes in a tar file.
        row: Row of a parquet file.
        label: Class index, if it is stored with the image.
    """

    folder: str
    file: str
    member: str = ""
    offset: int = -1
    size: int = -1
    row: int = -1
    label: int = UNKNOWN

    @property
    def place(self) -> Place:
        """Location of the image's bytes, relative to the listing's root."""
        return Place(os.path.join(self.folder, self.file), self.offset, self.size, self.row)


class Builder:
    """Writes a listing image by image, in constant memory."""

    def __init__(self, connection: sqlite3.Connection, root: Path, bar: Any) -> None:
        self._connection = connection
        self._root = root
        self._bar = bar
        self._pending: list[tuple[Any, ...]] = []
        self._others: Counter[str] = Counter()
        self._complete = True

    def watch(self, path: str = "") -> None:
        """Add a folder or archive whose changes invalidate the listing, before it is read.

        Args:
            path: Path relative to the root.
        """
        status = os.stat(os.path.join(self._root, path))
        self._connection.execute(
            "INSERT INTO watched VALUES (?, ?, ?)",
            (_encode(path), status.st_mtime_ns, status.st_size),
        )

    def add(self, entry: Entry) -> None:
        """Add an image."""
        self._pending.append(
            (
                *map(_encode, (entry.folder, entry.file, entry.member)),
                *(entry.offset, entry.size, entry.row, entry.label),
            )
        )
        if len(self._pending) == _BATCH:
            self._flush()

    def other(self, name: str) -> None:
        """Count a file that is not an image, by its suffix."""
        self._others[os.path.splitext(name)[1].lower() or "(none)"] += 1

    def unreadable(self, folder: str) -> None:
        """Remove a folder that could not be listed completely, and do not reuse this listing."""
        self._flush()
        self._connection.execute("DELETE FROM found WHERE folder = ?", (_encode(folder),))
        self._complete = False

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        self._bar.update(steps)

    def _flush(self) -> None:
        self._connection.executemany(
            "INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?)", self._pending
        )
        self._pending.clear()

    def finish(self, began: int) -> None:
        """Sort the images and write the metadata."""
        self._flush()
        for command in _SORT.split(";"):
            self._connection.execute(command)
        (count,) = self._connection.execute("SELECT COUNT(*) FROM images").fetchone()
        values = {"began": began, "whole": self._complete, "images": count, "others": self._others}
        self._connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in values.items()]
        )


class Listing:
    """The images below a folder, sorted by folder, file and position in an archive.

    It can be pickled and used after a fork. Memory use does not depend on the number of images.

    Args:
        path: The SQLite file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._meta = {key: json.loads(value) for key, value in self._rows("SELECT * FROM meta")}

    @classmethod
    def of(
        cls,
        root: Path,
        kind: str,
        fill: Callable[[Builder], None],
        *,
        total: int | None = None,
        unit: str = " images",
        progress: bool = True,
    ) -> Listing:
        """Return the cached listing, or create it.

        Args:
            root: The folder.
            kind: Distinguishes this listing from others of the same folder.
            fill: Function that adds the images to the builder.
            total: Number of steps of the progress bar, if known.
            unit: Unit of the steps.
            progress: If ``True``, show a progress bar if it takes longer than two seconds.

        Raises:
            FatError: If the listing cannot be written, or ``fill`` raises it.
        """
        place = os.path.abspath(root)
        key = "\0".join((str(_FORMAT), kind, place))
        name = hashlib.sha256(_encode(key)).hexdigest()[:24]
        reason = ""
        for path in _newest_first(_folder(), name):
            stored, stale = _try(path, place)
            if stored is not None:
                return stored
            reason = reason or stale
        if reason:
            logger.info("Listing %s again: %s.", place, reason)
        target = _folder() / f"{name}-{uuid.uuid4().hex[:8]}.sqlite"
        with tqdm(
            desc=f"List {place}",
            total=total,
            unit=unit,
            unit_scale=True,
            leave=False,
            disable=not progress,
            delay=_BAR_DELAY,
        ) as bar:
            write_atomic(target, lambda temporary: _build(temporary, root, fill, bar))
        _tidy(_folder())
        return cls(target)

    def __len__(self) -> int:
        return int(self._meta["images"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def entry(self, index: int) -> Entry:
        """Return one image.

        Raises:
            IndexError: If the index is out of range.
            FatError: If the listing is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            (row,) = self._rows(f"{_SELECT} WHERE images.id = ?", (index + 1,))
            return _entry(row)
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def entries(self) -> Iterator[Entry]:
        """Yield all images in order."""
        for row in self._rows(f"{_SELECT} ORDER BY images.id"):
            yield _entry(row)

    def folders(self) -> Iterator[str]:
        """Yield the folders with images, in order."""
        for (folder,) in self._rows("SELECT folder FROM folders ORDER BY id"):
            yield _decode(folder)

    @property
    def others(self) -> Counter[str]:
        """Number of files that are not images, by suffix."""
        return Counter(self._meta["others"])

    def stale(self, root: str) -> str:
        """Return the reason why the listing is no longer valid, "" if it is."""
        if not self._meta["whole"]:
            return "last time a folder could not be read"
        began = self._meta["began"]
        for name, changed, size in self._rows("SELECT * FROM watched"):
            path = os.path.join(root, _decode(name))
            try:
                status = os.stat(path)
            except OSError:
                return f"{path} is gone"
            if (status.st_mtime_ns, status.st_size) != (changed, size):
                return f"{path} has changed"
            if changed > began - _RECENT:
                return f"{path} was still changing last time"
        return ""

    def _rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        try:
            yield from self._open().execute(query, values)
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> FatError:
        return FatError(f"The listing {self.path} is damaged: {error}. Delete it and start again.")

    def _open(self) -> sqlite3.Connection:
        """Return a connection of this process, as connections must not be used after a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            # immutable: no locks, which network and read-only file systems may not support.
            uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
            try:
                connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            except sqlite3.Error as error:
                raise FatError(
                    f"The listing {self.path} is gone: {error}. Start again to recreate it."
                ) from error
            self._connection = os.getpid(), connection
        return self._connection[1]


def list_folder(root: Path, *, progress: bool = True) -> Listing:
    """List the images below a folder.

    Hidden files and folders are ignored, as are links to folders that were already visited. Folders
    that cannot be listed are skipped with a warning.

    Args:
        root: The folder.
        progress: If ``True``, show a progress bar if it takes longer than two seconds.
    """
    return Listing.of(root, "folder", lambda builder: _walk(root, builder), progress=progress)


def _walk(root: Path, builder: Builder) -> None:
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        # Links last, so that a folder that is also reached directly gets its own name.
        folder = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            builder.watch(folder)
            below = _scan(path, folder, builder)
        except OSError as error:
            logger.warning("Skipping the folder %s, which cannot be listed: %s", path, error)
            builder.unreadable(folder)
            continue
        for name, linked in sorted(below):
            (links if linked else folders).append(os.path.join(folder, name))


def _scan(path: str, folder: str, builder: Builder) -> list[tuple[str, bool]]:
    """Add a folder's images; return its subfolders, and whether they are links."""
    below = []
    with os.scandir(path) as scan:
        for entry in scan:
            if entry.name.startswith("."):
                continue
            try:
                is_dir, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                continue
            if is_dir:
                below.append((entry.name, entry.is_symlink()))
            elif is_file and is_image(entry.name):
                builder.add(Entry(folder, entry.name))
                builder.advance(1)
            elif is_file:
                builder.other(entry.name)
    return below


class Hashes:
    """Cache of the SHA-256 of images, in SQLite.

    An entry is valid as long as its file has the same modification time and size. If the cache
    cannot be written, hashes are computed again next time.
    """

    def __init__(self) -> None:
        self._connection: sqlite3.Connection | None = None
        try:
            self._connection = sqlite3.connect(_folder() / "hashes.sqlite", timeout=30)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS hashes (path BLOB, start INTEGER, row INTEGER, "
                "changed INTEGER, bytes INTEGER, sha256 TEXT, PRIMARY KEY (path, start, row)) "
                "WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            self._disable(error)

    def find(self, root: Path, place: Place) -> str | None:
        """Return the cached hash of the image, if it is still valid.

        Raises:
            OSError: If the file is missing.
        """
        status = os.stat(root / place.path)
        if self._connection is None:
            return None
        try:
            row = self._connection.execute(
                "SELECT sha256 FROM hashes WHERE path = ? AND start = ? AND row = ? "
                "AND changed = ? AND bytes = ?",
                (*_key(root, place), status.st_mtime_ns, status.st_size),
            ).fetchone()
        except sqlite3.Error as error:
            self._disable(error)
            return None
        return str(row[0]) if row else None

    def keep(self, root: Path, place: Place, sha256: str) -> None:
        """Store the hash of an image that was just read, unless its file is still changing."""
        status = os.stat(root / place.path)
        if self._connection is None or status.st_mtime_ns > time.time_ns() - _RECENT:
            return
        try:
            self._connection.execute(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?, ?)",
                (*_key(root, place), status.st_mtime_ns, status.st_size, sha256),
            )
        except sqlite3.Error as error:
            self._disable(error)

    def commit(self) -> None:
        """Commit the stored hashes, and let other processes write."""
        try:
            if self._connection is not None:
                self._connection.commit()
        except sqlite3.Error as error:
            self._disable(error)

    def close(self) -> None:
        """Commit and close."""
        self.commit()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _disable(self, error: sqlite3.Error) -> None:
        logger.info("Not caching the hashes of images: %s.", error)
        self._connection = None


def _key(root: Path, place: Place) -> tuple[bytes, int, int]:
    return _encode(os.path.abspath(root / place.path)), place.offset, place.row


def _encode(text: str) -> bytes:
    # Preserves names that are not UTF-8, and the order of strings.
    return text.encode("utf-8", "surrogatepass")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _entry(row: Sequence[Any]) -> Entry:
    folder, file, member, *numbers = row
    return Entry(_decode(folder), _decode(file), _decode(member), *numbers)


def _build(path: Path, root: Path, fill: Callable[[Builder], None], bar: Any) -> None:
    began = time.time_ns()
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.executescript(_TABLES)
            connection.execute("BEGIN")
            builder = Builder(connection, root, bar)
            fill(builder)
            builder.finish(began)
            connection.execute("COMMIT")
        finally:
            connection.close()
    except OSError as error:  # write_atomic would report it as an error of writing
        raise FatError(
            f"{error.filename or root} cannot be read: {error.strerror or error}. Repair it, or "
            "type data.root=DIR with another folder."
        ) from error
    except sqlite3.Error as error:
        raise FatError(
            f"Cannot write the listing of {root} to {path.parent}: {error}. Free disk space there, "
            "or set XDG_CACHE_HOME=DIR to another folder."
        ) from error


def _try(path: Path, root: str) -> tuple[Listing | None, str]:
    """Return the listing of a file if it is valid, and otherwise the reason."""
    try:
        listing = Listing(path)
        reason = listing.stale(root)
    except Exception as error:  # a damaged file may hold anything
        return None, f"{path} is damaged ({error})"
    if reason:
        return None, reason
    with contextlib.suppress(OSError):
        os.utime(path)  # mark as used
    return listing, ""


def _newest_first(folder: Path, name: str) -> list[Path]:
    """Return the listings of one name; other processes may delete some at the same time."""
    found = []
    for path in _listings(folder):
        if not path.name.startswith(f"{name}-"):
            continue
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:
            continue
    return [path for _, path in sorted(found, reverse=True)]


def _listings(folder: Path, also_unfinished: bool = False) -> list[Path]:
    """Return the listings in the cache folder, without hashes.sqlite and those being written."""
    names = [name for name in os.listdir(folder) if "-" in name and ".sqlite" in name]
    return [folder / name for name in names if also_unfinished or not name.startswith(".")]


def _tidy(folder: Path) -> None:
    """Delete finished and unfinished listings that were not used for a month."""
    for path in _listings(folder, also_unfinished=True):
        try:
            if path.stat().st_mtime < time.time() - _UNUSED:
                path.unlink()
        except OSError:
            continue


def _folder() -> Path:
    try:
        folder = cache_folder("listings")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, FatError):
        pass
    return _private_folder()


@functools.cache
def _private_folder() -> Path:
    logger.warning(
        "The cache folder is not writable, so every run lists the images again. Set "
        "XDG_CACHE_HOME=DIR to a writable folder to avoid it."
    )
    folder = Path(tempfile.mkdtemp(prefix="fat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
