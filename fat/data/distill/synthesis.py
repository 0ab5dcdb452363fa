"""Data-free images, synthesized from the batch-norm statistics of a float network.

Every batch norm holds the mean μ and variance σ² of its input in training. Starting from noise,
images are optimized by gradient descent on

    mean over layers and channels of ((μ_batch − μ) / σ)² + (σ_batch / σ − 1)²
    + smoothness · total variation + class_weight · cross-entropy with a random class,

where the pixels count as one more layer with the statistics of photographs. Sources: ZeroQ
(arXiv 2001.00281) for the statistics, DeepInversion (arXiv 1912.08795) for the other two terms.
Most steps run at half the network's resolution, where they take a quarter of the time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fat.data.config import DistillSpec
from fat.data.distill.store import ImageStore
from fat.data.transforms import crop_box
from fat.utils.errors import FatError
from fat.utils.io import cache_folder
from fat.utils.precision import full_precision
from fat.utils.random import generator
from fat.utils.schedules import annealed

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = ["DistillSpec", "DistilledBatch", "distill", "distilled_folder"]

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cached folders; increase it also when the same spec gives other pixels
# Statistics of all pixels (scaled to 0…1) of ImageNet's photographs, per channel R, G, B.
PHOTO_MEAN = (0.485, 0.456, 0.406)
PHOTO_STD = (0.275, 0.269, 0.270)
GRAY = 0.95  # correlation of the channels of the initial noise: photographs are mostly gray
# The random crops of training (RandomCropTransform), and the fraction of steps that use them.
ZOOM_SCALE, ZOOM_RATIO, ZOOM_FRACTION = (0.35, 1.0), (3 / 4, 4 / 3), 0.5
FULL_COST = 4  # cost of a step at full resolution, in steps at half resolution


@dataclass(frozen=True)
class DistilledBatch:
    """A batch of synthesized images.

    Attributes:
        images: uint8 [N, 3, H, W] on the CPU; H and W are the size to which the evaluation
            transform resizes, so that it only crops them.
        error_before: Error of the initial noise's statistics in the evaluation crop, the mean over
            layers and channels of ((μ_batch − μ)/σ)² + (σ_batch/σ − 1)².
        error: Error of the images' statistics, likewise.
    """

    images: Tensor
    error_before: float
    error: float


def distill(
    network: nn.Module,
    preprocessing: Preprocessing,
    spec: DistillSpec,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Iterator[DistilledBatch]:
    """Synthesize images batch by batch from the batch norms of a network.

    A batch depends only on the network, the preprocessing, the spec, the seed, its own index and
    the device; on a GPU it may also vary from run to run by rounding. The network does not change.

    Args:
        network: Float network with batch norms that are not folded, [N, 3, H, W] → logits
            [N, classes].
        preprocessing: Size, mean and std of the network's images.
        spec: Options.
        seed: Seed of the noise, the crops and the classes.
        device: Device to compute on; the network's by default.
        progress: If ``True``, show a progress bar with an ETA.

    Returns:
        Iterator that computes the batches.

    Raises:
        FatError: If the network has no batch norm with statistics, does not accept images of half
            its size, or gives values that are not finite.

    Examples:
        >>> from fat.models import Preprocessing
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ... )
        >>> how = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
        >>> spec = DistillSpec(images=6, batch_size=4, coarse_steps=2, steps=1)
        >>> [batch.images.shape[0] for batch in distill(network, how, spec, progress=False)]
        [3, 3]
    """
    distiller = _Distiller(network, preprocessing, spec, seed, device)

    def run() -> Iterator[DistilledBatch]:
        with _bar(spec, spec.images, progress) as bar:
            for number in range(len(spec.batches)):
                yield distiller.batch(number, bar)

    return run()


def distilled_folder(
    network: nn.Module,
    preprocessing: Preprocessing,
    spec: DistillSpec,
    *,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Run :func:`distill` once and save the images as PNG files.

    Besides the folder of images, it writes ``contact_sheet.png`` (thumbnails), ``request.json``
    (the inputs), ``batches/`` (a checksum for each image) and, last, ``distilled.json`` (spec, seed
    and errors of the statistics). Batches that exist and are undamaged are not computed again.

    Args:
        network: As for :func:`distill`.
        preprocessing: As for :func:`distill`.
        spec: Options.
        seed: Seed of the noise, the crops and the classes.
        folder: Target folder; by default ``~/.cache/fat/distilled/KEY`` (``XDG_CACHE_HOME``), where
            KEY is a hash of the network's weights, the preprocessing, the spec and the seed.
        device: Device to compute on; the network's by default.
        progress: If ``True``, show a progress bar with an ETA.

    Returns:
        The folder with the images ``00000.png`` … and no other files.

    Raises:
        FatError: As for :func:`distill`, or if ``folder`` holds other files or cannot be written.
    """
    _check_batch_norms(network)
    started = time.perf_counter()
    key = _key(network, preprocessing, spec, seed)
    root = cache_folder("distilled", key) if folder is None else Path(folder)
    store = ImageStore(root, "distilled.json", spec.batches)
    request = {"format": FORMAT, "key": key, "seed": seed, "spec": asdict(spec)}
    store.claim(request)
    missing = store.missing()
    if not missing and store.complete:
        logger.info("Using the distilled images in %s, shown in %s.", store.images, store.sheet)
        return store.images
    if missing:
        logger.info("Distilling %d images into %s.", spec.images, store.images)
        _fill(store, missing, _Distiller(network, preprocessing, spec, seed, device), progress)
    errors = _mean_errors(store.facts(), spec)
    store.finish({"seed": seed, "spec": asdict(spec), **errors})
    logger.info(
        "Distilled %d images in %.0f s; error of their statistics: %.3f, of noise: %.3f. They are "
        "shown in %s.",
        spec.images,
        time.perf_counter() - started,
        errors["error"],
        errors["error_before"],
        store.sheet,
    )
    return store.images


