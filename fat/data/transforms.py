"""Transforms from RGB images to the network's input, for evaluation and for training.

A transform has two parts. The first processes one image in a worker and returns 8-bit pixels, which
take a quarter of the memory of float32. The second, ``finish``, processes a batch on its device.
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
from fat.utils.precision import full_precision
from fat.utils.random import generator

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = [
    "DeviceCropTransform",
    "EvalTransform",
    "Normalize",
    "RandomCropTransform",
    "Transform",
    "apply",
    "crop_box",
]

CROP_MODES = ("center", "squash", "border")
# The filters with which torch resizes 8-bit pixels with antialiasing.
_TORCH_FILTERS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)

SHAPE = "fat.shape"
"""Key of the original width and height in the ``info`` of an image resized to a square."""

Parts = tuple[Tensor, ...]
"""Tensors that a worker returns for an image: 8-bit pixels, and other arguments of ``finish``."""


class Transform(Protocol):
    """Converts RGB images to float32 [N, 3, H, W]."""

    @property
    def short_side(self) -> int | None:
        """Pixels that a decoder must keep along the shorter side; ``None`` for full size."""
        ...

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Parts:
        """Return the tensors of one image; ``rng`` is the only source of randomness."""
        ...

    def finish(self, *parts: Tensor) -> Tensor:
        """Return float32 [N, 3, H, W] from the stacked tensors of N images."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return all options that the result depends on."""
        ...


def apply(
    transform: Transform, image: Image.Image, rng: np.random.Generator | None = None
) -> Tensor:
    """Apply both parts of a transform to one image, and return float32 [3, H, W]."""
    rng = generator(0) if rng is None else rng
    return transform.finish(*(part[None] for part in transform(image, rng)))[0]


class Normalize:
    """Normalization (pixels / 255 − mean) / std, bit for bit as in timm.

    Args:
        preprocessing: Mean and std of the network, for pixels scaled to 0…1.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._mean, self._std = tuple(preprocessing.mean), tuple(preprocessing.std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 from uint8 or float pixels 0…255 [N, 3, H, W], on their device.

        The result is the same on every device, bit for bit.
        """
        largest, mean, std = self._constants_on(pixels.device)
        scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        if scaled is pixels:  # do not change the caller's tensor
            scaled = scaled.clone()
        return scaled.div_(largest).sub_(mean).div_(std)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return 255, mean and std on a device, copied there once.

        255 is a tensor because CUDA divides by a number as a product with its reciprocal, which
        rounds differently.
        """
        if device not in self._constants:
            with torch.inference_mode(False):  # tensors made in inference mode are bound to it
                self._constants[device] = (
                    torch.tensor(255.0, device=device),
                    torch.tensor(self._mean, device=device).view(-1, 1, 1),
                    torch.tensor(self._std, device=device).view(-1, 1, 1),
                )
        return self._constants[device]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tensors, so that a worker process does not start a GPU for them."""
        return {**self.__dict__, "_constants": {}}


Normalise = Normalize
"""The name in FAT 0.1."""


class EvalTransform:
    """Resize, center crop, scale to 0…1 and normalize, as timm does for the same configuration.

    Args:
        preprocessing: Size, filter, crop, mean and std of the network.

    Raises:
        FatError: If the filter or the crop mode is unknown.
    """

    # Images are decoded at full size, so that results equal timm's bit for bit.
    short_side = None

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._filter = _filter(preprocessing)
        self._normalize = Normalize(preprocessing)
        if preprocessing.crop_mode not in CROP_MODES:
            raise unknown_name("crop mode", preprocessing.crop_mode, CROP_MODES)
        height, width = preprocessing.size
        pct = preprocessing.crop_pct
        self._scaled = (math.floor(height / pct), math.floor(width / pct))

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Parts:
        """Return the uint8 tensor [3, H, W]. ``rng`` is not used."""
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
        """Normalize a batch."""
        return self._normalize(parts[0])

    def settings(self) -> dict[str, Any]:
        """Return the preprocessing."""
        return {"kind": "eval", **self.preprocessing.to_dict()}

    def _pad(self, image: Image.Image) -> Image.Image:
        """Pad to the network's size with the mean color."""
        height, width = self.preprocessing.size
        down, right = max(height - image.height, 0), max(width - image.width, 0)
        padding = [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]
        fill = tuple(round(255 * value) for value in self.preprocessing.mean)
        padded: Image.Image = F.pad(image, padding, fill=fill)
        return padded


