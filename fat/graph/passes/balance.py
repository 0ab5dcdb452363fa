"""Scales that minimize the predicted quantization noise of a network.

Rounding a tensor with step d adds noise of variance d²/12 to each value. To first order, the noise
power of the logits is, summed over all layers and quantized activations that a scale affects,

    P(s) = Σ_layers Σ_k d_k²/12 · Σ_j F_kj · (s_j/s_k)²  +  Σ_tensors d²/12 · Σ_k G_k / s_k²

with s_k the scale of an output channel, s_j of an input channel, and F_kj = E ‖∂z/∂W_kj‖² and
G_k = E Σ_pixels ‖∂z/∂x_k‖² of the network before rescaling
(:mod:`fat.graph.passes.channel_statistics`). The steps depend on the scales, too:

* weights: d_k = max_j |W_kj|·s_k/s_j / q, with the maximum also over k for per-tensor thresholds;
* activations: d = (max_k s_k·M_k − min_k s_k·m_k) / q for channel ranges m_k…M_k; on symmetric
  grids the larger side over q.

If a ReLU6 stays as it is, s_k moves its effective bound from 6 to 6/s_k, which changes the float
function. This counts as noise: P includes w·Σ_k D_k(s_k) with the option w = ``shift_weight`` and
D_k = E ‖Σ_pixels ∂z/∂x_k·Δx_k‖², tabulated over s_k on the images.

All terms but D are sums, products and maxima of powers of s with positive coefficients, so log P is
convex in log s (a geometric program): without remaining clips, gradient descent finds the global
minimum.

The model is evaluated on the CPU, also for a network on a GPU: most of its operations are on short
vectors, and the scales then depend on the statistics alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fat.graph.passes.channel_statistics import LOG_LIMIT, LOG_SCALES, ChannelStatistics
from fat.graph.passes.quantizer_insertion import find_quantized
from fat.graph.passes.scale_groups import ScaleGroup, is_grouped
from fat.graph.patterns import input_node, is_compute, module_of, non_negative
from fat.quant.config import Grid, QuantSpec
from fat.quant.policy import activation_grid, weight_grid

__all__ = ["NoiseModel", "balanced_scales"]

POWERS = (8, 32)
"""Exponents of the p-norms that replace maxima during optimization, one after the other: the
gradient of a maximum concerns one channel only."""
STEPS = 100
"""Optimizer steps for each p."""
RATE = 0.1
"""Adam's learning rate for log s."""
SMALLEST = 1e-300
"""Lower bound under the root, so that the norm of an all-zero filter is differentiable."""


@dataclass(frozen=True)
class _Weight:
    """Layer in the noise model; ``rows`` and ``columns`` are slices of the vector log s."""

    ranges: Tensor  # max over the kernel of |W_kj|, [out, in]
    powered: dict[int, Tensor]  # (ranges / their maximum)^p for each p of POWERS
    power: Tensor  # F_kj, [out, in]
    rows: slice | None
    columns: slice | None
    diagonal: bool  # filter k reads channel k // multiplier alone: both are [out, 1]
    grid: Grid


@dataclass(frozen=True)
class _Activation:
    """Quantized activation in the noise model."""

    low: Tensor
    high: Tensor
    power: Tensor
    channels: slice
    grid: Grid


