"""Images from nothing but a float network: what its batch norms remember of the training images.

Every batch norm holds the mean μ and the variance σ² that its input had in training. Noise is
turned into images by gradient descent on

    mean over layers and channels of ((μ_batch − μ) / σ)² + (σ_batch / σ − 1)²
    + smoothness · total variation + class_weight · cross-entropy with a random class,

where the pixels count as one more layer, whose statistics are those of photographs. Sources: ZeroQ
(arXiv 2001.00281) for the statistics, DeepInversion (arXiv 1912.08795) for the other two terms.
Most steps work at half the network's resolution, where they take a quarter of the time.
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
from fat.utils.random import generator
from fat.utils.schedules import annealed

if TYPE_CHECKING:
    from fat.models.float_model import Preprocessing

__all__ = ["DistillSpec", "DistilledBatch", "distill", "distilled_folder"]

log = logging.getLogger(__name__)

FORMAT = 1  # of the cached folders; also to be raised when other pixels come from the same spec
# Over all pixels (scaled to 0…1) of ImageNet's photographs, per channel R, G, B.
PHOTO_MEAN = (0.485, 0.456, 0.406)
PHOTO_STD = (0.275, 0.269, 0.270)
GREY = 0.95  # what the channels of the first noise share: photographs are mostly grey
# The crops that training draws (RandomCropTransform), so that images are good at these scales too.
ZOOM_SCALE, ZOOM_RATIO, ZOOM_SHARE = (0.35, 1.0), (3 / 4, 4 / 3), 0.5
FULL_COST = 4  # a step at full resolution takes so many times as long as one at half


@dataclass(frozen=True)
class DistilledBatch:
    """Images that were made together.

    Attributes:
        images: uint8 [N, 3, H, W] on the CPU; H and W are what the evaluation transform resizes
            to, so that its crop takes the pixels as they are.
        error_before: How far the statistics of the first noise were from the batch norms', in the
            evaluation crop: mean over layers and channels of ((μ_batch − μ)/σ)² + (σ_batch/σ − 1)².
        error: The same of the images.
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
    """Make images batch by batch, from the batch norms of a network.

    A batch depends on the network, the preprocessing, the spec, the seed and its own number, on
    nothing else. The network is copied, and so left as it is.

    Args:
        network: Float network with batch norms, not folded: image batches [N, 3, H, W] → logits
            [N, classes].
        preprocessing: Size, mean and std of the network's images.
        spec: How many images, and how.
        seed: Seed of the noise, the crops and the classes.
        device: Where to compute; where the network is by default.
        progress: Whether to show a progress bar with the time left.

    Returns:
        The batches, each made when it is asked for.

    Raises:
        FatError: If the network has no batch norm with statistics, cannot take images of half its
            size, or gives numbers that are not finite.

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
    """Make the images of :func:`distill` once, and keep them as PNG files.

    Beside the folder with the images stand ``contact_sheet.png`` for the eye, ``request.json``
    (what the images are made from), ``batches/`` (a checksum for each image) and, written last,
    ``distilled.json`` (spec, seed and the errors of the statistics). A batch that is there and
    intact is not made again, whether the run before was interrupted or finished.

    Args:
        network: As for :func:`distill`.
        preprocessing: As for :func:`distill`.
        spec: How many images, and how.
        seed: Seed of the noise, the crops and the classes.
        folder: Where to; ``~/.cache/fat/distilled/KEY`` (``XDG_CACHE_HOME``) by default, where KEY
            stands for the network's weights, the preprocessing, the spec and the seed.
        device: Where to compute; where the network is by default.
        progress: Whether to show a progress bar with the time left.

    Returns:
        The folder that holds the images ``00000.png`` … and nothing else.

    Raises:
        FatError: As for :func:`distill`; or if ``folder`` holds anything else, or cannot be
            written.
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
        log.info("Distilled images, made before: %s. Have a look: %s", store.images, store.sheet)
        return store.images
    if missing:
        log.info("Distilling %d images into %s.", spec.images, store.images)
        _fill(store, missing, _Distiller(network, preprocessing, spec, seed, device), progress)
    errors = _mean_errors(store.facts(), spec)
    store.finish({"seed": seed, "spec": asdict(spec), **errors})
    log.info(
        "Distilled %d images in %.0f s; error of their statistics: %.3f, noise: %.3f. Have a look: "
        "%s",
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
            # Another process may have been faster; its record must go on fitting its images.
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
    """A name for everything that the images depend on."""
    digest = hashlib.sha256()
    # The types, since weights do not tell a ReLU from a ReLU6.
    types = [(name, type(module).__qualname__) for name, module in network.named_modules()]
    facts = [FORMAT, preprocessing.to_dict(), asdict(spec), seed, types]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_batch_norms(network: nn.Module) -> None:
    """Raise a FatError unless the network has batch norms that know their statistics."""
    if not _batch_norms(network):
        raise FatError(
            "Images are distilled from the running statistics of batch norms, but the network, "
            f"{type(network).__name__}, has no batch norm that holds any (none at all, or they "
            "are folded already). Type data=photos or data=folder data.root=DIR."
        )


class _Distiller:
    """A copy of the network, with what makes one batch from it."""

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
        # A copy: hooks and flags on the caller's own would be seen between two batches.
        self.network = copy.deepcopy(network).to(device, torch.float32)
        self.network.eval().requires_grad_(False)
        self.errors: list[Tensor] = []
        for norm in _batch_norms(self.network):
            norm.register_forward_pre_hook(self._observe)
        self.spec, self.seed, self.device = spec, seed, torch.device(device)
        self.size = preprocessing.size
        # What EvalTransform resizes to; its crop then takes the pixels as they are.
        height, width = (max(side, math.floor(side / preprocessing.crop_pct)) for side in self.size)
        self.canvas = height, width
        self.mean, self.std, self.photo_mean, self.photo_std = (
            torch.tensor(values, device=self.device)
            for values in (preprocessing.mean, preprocessing.std, PHOTO_MEAN, PHOTO_STD)
        )
        self._check(self.size, "")
        if spec.coarse_steps > 0:
            self._check(
                _half(self.size), " Type data.distill.coarse_steps=0 data.distill.steps=40."
            )

    @torch.no_grad()
    def _check(self, size: tuple[int, int], hint: str) -> None:
        """Raise a FatError now if the network cannot take images of this size."""
        try:
            logits, _ = self._forward(torch.zeros(1, 3, *size, device=self.device))
        except (RuntimeError, AssertionError) as error:
            raise FatError(
                f"The network takes no images [1, 3, {size[0]}, {size[1]}]: {error}.{hint}"
            ) from error
        if logits.dim() != 2:
            raise FatError(
                f"The network gives {list(logits.shape)} for one image; wanted logits [1, classes]."
            )

    def batch(self, number: int, bar: Any) -> DistilledBatch:
        """Make batch ``number``."""
        count = len(self.spec.batches[number])
        rng = generator(self.seed, number)
        shares = torch.from_numpy(rng.random(count))  # of the classes: their number is not known
        canvas, size = self.canvas, self.size
        coarse = self.spec.coarse_steps > 0
        if coarse:
            canvas, size = _half(canvas), _half(size)
        pixels = self._colour(pyramid_noise(count, *canvas, rng))
        before = self._judge(_resized(pixels, self.canvas) if coarse else pixels)
        if coarse:
            pixels = self._optimise(pixels, size, self.spec.coarse_steps, shares, rng, bar, 1)
            pixels = _resized(pixels, self.canvas)
        pixels = self._optimise(pixels, self.size, self.spec.steps, shares, rng, bar, FULL_COST)
        images = (pixels * 255.0).round()
        after = self._judge(images / 255.0)
        return DistilledBatch(images.to("cpu", torch.uint8).contiguous(), before, after)

    def _optimise(
        self,
        pixels: Tensor,
        size: tuple[int, int],
        steps: int,
        shares: Tensor,
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
                self._loss(pixels, size, shares, rng).backward()  # type: ignore[no-untyped-call]
                adam.step()
                with torch.no_grad():
                    pixels.clamp_(0.0, 1.0)
                bar.update(len(pixels) * cost)
        return pixels.detach()

    def _loss(
        self, pixels: Tensor, size: tuple[int, int], shares: Tensor, rng: np.random.Generator
    ) -> Tensor:
        logits, error = self._forward(random_view(pixels, size, rng))
        classes = (shares * logits.shape[1]).long().to(logits.device)
        return (
            error
            + self.spec.smoothness * total_variation(pixels)
            + self.spec.class_weight * F.cross_entropy(logits, classes)
        )

    def _forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the error of the statistics."""
        view, mean, mean_square = _moments(view)
        self.errors = [_mismatch(mean, mean_square, self.photo_mean, self.photo_std.square())]
        x = (view - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        logits = self.network(x)
        errors, self.errors = torch.stack(self.errors), []
        return logits, errors.mean()

    @torch.no_grad()
    def _judge(self, pixels: Tensor) -> float:
        """The error of the statistics of what the evaluation transform cuts out of the images."""
        (height, width), (rows, columns) = self.size, self.canvas
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        view = pixels[..., top : top + height, left : left + width]
        error = float(self._forward(view)[1])
        if not math.isfinite(error):
            raise FatError(
                "Distilling images gave numbers that are not finite: the network's weights or "
                "batch norms are damaged. Type model.weights=FILE for others, or take images: "
                "data=photos or data=folder data.root=DIR."
            )
        return error

    def _colour(self, noise: Tensor) -> Tensor:
        """Give noise [N, 3, H, W] of mean 0 and variance 1 the statistics of photographs."""
        noise = noise.to(self.device)
        coloured = noise * self.photo_std.view(-1, 1, 1) + self.photo_mean.view(-1, 1, 1)
        return coloured.clamp(0.0, 1.0)

    def _observe(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x, mean, mean_square = _moments(inputs[0])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance = norm.running_var + norm.eps
        self.errors.append(_mismatch(mean, mean_square + norm.eps, norm.running_mean, variance))
        return (x,)


def pyramid_noise(count: int, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Noise with the spectrum of photographs: octaves added up, each half as strong as the coarser.

    Returns:
        float32 [count, 3, height, width]; each image has variance 1.
    """
    noise = torch.zeros(count, 3, height, width)
    rows, columns, strength = height, width, 1.0
    while min(rows, columns) >= 2:
        octave = GREY * _normal(rng, count, 1, rows, columns)
        octave = octave + math.sqrt(1 - GREY**2) * _normal(rng, count, 3, rows, columns)
        noise += strength * _bicubic(octave, (height, width))
        rows, columns, strength = rows // 2, columns // 2, strength * 2
    return noise / noise.std((1, 2, 3), keepdim=True).clamp_min(1e-6)


def random_view(pixels: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A part of the images [N, 3, H, W] as training or evaluation would show it, maybe mirrored."""
    height, width = pixels.shape[2:]
    if rng.random() < ZOOM_SHARE:
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
    """Mean absolute difference between neighbours, along the columns plus along the rows."""
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().mean()
    return down + (pixels[..., 1:] - pixels[..., :-1]).abs().mean()


class _Moments(torch.autograd.Function):
    """Mean and mean square per channel of x [N, C, H, W], with x itself handed on.

    torch.var_mean takes longer than the convolution before it; and since x comes through here,
    its gradient is completed in place of being added up from three tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        # Over pixels first: this order is the fast one, and adds few large sums to small terms.
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
    """Mean over channels of ((μ_batch − μ)/σ)² + (σ_batch/σ − 1)²."""
    shift = (mean - wanted).square() / variance
    # The floor keeps the root's gradient finite where a channel is constant.
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
    # Steps differ in length, so the bar counts them by their cost: its estimate is then right.
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(
        total=images * each, desc="Distill", bar_format=form, disable=not progress, leave=False
    )
