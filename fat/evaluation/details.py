"""Statistics of single layers and images, computed on a student: layers.csv and details.json."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fat.evaluation.evaluator import Disagreement, Disagreements
from fat.evaluation.layer_analysis import switched
from fat.models.float_model import Preprocessing
from fat.models.labels import readable_classes
from fat.models.student import Student
from fat.quant.functional import Adjust
from fat.quant.metrics import sqnr_db
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.quant.thresholds import Thresholds
from fat.utils.batches import AnyBatch, to_device
from fat.utils.errors import FatError
from fat.utils.io import write_csv, write_text
from fat.utils.precision import full_precision

__all__ = [
    "DETAILS",
    "LAYERS",
    "FilterChange",
    "Histogram",
    "LayerRow",
    "example",
    "filter_changes",
    "layer_rows",
    "picture",
    "write_details",
]

LAYERS, DETAILS = "layers.csv", "details.json"
BINS = 100
BLOCK = 2**18
"""Number of values that are summed at once, so that they stay in the processor's cache."""
WORST = 6
"""Number of tensors with a histogram."""
THUMBNAIL = 160
"""Longest side of an example's thumbnail, pixels."""
TOP = 3
"""Number of predicted classes listed for an example."""


@dataclass(frozen=True)
class LayerRow:
    """Statistics of one quantizer. The fields are the columns of layers.csv.

    Attributes:
        layer: Name of the layer.
        kind: ``"weight"`` or ``"activation"``.
        bits: Bit-width.
        thresholds: Number of thresholds: one, or one per filter.
        sqnr_db: Signal to quantization noise ratio of the tensor, 10·log10(Σ x² / Σ (x − q)²), dB.
            For an activation, x is the quantizer's input after the activation function (ReLU,
            ReLU6) fused into it. For a weight, x is the weight with its trained scale factors;
            factors that choose the rounding (``weights=adaround``) are part of the quantization.
        saturated: Fraction of x more than half a step beyond the ends of the grid, 0…1. Values
            clipped by ReLU6 do not count.
        threshold_before: Largest magnitude on the calibrated grid, over all filters, in the units
            of the tensor.
        threshold_after: Largest magnitude on the trained grid.
        alpha_mean: Mean of the trained factors on the calibrated range; ``None``, like the next
            three, if they are not trained.
        alpha_min: Smallest factor.
        alpha_max: Largest factor.
        alpha_at_edge: Fraction of the factors at an end of their allowed range, 0…1.
    """

    layer: str
    kind: str
    bits: int
    thresholds: int
    sqnr_db: float
    saturated: float
    threshold_before: float
    threshold_after: float
    alpha_mean: float | None
    alpha_min: float | None
    alpha_max: float | None
    alpha_at_edge: float | None


@dataclass(frozen=True)
class Histogram:
    """Histogram of one tensor, and the range of its grid.

    Attributes:
        layer: Name of the layer.
        kind: ``"weight"`` or ``"activation"``.
        sqnr_db: See :class:`LayerRow`.
        unit: ``"value"`` for the units of the tensor, or ``"threshold"`` for per-channel
            quantization: each filter's weights divided by its calibrated threshold, so that all
            grids end at ±1.
        edges: Edges of the bins. They cover all finite values and both grids.
        counts: Number of values in each bin.
        before: Lowest and highest value of the calibrated grid in ``unit``.
        after: Lowest and highest value of the trained grid, averaged over filters.
    """

    layer: str
    kind: str
    sqnr_db: float
    unit: str
    edges: list[float]
    counts: list[int]
    before: tuple[float, float]
    after: tuple[float, float]


@dataclass(frozen=True)
class FilterChange:
    """Maximum magnitude max|W_k| of each filter k of a layer before and after equalization."""

    layer: str
    before: list[float]
    after: list[float]


