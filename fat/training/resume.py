"""Files from which a training resumes after a crash. They are loaded with ``weights_only``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fat.models.student import Student
from fat.quant.config import QuantSpec
from fat.training.config import TrainSpec
from fat.utils import distributed
from fat.utils.errors import FatError, first_line
from fat.utils.io import torn_part, write_atomic

__all__ = ["LAST", "RECONSTRUCTION", "START", "TrainingState", "clear_starts"]

LAST = "last.ckpt"
"""Lightning's checkpoint: student, optimizer, loops, data loader, random states."""
START = "start.pt"
"""The student at the first step of the end-to-end training."""
RECONSTRUCTION = "reconstruction.pt"
"""The student after the last reconstructed block."""


def clear_starts(folder: Path) -> None:
    """Remove files that are needed until the first step only.

    Args:
        folder: Folder of the training; it need not exist.
    """
    for name in (START, RECONSTRUCTION):
        (folder / name).unlink(missing_ok=True)


class TrainingState:
    """Files of one training in a folder.

    Args:
        folder: The folder; if ``None``, nothing is saved or found.
        student: The student that is trained.
        spec: Training options. Files of a training with other options are rejected.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, student: Student, spec: TrainSpec
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._whose = {"quantization": student.spec.to_dict(), "recipe": asdict(spec)}

    def clear(self) -> None:
        """Remove the files of an earlier training."""
        if self.folder is not None and distributed.is_main_process():
            for path in [*self.folder.glob("*.ckpt"), *self.folder.glob("*.pt")]:
                path.unlink()

    def path(self, name: str) -> Path | None:
        """Return the path of a file, ``None`` if it does not exist."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return self.folder / name

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Save tensors and plain values, on the main process."""
        if self.folder is not None and distributed.is_main_process():
            saved = {"whose": self._whose, "content": dict(content)}
            write_atomic(self.folder / name, lambda path: torch.save(saved, path))

    def damaged(self, path: Path, error: BaseException) -> FatError:
        """Build the error for a file that cannot be resumed from."""
        return FatError(
            f"Cannot resume from {path}: {first_line(error)[:200].rstrip('.')}. The file is "
            "damaged or was modified. Delete it to restart training from the calibrated student: "
            f"rm '{path}'"
        )

    def check(self, path: Path) -> None:
        """Raise a FatError if the checksums of a file do not match."""
        try:
            _check_sums(path)
        except ValueError as error:
            raise self.damaged(path, error) from error

    def load(self, name: str) -> dict[str, Any] | None:
        """Load the content of a file, ``None`` if it does not exist.

        Raises:
            FatError: If the file is damaged or belongs to another training.
        """
        path = self.path(name)
        if path is None:
            return None
        try:
            _check_sums(path)
            saved = torch.load(path, map_location="cpu", weights_only=True)
            whose, content = saved["whose"], saved["content"]
            whose = {  # files of earlier versions have other names and fewer options
                "quantization": QuantSpec.from_dict(whose["quantization"]).to_dict(),
                "recipe": TrainSpec.from_dict(whose["recipe"]).to_dict(),
            }
        except Exception as error:  # torch.load raises many types on a damaged file
            raise FatError(
                f"Cannot read {path}: {first_line(error).rstrip('.')}. Delete {path.parent} to "
                "restart training."
            ) from error
        for what, options in self._whose.items():
            if whose[what] != options:
                raise FatError(
                    f"{path} belongs to a training with another {what}. Resume with the same "
                    "options, or train in another folder."
                )
        found: dict[str, Any] = content
        return found


def _check_sums(path: Path) -> None:
    part = torn_part(path)
    if part:
        raise ValueError(f"its part {part} is damaged")
