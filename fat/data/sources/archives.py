"""Reading of single images from tar and parquet files, without unpacking them."""

from __future__ import annotations

import importlib.util
import os
import stat
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fat.utils.errors import FatError, first_line, missing_extra

__all__ = ["Member", "Place", "Reader", "parquet_rows", "tar_members"]

_MAX_OPEN = 32  # open archives per process, since a thousand class tars exceed the usual limit
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Place:
    """Location of an image's bytes; fields that do not apply are −1.

    Attributes:
        path: The file or archive, relative to a root.
        offset: First byte in a tar file.
        size: Bytes in a tar file.
        row: Row of a parquet file.
    """

    path: str
    offset: int = -1
    size: int = -1
    row: int = -1


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: its name, its first byte in the outermost file, and its size."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Yield the files of an uncompressed tar in order, in constant memory.

    Args:
        path: The tar.
        start: First byte of the tar in ``path``, for a tar inside a tar.
        size: Size of the tar inside a tar.

    Raises:
        FatError: If it is compressed, not a tar, or damaged (after yielding the members before the
            damage).
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        file.seek(start)
        count = 0
        try:
            tar: Any = tarfile.TarFile(fileobj=file)
            while (found := tar.next()) is not None:
                tar.members.clear()  # otherwise it keeps all of them in memory
                if size is not None and found.offset_data + found.size > start + size:
                    raise tarfile.ReadError("it has no end")  # what follows is the outer tar's
                count += 1
                if found.isreg() and not found.issparse():
                    yield Member(found.name, found.offset_data, found.size)
        except (tarfile.TarError, ValueError, OverflowError) as error:  # sizes beyond any file
            raise _damaged(path, start, count, str(error)) from error
        # tarfile takes anything that is not a header for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _damaged(path, start, count, "it has no end")


def _damaged(path: Path, start: int, count: int, reason: str) -> FatError:
    with path.open("rb") as file:
        file.seek(start)
        head = file.read(8)
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            return FatError(
                f"{path} is compressed ({kind}), so single images cannot be read from it. "
                f"Decompress it to a plain .tar, or unpack it: tar xf {path}"
            )
    where = f" (the tar at byte {start} in it)" if start else ""
    return FatError(
        f"{path}{where} is damaged after {count} members: {reason}. Copy or download it again."
    )


def parquet_rows(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield row, file name ("" if missing) and label (−1 if missing) of each image.

    The layout is that of the Hugging Face hub: a column ``image``, struct{bytes, path}, and an
    integer column ``label``.

    Raises:
        FatError: If pyarrow is not installed, the file is damaged, or it has other columns.
    """
    arrow = _pyarrow()
    try:
        with arrow.ParquetFile(path) as file:
            named = _check_columns(file.schema_arrow, path)
            columns = ["label", "image.path"] if named else ["label"]
            row = 0
            for batch in file.iter_batches(8192, columns=columns, use_threads=False):
                labels = batch.column("label").to_pylist()
                paths = (
                    batch.column("image").field("path").to_pylist()
                    if named
                    else [None] * len(labels)
                )
                for name, label in zip(paths, labels, strict=True):
                    yield row, name or "", -1 if label is None else label
                    row += 1
    except _arrow_errors() as error:
        raise FatError(
            f"{path} cannot be read as parquet: {_reason(error)}. Copy or download it again."
        ) from error


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")


def _check_columns(schema: Any, path: Path) -> bool:
    """Raise a FatError unless there are images and labels; return whether images have names."""
    import pyarrow

    types = {field.name: field.type for field in schema}
    image, label = types.get("image"), types.get("label")
    fields = (
        {image.field(i).name for i in range(image.num_fields)}
        if image is not None and pyarrow.types.is_struct(image)
        else set()
    )
    if "bytes" not in fields or label is None or not pyarrow.types.is_integer(label):
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise FatError(
            f"{path} has the columns {found}; expected are image, a struct of bytes and path, and "
            "label, an integer, as in imagenet-1k on the Hugging Face hub."
        )
    return "path" in fields


def _pyarrow() -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise missing_extra("parquet", "pyarrow, which reads parquet files,")
    import pyarrow.parquet

    return pyarrow.parquet


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError)


def _regular(path: Path) -> BinaryIO:
    """Open a regular file, but not a pipe or device, which may be endless."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    return path.open("rb")


class Reader:
    """Reads images from files and archives, and keeps a few archives open.

    It can be pickled, used after a fork, and shared by threads.

    Args:
        root: Folder that paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._groups: tuple[str, int, Any] | None = None  # path, first row, images of the group

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root = state["root"]
        self._reset()

    def read(self, place: Place) -> bytes:
        """Return the image's bytes, fewer if the archive is truncated.

        Raises:
            OSError: If the file is missing or unreadable, or has no such row.
            FatError: If pyarrow is needed and not installed.
        """
        if self._process != os.getpid():  # open files must not be used after a fork
            self._reset()
        if place.row >= 0:
            return self._row(place)
        if place.offset < 0:
            with _regular(self.root / place.path) as file:
                return file.read()
        # pread, because threads and forked processes share the file position.
        archive = self._file(place.path).fileno()
        left = max(0, os.fstat(archive).st_size - place.offset)
        return os.pread(archive, min(place.size, left), place.offset) if left else b""

    def _file(self, path: str) -> BinaryIO:
        file = self._files.pop(path, None) or _regular(self.root / path)
        self._files[path] = file
        if len(self._files) > _MAX_OPEN:
            self._files.popitem(last=False)  # closed when no thread uses it any more
        return file

    def _row(self, place: Place) -> bytes:
        arrow = _pyarrow()
        group = self._groups
        if group is None or group[0] != place.path or not 0 <= place.row - group[1] < len(group[2]):
            try:
                group = (place.path, *_row_group(arrow, self.root / place.path, place.row))
            except FileNotFoundError:
                raise
            except _arrow_errors() as error:
                raise OSError(_reason(error)) from error
            self._groups = group
        content = group[2][place.row - group[1]].as_py()
        if content is None:
            raise OSError(f"row {place.row} holds no image")
        return bytes(content)


def _row_group(arrow: Any, path: Path, row: int) -> tuple[int, Any]:
    """Return the first row of the row group that holds a row, and the bytes of its images."""
    with arrow.ParquetFile(path, pre_buffer=False) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        group = int(np.searchsorted(ends, row, side="right"))
        if group == len(sizes):
            raise OSError(f"row {row} of {sum(sizes)}")
        table = file.read_row_group(group, columns=["image.bytes"], use_threads=False)
    return int(ends[group]) - sizes[group], table.column("image").combine_chunks().field("bytes")
