"""Folder of computed images, written batch by batch with checksums so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fat.utils.errors import FatError, abbreviated
from fat.utils.io import write_atomic, write_json

__all__ = ["ImageStore"]

logger = logging.getLogger(__name__)

SHEET_IMAGES, SHEET_SIDE, SHEET_COLUMNS = 256, 96, 16
REQUEST, SHEET = "request.json", "contact_sheet.png"


class ImageStore:
    """Folder of images that are computed batch by batch, as PNG files ``images/00000.png`` ….

    ``request.json`` holds the inputs of the computation. A batch is complete once its record,
    ``batches/0000.json``, holds the checksums of its images. Every write is atomic, so that
    processes with the same request can share the folder.

    Args:
        root: The folder; :meth:`claim` creates it.
        report: Name of the file that is written last, when all images are complete.
        batches: Indices of the images of each batch.

    Attributes:
        images: The folder that holds only the images.
        sheet: The file with thumbnails of the images.
    """

    def __init__(self, root: Path, report: str, batches: Sequence[range]) -> None:
        self.root, self.batches = root, batches
        self.images, self.sheet, self._report = root / "images", root / SHEET, root / report

    @property
    def complete(self) -> bool:
        """``True`` once :meth:`finish` was called."""
        return self._report.is_file() and self.sheet.is_file()

    def claim(self, request: dict[str, Any]) -> None:
        """Write the request, or check that the folder has the same one.

        Raises:
            FatError: If the folder holds anything else, or cannot be written.
        """
        path = self.root / REQUEST
        if self.root.exists() and not self.root.is_dir():
            raise FatError(f"{self.root} is a file. Choose another folder.")
        if path.is_file():
            if _read_json(path) != request:
                raise FatError(
                    f"{self.root} holds images computed from another network or with other "
                    "settings. Choose another folder, or remove it."
                )
            self._refuse_other_files()
            return
        # Hidden files may be the temporary files of another process.
        if self.root.is_dir() and any(not x.name.startswith(".") for x in self.root.iterdir()):
            raise FatError(
                f"{self.root} holds other files; computed images need an empty folder. Choose "
                "another folder."
            )
        write_json(path, request)

    def missing(self) -> list[int]:
        """Return the batches that are missing or damaged."""
        missing = [number for number in range(len(self.batches)) if not self.has(number)]
        damaged = [number for number in missing if self._record(number).exists()]
        if damaged:
            logger.warning(
                "Recomputing batches %s of %s: their images are damaged.", damaged, self.images
            )
        if missing:
            self._report.unlink(missing_ok=True)
        return missing

    def has(self, number: int) -> bool:
        """Return whether the batch is complete and undamaged."""
        record = _read_json(self._record(number))
        return isinstance(record, dict) and record.get("sha256") == self._checksums(number)

    def put(self, number: int, images: Tensor, facts: dict[str, Any]) -> None:
        """Write the images of a batch, then their record.

        Args:
            number: Index of the batch.
            images: uint8 [N, 3, H, W] on the CPU.
            facts: Further values for the record.
        """
        for index, image in zip(self.batches[number], images, strict=True):
            _write_png(self._image(index), image)
        write_json(self._record(number), {"sha256": self._checksums(number), **facts})

    def facts(self) -> list[dict[str, Any]]:
        """Return the records of all batches, which must be complete."""
        return [json.loads(self._record(i).read_text("utf-8")) for i in range(len(self.batches))]

    def finish(self, report: dict[str, Any]) -> None:
        """Write the contact sheet, and then the report."""
        write_atomic(self.sheet, lambda path: self._contact_sheet().save(path, "PNG"))
        write_json(self._report, report)

    def _contact_sheet(self) -> Image.Image:
        files = [self._image(index) for batch in self.batches for index in batch][:SHEET_IMAGES]
        columns = min(len(files), SHEET_COLUMNS)
        rows = math.ceil(len(files) / columns)
        sheet = Image.new("RGB", (columns * SHEET_SIDE, rows * SHEET_SIDE), "white")
        for position, file in enumerate(files):
            with Image.open(file) as image:
                small = image.resize((SHEET_SIDE, SHEET_SIDE))
            row, column = divmod(position, columns)
            sheet.paste(small, (column * SHEET_SIDE, row * SHEET_SIDE))
        return sheet

    def _refuse_other_files(self) -> None:
        if not self.images.is_dir():
            return
        own = {self._image(index).name for batch in self.batches for index in batch}
        names = sorted(entry.name for entry in self.images.iterdir())
        others = [name for name in names if name not in own and not name.startswith(".")]
        if others:
            raise FatError(
                f"{self.images} holds files that FAT did not write: {abbreviated(others)}. Move "
                "them elsewhere, because all images in the folder are used."
            )

    def _checksums(self, number: int) -> list[str | None]:
        return [_checksum(self._image(index)) for index in self.batches[number]]

    def _image(self, index: int) -> Path:
        return self.images / f"{index:05d}.png"

    def _record(self, number: int) -> Path:
        return self.root / "batches" / f"{number:04d}.json"


def _write_png(path: Path, image: Tensor) -> None:
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    write_atomic(path, lambda temporary: pixels.save(temporary, "PNG"))


def _checksum(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
