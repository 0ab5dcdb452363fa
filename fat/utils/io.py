"""Atomic file writes: a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fat.utils.errors import FatError

__all__ = [
    "cache_folder",
    "check_writable",
    "put_in_place",
    "torn_part",
    "write_atomic",
    "write_csv",
    "write_json",
    "write_text",
]


def cache_folder(*parts: str) -> Path:
    """Return FAT's cache folder, ``~/.cache/fat`` or ``$XDG_CACHE_HOME/fat``, or a path in it.

    Args:
        *parts: Names of folders below it. None is created.

    Raises:
        FatError: If there is no home directory and XDG_CACHE_HOME is not set.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FatError(
            "There is no home directory for the cache: set XDG_CACHE_HOME=DIR."
        ) from error
    return Path(base, "fat", *parts)


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Write a file atomically: fill a temporary file beside it, then rename that.

    Args:
        path: The file; its folder is created.
        write: Function that fills the file at the path that it is given.

    Raises:
        FatError: If the file cannot be written; no temporary file is left behind.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
    except OSError as error:
        raise _unwritable(target, error) from error
    temporary = Path(name)
    try:
        write(temporary)
        # A temporary file is private; the result gets the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        put_in_place(temporary, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def put_in_place(temporary: Path, target: Path) -> None:
    """Move a complete file over another one, so that a power cut leaves one of them intact.

    Raises:
        OSError: If the file system refuses.
    """
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(target)


def _unwritable(target: Path, error: OSError) -> FatError:
    return FatError(f"Cannot write {target}: {error.strerror or error}. Choose another place.")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically; undecodable bytes of file names are written as escapes."""
    content = text.encode("utf-8", errors="backslashreplace")
    return write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_csv(
    path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Iterable[object]]
) -> Path:
    """Write a CSV table atomically, with Unix line endings."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write strict JSON (no NaN or infinity) atomically, indented."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def torn_part(path: str | os.PathLike[str]) -> str:
    """Return the name of a damaged part of a file of torch.save, or "" if all are intact.

    torch.load does not check the checksums that are stored with the parts.
    """
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() or ""
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error) or type(error).__name__


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise a FatError if files cannot be written into the folder."""
    probe = Path(folder) / ".write-probe"
    write_text(probe, "")
    probe.unlink()
