"""Decoding of image files to 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from fat.utils.errors import FatError

__all__ = ["IMAGE_SUFFIXES", "UNKNOWN", "UnreadableImage", "is_image", "open_image"]

UNKNOWN = -1
"""Label of an image of unknown class."""
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm"}
)


class UnreadableImage(FatError):
    """An image that cannot be decoded.

    Args:
        name: Name of the image in its source.
        reason: Reason of the failure.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both arguments, for pickling
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"The image {self.name} cannot be read: {self.reason}."


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image.

    Examples:
        >>> is_image("cat.JPEG"), is_image("cat.txt")
        (True, False)
    """
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def open_image(
    file: str | os.PathLike[str] | BinaryIO, name: str | None = None, short_side: int | None = None
) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Grayscale, palette and CMYK images are converted, transparent pixels are blended with white,
    16-bit gray v becomes round(v·255/65535), and the EXIF orientation is applied. The first frame
    of an animation is used.

    Args:
        file: Path or binary file object.
        name: Name of the image in errors; the path by default.
        short_side: Allows JPEGs to be decoded at 1/2, 1/4 or 1/8 of their size (several times
            faster) if the shorter side keeps at least this many pixels. ``None`` decodes at full
            size.

    Returns:
        The decoded image in mode ``"RGB"``.

    Raises:
        UnreadableImage: If the file is missing, truncated or not an image, exceeds Pillow's limit
            on pixels, or holds values without a defined range (float, 32-bit).
    """
    label = name or (str(file) if isinstance(file, str | os.PathLike) else "<stream>")
    try:
        with warnings.catch_warnings():
            # Warnings about metadata are harmless, but the warning of a decompression bomb must
            # become an error, before memory is allocated.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if short_side is not None and image.format == "JPEG":
                    _reduce(image, short_side)
                image.load()
                # exif_transpose always copies, so the result outlives the closed file.
                return _to_rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise nearly anything for damaged files: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, IndexError, …
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UnreadableImage(label, reason.rstrip(".")) from error


def _reduce(image: Image.Image, short_side: int) -> None:
    """Decode a JPEG at the smallest size whose shorter side is at least ``short_side``."""
    # draft divides each side by the requested one and uses the smaller quotient.
    image.draft(None, (short_side, short_side))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_sixteen_to_eight(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save it with 8 or 16 bits")
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_to_eight(
    gray: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    values = gray.astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("32-bit pixels have no defined range; save it with 8 or 16 bits")
    return ((values * 255 + 32767) // 65535).astype(np.uint8)