def write_details(
    directory: Path,
    student: Student,
    batch: AnyBatch,
    differing: Disagreements | None = None,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Write layers.csv and details.json into a run directory, each atomically.

    layers.csv has one row per quantizer, the fields of :class:`LayerRow`. details.json holds

    * ``histograms``: fields of :class:`Histogram` for the :data:`WORST` tensors of lowest SQNR;
    * ``filters``: fields of :class:`FilterChange` for the layers that equalization changed;
    * ``examples``: the result of :func:`example` for each image kept in ``differing``;
    * ``images``, ``differing``: number of images evaluated, and of those with different
      predictions; ``null`` without ``differing``.

    The student does not change. The batch passes through the network once.

    Args:
        directory: The run directory.
        student: Calibrated student. ``student.origin`` gives the preprocessing and the names of the
            classes.
        batch: About 16 held-out images, labeled or not.
        differing: The images that :func:`fat.evaluation.evaluate` collected.
        names: Names of the evaluated images, in their order.

    Raises:
        FatError: If the student is not calibrated, the batch is empty or holds no images, or the
            directory cannot be written.
    """
    rows, histograms = layer_rows(student, batch)
    origin = student.origin
    stored = origin.get("preprocessing")
    preprocessing = None if stored is None else Preprocessing.from_dict(stored)
    kept = [] if differing is None else differing.kept
    classes: list[str] = []
    if kept:
        classes = readable_classes(kept[0].reference.numel(), origin.get("classes"))
    content = {
        "histograms": [asdict(histogram) for histogram in histograms],
        "filters": [asdict(ranges) for ranges in filter_changes(student)],
        "examples": [example(entry, classes, preprocessing, names) for entry in kept],
        "images": None if differing is None else differing.images,
        "differing": None if differing is None else differing.differing,
    }
    header = [column.name for column in fields(LayerRow)]
    write_csv(directory / LAYERS, header, ([_cell(x) for x in astuple(row)] for row in rows))
    # Not indented, because that would put each of about ten thousand numbers on its own line.
    write_text(directory / DETAILS, json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n")


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


# ------------------------------------------------------------------------------------ the layers


@torch.no_grad()
def layer_rows(
    student: Student, batch: AnyBatch, worst: int = WORST
) -> tuple[list[LayerRow], list[Histogram]]:
    """Compute the statistics of every quantizer in one pass of a batch through the student.

    Activations are those of the fake-quantized network, including the errors of earlier layers.
    Only one activation at a time is kept in memory.

    Args:
        student: Calibrated student; it does not change.
        batch: Images [N, 3, H, W], or (images, labels).
        worst: Number of tensors with a histogram, at least 1.

    Returns:
        One row per quantizer in the order of ``student.quantizers()``, and the histograms of the
        tensors of lowest SQNR, the worst first.

    Raises:
        FatError: If the student is not calibrated, or the batch is empty or holds no images.
    """
    student.check_calibrated()
    images = to_device(batch, student.device)[0]
    if not len(images):
        raise FatError("The batch holds no image. Give a few, such as 16 validation images.")
    collected = _Collector(worst)

    def watch(quantizer: ActivationQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        collected.add(
            (quantizer.layer, "activation"),
            quantizer.thresholds,
            quantizer.activate(inputs[0]),
            output,
        )

    quantizers = student.activation_quantizers()
    handles = [quantizer.register_forward_hook(watch) for quantizer in quantizers]
    was_training = student.training
    student.eval()
    try:
        with switched(student, on=True), full_precision(student.device):
            # Weights first: they are small, and spare the histograms of most activations.
            for layer in student.layers():
                collected.add(
                    (layer.layer, "weight"),
                    layer.weight_quantizer.thresholds,
                    _unrounded(layer),
                    layer.quantized()[0],
                )
            student.network(images.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
        student.train(was_training)
    rows = [collected.rows[id(quantizer.thresholds)] for _, _, quantizer in student.quantizers()]
    return rows, [histogram for _, _, histogram in collected.worst]


def _unrounded(layer: QuantLayer) -> Tensor:
    """Return the real values that a weight's quantizer rounds (see :class:`LayerRow`)."""
    return layer.weight if layer.adjust is Adjust.MOVE else layer.adjusted_weight()


class _Collector:
    """Rows of all tensors, and histograms of the worst.

    A histogram is computed at once if its tensor is among the worst so far, so that no tensor needs
    to be kept.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.rows: dict[int, LayerRow] = {}
        self.worst: list[tuple[float, int, Histogram]] = []

    def add(
        self, name: tuple[str, str], thresholds: Thresholds, exact: Tensor, quantized: Tensor
    ) -> None:
        row = _row(name, thresholds, exact, quantized)
        place = (row.sqnr_db, len(self.rows))
        self.rows[id(thresholds)] = row
        if len(self.worst) == self.keep and place > self.worst[-1][:2]:
            return
        histogram = _histogram(row, thresholds, exact)
        if histogram is not None:
            self.worst.append((*place, histogram))
            self.worst.sort(key=lambda entry: entry[:2])
            del self.worst[self.keep :]


def _row(
    name: tuple[str, str], thresholds: Thresholds, exact: Tensor, quantized: Tensor
) -> LayerRow:
    low, high = thresholds.grid_range()
    signal, noise = _powers(exact, quantized)
    factors = thresholds.factors().get("alpha")
    edge = thresholds.at_edge()
    return LayerRow(
        *name,
        bits=thresholds.grid.bits,
        thresholds=thresholds.high.numel(),
        sqnr_db=sqnr_db(signal, noise),
        saturated=_beyond(exact, low, high, thresholds()[0]) / exact.numel(),
        threshold_before=_magnitude(*thresholds.grid_range(calibrated=True)),
        threshold_after=_magnitude(low, high),
        alpha_mean=None if factors is None else float(factors.mean()),
        alpha_min=None if factors is None else float(factors.min()),
        alpha_max=None if factors is None else float(factors.max()),
        alpha_at_edge=None if edge is None else float(edge.double().mean()),
    )


def _powers(exact: Tensor, quantized: Tensor) -> tuple[float, float]:
    """Return Σ x² and Σ (x − q)², summed in float64 block by block."""
    signal = noise = 0.0
    for x, q in zip(_blocks(exact), _blocks(quantized), strict=True):
        signal += float(x.square().sum(dtype=torch.float64))
        noise += float((x - q).double().square_().sum())
    return signal, noise


def _beyond(exact: Tensor, low: Tensor, high: Tensor, step: Tensor) -> int:
    """Count the values more than half a step beyond the ends of the grid."""
    bottom, top = low - 0.5 * step, high + 0.5 * step
    if step.dim():
        shape = (-1, *[1] * (exact.dim() - 1))
        return int(((exact < bottom.reshape(shape)) | (exact > top.reshape(shape))).sum())
    count = 0
    for x in _blocks(exact):
        smallest, largest = x.aminmax()  # a fast test, since few blocks have such values
        if not (bool(smallest >= bottom) and bool(largest <= top)):
            count += int(((x < bottom) | (x > top)).sum())
    return count


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(_flat(x), BLOCK)


def _flat(x: Tensor) -> Tensor:
    """Flatten in channels-last order, which needs no copy for most activations."""
    return x.movedim(1, -1).flatten() if x.dim() > 2 else x.flatten()


def _magnitude(low: Tensor, high: Tensor) -> float:
    return float(torch.maximum(low.abs(), high.abs()).max())


def _histogram(row: LayerRow, thresholds: Thresholds, exact: Tensor) -> Histogram | None:
    """Return the histogram of a tensor, or ``None`` if its thresholds are not finite."""
    before, after = thresholds.grid_range(calibrated=True), thresholds.grid_range()
    unit = "value"
    if before[1].dim():
        unit = "threshold"
        threshold = before[1]
        exact = exact / threshold.reshape(-1, *[1] * (exact.dim() - 1))
        before = (before[0] / threshold, before[1] / threshold)
        after = (after[0] / threshold, after[1] / threshold)
    ends_before, ends_after = (
        (float(low.mean()), float(high.mean())) for low, high in (before, after)
    )
    if not all(map(math.isfinite, (*ends_before, *ends_after))):
        return None
    values = _flat(exact)
    smallest, largest = values.aminmax()
    if not bool((largest - smallest).isfinite()):
        values = values[values.isfinite()]
        smallest, largest = values.aminmax() if len(values) else before
    low = min(float(smallest.min()), ends_before[0], ends_after[0])
    high = max(float(largest.max()), ends_before[1], ends_after[1])
    counts = torch.zeros(BINS, dtype=torch.int64)
    for block in torch.split(values, BLOCK):  # histc counts in float32, exact up to 2^24
        counts += torch.histc(block, BINS, low, high).to("cpu", torch.int64)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return Histogram(
        row.layer,
        row.kind,
        round(row.sqnr_db, 3),
        unit,
        [_rounded(edge) for edge in edges.tolist()],
        counts.tolist(),
        (_rounded(ends_before[0]), _rounded(ends_before[1])),
        (_rounded(ends_after[0]), _rounded(ends_after[1])),
    )


def _rounded(value: float, digits: int = 6) -> float:
    """Round to significant digits, so that files stay small."""
    return float(f"{value:.{digits}g}")


def filter_changes(student: Student) -> list[FilterChange]:
    """Return the filters' ranges for the layers that equalization changed, in the graph's order.

    Both layers of an equalized pair change: the filters of the first and the input channels of the
    second. Nothing else changes a student's float weights.
    """
    if not student.spec.equalize.methods:
        return []
    changes = []
    for layer in student.layers():
        original = student.teacher.get_submodule(layer.layer).weight
        assert isinstance(original, Tensor)
        if not torch.equal(original, layer.weight):
            before, after = (
                [_rounded(value, 4) for value in weight.flatten(1).abs().amax(1).tolist()]
                for weight in (original, layer.weight)
            )
            changes.append(FilterChange(layer.layer, before, after))
    return changes


# ---------------------------------------------------------------------------------- the examples


def example(
    entry: Disagreement,
    classes: Sequence[str],
    preprocessing: Preprocessing | None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Describe an image with different predictions as plain values.

    Args:
        entry: The image and its logits.
        classes: Names of the classes in the order of the logits.
        preprocessing: Normalization of the image, see :func:`picture`.
        names: Names of the evaluated images, in their order.

    Returns:
        ``image`` (a JPEG of at most :data:`THUMBNAIL` pixels, as a data URL), ``name``, ``label``
        (the class, or ``None`` if unknown), ``float`` and ``quantized``: the :data:`TOP` most
        likely classes, each {class, p} with the softmax probability p.
    """
    jpeg = io.BytesIO()
    thumbnail = picture(entry.image, preprocessing)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    thumbnail.save(jpeg, "JPEG", quality=85)
    position = entry.position
    known = names is not None and position < len(names)
    return {
        "image": "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii"),
        "name": names[position] if names is not None and known else f"image {position}",
        "label": classes[entry.label] if 0 <= entry.label < len(classes) else None,
        "float": _likely(entry.reference, classes),
        "quantized": _likely(entry.logits, classes),
    }


def _likely(logits: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    if not bool(logits.isfinite().all()):
        return []
    best = logits.double().softmax(0).topk(min(TOP, len(logits)))
    return [
        {"class": classes[index], "p": round(p, 4)}
        for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def picture(image: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """Convert a normalized image to a picture: x·std + mean, scaled to 0…255.

    Args:
        image: float32 [3, H, W].
        preprocessing: Mean and std; ``None`` scales the smallest and largest value to 0 and 255.
    """
    pixels = image.detach().cpu().float()
    if preprocessing is None:
        smallest, largest = pixels.aminmax()
        pixels = (pixels - smallest) / (largest - smallest).clamp(min=1e-12)
    else:
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        pixels = pixels * std + mean
    pixels = pixels.nan_to_num(0.0).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
