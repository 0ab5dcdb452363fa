"""From an RGB image to the network's input: for evaluation, and randomly for training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fat.errors import FatError, unknown_name

if TYPE_CHECKING:
    from fat.models import Preprocessing

__all__ = ["EvalTransform", "RandomCropTransform", "Transform", "crop_box", "generator"]

CROP_MODES = ("center", "squash", "border")


class Transform(Protocol):
    """What turns an RGB image into a float32 tensor [3, H, W], drawing from ``rng`` alone."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Return the network's input."""
        ...


class EvalTransform:
    """Resize, crop the middle, scale to 0…1 and normalise, as timm does for the same config.

    Args:
        preprocessing: Size, filter, crop, mean and std of the network.

    Raises:
        FatError: If the filter or the crop mode is unknown.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._filter = _filter(preprocessing)
        if preprocessing.crop_mode not in CROP_MODES:
            raise unknown_name("crop mode", preprocessing.crop_mode, CROP_MODES)
        height, width = preprocessing.size
        pct = preprocessing.crop_pct
        self._scaled = (math.floor(height / pct), math.floor(width / pct))

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """Return the float32 tensor [3, H, W]. Nothing is drawn at random."""
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
        return _normalised(F.center_crop(image, size), self.preprocessing)

    def _pad(self, image: Image.Image) -> Image.Image:
        """Fill up to the network's size with the mean colour."""
        height, width = self.preprocessing.size
        down, right = max(height - image.height, 0), max(width - image.width, 0)
        padding = [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]
        fill = tuple(round(255 * value) for value in self.preprocessing.mean)
        padded: Image.Image = F.pad(image, padding, fill=fill)
        return padded


class RandomCropTransform:
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

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Return the float32 tensor [3, H, W] of the part that ``rng`` picks."""
        box = crop_box(image.width, image.height, rng, self.scale, self.ratio)
        left, top, width, height = box
        size = list(self.preprocessing.size)
        image = F.resized_crop(image, top, left, height, width, size, self._filter)
        if rng.random() < self.flip:
            image = F.hflip(image)
        return _normalised(image, self.preprocessing)


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
            return (
                int(rng.integers(width - w + 1)),
                int(rng.integers(height - h + 1)),
                w,
                h,
            )
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def generator(*key: int) -> np.random.Generator:
    """Return the random generator of a key such as (seed, epoch, index).

    Equal keys give equal draws in every process, whatever was drawn before.

    Raises:
        FatError: If a number is negative.

    Examples:
        >>> generator(0, 1, 2).random() == generator(0, 1, 2).random()
        True
    """
    if min(key) < 0:
        raise FatError(f"Seeds, epochs and indices must not be negative, but came {key}.")
    return np.random.default_rng(key)


def _filter(preprocessing: Preprocessing) -> InterpolationMode:
    known = [mode.value for mode in InterpolationMode]
    if preprocessing.interpolation not in known:
        raise unknown_name("interpolation", preprocessing.interpolation, known)
    return InterpolationMode(preprocessing.interpolation)


def _normalised(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    tensor: Tensor = F.normalize(
        F.to_tensor(image),
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
        inplace=True,
    )
    return tensor.to(torch.float32)
