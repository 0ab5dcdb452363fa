"""Equalization of channel ranges before quantization.

Ranges of channels are measured where the network is. Scales are computed from them on the CPU, so
that they are the same for a network on any device; the vectors are short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fat.graph.passes.balance import NoiseModel, balanced_scales
from fat.graph.passes.channel_statistics import gather_statistics
from fat.graph.passes.quantizer_insertion import find_quantized
from fat.graph.passes.scale_groups import (
    ScaleGroup,
    channel_clips,
    column_ranges,
    filter_ranges,
    find_depthwise_pairs,
    find_groups,
    find_pairs,
    rescale,
)
from fat.graph.tracing.capture import mark_data
from fat.quant.config import EqualizeSpec, QuantSpec

__all__ = [
    "EqualizeReport",
    "PairReport",
    "channel_maxima",
    "cross_layer_scales",
    "depthwise_scales",
    "equalize",
]

MAX_SCALE = 1e3
"""Bound of scales and their inverses, such as for channels that are never active."""
DEAD = 1e-8
"""Filters whose largest weight is below this are dead and not balanced."""
TOLERANCE = 1e-3
"""Cross-layer equalization has converged if |log| of all scales of a sweep is below this."""


@dataclass(frozen=True)
class PairReport:
    """Effect of one method on one pair, or group of layers with common scales.

    A spread is the ratio of the largest to the smallest channel range without dead channels; for
    several layers it is the largest of theirs.

    Attributes:
        method: Name of the method.
        first: Layers whose output channels were multiplied, joined by ``" + "``.
        following: Layers whose input channels were divided.
        channels: Number of channels.
        locked: Number of channels that kept their scale because they reach ReLU6's bound.
        first_before: Spread of the output channels of the first layers before equalization.
        first_after: The same after equalization.
        following_before: Spread of the input channels of the following layers before equalization.
        following_after: The same after equalization.
    """

    method: str
    first: str
    following: str
    channels: int
    locked: int
    first_before: float
    first_after: float
    following_before: float
    following_after: float


@dataclass(frozen=True)
class EqualizeReport:
    """Effect of equalization on every pair."""

    pairs: tuple[PairReport, ...]

    @property
    def locked_share(self) -> float:
        """Fraction of channels (0…1) that kept their scale because they reach ReLU6's bound."""
        channels = sum(pair.channels for pair in self.pairs)
        return sum(pair.locked for pair in self.pairs) / channels if channels else 0.0


def equalize(module: fx.GraphModule, images: Sequence[Tensor], spec: QuantSpec) -> EqualizeReport:
    """Apply the methods of ``spec.equalize`` in order, in place.

    Args:
        module: Folded canonical graph.
        images: Batches [N, 3, H, W] for the channels' ranges.
        spec: Quantization options, see :class:`fat.quant.config.EqualizeSpec`. ``balanced`` and
            ``exact`` also use bits, granularity and scheme.
    """
    mark_data(module, images[0][:1])
    reports: list[PairReport] = []
    for method in spec.equalize.methods:
        reports += METHODS[method](module, images, spec, method)
    return EqualizeReport(tuple(reports))


def lock_and_cap(
    scales: Tensor, maxima: Tensor, cap: float | None, options: EqualizeSpec
) -> tuple[Tensor, Tensor]:
    """Limit scales by ReLU6: s_k = 1 for locked channels, s_k·m_k ≤ cap for the others.

    Args:
        scales: Requested scales, [C] float64.
        maxima: m_k, the largest value of each channel before the activation on the images, [C].
        cap: Upper bound of the activation, or ``None``.
        options: ``locked_from`` and ``cap`` are relative to ReLU6 and scaled for other bounds.

    Returns:
        The limited scales, and the mask of locked channels, [C] bool.
    """
    locked = _locked(maxima, cap, options)
    if cap is not None:
        room = _room(maxima, cap, options)
        scales = torch.where(maxima > 0, torch.minimum(scales, room), scales)
    scales = scales.clamp(1 / MAX_SCALE, MAX_SCALE)
    return torch.where(locked, torch.ones_like(scales), scales), locked


def depthwise_scales(
    ranges: Tensor, maxima: Tensor, cap: float | None, options: EqualizeSpec
) -> tuple[Tensor, Tensor]:
    """Return the scales of the paper's rescaling scheme, and the mask of locked channels.

    The control value is the mean of T_k over the locked filters (over all if none is locked);
    s_k = control / T_k for the others, with s_k·m_k limited to the activation's bound.

    Args:
        ranges: T_k = max|W_k| of each depthwise filter, [C].
        maxima: See :func:`lock_and_cap`.
        cap: See :func:`lock_and_cap`.
        options: See :func:`lock_and_cap`.

    Returns:
        s [C] float64, 1 for locked and dead filters, and locked [C] bool.

    Source: arXiv 1812.07872, section 3.3.
    """
    ranges, maxima = ranges.double(), maxima.double()
    dead = ranges < DEAD
    locked = _locked(maxima, cap, options) & ~dead
    chosen = ranges[locked] if bool(locked.any()) else ranges[~dead]
    if len(chosen) == 0:
        return torch.ones_like(ranges), locked
    scales, _ = lock_and_cap(chosen.mean() / ranges.clamp(min=DEAD), maxima, cap, options)
    return torch.where(dead, torch.ones_like(scales), scales), locked


