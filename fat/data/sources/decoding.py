"""Opening an image file of any kind as 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from fat.utils.errors import FatError

__all__ = ["IMAGE_SUFFIXES", "UNKNOWN", "UnreadableImage", "is_image", "open_image"]

UNKNOWN = -1  # the label of an image whose class is not known
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm"}
)


class UnreadableImage(FatError):
    """An image that cannot be decoded. It travels between processes, hence the two arguments.

    Attributes:
        name: Which image, as its source calls it.
        reason: What was wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        """Keep the name and the reason."""
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"The image {self.name} cannot be read: {self.reason}."


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does.

    Examples:
        >>> is_image("cat.JPEG"), is_image("cat.txt")
        (True, False)
    """
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def open_image(
    file: str | os.PathLike[str] | BinaryIO, name: str | None = None, short_side: int | None = None
) -> Image.Image:
    """Decode an image to 8-bit RGB, upright.

    Greyscale, palette and CMYK are converted; transparent pixels are laid on white, as viewers
    show them; 16-bit grey v becomes round(v·255/65535) (a plain conversion would clip at 255);
    EXIF's rotation is applied. Of an animation the first frame is taken.

    Args:
        file: Path, or a binary file object (an entry of a tar or a parquet file).
        name: What to call the image in an error; the path by default.
        short_side: Where a JPEG has more pixels than this along its shorter side, it may be decoded
            at 1/2, 1/4 or 1/8 of its size (a smaller inverse DCT, several times faster), as long
            as the shorter side keeps at least so many. None decodes every pixel.

    Returns:
        The image in mode ``"RGB"``, decoded, its file closed.

    Raises:
        UnreadableImage: If the file is missing, empty, truncated, no image, has more pixels than
            Pillow thinks safe, or holds numbers without a defined range (float, 32-bit).
    """
    label = name or (str(file) if isinstance(file, str | os.PathLike) else "<stream>")
    try:
        with warnings.catch_warnings():
            # Pillow warns of harmless oddities in metadata, once per image; but its warning of a
            # decompression bomb comes before any memory is taken, and must stop us.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if short_side is not None and image.format == "JPEG":
                    _reduce(image, short_side)
                image.load()
                # A copy even where nothing is turned: it must outlive the closed file.
                return _to_rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise nearly anything on damaged files: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, IndexError, …
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UnreadableImage(label, reason.rstrip(".")) from error


def _reduce(image: Image.Image, short_side: int) -> None:
    """Have a JPEG decoded at the smallest size whose shorter side is at least ``short_side``."""
    # A square, as draft divides each side by what is asked for and takes the smaller quotient.
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
    grey: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    values = grey.astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("32-bit pixels have no defined range; save it with 8 or 16 bits")
    return ((values * 255 + 32767) // 65535).astype(np.uint8)