class _RandomCrop:
    """Base of the random crops: draws a box and a horizontal flip."""

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
            raise FatError(f"The probability of a flip is {flip}; allowed: 0 to 1.")
        self.preprocessing = preprocessing
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.flip = flip
        self._filter = _filter(preprocessing)
        self._normalize = Normalize(preprocessing)

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
    """Random crop, resized to the network's size and flipped horizontally at random.

    Args:
        preprocessing: Size, filter, mean and std of the network.
        scale: Smallest and largest fraction of the image's area, 0…1. The default is closer to the
            evaluation crop (about 0.77) than the 0.08 of classification training, because very
            small crops would shift the ranges of activations.
        ratio: Smallest and largest width / height of the crop.
        flip: Probability of a horizontal flip, 0…1.

    Raises:
        FatError: If a range is empty or outside its bounds, or the filter is unknown.
    """

    @property
    def short_side(self) -> int | None:
        """Pixels for which even the smallest crop is as large as the network's input."""
        return math.ceil(max(self.preprocessing.size) / math.sqrt(self.scale[0]))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Parts:
        """Return the uint8 tensor [3, H, W] of a random crop."""
        (left, top, width, height), mirror = self._draw(image.width, image.height, rng)
        part = image.crop((left, top, left + width, top + height))
        pixels = _resized(part, self.preprocessing.size, self._filter)
        return (pixels.flip(-1) if mirror else pixels,)

    def finish(self, *parts: Tensor) -> Tensor:
        """Normalize a batch."""
        return self._normalize(parts[0])


class DeviceCropTransform(_RandomCrop):
    """Random crop on the device of the batch, for machines whose processor is the bottleneck.

    A worker only resizes the whole image to a square and draws the box. The device then samples the
    box bilinearly, which also restores the aspect ratio. Images that are already squares with a
    recorded shape (:mod:`fat.data.cache`) are not resized.

    Args:
        preprocessing: Size, filter, mean and std of the network.
        scale: Smallest and largest fraction of the image's area, 0…1.
        ratio: Smallest and largest width / height of the crop.
        flip: Probability of a horizontal flip, 0…1.
        side: Side of the square, pixels; by default 8/7 of the network's larger side (256 for 224).

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
        """Return uint8 [side, side, 3], and the crop as an affine map, float32 [2, 3]."""
        shape = image.info.get(SHAPE)
        wide, high = shape or image.size
        (left, top, width, height), mirror = self._draw(wide, high, rng)
        # grid_sample's coordinates run from −1 to 1 over the image.
        across, down = width / wide, height / high
        x, y = (2 * left + width) / wide - 1, (2 * top + height) / high - 1
        place = torch.tensor([[-across if mirror else across, 0.0, x], [0.0, down, y]])
        if shape is not None:
            return torch.from_numpy(np.array(image)), place
        # Channels last, the memory layout of an image; the device transposes it faster.
        square = _resized(image, (self.side, self.side), self._filter)
        return square.permute(1, 2, 0).contiguous(), place

    def finish(self, *parts: Tensor) -> Tensor:
        """Crop a batch and normalize it."""
        pixels, places = parts
        squares = pixels.permute(0, 3, 1, 2)
        height, width = self.preprocessing.size
        # The coordinates come from a matrix product, which TF32 would move by a tenth of a pixel.
        with full_precision(pixels.device):
            grid = torch.nn.functional.affine_grid(
                places, [len(squares), 3, height, width], align_corners=False
            )
        cut = torch.nn.functional.grid_sample(
            squares.float(), grid, padding_mode="border", align_corners=False
        )
        return self._normalize(cut)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a box inside the image, with uniform area and uniform log(width / height).

    Args:
        width: Width of the image, pixels.
        height: Height of the image, pixels.
        rng: Random generator.
        scale: Smallest and largest fraction of the area.
        ratio: Smallest and largest width / height.

    Returns:
        Left, top, width and height in pixels. After ten draws that do not fit, the largest centered
        box with an allowed ratio.
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
    """Resize to uint8 [3, H, W]. torch's antialiased filters take a third of Pillow's time."""
    if mode not in _TORCH_FILTERS:
        return _pixels(F.resize(image, list(size), mode))
    # Channels last, the memory layout of an image, which torch resizes fastest.
    last: Any = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # Not torchvision's resize, which converts to float32 and takes four times as long.
    resized = interpolate(last[None], size, mode=mode.value, antialias=True)
    return resized[0].contiguous()
