"""Where images come from: an indexed collection that loads one image at a time."""

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
    """An indexed collection of images. It must survive pickling: workers get a copy."""

    @property
    def labelled(self) -> bool:
        """Whether the images have labels, which are indices of the network's logits."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the image in mode RGB.

        Args:
            index: Which.
            short_side: The image may come smaller than it is, as long as its shorter side keeps so
                many pixels: see :func:`fat.data.sources.decoding.open_image`. None asks for all of
                them.

        Raises:
            UnreadableImage: If it cannot be decoded.
        """
        ...

    def label(self, index: int) -> int:
        """Return the class index, or -1 if it is not known."""
        ...

    def name(self, index: int) -> str:
        """Return what to call the image in messages, unique within the source."""
        ...

    def content(self, index: int) -> bytes:
        """Return bytes that tell this image from others: its file's, where there is one.

        Raises:
            UnreadableImage: If they cannot be read.
        """
        ...


class PhotoSource:
    """Photographs that ship inside the scikit-image wheel, each repeated to be cropped many times.

    Index i is photograph i mod n, so that any run of n indices shows every photograph once. Nothing
    is downloaded. The crops themselves are made by a random transform.

    Args:
        names: File names in scikit-image's data folder, such as ``"chelsea.png"``.
        count: Number of images that the source pretends to hold.

    Raises:
        FatError: If scikit-image or one of the files is not installed, or nothing is asked for.
    """

    labelled = False

    def __init__(self, names: Sequence[str], count: int) -> None:
        if not names or count < 1:
            raise FatError(f"{len(names)} photographs, {count} crops: ask for at least one each.")
        folder = _photo_folder()
        self._files = [folder / name for name in names]
        missing = [file.name for file in self._files if not file.is_file()]
        if missing:
            present = sorted(entry.name for entry in folder.iterdir() if is_image(entry.name))
            raise FatError(
                f"The installed scikit-image has no photograph {', '.join(missing)}. It has: "
                f"{', '.join(present)}. Type pip install 'scikit-image>=0.22', or bring images "
                "of your own: data=folder data.root=DIR."
            )
        self._count = count
        self._decoded: dict[int, Image.Image] = {}  # a few MB, decoded once per process

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_decoded": {}}

    def load(self, index: int, short_side: int | None = None) -> Image.Image:
        """Return the whole photograph that the index stands for."""
        which = index % len(self._files)
        if which not in self._decoded:
            self._decoded[which] = open_image(self._files[which])
        return self._decoded[which]

    def label(self, index: int) -> int:
        """Return -1: the photographs have no labels."""
        return UNKNOWN

    def name(self, index: int) -> str:
        """Return the photograph and the crop's number, such as ``"chelsea.png#3"``."""
        repeat, which = divmod(index, len(self._files))
        return f"{self._files[which].name}#{repeat}"

    def content(self, index: int) -> bytes:
        """Return the bytes of the photograph's file."""
        return self._files[index % len(self._files)].read_bytes()


def _photo_folder() -> Path:
    # Found without importing scikit-image, which would take a second.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise FatError(
            "data=photos needs scikit-image, which is not installed. Type pip install "
            "scikit-image, or bring images of your own: data=folder data.root=DIR."
        )
    return Path(spec.submodule_search_locations[0]) / "data"
