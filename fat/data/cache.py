"""Cache of decoded and resized images in a single file, which saves the cost of decoding JPEGs.

While the file is being built its name ends in ``.part`` and it only grows by whole records, each
with a checksum, so that an interrupted build can be resumed. It gets its final name when it is
complete and written to disk:

=========  ================================================================================
head       magic, key (sha256)
records    per image: crc32 of the rest, kind, width, height, size in bytes, then the bytes
offsets    uint64 [N + 1]: start of each record, and end of the last one
foot       sha256 of head and offsets, magic
=========  ================================================================================
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

logger = logging.getLogger(__name__)

MODES = ("jpeg", "pixels", "squares")

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Offsets = np.ndarray[tuple[int], np.dtype[np.uint64]]

_MAGIC = b"FATIMG02"  # to be increased whenever the pixels or the layout change
_HEAD = struct.Struct("<8s32s")
_RECORD = struct.Struct("<5I")
_FOOT = struct.Struct("<32s8s")
_UNREADABLE, _JPEG, _PIXELS, _SQUARE = range(4)
# No chroma subsampling: the only loss is the quantization of the DCT.
_JPEG_QUALITY, _JPEG_SUBSAMPLING = 92, 0
_SAMPLE = 32  # images from which the size is estimated
_CHUNK = 8  # images that a worker returns at a time
_MARGIN = 1.05  # safety factor of the estimated size


@runtime_checkable
class Stamped(Protocol):
    """A source that can detect changes of an image without reading it."""

    def stamp(self, index: int) -> bytes:
        """Return bytes that change whenever the image does, such as its file's size and time."""
        ...