def _fill(store: ImageStore, missing: list[int], distiller: _Distiller, progress: bool) -> None:
    spec = distiller.spec
    with _bar(spec, sum(len(spec.batches[number]) for number in missing), progress) as bar:
        for number in missing:
            batch = distiller.batch(number, bar)
            # Another process may have written it meanwhile, with a record that fits its images.
            if not store.has(number):
                facts = {"error_before": batch.error_before, "error": batch.error}
                store.put(number, batch.images, facts)


def _mean_errors(records: list[dict[str, Any]], spec: DistillSpec) -> dict[str, float]:
    sizes = [len(batch) for batch in spec.batches]
    return {
        name: float(np.average([record[name] for record in records], weights=sizes))
        for name in ("error_before", "error")
    }


def _key(network: nn.Module, preprocessing: Preprocessing, spec: DistillSpec, seed: int) -> str:
    """Return a hash of everything that the images depend on."""
    digest = hashlib.sha256()
    # Types are included because weights do not distinguish ReLU from ReLU6.
    types = [(name, type(module).__qualname__) for name, module in network.named_modules()]
    facts = [FORMAT, preprocessing.to_dict(), asdict(spec), seed, types]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_batch_norms(network: nn.Module) -> None:
    """Raise a FatError unless the network has batch norms with running statistics."""
    if not _batch_norms(network):
        raise FatError(
            "Images are distilled from the running statistics of batch norms, but the network, "
            f"{type(network).__name__}, has none (or they are folded already). Type data=photos or "
            "data=folder data.root=DIR."
        )


