"""A one-time cache of images made small, so that an epoch no longer waits for the JPEG decoder.

One file holds everything. While it is being built it is called ``*.part`` and only ever grows by
whole records, each with its checksum; so a build that was killed goes on where it stopped. The
file gets its final name once it is whole and on the disk:

=========  ==========================================================================
head       magic, key (sha256)
records    per image: crc32 of the rest, kind, width, height, bytes; then these bytes
offsets    uint64 [N + 1]: where each record starts, and where the last one ends
foot       sha256 of head and offsets, magic
=========  ==========================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fat.data.sources.base import ImageSource
from fat.data.sources.decoding import UnreadableImage, open_image
from fat.data.transforms import SHAPE
from fat.utils.errors import FatError, unknown_name

__all__ = ["MODES", "CachedSource", "Stamped", "build_cache"]

log = logging.getLogger(__name__)

MODES = ("jpeg", "pixels", "squares")

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Offsets = np.ndarray[tuple[int], np.dtype[np.uint64]]

_MAGIC = b"FATIMG02"  # its number goes up whenever pixels or layout change
_HEAD = struct.Struct("<8s32s")
_RECORD = struct.Struct("<5I")
_FOOT = struct.Struct("<32s8s")
_UNREADABLE, _JPEG, _PIXELS, _SQUARE = range(4)
# Colours at full resolution: nothing but the quantization of the DCT is lost.
_JPEG_QUALITY, _JPEG_SUBSAMPLING = 92, 0
_SAMPLE = 32  # images that the size is estimated from
_CHUNK = 8  # images that a worker hands over at a time
_MARGIN = 1.05  # what a sample may be wrong by


@runtime_checkable
class Stamped(Protocol):
    """A source that can tell whether an image changed without reading it."""

    def stamp(self, index: int) -> bytes:
        """Return what changes whenever the image does, such as its file's size and time."""
        ...


