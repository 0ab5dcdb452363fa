"""From an RGB image to the network's input: for evaluation, and randomly for training.

A transform has two halves. The first runs for one image where it is decoded, in a worker, and
gives 8-bit pixels; the second, `finish`, runs once for a batch, on the device that the batch is
on. Between the two an image takes a quarter of the memory that it takes as float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fat.utils.errors import FatError, unknown_name
from fat.utils.random import generator

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = [
    "DeviceCropTransform",
    "EvalTransform",
    "Normalise",
    "RandomCropTransform",
    "Transform",
    "apply",
    "crop_box",
]

CROP_MODES = ("center", "squash", "border")
# What torch resizes with antialiasing, in one pass over 8-bit pixels.
_TORCH_FILTERS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)

SHAPE = "fat.shape"
"""Key in a squashed image's ``info``: the width and height that it had."""

Parts = tuple[Tensor, ...]
"""What a worker hands over for one image: 8-bit pixels, and what `finish` needs beside them."""


class Transform(Protocol):
    """What turns RGB images into float32 [N, 3, H, W], drawing from ``rng`` alone."""

    @property
    def short_side(self) -> int | None:
        """Pixels that an image's shorter side must keep, None for all: a decoder may save work."""
        ...

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Parts:
        """Return the tensors of one image."""
        ...

    def finish(self, *parts: Tensor) -> Tensor:
        """Return float32 [N, 3, H, W] from the stacked parts of N images."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on beside the image and ``rng``."""
        ...


def apply(
    transform: Transform, image: Image.Image, rng: np.random.Generator | None = None
) -> Tensor:
    """Both halves of a transform for one image: float32 [3, H, W]."""
    rng = generator(0) if rng is None else rng
    return transform.finish(*(part[None] for part in transform(image, rng)))[0]


class Normalise:
    """(pixels / 255 − mean) / std, with timm's order of operations and so its very bits.

    Args:
        preprocessing: Mean and std of the network, for pixels scaled to 0…1.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 from uint8 or float pixels 0…255 [N, 3, H, W], on their device."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        if scaled is pixels:  # the caller's own
            scaled = scaled.clone()
        return scaled.div_(255).sub_(mean).div_(std)


class EvalTransform:
    """Resize, crop the middle, scale to 0…1 and normalise, as timm does for the same config.

    Args:
        preprocessing: Size, filter, crop, mean and std of the network.

    Raises:
        FatError: If the filter or the crop mode is unknown.
    """

    # Every pixel is decoded: the figures are those that timm would give, to the bit.
    short_side = None

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._filter = _filter(preprocessing)
        self._normalise = Normalise(preprocessing)
        if preprocessing.crop_mode not in CROP_MODES:
            raise unknown_name("crop mode", preprocessing.crop_mode, CROP_MODES)
        height, width = preprocessing.size
        pct = preprocessing.crop_pct
        self._scaled = (math.floor(height / pct), math.floor(width / pct))

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Parts:
        """Return the uint8 tensor [3, H, W]. Nothing is drawn at random."""
        size, mode = list(self.preprocessing.size), self.preprocessing.crop_mode
        height, width = self._scaled
        if mode == "squash":
            image = F.resize(image, [height, width], self._filter)
        elif mode == "center" and height == width:
            image = F.resize(image, [height], self._filter)
        else:
            ratios = image.height / height, image.width / width
            ratio = max(ratios) if mode == "border" else min(ratios)
            scaled = [round(image.height / ratio), round(image.width / ratio)]
            image = F.resize(image, scaled, self._filter)
        if mode == "border":
            image = self._pad(image)
        return (_pixels(F.center_crop(image, size)),)

    def finish(self, *parts: Tensor) -> Tensor:
        """Normalise a batch."""
        return self._normalise(parts[0])

    def settings(self) -> dict[str, Any]:
        """Return the preprocessing."""
        return {"kind": "eval", **self.preprocessing.to_dict()}

    def _pad(self, image: Image.Image) -> Image.Image:
        """Fill up to the network's size with the mean colour."""
        height, width = self.preprocessing.size
        down, right = max(height - image.height, 0), max(width - image.width, 0)
        padding = [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]
        fill = tuple(round(255 * value) for value in self.preprocessing.mean)
        padded: Image.Image = F.pad(image, padding, fill=fill)
        return padded


