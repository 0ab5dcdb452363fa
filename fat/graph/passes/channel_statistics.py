"""Channel statistics on images: ranges, and sensitivity of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fat.graph.passes.scale_groups import Clip
from fat.graph.patterns import is_compute, module_of

__all__ = [
    "LOG_LIMIT",
    "LOG_SCALES",
    "ChannelStatistics",
    "clip_bounds",
    "clip_shift",
    "gather_statistics",
]

LOG_LIMIT = math.log(1e3)
"""Bound of |log s| for every scale s."""
LOG_SCALES = torch.linspace(-LOG_LIMIT, LOG_LIMIT, 139, dtype=torch.float64)
"""Logarithms of the scales for which the effect of a clip is tabulated; 0 is in the middle."""

GRADIENT_IMAGES = 64
"""Number of images for gradients, one backward pass each; ranges use all images."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Float64 statistics per channel on the CPU, by name of the node that computes the tensor.

    Attributes:
        low: Smallest value of each channel, [C].
        high: Largest value of each channel, [C].
        activation: G_k = mean over images of Σ_pixels ‖∂z/∂x_k‖², z the logits, over pixels where
            x_k is not 0, which every grid represents exactly. [C]
        weight: F_kj = mean over images of Σ_kernel ‖∂z/∂W_kj‖², [out, in] by name of the layer.
        shift: D_k = mean over images of ‖Σ_pixels ∂z/∂x_k·Δx_k‖² when channel k alone is scaled by
            s_k before a clip and back after it, for each of ``LOG_SCALES``. [C, scales]
    """

    low: dict[str, Tensor]
    high: dict[str, Tensor]
    activation: dict[str, Tensor]
    weight: dict[str, Tensor]
    shift: dict[str, Tensor]


class _Recorder(fx.Interpreter):
    """Interpreter that keeps the results of given nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self._names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = result
        return result


def clip_bounds(cap: float) -> Tensor:
    """Return the bounds c/s of s = exp(−LOG_SCALES), float64 [scales], rising.

    Args:
        cap: c.
    """
    return cap * LOG_SCALES.exp()


def clip_shift(x: Tensor, gradient: Tensor, bounds: Tensor) -> Tensor:
    """Return (Σ_pixels g·(min(x, c/s) − min(x, c)))² for s = exp(LOG_SCALES).

    Multiplying a channel by s before a clip at c and dividing by s after it is a clip at c/s. The
    pixels are sorted into bins between the values c/s once; running sums give all results.

    Args:
        x: Input of the clip, [1, C, ...]; negative values count as 0.
        gradient: g, the gradient of the clip's result, same shape.
        bounds: :func:`clip_bounds` of c, on the device of ``x``.

    Returns:
        float64 [C, scales].
    """
    x, gradient = (tensor.transpose(0, 1).flatten(1) for tensor in (x.clamp(min=0.0), gradient))
    bins = torch.bucketize(x, bounds.to(x.dtype))  # the number of bounds below x
    sums = x.new_zeros((2, len(x), len(bounds) + 1), dtype=torch.float64)
    sums[0].scatter_add_(1, bins, gradient.double())
    sums[1].scatter_add_(1, bins, (gradient * x).double())
    above = sums[0].sum(1, keepdim=True) - sums[0].cumsum(1)[:, :-1]
    clipped = sums[1].cumsum(1)[:, :-1] + bounds * above  # Σ g·min(x, bound)
    unscaled = clipped[:, len(bounds) // 2, None]
    return (clipped - unscaled).square().flip(1)


def gather_statistics(
    module: fx.GraphModule,
    images: Iterable[Tensor],
    tensors: Iterable[str],
    quantized: set[str],
    clips: Sequence[Clip] = (),
) -> ChannelStatistics:
    """Collect the statistics of tensors and of all layers, image by image, in one pass.

    The squared norms over all logits are estimated by one backward pass per image of Σ v_i·z_i with
    random v_i of mean 0 and variance 1: E (∂(v·z)/∂x)² = ‖∂z/∂x‖². The v are the same in every run
    and do not change the global random state.

    Args:
        module: Float graph in eval mode.
        images: Batches [N, 3, H, W].
        tensors: Names of the nodes to get ranges of.
        quantized: Names of quantized nodes; those in ``tensors`` also get gradients.
        clips: Clips to get ``shift`` of.
    """
    names = set(tensors)
    clipping = {clip.node: clip for clip in clips}
    bounds: dict[float, Tensor] = {}
    differentiated = (quantized | clipping.keys()) & names
    sources = [node.name for node in module.graph.nodes if node.name in differentiated]
    layers = {
        str(node.target): module_of(module, node)
        for node in module.graph.nodes
        if is_compute(module, node)
    }
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc, union-attr]
    found = ChannelStatistics({}, {}, {}, {}, {})
    generator = torch.Generator().manual_seed(0)
    count = 0
    required_grad = {name: weight.requires_grad for name, weight in weights.items()}
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
                    for name, gradient in zip(sources, gradients, strict=False):
                        if name in clipping:
                            clip = clipping[name]
                            before = recorder.values[clip.before].detach()
                            if clip.cap not in bounds:  # copied to the device once
                                bounds[clip.cap] = clip_bounds(clip.cap).to(before.device)
                            _add(found.shift, name, clip_shift(before, gradient, bounds[clip.cap]))
                    count += 1
                for name, value in recorder.values.items():
                    _widen(found, name, value.detach())
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required_grad[name])
    for sums in (found.activation, found.weight, found.shift):
        for name in sums:
            sums[name] = sums[name].cpu() / max(count, 1)
    for ends in (found.low, found.high):
        for name in ends:
            ends[name] = ends[name].cpu()
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