class NoiseModel:
    """Predicted noise power of the logits as a function of log s, all groups in one vector.

    Args:
        module: Folded canonical graph after :func:`fat.graph.tracing.capture.mark_data`.
        groups: Groups to be scaled.
        statistics: Statistics of all tensors of the groups and all layers.
        spec: Quantization options.
        keeps_clips: True if clips stay as they are, so that scales change the function.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        groups: Sequence[ScaleGroup],
        statistics: ChannelStatistics,
        spec: QuantSpec,
        *,
        keeps_clips: bool,
    ) -> None:
        self.places: list[slice] = []
        start = 0
        for group in groups:
            self.places.append(slice(start, start + group.channels))
            start += group.channels
        self.size = start
        self._per_filter = spec.granularity == "per_channel"
        writes = {n: p for g, p in zip(groups, self.places, strict=True) for n in g.first}
        reads = {n: p for g, p in zip(groups, self.places, strict=True) for n in g.following}
        tensors = {n: p for g, p in zip(groups, self.places, strict=True) for n in g.tensors}

        compute = [node for node in module.graph.nodes if is_compute(module, node)]
        self._weights = []
        for node in compute:
            name, layer = str(node.target), module_of(module, node)
            if name not in writes and name not in reads:
                continue
            assert layer is not None
            weight = layer.weight.detach().cpu().double().abs()  # type: ignore[operator]
            ranges = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
            unit = ranges.max().clamp(min=torch.finfo(ranges.dtype).tiny)
            self._weights.append(
                _Weight(
                    ranges,
                    {p: (ranges / unit).pow(p) for p in POWERS},
                    statistics.weight[name],
                    writes.get(name),
                    reads.get(name),
                    is_grouped(layer),
                    weight_grid(spec, name, first=node is compute[0], last=node is compute[-1]),
                )
            )
        feeds_last = input_node(module, compute[-1])
        self._activations = [
            _Activation(
                statistics.low[node.name].clamp(max=0.0),
                statistics.high[node.name].clamp(min=0.0),
                statistics.activation[node.name],
                tensors[node.name],
                activation_grid(
                    spec,
                    non_negative=non_negative(module, node),
                    feeds_first=False,  # the network's input belongs to no group
                    feeds_last=node is feeds_last,
                ),
            )
            for node in find_quantized(module)
            if node.name in tensors
        ]
        self._shifts = [
            (place, statistics.shift[clip.node] * spec.equalize.shift_weight)
            for group, place in zip(groups, self.places, strict=True)
            for clip in group.clips
            if keeps_clips
        ]

    def zeros(self) -> Tensor:
        """Return log s of the unscaled network, float64 [size]."""
        return torch.zeros(self.size, dtype=torch.float64)

    def __call__(self, log_scales: Tensor, p: int | None = None) -> Tensor:
        """Return the predicted noise power P, 0-dim float64.

        Args:
            log_scales: [size].
            p: One of ``POWERS`` for p-norms; ``None`` for maxima.
        """
        total = log_scales.new_zeros(())
        for weight in self._weights:
            total = total + self._weight_noise(weight, log_scales, p)
        for activation in self._activations:
            total = total + _activation_noise(activation, log_scales, p)
        return total + self.shift(log_scales)

    def shift(self, log_scales: Tensor) -> Tensor:
        """Return the part of P from changing the float function, 0-dim float64."""
        total = log_scales.new_zeros(())
        for place, table in self._shifts:
            total = total + _interpolated(table, log_scales[place]).sum()
        return total

    def _weight_noise(self, weight: _Weight, log_scales: Tensor, p: int | None) -> Tensor:
        outputs, inputs = weight.ranges.shape
        rows = log_scales.new_zeros(outputs) if weight.rows is None else log_scales[weight.rows]
        if weight.columns is None:
            columns = log_scales.new_zeros(outputs if weight.diagonal else inputs)
        else:
            columns = log_scales[weight.columns]
            if weight.diagonal:
                columns = columns.repeat_interleave(outputs // len(columns))
        if weight.diagonal:
            ranges = weight.ranges[:, 0] * (rows - columns).exp()
            power = weight.power[:, 0] * (2 * (columns - rows)).exp()
        else:
            ranges = _row_norms(weight, -columns, p) * rows.exp()
            power = (weight.power @ (2 * columns).exp()) * (-2 * rows).exp()
        if self._per_filter:
            return ((ranges / weight.grid.qmax).square() * power).sum() / 12
        return (_norm(ranges, p) / weight.grid.qmax).square() * power.sum() / 12


def balanced_scales(model: NoiseModel) -> Tensor:
    """Minimize the predicted noise with Adam on log P, starting from s = 1; deterministic.

    Args:
        model: Noise model to minimize.

    Returns:
        log s, float64 [size], with at most the noise of s = 1.
    """
    best = model.zeros()
    least = float(model(best))
    if not least > 0.0:
        return best  # nothing to scale, or nothing that affects the logits
    position = best.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([position], lr=RATE, betas=(0.9, 0.99))
    total = STEPS * len(POWERS)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = RATE * (0.01 + math.cos(math.pi * step / total / 2) ** 2)
        optimizer.zero_grad()
        with torch.enable_grad():
            model(position, POWERS[step // STEPS]).log().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            position.clamp_(-LOG_LIMIT, LOG_LIMIT)
            if step % 10 == 9:
                noise = float(model(position))
                if noise < least:
                    least, best = noise, position.detach().clone()
    return best


def _activation_noise(activation: _Activation, log_scales: Tensor, p: int | None) -> Tensor:
    logs = log_scales[activation.channels]
    scales = logs.exp()
    low, high = -activation.low * scales, activation.high * scales
    if activation.grid.kind == "symmetric":
        extent = _norm(torch.maximum(low, high), p)
    else:
        extent = _norm(low, p) + _norm(high, p)
    noise = (activation.power * (-2 * logs).exp()).sum()
    return (extent / activation.grid.qmax).square() * noise / 12


def _interpolated(table: Tensor, logs: Tensor) -> Tensor:
    """Interpolate [C, scales] tables linearly at log s, [C]."""
    spacing = 2 * LOG_LIMIT / (len(LOG_SCALES) - 1)
    place = (logs + LOG_LIMIT) / spacing
    left = place.detach().floor().clamp(0, len(LOG_SCALES) - 2).long()
    fraction = place - left
    ends = table.gather(1, torch.stack([left, left + 1], 1))
    return ends[:, 0] * (1 - fraction) + ends[:, 1] * fraction


def _norm(values: Tensor, p: int | None) -> Tensor:
    """Return the maximum of non-negative values, or their p-norm, without overflow."""
    largest = values.max()
    if p is None or not float(largest.detach()) > 0.0:
        return largest
    unit = largest.detach()
    return (values / unit).pow(p).sum().pow(1 / p) * unit


def _row_norms(weight: _Weight, logs: Tensor, p: int | None) -> Tensor:
    """Return max_j (or p-norm over j) of ranges_kj·exp(logs_j), [out]."""
    if p is None:
        return (weight.ranges * logs.exp()).amax(1)
    # A matrix-vector product, without an intermediate of the matrix' size.
    sums = weight.powered[p] @ (p * logs).exp()
    return sums.clamp(min=SMALLEST).pow(1 / p) * weight.ranges.max()