class _Distiller:
    """Copy of a network that synthesizes batches."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        spec: DistillSpec,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        _check_batch_norms(network)
        if device is None:
            device = next(network.buffers()).device
        # A copy, because the caller could see hooks and flags between two batches.
        self.network = copy.deepcopy(network).to(device, torch.float32)
        self.network.eval().requires_grad_(False)
        self.errors: list[Tensor] = []
        for norm in _batch_norms(self.network):
            norm.register_forward_pre_hook(self._observe)
        self.spec, self.seed, self.device = spec, seed, torch.device(device)
        self.size = preprocessing.size
        # The size to which EvalTransform resizes.
        height, width = (max(side, math.floor(side / preprocessing.crop_pct)) for side in self.size)
        self.canvas = height, width
        self.mean, self.std, self.photo_mean, self.photo_std = (
            torch.tensor(values, device=self.device)
            for values in (preprocessing.mean, preprocessing.std, PHOTO_MEAN, PHOTO_STD)
        )
        self.classes = self._check(self.size, "")
        if spec.coarse_steps > 0:
            self._check(
                _half(self.size), " Type data.distill.coarse_steps=0 data.distill.steps=40."
            )

    @torch.no_grad()
    def _check(self, size: tuple[int, int], hint: str) -> int:
        """Return the number of classes.

        Raises:
            FatError: If the network does not accept images of this size.
        """
        try:
            with full_precision(self.device):
                logits, _ = self._forward(torch.zeros(1, 3, *size, device=self.device))
        except (RuntimeError, AssertionError) as error:
            raise FatError(
                f"The network does not accept images [1, 3, {size[0]}, {size[1]}]: {error}.{hint}"
            ) from error
        if logits.dim() != 2:
            raise FatError(
                f"The network returns {list(logits.shape)} for one image, not logits [1, classes]."
            )
        return logits.shape[1]

    def batch(self, number: int, bar: Any) -> DistilledBatch:
        """Synthesize batch ``number``, in full float32."""
        with full_precision(self.device):
            return self._batch(number, bar)

    def _batch(self, number: int, bar: Any) -> DistilledBatch:
        count = len(self.spec.batches[number])
        rng = generator(self.seed, number)
        classes = (torch.from_numpy(rng.random(count)) * self.classes).long().to(self.device)
        canvas, size = self.canvas, self.size
        coarse = self.spec.coarse_steps > 0
        if coarse:
            canvas, size = _half(canvas), _half(size)
        pixels = self._colorize(pyramid_noise(count, *canvas, rng))
        before = self._error(_resized(pixels, self.canvas) if coarse else pixels)
        if coarse:
            pixels = self._optimize(pixels, size, self.spec.coarse_steps, classes, rng, bar, 1)
            pixels = _resized(pixels, self.canvas)
        pixels = self._optimize(pixels, self.size, self.spec.steps, classes, rng, bar, FULL_COST)
        images = (pixels * 255.0).round()
        after = self._error(images / 255.0)
        return DistilledBatch(images.to("cpu", torch.uint8).contiguous(), before, after)

    def _optimize(
        self,
        pixels: Tensor,
        size: tuple[int, int],
        steps: int,
        classes: Tensor,
        rng: np.random.Generator,
        bar: Any,
        cost: int,
    ) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.enable_grad():
            pixels.requires_grad_()
            adam = torch.optim.Adam([pixels], betas=(0.9, 0.99))
            for step in range(steps):
                adam.param_groups[0]["lr"] = self.spec.lr * annealed(step, steps)
                adam.zero_grad()
                self._loss(pixels, size, classes, rng).backward()  # type: ignore[no-untyped-call]
                adam.step()
                with torch.no_grad():
                    pixels.clamp_(0.0, 1.0)
                bar.update(len(pixels) * cost)
        return pixels.detach()

    def _loss(
        self, pixels: Tensor, size: tuple[int, int], classes: Tensor, rng: np.random.Generator
    ) -> Tensor:
        logits, error = self._forward(random_view(pixels, size, rng))
        return (
            error
            + self.spec.smoothness * total_variation(pixels)
            + self.spec.class_weight * F.cross_entropy(logits, classes)
        )

    def _forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the error of the statistics."""
        view, mean, mean_square = _moments(view)
        self.errors = [_mismatch(mean, mean_square, self.photo_mean, self.photo_std.square())]
        x = (view - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        logits = self.network(x)
        errors, self.errors = torch.stack(self.errors), []
        return logits, errors.mean()

    @torch.no_grad()
    def _error(self, pixels: Tensor) -> float:
        """Return the error of the statistics in the evaluation crop."""
        (height, width), (rows, columns) = self.size, self.canvas
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        view = pixels[..., top : top + height, left : left + width]
        error = float(self._forward(view)[1])
        if not math.isfinite(error):
            raise FatError(
                "Distilling images gave values that are not finite: the network's weights or "
                "batch norms are damaged. Type model.weights=FILE with others, or use images: "
                "data=photos or data=folder data.root=DIR."
            )
        return error

    def _colorize(self, noise: Tensor) -> Tensor:
        """Give noise [N, 3, H, W] of mean 0 and variance 1 the statistics of photographs."""
        noise = noise.to(self.device)
        colored = noise * self.photo_std.view(-1, 1, 1) + self.photo_mean.view(-1, 1, 1)
        return colored.clamp(0.0, 1.0)

    def _observe(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, mean, mean_square = _moments(inputs[0])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance = norm.running_var + norm.eps
        self.errors.append(_mismatch(mean, mean_square + norm.eps, norm.running_mean, variance))
        return (x,)


def pyramid_noise(count: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Draw noise with the spectrum of photographs: octaves of half the amplitude of the coarser.

    Returns:
        float32 [count, 3, height, width]; each image has variance 1.
    """
    noise = torch.zeros(count, 3, height, width)
    rows, columns, strength = height, width, 1.0
    while min(rows, columns) >= 2:
        octave = GRAY * _normal(rng, count, 1, rows, columns)
        octave = octave + math.sqrt(1 - GRAY**2) * _normal(rng, count, 3, rows, columns)
        noise += strength * _bicubic(octave, (height, width))
        rows, columns, strength = rows // 2, columns // 2, strength * 2
    return noise / noise.std((1, 2, 3), keepdim=True).clamp_min(1e-6)


def random_view(pixels: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Crop images [N, 3, H, W] as in training or as in evaluation, and flip them, at random."""
    height, width = pixels.shape[2:]
    if rng.random() < ZOOM_FRACTION:
        left, top, columns, rows = crop_box(width, height, rng, ZOOM_SCALE, ZOOM_RATIO)
    else:
        rows, columns = size
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
    view = pixels[..., top : top + rows, left : left + columns]
    if (rows, columns) != size:
        view = F.interpolate(view, size, mode="bilinear", align_corners=False)
    return view.flip(-1) if rng.random() < 0.5 else view


def total_variation(pixels: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbors, summed over columns and rows."""
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    return down + (pixels[..., 1:] - pixels[..., :-1]).abs().mean()


class _Moments(torch.autograd.Function):
    """Identity of x [N, C, H, W] that also returns its mean and mean square per channel.

    torch.var_mean takes longer than the convolution before it. Returning x allows the backward pass
    to compute its gradient in place instead of summing three tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        # Over pixels first, which is faster and more accurate.
        return x.view_as(x), x.mean((2, 3)).mean(0), x.square().mean((2, 3)).mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, of_mean, of_square = grads
        count = x.numel() / x.shape[1]
        by_channel = (2.0 * of_square / count).view(1, -1, 1, 1)
        return torch.addcmul(grad, x, by_channel).add_((of_mean / count).view(1, -1, 1, 1))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = _Moments.apply(x)
    return out


def _mismatch(mean: Tensor, mean_square: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """Return the mean over channels of ((μ_batch − μ)/σ)² + (σ_batch/σ − 1)²."""
    shift = (mean - wanted).square() / variance
    # The minimum keeps the root's gradient finite for constant channels.
    ratio = ((mean_square - mean.square()) / variance).clamp_min(1e-6).sqrt()
    return (shift + (ratio - 1.0).square()).mean()


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [
        module
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    ]


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bicubic", align_corners=False)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return _bicubic(pixels, size).clamp(0.0, 1.0)


def _half(size: tuple[int, int]) -> tuple[int, int]:
    return max(size[0] // 2, 1), max(size[1] // 2, 1)


def _bar(spec: DistillSpec, images: int, progress: bool) -> Any:
    each = spec.coarse_steps + FULL_COST * spec.steps
    # Steps are counted by their cost, for a correct ETA.
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(
        total=images * each, desc="Distill", bar_format=form, disable=not progress, leave=False
    )
