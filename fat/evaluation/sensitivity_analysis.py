"""How much each tensor's quantization costs the logits: it alone quantized, and all but it."""

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
from fat.utils.batches import Images, as_batches, split
from fat.utils.errors import FatError

__all__ = ["TensorSensitivity", "sensitivity"]


@dataclass(frozen=True)
class TensorSensitivity:
    """What the quantization of one tensor costs, against the student with every quantizer off.

    Attributes:
        position: Place of the tensor among all in the order of the graph, from 0.
        layer: Name of the layer, or of the operation whose result an activation is.
        kind: ``"weight"`` or ``"activation"``.
        bits: Bit-width that the tensor has in the student.
        alone_db: Logits' SQNR when this tensor alone is quantized, dB.
        alone_agreement: Share of images with the same largest logit then, %.
        without_db: Logits' SQNR when all tensors but this one are quantized, dB.
        without_agreement: Share of images with the same largest logit then, %.
        parameters: Number of weights; 0 for an activation.
        biases: Number of biases of the layer; 0 for an activation.
        bits_db: Logits' SQNR, dB, when this weight alone is quantized, by bit-width, each with
            thresholds initialised for that width; empty for an activation.
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
    """Quantize one tensor at a time, and all but one, and compare the logits.

    The reference is the student's own float function: every quantizer off, weights unrounded with
    their pointwise factors, biases unrounded as they are. What equalization or training made of
    weights and biases is part of the reference, not of the damage.

    The images pass the network once for every measurement: twice for an activation, nine times for
    a weight. What comes before the tensor in question is computed once for all of them. The
    student is left exactly as it came.

    Args:
        student: Calibrated student.
        images: One batch [N, 3, H, W] or several, labelled or not; 50 to 100 images are enough.
            They are kept in memory.
        progress: Text before a progress bar; ``None`` shows none.

    Returns:
        One row per quantizer, the most harmful first: ``alone_db`` ascending, ties in the order of
        the graph.

    Raises:
        FatError: If the student is not calibrated, or no image came.
    """
    student.check_calibrated()
    batches = [split(batch)[0] for batch in as_batches(images)]
    if not sum(map(len, batches)):
        raise FatError("No images came to measure on; give at least one batch [N, 3, H, W].")
    sites = _sites(student.network)
    widths = {node: _at_every_width(site, student.spec) for node, site in sites.items()}
    runs = len(batches) * sum(2 + len(quantizers) for quantizers in widths.values())
    device = student.device
    judged: dict[Any, Comparison] = defaultdict(lambda: Comparison().to(device))

    def judge(key: Any, reference: Tensor) -> None:
        logits = partial.finish()
        judged[key].update(logits, reference, torch.full((len(logits),), -1, device=device))
        bar.update()

    partial = _Partial(student.network)
    was_training = student.training
    student.eval()
    # The rate averaged over the whole measurement: runs get shorter along the graph.
    bar = tqdm(total=runs, desc=progress, disable=progress is None, leave=False, smoothing=0)
    try:
        for pixels in batches:
            x = pixels.contiguous(memory_format=torch.channels_last)
            with switched(student, on=False):
                reference = student.network(x)
                for node in partial.walk(x, sites):
                    with _toggled(sites[node]):
                        judge((node, "alone"), reference)
                    for bits, quantizer in widths[node].items():
                        with _replaced(sites[node], quantizer):
                            judge((node, bits), reference)
            with switched(student, on=True):
                for node in partial.walk(x, sites):
                    with _toggled(sites[node]):
                        judge((node, "without"), reference)
    finally:
        bar.close()
        student.train(was_training)
    figures = {key: comparison.compute() for key, comparison in judged.items()}
    rows = []
    for position, (node, site) in enumerate(sites.items()):
        is_layer = isinstance(site, QuantLayer)
        rows.append(
            TensorSensitivity(
                position=position,
                layer=site.layer,
                kind="weight" if is_layer else "activation",
                bits=_quantizer(site).grid.bits,
                alone_db=_figure(figures[node, "alone"], "sqnr_db"),
                alone_agreement=_figure(figures[node, "alone"], "agreement"),
                without_db=_figure(figures[node, "without"], "sqnr_db"),
                without_agreement=_figure(figures[node, "without"], "agreement"),
                parameters=site.weight.numel() if isinstance(site, QuantLayer) else 0,
                biases=_biases(site),
                bits_db={bits: _figure(figures[node, bits], "sqnr_db") for bits in widths[node]},
            )
        )
    return sorted(rows, key=lambda row: row.alone_db)


Site = ActivationQuantizer | QuantLayer


def _sites(network: fx.GraphModule) -> dict[fx.Node, Site]:
    """What quantizes, by its node, in the order of the graph."""
    sites: dict[fx.Node, Site] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if isinstance(module, ActivationQuantizer | QuantLayer):
                sites[node] = module
    return sites


def _figure(figures: Mapping[str, float | None], name: str) -> float:
    value = figures[name]
    assert value is not None  # images came
    return value


def _quantizer(site: Site) -> ActivationQuantizer | WeightQuantizer:
    return site.weight_quantizer if isinstance(site, QuantLayer) else site


def _biases(site: Site) -> int:
    return site.bias.numel() if isinstance(site, QuantLayer) and site.bias is not None else 0


def _at_every_width(site: Site, spec: QuantSpec) -> dict[int, WeightQuantizer]:
    """Fresh quantizers of a layer's weight by bit-width; none for an activation.

    Filters with vanishing weights keep their own small thresholds here: what widens them, a bias
    that does not fit int32, needs the input's step, and the input is not quantized.
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
    """Computes a graph once, and from chosen nodes on as often as asked."""

    def walk(self, x: Tensor, stops: Mapping[fx.Node, object]) -> Iterator[fx.Node]:
        """Compute node after node; yield each of ``stops`` before it is computed."""
        nodes = [node for node in self.graph.nodes if node.op != "placeholder"]
        self._values = {node: x for node in self.graph.nodes if node.op == "placeholder"}
        for index, node in enumerate(nodes):
            self._rest = nodes[index:]
            if node in stops:
                yield node
            self._compute(node, self._values)

    def finish(self) -> Tensor:
        """The graph's result, from the node that :meth:`walk` stands at, as modules are now."""
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
