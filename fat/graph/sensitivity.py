"""What the images tell about each channel: its range, and how much the logits depend on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fat.graph.patterns import is_compute, module_of

__all__ = ["ChannelStatistics", "gather_statistics"]

GRADIENT_IMAGES = 64
"""So many images give the gradients, one backward pass each; ranges are taken over all images."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics by name of the node that gives the tensor, per channel, float64.

    Attributes:
        low: Smallest value of each channel, [C].
        high: Largest value of each channel, [C].
        activation: G_k = mean over images of Σ_pixels ‖∂z/∂x_k‖², z the logits, over pixels where
            x_k is not 0: zero lies on every grid. [C]
        weight: F_kj = mean over images of Σ_kernel ‖∂z/∂W_kj‖², [out, in] by name of the layer.
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]
    activation: dict[str, Tensor]
    weight: dict[str, Tensor]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the results that are wanted."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._wanted:
            self.values[n.name] = result
        return result


def gather_statistics(
    module: fx.GraphModule, images: Iterable[Tensor], tensors: Iterable[str], quantized: set[str]
) -> ChannelStatistics:
    """Gather the statistics of tensors and of all layers, image by image, in one pass.

    The squared norms over all logits are estimated by one backward pass per image from Σ v_i·z_i
    with random v_i of mean 0 and variance 1: E (∂(v·z)/∂x)² = ‖∂z/∂x‖². The v are the same in
    every run, and the global random state is left alone.

    Args:
        module: Float graph, in eval mode.
        images: Batches [N, 3, H, W].
        tensors: Names of the nodes whose ranges are wanted.
        quantized: Those among them whose results go onto a grid; they get gradients.
    """
    names = set(tensors)
    sources = [node.name for node in module.graph.nodes if node.name in quantized & names]
    layers = {
        str(node.target): module_of(module, node)
        for node in module.graph.nodes
        if is_compute(module, node)
    }
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc, union-attr]
    found = ChannelStatistics({}, {}, {}, {})
    generator = torch.Generator().manual_seed(0)
    count = 0
    wanted = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for batch in images:
            for image in torch.split(batch, 1):
                with_gradient = count < GRADIENT_IMAGES
                for weight in weights.values():
                    weight.requires_grad_(with_gradient)
                recorder = _Recorder(module, names)
                with torch.set_grad_enabled(with_gradient):
                    logits = recorder.run(image)
                if with_gradient:
                    direction = torch.randn(logits.shape, generator=generator).to(logits)
                    with torch.enable_grad():
                        objective = (logits * direction).sum()
                    inputs = [recorder.values[name] for name in sources]
                    gradients = torch.autograd.grad(objective, [*inputs, *weights.values()])
                    _add_gradients(found, sources, inputs, [*weights], gradients)
                    count += 1
                for name, value in recorder.values.items():
                    _widen(found, name, value.detach())
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(wanted[name])
    for sums in (found.activation, found.weight):
        for name in sums:
            sums[name] /= max(count, 1)
    return found


def _add_gradients(
    found: ChannelStatistics,
    sources: list[str],
    values: list[Tensor],
    layers: list[str],
    gradients: tuple[Tensor, ...],
) -> None:
    for name, value, gradient in zip(sources, values, gradients[: len(sources)], strict=True):
        power = (gradient.square() * (value != 0)).double()
        _add(found.activation, name, power.sum(_others(power)))
    for name, gradient in zip(layers, gradients[len(sources) :], strict=True):
        power = gradient.double().square()
        _add(found.weight, name, power.flatten(2).sum(2) if power.dim() > 2 else power)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _widen(found: ChannelStatistics, name: str, value: Tensor) -> None:
    low, high = value.amin(_others(value)).double(), value.amax(_others(value)).double()
    found.low[name] = torch.minimum(found.low[name], low) if name in found.low else low
    found.high[name] = torch.maximum(found.high[name], high) if name in found.high else high


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]
