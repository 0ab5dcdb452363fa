"""What a run's page shows of single layers and images: layers.csv and details.json."""

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
from fat.utils.batches import AnyBatch, split
from fat.utils.errors import FatError
from fat.utils.io import write_csv, write_text

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
"""Values that are summed at once."""
WORST = 6
"""Of how many tensors a histogram is kept."""
THUMBNAIL = 160
"""Longest side of an example's picture, pixels."""
TOP = 3
"""How many classes are named for each example."""


@dataclass(frozen=True)
class LayerRow:
    """One quantizer, and what it does to its tensor. The fields are the columns of layers.csv.

    Attributes:
        layer: Name of the layer.
        kind: ``"weight"`` or ``"activation"``.
        bits: Width of its integers.
        thresholds: How many thresholds it has: one, or one per filter.
        sqnr_db: The tensor's own signal to quantization noise, 10·log10(Σ x² / Σ (x − q)²), dB.
            Of an activation x is what reaches the quantizer, after the clip (ReLU, ReLU6) that is
            fused into it; of a weight x is the weight with its pointwise factors. Factors that
            choose how to round (``weights=rounding``) are part of the quantization, not of x.
        saturated: Share of x that lies more than half a step beyond the grid's ends, 0…1. What
            ReLU6 itself clips is none of it.
        threshold_before: Largest magnitude on the grid as calibrated; of several filters the
            largest. In the tensor's own units.
        threshold_after: The same as trained.
        alpha_mean: Mean of the trained factors on the calibrated range; ``None`` where nothing is
            trained, as for the next three.
        alpha_min: Smallest factor.
        alpha_max: Largest factor.
        alpha_at_edge: Share of the factors that stand at an end of their range, 0…1.
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
    """Values of one tensor and the range of its grid.

    Attributes:
        layer: Name of the layer.
        kind: ``"weight"`` or ``"activation"``.
        sqnr_db: See :class:`LayerRow`.
        unit: ``"value"``: the tensor's own units. ``"threshold"``, where each filter has one of its
            own: a filter's weights in units of its calibrated threshold, so that all filters show
            their grids' ends at ±1.
        edges: Ends of the bins, one more than there are bins. They cover all finite values and
            the grid before and after.
        counts: How many values each bin holds.
        before: Lowest and highest value of the grid as calibrated, in ``unit``.
        after: The same as trained; of several filters the mean.
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
    """What equalization did to one layer: max|W_k| of each filter k, before it and after."""

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

    * ``histograms``: of the :data:`WORST` tensors with the least SQNR, fields of
      :class:`Histogram`;
    * ``filters``: of the layers that equalization changed, fields of :class:`FilterChange`;
    * ``examples``: what :func:`example` gives of each image kept in ``differing``;
    * ``images``, ``differing``: how many images were looked at, and on how many of them the largest
      logits differ; both ``null`` without ``differing``.

    The student stays as it is. It costs one pass of the batch.

    Args:
        directory: The run directory.
        student: Calibrated, and trained or not. ``student.origin`` gives the preprocessing and the
            names of the classes.
        batch: Some 16 images that nothing was trained on, labelled or not.
        differing: What :func:`fat.evaluation.evaluator` collected.
        names: Names of the images that were judged, in their order.

    Raises:
        FatError: If the student is not calibrated, the batch is empty or not one of images, or the
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
    # Not indented: each of some ten thousand numbers would stand on a line of its own.
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
    """What each quantizer does to its tensor, from one pass of a batch with all quantizers on.

    Activations are those of the fake-quantized network: each with what the tensors before it left.
    In memory is one activation at a time.

    Args:
        student: Calibrated student; it stays as it is.
        batch: Images [N, 3, H, W], or (images, labels).
        worst: Of how many tensors to give a histogram, at least 1.

    Returns:
        One row per quantizer, in the order of ``student.quantizers()``, and the histograms of the
        tensors with the least SQNR, the worst first.

    Raises:
        FatError: If the student is not calibrated, or the batch is empty or not one of images.
    """
    student.check_calibrated()
    images = split(batch)[0].to(student.device)
    if not len(images):
        raise FatError("The batch holds no image; give a few, such as 16 validation images.")
    seen = _Seen(worst)

    def watch(quantizer: ActivationQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.take(
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
        with switched(student, on=True):
            # Weights first: they are small, and few activations are then among the worst for long.
            for layer in student.layers():
                seen.take(
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
    rows = [seen.rows[id(quantizer.thresholds)] for _, _, quantizer in student.quantizers()]
    return rows, [histogram for _, _, histogram in seen.worst]


def _unrounded(layer: QuantLayer) -> Tensor:
    """The real values that a weight's quantizer rounds (see :class:`LayerRow`)."""
    return layer.weight if layer.adjust is Adjust.MOVE else layer.adjusted_weight()


class _Seen:
    """Rows of all tensors that came, and histograms of the worst.

    A histogram is made when its tensor is among the worst so far, so that no tensor is kept and few
    histograms are made in vain.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.rows: dict[int, LayerRow] = {}
        self.worst: list[tuple[float, int, Histogram]] = []

    def take(
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
    """Σ x² and Σ (x − q)², summed in float64 block by block: a block stays in the cache."""
    signal = noise = 0.0
    for x, q in zip(_blocks(exact), _blocks(quantized), strict=True):
        signal += float(x.square().sum(dtype=torch.float64))
        noise += float((x - q).double().square_().sum())
    return signal, noise


def _beyond(exact: Tensor, low: Tensor, high: Tensor, step: Tensor) -> int:
    """How many values lie more than half a step beyond the ends of the grid."""
    bottom, top = low - step / 2, high + step / 2
    if step.dim():
        shape = (-1, *[1] * (exact.dim() - 1))
        return int(((exact < bottom.reshape(shape)) | (exact > top.reshape(shape))).sum())
    count = 0
    for x in _blocks(exact):
        smallest, largest = x.aminmax()  # mostly nothing is beyond, and this is soon known
        if not (bool(smallest >= bottom) and bool(largest <= top)):
            count += int(((x < bottom) | (x > top)).sum())
    return count


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(_flat(x), BLOCK)


def _flat(x: Tensor) -> Tensor:
    """All values in one order for all tensors of a shape, without a copy where possible."""
    return x.movedim(1, -1).flatten() if x.dim() > 2 else x.flatten()


def _magnitude(low: Tensor, high: Tensor) -> float:
    return float(torch.maximum(low.abs(), high.abs()).max())


def _histogram(row: LayerRow, thresholds: Thresholds, exact: Tensor) -> Histogram | None:
    """The histogram of a tensor; none where training left thresholds that are not numbers."""
    before, after = thresholds.grid_range(calibrated=True), thresholds.grid_range()
    unit = "value"
    if before[1].dim():
        unit = "threshold"
        own = before[1]
        exact = exact / own.reshape(-1, *[1] * (exact.dim() - 1))
        before = (before[0] / own, before[1] / own)
        after = (after[0] / own, after[1] / own)
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
    for block in torch.split(values, BLOCK):  # histc counts in float32, which ends at 2^24
        counts += torch.histc(block, BINS, low, high).to("cpu", torch.int64)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return Histogram(
        row.layer,
        row.kind,
        round(row.sqnr_db, 3),
        unit,
        [_short(edge) for edge in edges.tolist()],
        counts.tolist(),
        (_short(ends_before[0]), _short(ends_before[1])),
        (_short(ends_after[0]), _short(ends_after[1])),
    )


def _short(value: float, digits: int = 6) -> float:
    """A number with so many digits: files stay small."""
    return float(f"{value:.{digits}g}")


def filter_changes(student: Student) -> list[FilterChange]:
    """Ranges of the filters of each layer that equalization changed, in the order of the graph.

    Both layers of a pair are changed: the first one's filters were multiplied, and what reads them
    had its input channels divided. Nothing else changes a student's float weights.
    """
    if not student.spec.equalize.methods:
        return []
    found = []
    for layer in student.layers():
        original = student.teacher.get_submodule(layer.layer).weight
        assert isinstance(original, Tensor)
        if not torch.equal(original, layer.weight):
            before, after = (
                [_short(value, 4) for value in weight.flatten(1).abs().amax(1).tolist()]
                for weight in (original, layer.weight)
            )
            found.append(FilterChange(layer.layer, before, after))
    return found


# ---------------------------------------------------------------------------------- the examples


def example(
    entry: Disagreement,
    classes: Sequence[str],
    preprocessing: Preprocessing | None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """An image that the two networks see differently, as plain values.

    Args:
        entry: The image and its logits.
        classes: What to call the classes, in the order of the logits.
        preprocessing: How the image was normalised, see :func:`picture`.
        names: Names of the images that were judged, in their order.

    Returns:
        ``image`` (a JPEG of at most :data:`THUMBNAIL` pixels, as a data URL), ``name``, ``label``
        (the class, ``None`` where unknown), ``float`` and ``quantized``: the :data:`TOP` most
        likely classes, each {class, p}, p in 0…1 by softmax.
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
        return []  # a network that broke down has no opinion
    best = logits.double().softmax(0).topk(min(TOP, len(logits)))
    return [
        {"class": classes[index], "p": round(p, 4)}
        for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def picture(image: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
    """The picture that a normalised image was made from: x·std + mean, scaled to 0…255.

    Args:
        image: float32 [3, H, W].
        preprocessing: Its mean and std; ``None`` stretches the image from its smallest value to its
            largest.
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