class CachedSource:
    """Images of another source, read from a cache file. Labels and names are those of the source.

    Each process maps the file into memory and verifies an image's checksum the first time that it
    reads the image; verifying every read would take a sixth of the speed.

    Args:
        source: The source of the images, used for labels and names only.
        indices: Indices of the cached images in the source, in any order.
        file: The cache file, from :func:`build_cache`.
        key: Key of the content, 32 bytes.

    Raises:
        FatError: If the file is damaged, or does not hold exactly these images.
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
        """``True`` if the images have labels."""
        return self.source.labelled

    def __len__(self) -> int:
        """Return the number of images of the source, cached or not."""
        return len(self.source)

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the resized image.

        Raises:
            IndexError: If the image is not in the cache.
            UnreadableImage: If it could not be decoded when the cache was built.
            FatError: If its record is damaged.
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
        """Return the class index, −1 if unknown."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """Return the source's name of the image."""
        return self.source.name(index)

    def content(self, index: int) -> bytes:
        """Return the source's bytes of the image."""
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
    """Open the cache of some images, and build it first if it does not exist.

    Images are decoded (large JPEGs at reduced size, see
    :func:`fat.data.sources.decoding.open_image`) and resized with a bicubic filter to
    ``short_side`` pixels on the shorter side; smaller images keep their size. Random crops of less
    than (input size / short_side)² of an image are therefore upsampled. Unreadable images are
    recorded with the reason.

    The file is named after a hash of everything that its content depends on: the names of the
    images and their stamps (:class:`Stamped`; without stamps, the names alone), ``mode``,
    ``short_side`` and the version of the format, so that a changed dataset gets a new cache. The
    content does not depend on the number of workers or on interruptions. If another process is
    building the same cache, this one waits for it.

    Args:
        source: Source of the images.
        indices: Indices of the images to cache.
        mode: ``"jpeg"``: JPEG of quality 92 without chroma subsampling, about 40 kB per image at
            256 pixels. ``"pixels"``: decoded 8-bit pixels, about 260 kB. ``"squares"``: decoded
            pixels resized to a square, with the original shape, 197 kB; only for
            :class:`fat.data.transforms.DeviceCropTransform`.
        short_side: Length of the shorter side, pixels.
        folder: Folder of the caches; it is created if necessary.
        key: Identifies the images in place of their names and stamps, such as a digest of these.
        workers: Number of decoding processes; 0 decodes in this one.
        progress: If ``True``, show a progress bar.

    Raises:
        FatError: If an option is invalid, there are no images, the disk is full or not writable, or
            an existing cache is damaged.
    """
    if mode not in MODES:
        raise unknown_name("data.cache", mode, ("none", *MODES))
    if short_side < 1:
        raise FatError(f"data.cache_side is {short_side}; it must be at least 1 pixel.")
    chosen = _sorted(indices)
    if len(chosen) == 0:
        raise FatError("There are no images to cache. Type data.cache=none.")
    digest = _key(source, chosen, mode, short_side, key)
    file = folder / f"{mode}-{short_side}-{digest.hex()[:16]}.cache"
    small = _SmallImages(source, chosen, mode, short_side)
    if not file.exists():
        _announce(small, file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(file):
                if not file.exists():  # another process may have built it meanwhile
                    _build(small, file, digest, workers, progress)
        except OSError as error:
            raise FatError(
                f"Cannot write the image cache {file}: {error.strerror or error}. Type "
                "data.cache_dir=DIR with another folder, or data.cache=none. The images written so "
                "far are kept, and the next run resumes from them."
            ) from error
    logger.info("Reading %d images from the cache %s.", len(chosen), file)
    return CachedSource(source, chosen, file, digest)


class _Mapped(NamedTuple):
    view: memoryview
    offsets: Offsets
    checked: np.ndarray[tuple[int], np.dtype[np.bool_]]  # images whose checksum was verified


class _Record(NamedTuple):
    kind: int
    width: int
    height: int
    content: memoryview


class _SmallImages(Dataset[bytes]):
    """Dataset that computes the records of a cache."""

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
            comment=b"",  # otherwise the source's is copied, which may be long
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
        ValueError: If it is truncated, or (with ``check``) its checksum does not match.
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
    """Yield the ends of the records, up to the first that is incomplete or damaged."""
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
    """Return the starts of the records and the end of the last one, uint64 [count + 1].

    Raises:
        ValueError: If the file is damaged, or was made for other images.
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


def _damaged(file: Path, reason: str) -> FatError:
    return FatError(
        f"The image cache {file} is damaged: {reason}. Delete it to have it rebuilt, or type "
        "data.cache=none."
    )


def _sorted(indices: Sequence[int] | Indices) -> Indices:
    return np.unique(np.asarray(indices, dtype=np.int64))


def _key(
    source: ImageSource, indices: Indices, mode: str, short_side: int, images: str | None
) -> bytes:
    """Return the sha256 of everything that a cache's content depends on."""
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
    """Log the estimated size of the cache.

    Raises:
        FatError: If the disk has too little free space.
    """
    sample = np.unique(np.linspace(0, len(small) - 1, _SAMPLE).round().astype(int)).tolist()
    size = len(small) * sum(len(small[place]) for place in sample) / len(sample)
    part = _part(file)
    missing = size - (part.stat().st_size if part.exists() else 0)
    place = next(folder for folder in file.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    task = f"{len(small)} images at {small.short_side} pixels as {small.mode}: about {_gb(size)}"
    if missing * _MARGIN > free:
        smaller = "data.cache=jpeg (a sixth of the size), " if small.mode != "jpeg" else ""
        raise FatError(
            f"There is too little disk space for the image cache. {task}, but {place} has "
            f"{_gb(free)} free. Type data.cache_dir=DIR with a folder on another disk, {smaller}a "
            "smaller data.cache_side, or data.cache=none."
        )
    logger.info("Caching %s in %s (%s free).", task, file.parent, _gb(free))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _part(file: Path) -> Path:
    return file.with_suffix(".part")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock the file, so that one process at a time builds it."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is building %s; waiting for it.", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(small: _SmallImages, file: Path, key: bytes, workers: int, progress: bool) -> None:
    """Write all missing records, then rename the file."""
    part, head = _part(file), _HEAD.pack(_MAGIC, key)
    offsets = _resume(part, head, len(small))
    done = len(offsets) - 1
    chunks: DataLoader[bytes] = DataLoader(
        small,
        batch_size=_CHUNK,
        sampler=range(done, len(small)),
        collate_fn=b"".join,
        num_workers=workers,
        # Without a generator it would advance the global random state.
        generator=torch.Generator(),
    )
    bar = tqdm(
        desc="Cache images", total=len(small), initial=done, unit="image", disable=not progress
    )
    with part.open("ab") as stream, bar:
        for chunk in chunks:
            stream.write(chunk)
            stream.flush()  # survives if this process is killed
            start = offsets[-1]
            ends = list(_ends(memoryview(chunk), 0, _CHUNK))
            offsets += [start + end for end in ends]
            bar.update(len(ends))
        stream.write(_offsets_and_foot(head, offsets))
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _resume(part: Path, head: bytes, count: int) -> list[int]:
    """Truncate an unfinished file after its last complete record, or begin a new one.

    Returns:
        The starts of its records and the end of the last one.
    """
    offsets = [_HEAD.size]
    if part.exists() and part.stat().st_size >= _HEAD.size:
        view = _map(part)
        if view[: _HEAD.size] == head:
            offsets += _ends(view, _HEAD.size, count)
    if len(offsets) == 1:
        part.write_bytes(head)
    else:
        logger.info("Resuming: %d of %d images are in %s.", len(offsets) - 1, count, part)
        os.truncate(part, offsets[-1])
    return offsets
