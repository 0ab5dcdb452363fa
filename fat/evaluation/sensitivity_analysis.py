"""Sensitivity of the logits to the quantization of each tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from fat.evaluation.layer_analysis import switched
from fat.evaluation.metrics import Comparison
from fat.models.student import Student
from fat.quant.config import BITS, Grid, QuantSpec
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.utils.batches import Images, as_batches, split, to_device
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["TensorSensitivity", "sensitivity"]


@dataclass(frozen=True)
class TensorSensitivity:
    """Effect of quantizing one tensor, against the student with all quantizers disabled.

    Attributes:
        position: Index of the tensor in the order of the graph.
        layer: Name of the layer, or of the operation that produces an activation.
        kind: ``"weight"`` or ``"activation"``.
        bits: Bit-width of the tensor in the student.
        alone_db: Logits' SQNR when only this tensor is quantized, dB.
        alone_agreement: Images with the same largest logit when only this tensor is quantized, %.
        without_db: Logits' SQNR when all other tensors are quantized, dB.
        without_agreement: Images with the same largest logit when all others are quantized, %.
        parameters: Number of weights; 0 for an activation.
        biases: Number of biases of the layer; 0 for an activation.
        bits_db: Logits' SQNR by bit-width when only this weight is quantized, dB, with thresholds
            initialized for that bit-width; empty for an activation.
    """

    position: int
    layer: str
    kind: str
    bits: int
    alone_db: float
    alone_agreement: float
    without_db: float
    without_agreement: float
    parameters: int = 0
    biases: int = 0
    bits_db: Mapping[int, float] = field(default_factory=dict)


@torch.no_grad()
def sensitivity(
    student: Student, images: Images, *, progress: str | None = None
) -> list[TensorSensitivity]:
    """Quantize each tensor alone, and all tensors except it, and compare the logits.

    The reference is the student's own float function: all quantizers disabled, weights (with their
    trained scale factors) and biases not rounded. It includes changes made by equalization and
    training.

    Each activation takes two passes over the images and each weight nine. The part of the network
    before the tensor is computed only once. The student does not change.

    Args:
        student: Calibrated student.
        images: One or several batches [N, 3, H, W], labeled or not; 50 to 100 images are enough.
            They are kept in memory.
        progress: Label of a progress bar; ``None`` shows none.

    Returns:
        One row per quantizer in order of increasing ``alone_db``; ties keep the order of the graph.

    Raises:
        FatError: If the student is not calibrated, or there is no image.
    """
    student.check_calibrated()
    batches = [split(batch)[0] for batch in as_batches(images)]
    if not sum(map(len, batches)):
        raise FatError("There are no images to measure on. Give at least one batch [N, 3, H, W].")
    sites = _sites(student.network)
    widths = {node: _at_every_width(site, student.spec) for node, site in sites.items()}
    runs = len(batches) * sum(2 + len(quantizers) for quantizers in widths.values())
    device = student.device
    comparisons: dict[Any, Comparison] = defaultdict(lambda: Comparison().to(device))

    def compare(key: Any, reference: Tensor) -> None:
        logits = partial.finish()
        comparisons[key].update(logits, reference, torch.full((len(logits),), -1, device=device))
        bar.update()

    partial = _Partial(student.network)
    was_training = student.training
    student.eval()
    # smoothing=0 averages the rate over the whole measurement, as runs get shorter along the graph.
    bar = tqdm(total=runs, desc=progress, disable=progress is None, leave=False, smoothing=0)
    try:
        for pixels in batches:
            x = to_device(pixels, device)[0].contiguous(memory_format=torch.channels_last)
            with switched(student, on=False), full_precision(device):
                reference = student.network(x)
                for node in partial.walk(x, sites):
                    with _toggled(sites[node]):
                        compare((node, "alone"), reference)
                    for bits, quantizer in widths[node].items():
                        with _replaced(sites[node], quantizer):
                            compare((node, bits), reference)
            with switched(student, on=True), full_precision(device):
                for node in partial.walk(x, sites):
                    with _toggled(sites[node]):
                        compare((node, "without"), reference)
    finally:
        bar.close()
        student.train(was_training)
    metrics = {key: comparison.compute() for key, comparison in comparisons.items()}

    def metric(key: Any, name: str) -> float:
        value = metrics[key][name]
        assert value is not None  # there are images
        return value

    rows = []
    for position, (node, site) in enumerate(sites.items()):
        is_layer = isinstance(site, QuantLayer)
        rows.append(
            TensorSensitivity(
                position=position,
                layer=site.layer,
                kind="weight" if is_layer else "activation",
                bits=_quantizer(site).grid.bits,
                alone_db=metric((node, "alone"), "sqnr_db"),
                alone_agreement=metric((node, "alone"), "agreement"),
                without_db=metric((node, "without"), "sqnr_db"),
                without_agreement=metric((node, "without"), "agreement"),
                parameters=site.weight.numel() if isinstance(site, QuantLayer) else 0,
                biases=_biases(site),
                bits_db={bits: metric((node, bits), "sqnr_db") for bits in widths[node]},
            )
        )
    return sorted(rows, key=lambda row: row.alone_db)


Site = ActivationQuantizer | QuantLayer


def _sites(network: fx.GraphModule) -> dict[fx.Node, Site]:
    """Return all quantizing modules by their nodes, in the order of the graph."""
    sites: dict[fx.Node, Site] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if isinstance(module, ActivationQuantizer | QuantLayer):
                sites[node] = module
    return sites


def _quantizer(site: Site) -> ActivationQuantizer | WeightQuantizer:
    return site.weight_quantizer if isinstance(site, QuantLayer) else site


def _biases(site: Site) -> int:
    return site.bias.numel() if isinstance(site, QuantLayer) and site.bias is not None else 0


def _at_every_width(site: Site, spec: QuantSpec) -> dict[int, WeightQuantizer]:
    """Return new quantizers of a layer's weight by bit-width; none for an activation.

    Thresholds of filters with vanishing weights are not widened to fit the bias into int32, since
    that depends on the scale of the input, which is not quantized here.
    """
    if not isinstance(site, QuantLayer):
        return {}
    weight = site.adjusted_weight()
    quantizers = {}
    for bits in BITS:
        quantizer = WeightQuantizer(spec, Grid(bits, "symmetric"), weight.shape).to(weight.device)
        quantizer.calibrate(weight)
        quantizers[bits] = quantizer
    return quantizers


@contextmanager
def _toggled(site: Site) -> Iterator[None]:
    quantizer = _quantizer(site)
    before = quantizer.enabled
    quantizer.enabled = not before
    try:
        yield
    finally:
        quantizer.enabled = before


@contextmanager
def _replaced(site: Site, quantizer: WeightQuantizer) -> Iterator[None]:
    assert isinstance(site, QuantLayer)
    before = site.weight_quantizer
    site.weight_quantizer = quantizer
    try:
        yield
    finally:
        site.weight_quantizer = before


class _Partial(fx.Interpreter):
    """Computes a graph once, and its end from chosen nodes repeatedly."""

    def walk(self, x: Tensor, stops: Mapping[fx.Node, object]) -> Iterator[fx.Node]:
        """Compute all nodes, and yield each of ``stops`` before it is computed."""
        nodes = [node for node in self.graph.nodes if node.op != "placeholder"]
        self._values = {node: x for node in self.graph.nodes if node.op == "placeholder"}
        for index, node in enumerate(nodes):
            self._rest = nodes[index:]
            if node in stops:
                yield node
            self._compute(node, self._values)

    def finish(self) -> Tensor:
        """Compute the graph's result from the current node of :meth:`walk`."""
        values = dict(self._values)
        for node in self._rest:
            self._compute(node, values)
        result: Tensor = values[self._rest[-1]]
        return result

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        self.env = values
        values[node] = self.run_node(node)
        for unused in self.user_to_last_uses.get(node, ()):
            del values[unused]
