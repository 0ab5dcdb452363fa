"""What a training keeps on disk so that it can go on after a crash, as data that loads no code."""

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
"""The student that gradient descent over the whole network starts from."""
RECONSTRUCTION = "reconstruction.pt"
"""The student after the last block that was reconstructed."""


def clear_starts(folder: Path) -> None:
    """Remove what a training needed before its first step; one that is finished never goes back.

    Args:
        folder: Where its files are; it need not exist.
    """
    for name in (START, RECONSTRUCTION):
        (folder / name).unlink(missing_ok=True)


class TrainingState:
    """The files of one training in a folder.

    Args:
        folder: Where they are; ``None`` keeps nothing and finds nothing.
        student: Whose training it is.
        spec: Its recipe. Another one finds no file of this one.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, student: Student, spec: TrainSpec
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._whose = {"quantization": student.spec.to_dict(), "recipe": asdict(spec)}

    def clear(self) -> None:
        """Remove what an earlier training left here."""
        if self.folder is not None and distributed.is_main_process():
            for path in [*self.folder.glob("*.ckpt"), *self.folder.glob("*.pt")]:
                path.unlink()

    def path(self, name: str) -> Path | None:
        """Where a file is, ``None`` where there is none."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return self.folder / name

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep tensors and plain values; of several processes the first does."""
        if self.folder is not None and distributed.is_main_process():
            kept = {"whose": self._whose, "content": dict(content)}
            write_atomic(self.folder / name, lambda path: torch.save(kept, path))

    def damaged(self, path: Path, error: BaseException) -> FatError:
        """What to say of a file that cannot be gone on from."""
        return FatError(
            f"{path} cannot be gone on from: {first_line(error)[:200]} It is damaged, or was "
            "changed. Remove it, and the training begins anew from the calibrated student: "
            f"rm '{path}'"
        )

    def check(self, path: Path) -> None:
        """Raise a FatError if a file's checksums say that it is damaged."""
        try:
            _check_whole(path)
        except ValueError as error:
            raise self.damaged(path, error) from error

    def load(self, name: str) -> dict[str, Any] | None:
        """What was kept, ``None`` where nothing was.

        Raises:
            FatError: If the file is damaged, or of another training.
        """
        path = self.path(name)
        if path is None:
            return None
        try:
            _check_whole(path)
            kept = torch.load(path, map_location="cpu", weights_only=True)
            whose, content = kept["whose"], kept["content"]
            whose = {  # an earlier version has other names and fewer options
                "quantization": QuantSpec.from_dict(whose["quantization"]).to_dict(),
                "recipe": TrainSpec.from_dict(whose["recipe"]).to_dict(),
            }
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            raise FatError(
                f"{path} cannot be read: {first_line(error)}. Remove {path.parent} to train anew."
            ) from error
        for what, options in self._whose.items():
            if whose[what] != options:
                raise FatError(
                    f"{path} is of a training with another {what}. Go on with the options it had, "
                    "or train anew in another folder."
                )
        found: dict[str, Any] = content
        return found


def _check_whole(path: Path) -> None:
    part = torn_part(path)
    if part:
        raise ValueError(f"its part {part} is damaged")
