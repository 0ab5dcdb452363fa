"""Image sources: indexed collections that load one image at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from fat.data.sources.decoding import UNKNOWN, is_image, open_image
from fat.utils.errors import FatError

__all__ = ["ImageSource", "PhotoSource"]


class ImageSource(Protocol):
    """An indexed collection of images. It must support pickling, since workers get a copy."""

    @property
    def labelled(self) -> bool:
        """``True`` if the images have labels, which are indices of the network's logits."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the image in mode RGB.

        Args:
            index: Index of the image.
            short_side: Allows a smaller version whose shorter side has at least this many pixels,
                see :func:`fat.data.sources.decoding.open_image`. ``None`` requires full size.

        Raises:
            UnreadableImage: If it cannot be decoded.
        """
        ...

    def label(self, index: int) -> int:
        """Return the class index, −1 if unknown."""
        ...

    def name(self, index: int) -> str:
        """Return the image's name in messages, unique within the source."""
        ...

    def content(self, index: int) -> bytes:
        """Return bytes that identify the image: those of its file, if there is one.

        Raises:
            UnreadableImage: If they cannot be read.
        """
        ...


class PhotoSource:
    """Photographs from the scikit-image wheel, each repeated for many random crops.

    Index i is photograph i mod n. Nothing is downloaded. A random transform makes the crops.

    Args:
        names: File names in scikit-image's data folder, such as ``"chelsea.png"``.
        count: Length of the source.

    Raises:
        FatError: If scikit-image or one of the files is not installed, or an argument is empty or
            0.
    """

    labelled = False

    def __init__(self, names: Sequence[str], count: int) -> None:
        if not names or count < 1:
            raise FatError(f"{len(names)} photographs, {count} crops: at least one each is needed.")
        folder = _photo_folder()
        self._files = [folder / name for name in names]
        missing = [file.name for file in self._files if not file.is_file()]
        if missing:
            present = sorted(entry.name for entry in folder.iterdir() if is_image(entry.name))
            raise FatError(
                f"The installed scikit-image has no photograph {', '.join(missing)}. It has: "
                f"{', '.join(present)}. Type pip install 'scikit-image>=0.22', or use your own "
                "images: data=folder data.root=DIR."
            )
        self._count = count
        self._decoded: dict[int, Image.Image] = {}  # a few MB per process

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_decoded": {}}

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the whole photograph."""
        photo = index % len(self._files)
        if photo not in self._decoded:
            self._decoded[photo] = open_image(self._files[photo])
        return self._decoded[photo]

    def label(self, index: int) -> int:
        """Return −1: the photographs have no labels."""
        return UNKNOWN

    def name(self, index: int) -> str:
        """Return the photograph and the number of the crop, such as ``"chelsea.png#3"``."""
        repeat, photo = divmod(index, len(self._files))
        return f"{self._files[photo].name}#{repeat}"

    def content(self, index: int) -> bytes:
        """Return the bytes of the photograph's file."""
        return self._files[index % len(self._files)].read_bytes()


def _photo_folder() -> Path:
    # find_spec, because importing scikit-image takes a second.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FatError(
            "data=photos needs scikit-image, which is not installed. Type pip install "
            "scikit-image, or use your own images: data=folder data.root=DIR."
        )
    return Path(spec.submodule_search_locations[0]) / "data"