class _RandomCrop:
    """What the two random crops share: which part of an image is taken, and mirrored or not."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        scale: tuple[float, float] = (0.35, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise FatError(f"The crop's scale is {scale}; allowed: 0 < least <= most <= 1.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise FatError(f"The crop's ratio is {ratio}; allowed: 0 < least <= most.")
        if not 0 <= flip <= 1:
            raise FatError(f"The probability of mirroring is {flip}; allowed: 0 to 1.")
        self.preprocessing = preprocessing
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.flip = flip
        self._filter = _filter(preprocessing)
        self._normalise = Normalise(preprocessing)

    def settings(self) -> dict[str, Any]:
        """Return the preprocessing and the ranges of the crops."""
        return {
            "kind": type(self).__name__,
            **self.preprocessing.to_dict(),
            "scale": self.scale,
            "ratio": self.ratio,
            "flip": self.flip,
        }

    def _draw(
        self, width: int, height: int, rng: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], bool]:
        box = crop_box(width, height, rng, self.scale, self.ratio)
        return box, bool(rng.random() < self.flip)


class RandomCropTransform(_RandomCrop):
    """A random part of the image, resized to the network's size and mirrored half of the time.

    Args:
        preprocessing: Size, filter, mean and std of the network.
        scale: Smallest and largest share of the image's area, 0…1. The default stays nearer to the
            evaluation crop (about 0.77) than classification training's 0.08: what is trained here
            are ranges of activations, which very small crops would shift.
        ratio: Smallest and largest width / height of the part.
        flip: Probability of mirroring, 0…1.

    Raises:
        FatError: If a range is empty or outside its bounds, or the filter is unknown.
    """

    @property
    def short_side(self) -> int | None:
        """So many that even the smallest part has as many pixels as the network's input."""
        return math.ceil(max(self.preprocessing.size) / math.sqrt(self.scale[0]))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Parts:
        """Return the uint8 tensor [3, H, W] of the part that ``rng`` picks."""
        (left, top, width, height), mirror = self._draw(image.width, image.height, rng)
        part = image.crop((left, top, left + width, top + height))
        pixels = _resized(part, self.preprocessing.size, self._filter)
        return (pixels.flip(-1) if mirror else pixels,)

    def finish(self, *parts: Tensor) -> Tensor:
        """Normalise a batch."""
        return self._normalise(parts[0])


class DeviceCropTransform(_RandomCrop):
    """The same random parts, cut on the device that the batch is on.

    A worker only squashes the whole image to a square, the same for all, and draws the part; the
    device cuts it out by bilinear interpolation, which undoes the squashing too. For machines
    whose device waits for its processor. An image that is a square already and has its shape noted
    (:mod:`fat.data.cache`) is taken as it is.

    Args:
        preprocessing: Size, filter, mean and std of the network.
        scale: Smallest and largest share of the image's area, 0…1.
        ratio: Smallest and largest width / height of the part.
        flip: Probability of mirroring, 0…1.
        side: Pixels of the square; by default 8/7 of the network's larger side (256 for 224).

    Raises:
        FatError: If a range is empty or outside its bounds, the filter is unknown, or the square
            is smaller than one pixel.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        scale: tuple[float, float] = (0.35, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        side: int | None = None,
    ) -> None:
        super().__init__(preprocessing, scale, ratio, flip)
        self.side = math.ceil(max(preprocessing.size) * 8 / 7) if side is None else side
        if self.side < 1:
            raise FatError(f"The square's side is {side}; it must be at least 1 pixel.")

    @property
    def short_side(self) -> int | None:
        """The square's side."""
        return self.side

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Parts:
        """Return uint8 [side, side, 3], and the part as an affine map, float32 [2, 3]."""
        shape = image.info.get(SHAPE)
        wide, high = shape or image.size
        (left, top, width, height), mirror = self._draw(wide, high, rng)
        # grid_sample's coordinates run from −1 to 1 over the image.
        across, down = width / wide, height / high
        x, y = (2 * left + width) / wide - 1, (2 * top + height) / high - 1
        place = torch.tensor([[-across if mirror else across, 0.0, x], [0.0, down, y]])
        if shape is not None:
            return torch.from_numpy(np.array(image)), place
        # Channels last, as an image's memory is: the device does what turning it would cost here.
        square = _resized(image, (self.side, self.side), self._filter)
        return square.permute(1, 2, 0).contiguous(), place

    def finish(self, *parts: Tensor) -> Tensor:
        """Cut the parts out of a batch and normalise."""
        pixels, places = parts
        squares = pixels.permute(0, 3, 1, 2)
        height, width = self.preprocessing.size
        grid = torch.nn.functional.affine_grid(
            places, [len(squares), 3, height, width], align_corners=False
        )
        cut = torch.nn.functional.grid_sample(
            squares.float(), grid, padding_mode="border", align_corners=False
        )
        return self._normalise(cut)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a part of the image: area uniform in ``scale``, log(width / height) in ``ratio``.

    Args:
        width: Image's width, pixels.
        height: Image's height, pixels.
        rng: What the draws come from.
        scale: Smallest and largest share of the area.
        ratio: Smallest and largest width / height.

    Returns:
        Left, top, width, height in pixels, inside the image. After ten draws that did not fit,
        the largest middle part whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h)
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _filter(preprocessing: Preprocessing) -> InterpolationMode:
    known = [mode.value for mode in InterpolationMode]
    if preprocessing.interpolation not in known:
        raise unknown_name("interpolation", preprocessing.interpolation, known)
    return InterpolationMode(preprocessing.interpolation)


def _pixels(image: Image.Image) -> Tensor:
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels


def _resized(image: Image.Image, size: tuple[int, int], mode: InterpolationMode) -> Tensor:
    """Return uint8 [3, H, W]; torch's antialiased filters take a third of Pillow's time."""
    if mode not in _TORCH_FILTERS:
        return _pixels(F.resize(image, list(size), mode))
    # Channels last, as the image's memory is: the layout that torch resizes fastest.
    last: Any = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # Not torchvision's resize, which goes by float32 and takes four times as long.
    resized = interpolate(last[None], size, mode=mode.value, antialias=True)
    return resized[0].contiguous()
