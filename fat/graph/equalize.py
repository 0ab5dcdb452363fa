"""Balance the filter ranges of depthwise convolutions and keep the network's function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fat.graph.patterns import FUSED_ACTIVATIONS, activation_cap, module_of, only_user
from fat.spec import EqualizeSpec

__all__ = [
    "DepthwisePair",
    "EqualizeReport",
    "PairReport",
    "depthwise_scales",
    "equalize_depthwise",
    "find_depthwise_pairs",
]

SANE_SCALE = 1e3
"""A channel that never fires may take any scale; further than this from 1 it would gain nothing."""
DEAD = 1e-8
"""A filter whose largest weight is below this is dead: there is nothing to balance."""


@dataclass(frozen=True)
class DepthwisePair:
    """A depthwise convolution, the activation after it or none, and the convolution after that."""

    depthwise: str
    activation: str | None
    following: str
    cap: float | None


@dataclass(frozen=True)
class PairReport:
    """What equalization did to one pair.

    ``spread`` is the largest filter range over the smallest among filters that are not dead.
    """

    depthwise: str
    following: str
    channels: int
    locked: int
    spread_before: float
    spread_after: float


@dataclass(frozen=True)
class EqualizeReport:
    """What equalization did, pair by pair; ``locked_share`` is over all channels, 0…1."""

    pairs: tuple[PairReport, ...]

    @property
    def locked_share(self) -> float:
        """Channels that kept their scale because they reach ReLU6's bound, as a share of all."""
        channels = sum(pair.channels for pair in self.pairs)
        return sum(pair.locked for pair in self.pairs) / channels if channels else 0.0


def find_depthwise_pairs(module: fx.GraphModule) -> list[DepthwisePair]:
    """Depthwise convolution → ReLU, ReLU6 or nothing → convolution, each the only reader."""
    pairs = []
    for node in module.graph.nodes:
        if not _is_depthwise(module_of(module, node)):
            continue
        activation: fx.Node | None = None
        after = only_user(node)
        if after is not None and isinstance(module_of(module, after), FUSED_ACTIVATIONS):
            activation, after = after, only_user(after)
        if after is None:
            continue
        following = module_of(module, after)
        clip = module_of(module, activation) if activation is not None else None
        if not isinstance(following, nn.Conv2d):
            continue
        if isinstance(clip, nn.Hardtanh) and clip.min_val != 0:
            continue  # clips from below elsewhere than at 0: no positive scale passes through it
        if following.groups not in (1, following.in_channels):
            continue
        pairs.append(
            DepthwisePair(
                str(node.target),
                None if activation is None else str(activation.target),
                str(after.target),
                activation_cap(clip),
            )
        )
    return pairs


def depthwise_scales(
    ranges: Tensor, maxima: Tensor, cap: float | None, options: EqualizeSpec
) -> tuple[Tensor, Tensor]:
    """Scales of the paper's rescaling scheme, and which channels are locked.

    The control value is the mean of T_k over the locked filters (over all, when none is locked);
    s_k = control / T_k for the others, capped so that s_k·m_k does not pass the activation's bound.

    Args:
        ranges: T_k = max|W_k| of each depthwise filter, [C].
        maxima: m_k, the largest value of each channel before the activation on the images, [C].
        cap: Where the activation clips from above, or ``None``.
        options: ``locked_from`` and ``cap``, both stated for ReLU6 and scaled for other bounds.

    Returns:
        s [C] float64, 1 for locked and dead filters, and locked [C] bool.

    Source: arXiv 1812.07872, section 3.3.
    """
    ranges, maxima = ranges.double(), maxima.double()
    dead = ranges < DEAD
    locked = torch.zeros_like(dead)
    if cap is not None:
        locked = (maxima >= options.locked_from * cap / 6.0) & ~dead
    chosen = ranges[locked] if bool(locked.any()) else ranges[~dead]
    if len(chosen) == 0:
        return torch.ones_like(ranges), locked
    scales = chosen.mean() / ranges.clamp(min=DEAD)
    if cap is not None:
        room = options.cap * cap / 6.0 / maxima.clamp(min=torch.finfo(torch.float64).tiny)
        scales = torch.where(maxima > 0, torch.minimum(scales, room), scales)
    scales = scales.clamp(1 / SANE_SCALE, SANE_SCALE)
    return torch.where(locked | dead, torch.ones_like(scales), scales), locked


def equalize_depthwise(
    module: fx.GraphModule, images: Iterable[Tensor], options: EqualizeSpec
) -> EqualizeReport:
    """Rescale every depthwise → convolution pair in place.

    Args:
        module: Folded canonical graph.
        images: Batches [N, 3, H, W] on which the channels' maxima are taken.
        options: See :class:`fat.spec.EqualizeSpec`.
    """
    pairs = find_depthwise_pairs(module)
    maxima = channel_maxima(module, [pair.depthwise for pair in pairs], images)
    reports = []
    for pair in pairs:
        first = module.get_submodule(pair.depthwise)
        second = module.get_submodule(pair.following)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        before = _filter_ranges(first)
        scales, locked = depthwise_scales(before, maxima[pair.depthwise], pair.cap, options)
        rescale_channels(first, second, scales)
        reports.append(
            PairReport(
                pair.depthwise,
                pair.following,
                len(scales),
                int(locked.sum()),
                _spread(before),
                _spread(_filter_ranges(first)),
            )
        )
    return EqualizeReport(tuple(reports))


@torch.no_grad()
def rescale_channels(first: nn.Conv2d, second: nn.Conv2d, scales: Tensor) -> None:
    """Multiply output channel k of ``first`` by s_k and divide ``second``'s weights for it."""
    first.weight.mul_(scales.reshape(-1, 1, 1, 1).to(first.weight))
    if first.bias is not None:
        first.bias.mul_(scales.to(first.bias))
    inverse = (1 / scales).to(second.weight)
    shape = (1, -1, 1, 1) if second.groups == 1 else (-1, 1, 1, 1)
    if second.groups > 1:  # depthwise: filter k reads channel k // multiplier alone
        inverse = inverse.repeat_interleave(second.out_channels // second.groups)
    second.weight.mul_(inverse.reshape(shape))


@torch.no_grad()
def channel_maxima(
    module: fx.GraphModule, layers: list[str], images: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Largest value of each output channel of the named layers over all images, {layer: [C]}."""
    maxima: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen = output.amax(dim=(0, 2, 3))
            maxima[name] = torch.maximum(maxima[name], seen) if name in maxima else seen

        return module.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in layers]
    try:
        for batch in images:
            module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return maxima


def _is_depthwise(layer: nn.Module | None) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.groups > 1
    )


def _filter_ranges(layer: nn.Conv2d) -> Tensor:
    return layer.weight.detach().abs().amax(dim=(1, 2, 3))


def _spread(ranges: Tensor) -> float:
    alive = ranges[ranges >= DEAD]
    return float(alive.max() / alive.min()) if len(alive) else 1.0