class CachedSource:
    """Some images of another source, read from a cache file. Labels and names are the source's.

    The file is mapped into memory, once in each process. There an image's checksum is compared the
    first time it is read: each time would cost a sixth of the speed that decoded pixels are for.

    Args:
        source: Where the images came from; it is asked for labels and names only.
        indices: Which of its images the file holds; any order.
        file: The cache, as :func:`build_cache` made it.
        key: What it was made for, 32 bytes.

    Raises:
        FatError: If the file is damaged, or not a cache of just these images.
    """

    def __init__(
        self, source: ImageSource, indices: Sequence[int] | Indices, file: Path, key: bytes
    ) -> None:
        self.source = source
        self.indices = _sorted(indices)
        self.file = file
        self._key = key
        self._mapped: _Mapped | None = None
        self._open()

    def __getstate__(self) -> dict[str, object]:
        # Each process maps the file itself.
        return {**self.__dict__, "_mapped": None}

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.source.labelled

    def __len__(self) -> int:
        """Return the number of images of the source, whether cached or not."""
        return len(self.source)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the small image.

        Raises:
            IndexError: If the cache does not hold the image.
            UnreadableImage: If it could not be decoded when the cache was built.
            FatError: If the file is damaged here.
        """
        place = int(np.searchsorted(self.indices, index))
        if place == len(self.indices) or self.indices[place] != index:
            raise IndexError(f"image {index} is not among the {len(self.indices)} of {self.file}")
        mapped = self._open()
        try:
            start = int(mapped.offsets[place])
            record = _read(mapped.view, start, check=not mapped.checked[place])
        except ValueError as error:
            raise _damaged(self.file, f"{error} (image {self.name(index)})") from error
        mapped.checked[place] = True
        if record.kind == _UNREADABLE:
            raise UnreadableImage(self.name(index), bytes(record.content).decode())
        if record.kind == _JPEG:
            return open_image(io.BytesIO(record.content), self.name(index), short_side)
        pixels = np.frombuffer(record.content, dtype=np.uint8)
        if record.kind == _PIXELS:
            return Image.fromarray(pixels.reshape(record.height, record.width, 3))
        side = math.isqrt(len(pixels) // 3)
        square = Image.fromarray(pixels.reshape(side, side, 3))
        square.info[SHAPE] = (record.width, record.height)
        return square

    def label(self, index: int) -> int:
        """Return the class index, -1 if it is not known."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """Return what the source calls the image."""
        return self.source.name(index)

    def content(self, index: int) -> bytes:
        """Return what the source has stored of the image."""
        return self.source.content(index)

    def _open(self) -> _Mapped:
        if self._mapped is None:
            view = _map(self.file)
            try:
                offsets = _read_offsets(view, len(self.indices), self._key)
            except ValueError as error:
                raise _damaged(self.file, str(error)) from error
            self._mapped = _Mapped(view, offsets, np.zeros(len(self.indices), dtype=np.bool_))
        return self._mapped


def build_cache(
    source: ImageSource,
    indices: Sequence[int] | Indices,
    *,
    mode: str,
    short_side: int = 256,
    folder: Path,
    key: str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> CachedSource:
    """Open the cache of some images, after building it if it is not there.

    An image is decoded (a large JPEG at a fraction of its size, see
    :func:`fat.data.sources.decoding.open_image`) and resized by a bicubic filter until its shorter
    side has
    ``short_side`` pixels; smaller images stay as they are. A random crop that takes less than
    (input size / short_side)² of an image is therefore enlarged. What cannot be read is kept as
    such, with the reason.

    The file is named by a key over what its content follows from: the names of the images and
    their stamps (:class:`Stamped`; a source that has none tells its images apart by name alone),
    ``mode``, ``short_side`` and the version of the format. So a changed data set gets another
    cache. The content is the same for any number of workers, and after any number of interrupted
    builds. If another process is building the same cache, this one waits for it.

    Args:
        source: Where the images come from.
        indices: Which of them.
        mode: ``"jpeg"``: encoded again, quality 92, colours at full resolution; about 40 kB an
            image at 256 pixels. ``"pixels"``: decoded, 8 bits; about 260 kB. ``"squares"``: the
            same, squashed to a square with its shape noted, 197 kB: all that is left to do for
            :class:`fat.data.transforms.DeviceCropTransform`, and of no use for other transforms.
        short_side: Pixels of the shorter side.
        folder: Where caches lie; it is made.
        key: What stands for the images in place of names and stamps, such as a digest of theirs.
        workers: Processes that decode; 0 decodes in this one.
        progress: Whether to show a bar.

    Raises:
        FatError: If an option is unknown or out of range, there is no image, the disk has too
            little room or cannot be written, or a cache that is there is damaged.
    """
    if mode not in MODES:
        raise unknown_name("data.cache", mode, ("none", *MODES))
    if short_side < 1:
        raise FatError(f"data.cache_side is {short_side}; it must be at least 1 pixel.")
    chosen = _sorted(indices)
    if len(chosen) == 0:
        raise FatError("There is no image to cache. Type data.cache=none.")
    digest = _key(source, chosen, mode, short_side, key)
    file = folder / f"{mode}-{short_side}-{digest.hex()[:16]}.cache"
    small = _SmallImages(source, chosen, mode, short_side)
    if not file.exists():
        _announce(small, file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(file):
                if not file.exists():  # the process that was waited for has built it
                    _build(small, file, digest, workers, progress)
        except OSError as error:
            raise FatError(
                f"Cannot write the image cache {file}: {error.strerror or error}. Type "
                "data.cache_dir=DIR with another folder, or data.cache=none. What was written so "
                "far is kept and will be used."
            ) from error
    log.info("%d images come from the cache %s.", len(chosen), file)
    return CachedSource(source, chosen, file, digest)


class _Mapped(NamedTuple):
    view: memoryview
    offsets: Offsets
    checked: np.ndarray[tuple[int], np.dtype[np.bool_]]  # whose checksum was compared


class _Record(NamedTuple):
    kind: int
    width: int
    height: int
    content: memoryview


class _SmallImages(Dataset[bytes]):
    """The records of a cache, made one by one."""

    def __init__(self, source: ImageSource, indices: Indices, mode: str, short_side: int) -> None:
        self.source = source
        self.indices = indices
        self.mode = mode
        self.short_side = short_side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> bytes:
        try:
            image = self.source.load(int(self.indices[place]), self.short_side)
        except UnreadableImage as unreadable:
            return _pack(_UNREADABLE, 0, 0, unreadable.reason.encode())
        if self.mode == "squares":
            side = (self.short_side, self.short_side)
            squashed = image.resize(side, Image.Resampling.BICUBIC)
            return _pack(_SQUARE, *image.size, squashed.tobytes())
        image = _shrunk(image, self.short_side)
        if self.mode == "pixels":
            return _pack(_PIXELS, *image.size, image.tobytes())
        stream = io.BytesIO()
        image.save(
            stream,
            "JPEG",
            quality=_JPEG_QUALITY,
            subsampling=_JPEG_SUBSAMPLING,
            comment=b"",  # else the source's, of any length
        )
        return _pack(_JPEG, *image.size, stream.getvalue())


def _shrunk(image: Image.Image, short_side: int) -> Image.Image:
    """Resize to ``short_side`` if the shorter side has more pixels."""
    least = min(image.size)
    if least <= short_side:
        return image
    width, height = (round(side * short_side / least) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _pack(kind: int, width: int, height: int, content: bytes) -> bytes:
    rest = _RECORD.pack(0, kind, width, height, len(content))[4:]
    return struct.pack("<I", zlib.crc32(content, zlib.crc32(rest))) + rest + content


def _read(view: memoryview, start: int, *, check: bool = True) -> _Record:
    """Return the record that starts here.

    Raises:
        ValueError: If it is not whole; whether its checksum is right is known after a ``check``.
    """
    body = start + _RECORD.size
    if body > len(view):
        raise ValueError("a record is cut off")
    crc, kind, width, height, size = _RECORD.unpack_from(view, start)
    content = view[body : body + size]
    if len(content) < size:
        raise ValueError("a record is cut off")
    if check and zlib.crc32(content, zlib.crc32(view[start + 4 : body])) != crc:
        raise ValueError("a record does not match its checksum")
    return _Record(kind, width, height, content)


def _ends(view: memoryview, start: int, most: int) -> Iterator[int]:
    """Yield where the whole records end, up to the first that is not."""
    for _ in range(most):
        try:
            record = _read(view, start)
        except ValueError:
            return
        start += _RECORD.size + len(record.content)
        yield start


def _offsets_and_foot(head: bytes, offsets: Sequence[int] | Offsets) -> bytes:
    table = np.asarray(offsets, dtype="<u8").tobytes()
    return table + _FOOT.pack(hashlib.sha256(head + table).digest(), _MAGIC)


def _read_offsets(view: memoryview, count: int, key: bytes) -> Offsets:
    """Return where the records start, and the last one's end, uint64 [count + 1].

    Raises:
        ValueError: If the file is not whole, or was made for other images.
    """
    table = len(view) - _FOOT.size - 8 * (count + 1)
    if table < _HEAD.size:
        raise ValueError(f"{len(view)} bytes are too few for {count} images")
    head = bytes(view[: _HEAD.size])
    if head != _HEAD.pack(_MAGIC, key):
        raise ValueError("it was made for other images")
    offsets = np.frombuffer(view, dtype="<u8", count=count + 1, offset=table)
    if bytes(view[table:]) != _offsets_and_foot(head, offsets) or offsets[-1] != table:
        raise ValueError("its index does not match its checksum")
    return offsets


def _map(file: Path) -> memoryview:
    try:
        with file.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, what: str) -> FatError:
    return FatError(
        f"The image cache {file} is damaged: {what}. Delete it and start again to have it rebuilt, "
        "or type data.cache=none."
    )


def _sorted(indices: Sequence[int] | Indices) -> Indices:
    return np.unique(np.asarray(indices, dtype=np.int64))


def _key(
    source: ImageSource, indices: Indices, mode: str, short_side: int, images: str | None
) -> bytes:
    """Return the sha256 of everything that a cache's content follows from."""
    digest = hashlib.sha256(f"{_MAGIC!r} {mode} {short_side} {len(indices)}".encode())
    if images is not None:
        digest.update(images.encode())
        return digest.digest()
    for index in indices.tolist():
        stamp = source.stamp(index) if isinstance(source, Stamped) else b""
        for part in (os.fsencode(source.name(index)), stamp):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _announce(small: _SmallImages, file: Path) -> None:
    """Say how large the cache will be.

    Raises:
        FatError: If the disk has less room. Nothing was written.
    """
    sample = np.unique(np.linspace(0, len(small) - 1, _SAMPLE).round().astype(int)).tolist()
    size = len(small) * sum(len(small[place]) for place in sample) / len(sample)
    part = _part(file)
    missing = size - (part.stat().st_size if part.exists() else 0)
    place = next(folder for folder in file.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    told = f"{len(small)} images at {small.short_side} pixels as {small.mode}: about {_gb(size)}"
    if missing * _MARGIN > free:
        smaller = "data.cache=jpeg (a sixth), " if small.mode != "jpeg" else ""
        raise FatError(
            f"The image cache needs more room than there is. {told}, but {place} has {_gb(free)} "
            f"free. Type data.cache_dir=DIR with a folder on another disk, {smaller}a smaller "
            "data.cache_side, or data.cache=none."
        )
    log.info("Caching %s in %s (%s free).", told, file.parent, _gb(free))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _part(file: Path) -> Path:
    return file.with_suffix(".part")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one process at a time build this file. The system ends the lock of a killed process."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process is building %s; waiting for it.", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(small: _SmallImages, file: Path, key: bytes, workers: int, progress: bool) -> None:
    """Write all records that are missing and put the file in its place."""
    part, head = _part(file), _HEAD.pack(_MAGIC, key)
    offsets = _resume(part, head, len(small))
    done = len(offsets) - 1
    chunks: DataLoader[bytes] = DataLoader(
        small,
        batch_size=_CHUNK,
        sampler=range(done, len(small)),
        collate_fn=b"".join,
        num_workers=workers,
        # Otherwise it would advance the global random state by one draw.
        generator=torch.Generator(),
    )
    bar = tqdm(
        desc="Cache images", total=len(small), initial=done, unit="image", disable=not progress
    )
    with part.open("ab") as stream, bar:
        for chunk in chunks:
            stream.write(chunk)
            stream.flush()  # what the system has survives the end of this process
            start = offsets[-1]
            ends = list(_ends(memoryview(chunk), 0, _CHUNK))
            offsets += [start + end for end in ends]
            bar.update(len(ends))
        stream.write(_offsets_and_foot(head, offsets))
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _resume(part: Path, head: bytes, count: int) -> list[int]:
    """Cut an unfinished file after its last whole record; begin one if there is none.

    Returns:
        Where its records start, and where the last one ends.
    """
    offsets = [_HEAD.size]
    if part.exists() and part.stat().st_size >= _HEAD.size:
        view = _map(part)
        if view[: _HEAD.size] == head:
            offsets += _ends(view, _HEAD.size, count)
    if len(offsets) == 1:
        part.write_bytes(head)
    else:
        log.info("%d of the %d images are in %s already.", len(offsets) - 1, count, part)
        os.truncate(part, offsets[-1])
    return offsets