def cross_layer_scales(first: Tensor, following: Tensor) -> Tensor:
    """Return s_k = √(r2_k / r1_k), which makes both ranges √(r1_k·r2_k); 1 if either is dead.

    Args:
        first: r1_k, the range of the first layer's filter k, [C].
        following: r2_k, the range of the weights that read channel k, [C].

    Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 11.

    Examples:
        >>> cross_layer_scales(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 9.0])).tolist()
        [0.5, 3.0]
    """
    first, following = first.double(), following.double()
    dead = (first < DEAD) | (following < DEAD)
    return torch.where(dead, 1.0, (following / first.clamp(min=DEAD)).sqrt())


@torch.no_grad()
def channel_maxima(
    module: fx.GraphModule, layers: Sequence[str], images: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return the largest value of each output channel over all images, {layer: [C]} on the CPU."""
    maxima: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen = output.amax([axis for axis in range(output.dim()) if axis != 1])
            maxima[name] = torch.maximum(maxima[name], seen) if name in maxima else seen

        return module.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        for batch in images:
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen.cpu() for name, seen in maxima.items()}


def _depthwise(
    module: fx.GraphModule, images: Sequence[Tensor], spec: QuantSpec, method: str
) -> list[PairReport]:
    pairs = find_depthwise_pairs(module)
    maxima = channel_maxima(module, [pair.first[0] for pair in pairs], images)
    before = [_spreads(module, pair) for pair in pairs]
    locked = []
    for pair in pairs:
        ranges = filter_ranges(module.get_submodule(pair.first[0]))
        scales, fixed = depthwise_scales(ranges, maxima[pair.first[0]], _cap(pair), spec.equalize)
        rescale(module, pair, scales)
        locked.append(int(fixed.sum()))
    return _reports(module, method, pairs, locked, before)


def _cross_layer(
    module: fx.GraphModule, images: Sequence[Tensor], spec: QuantSpec, method: str
) -> list[PairReport]:
    pairs = find_pairs(module)
    maxima = channel_maxima(module, [pair.first[0] for pair in pairs], images)
    before = [_spreads(module, pair) for pair in pairs]
    scales = {pair: maxima[pair.first[0]].double().new_ones(pair.channels) for pair in pairs}
    locked = [0] * len(pairs)
    for _ in range(spec.equalize.iterations):
        moved = 0.0
        for index, pair in enumerate(pairs):
            step = cross_layer_scales(
                filter_ranges(module.get_submodule(pair.first[0])),
                column_ranges(module.get_submodule(pair.following[0])),
            )
            limited, fixed = lock_and_cap(
                scales[pair] * step, maxima[pair.first[0]].double(), _cap(pair), spec.equalize
            )
            step = limited / scales[pair]
            rescale(module, pair, step)
            scales[pair], locked[index] = limited, int(fixed.sum())
            moved = max(moved, float(step.log().abs().max()))
        if moved < TOLERANCE:
            break
    return _reports(module, method, pairs, locked, before)


def _balanced(
    module: fx.GraphModule, images: Sequence[Tensor], spec: QuantSpec, method: str
) -> list[PairReport]:
    groups = find_groups(module)
    names = {name for group in groups for name in group.tensors}
    quantized = {node.name for node in find_quantized(module)}
    clips = [clip for group in groups for clip in group.clips if method == "balanced"]
    statistics = gather_statistics(module, images, names, quantized, clips)
    model = NoiseModel(module, groups, statistics, spec, keeps_clips=method == "balanced")
    log_scales = balanced_scales(model)
    before = [_spreads(module, group) for group in groups]
    for group, place in zip(groups, model.places, strict=True):
        scales = log_scales[place].exp()
        rescale(module, group, scales)
        if method == "exact":
            channel_clips(module, group, scales)
    return _reports(module, method, groups, [0] * len(groups), before)


Method = Callable[[fx.GraphModule, Sequence[Tensor], QuantSpec, str], list[PairReport]]
METHODS: dict[str, Method] = {
    "depthwise": _depthwise,
    "cross_layer": _cross_layer,
    "balanced": _balanced,
    "exact": _balanced,
}


def _cap(pair: ScaleGroup) -> float | None:
    return pair.clips[0].cap if pair.clips else None


def _locked(maxima: Tensor, cap: float | None, options: EqualizeSpec) -> Tensor:
    if cap is None:
        return torch.zeros_like(maxima, dtype=torch.bool)
    return maxima >= options.locked_from * cap / 6.0


def _room(maxima: Tensor, cap: float, options: EqualizeSpec) -> Tensor:
    """Return the largest scale under the cap; very large for channels that are never active."""
    return options.cap * cap / 6.0 / maxima.clamp(min=torch.finfo(torch.float64).tiny)


def _spreads(module: fx.GraphModule, group: ScaleGroup) -> tuple[float, float]:
    return (
        max(_spread(filter_ranges(module.get_submodule(name))) for name in group.first),
        max(_spread(column_ranges(module.get_submodule(name))) for name in group.following),
    )


def _spread(ranges: Tensor) -> float:
    alive = ranges[ranges >= DEAD]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def _reports(
    module: fx.GraphModule,
    method: str,
    groups: Sequence[ScaleGroup],
    locked: Sequence[int],
    before: Sequence[tuple[float, float]],
) -> list[PairReport]:
    after = [_spreads(module, group) for group in groups]
    return [
        PairReport(
            method,
            first=" + ".join(group.first),
            following=" + ".join(group.following),
            channels=group.channels,
            locked=count,
            first_before=old[0],
            first_after=new[0],
            following_before=old[1],
            following_after=new[1],
        )
        for group, count, old, new in zip(groups, locked, before, after, strict=True)
    ]
