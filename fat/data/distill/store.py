"""A folder of computed images that can be interrupted, continued, and trusted afterwards."""

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

from fat.utils.errors import FatError
from fat.utils.io import write_atomic, write_json

__all__ = ["ImageStore"]

log = logging.getLogger(__name__)

SHEET_IMAGES, SHEET_SIDE, SHEET_COLUMNS = 256, 96, 16
REQUEST, SHEET = "request.json", "contact_sheet.png"


class ImageStore:
    """Images that are computed batch by batch, kept as PNG files ``images/00000.png`` ….

    ``request.json`` says what the images are computed from. A batch counts as there once its
    record, ``batches/0000.json``, stands beside its images and holds their checksums. Every write
    is atomic, so that processes with the same request may share the folder.

    Args:
        root: The folder; made by `claim`.
        report: Name of the file that says, in the end, that the set is whole.
        batches: Numbers of the images of each batch.

    Attributes:
        images: The folder of the images, and nothing else.
        sheet: The file with small copies of all.
    """

    def __init__(self, root: Path, report: str, batches: Sequence[range]) -> None:
        self.root, self.batches = root, batches
        self.images, self.sheet, self._report = root / "images", root / SHEET, root / report

    @property
    def complete(self) -> bool:
        """Whether `finish` has been called; `missing` says whether everything is there still."""
        return self._report.is_file() and self.sheet.is_file()

    def claim(self, request: dict[str, Any]) -> None:
        """Write down what will be in the folder, or see that it says so already.

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
            self._refuse_strangers()
            return
        # What is hidden may be another process's temporary files.
        if self.root.is_dir() and any(not x.name.startswith(".") for x in self.root.iterdir()):
            raise FatError(
                f"{self.root} holds other files; computed images need a folder of their own. "
                "Choose another folder."
            )
        write_json(path, request)

    def missing(self) -> list[int]:
        """Numbers of the batches that are not there, or not as they were written."""
        found = [number for number in range(len(self.batches)) if not self.has(number)]
        damaged = [number for number in found if self._record(number).exists()]
        if damaged:
            log.warning("Images in %s are damaged, batches %s: made again.", self.images, damaged)
        if found:
            self._report.unlink(missing_ok=True)
        return found

    def has(self, number: int) -> bool:
        """Whether the batch is there, every byte as it was written."""
        record = _read_json(self._record(number))
        return isinstance(record, dict) and record.get("sha256") == self._checksums(number)

    def put(self, number: int, images: Tensor, facts: dict[str, Any]) -> None:
        """Write the images of a batch, then their record.

        Args:
            number: Which batch.
            images: uint8 [N, 3, H, W] on the CPU.
            facts: What else the record shall hold; see `facts`.
        """
        for index, image in zip(self.batches[number], images, strict=True):
            _write_png(self._image(index), image)
        write_json(self._record(number), {"sha256": self._checksums(number), **facts})

    def facts(self) -> list[dict[str, Any]]:
        """The records of all batches, which must be there."""
        return [json.loads(self._record(i).read_text("utf-8")) for i in range(len(self.batches))]

    def finish(self, report: dict[str, Any]) -> None:
        """Draw the contact sheet and write, last of all, the report."""
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

    def _refuse_strangers(self) -> None:
        if not self.images.is_dir():
            return
        own = {self._image(index).name for batch in self.batches for index in batch}
        names = sorted(entry.name for entry in self.images.iterdir())
        others = [name for name in names if name not in own and not name.startswith(".")]
        if others:
            raise FatError(
                f"{self.images} holds {', '.join(others[:5])}, which FAT did not put there. Move "
                "such files away: the folder is read as a whole."
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
