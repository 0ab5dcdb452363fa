"""Groups of channels that can be rescaled together without changing the network's function."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fat.graph.patterns import activation_cap, is_compute, module_of
from fat.quant.layers import ChannelClip

__all__ = [
    "Clip",
    "ScaleGroup",
    "channel_clips",
    "column_ranges",
    "filter_ranges",
    "find_depthwise_pairs",
    "find_groups",
    "find_pairs",
    "is_depthwise",
    "rescale",
]

KEEPING = (torch.flatten, "flatten", torch.mean, "mean")
"""Functions and methods that keep channels separate if their number does not change."""
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Clip:
    """Activation of a group with an upper bound.

    Attributes:
        node: Name of its node.
        before: Name of the node that it reads.
        cap: Upper bound.
    """

    node: str
    before: str
    cap: float


@dataclass(frozen=True)
class ScaleGroup:
    """Tensors that must have the same scale s_k per channel: y_k → s_k·y_k.

    The simplest group is a pair: a convolution, a ReLU after it, and the convolution that reads it.
    Additions join their inputs, so that a residual stream is one group of all layers that write to
    it and read from it; pooling keeps the scale.

    Attributes:
        first: Layers whose output channels are multiplied by s_k.
        following: Layers whose input channels are divided by s_k.
        activations: Modules of the ReLUs and ReLU6s in between.
        clips: Activations with an upper bound, beyond which scaling changes the function.
        tensors: Names of all nodes of the group.
        channels: Number of channels.
    """

    first: tuple[str, ...]
    following: tuple[str, ...]
    activations: tuple[str, ...]
    clips: tuple[Clip, ...]
    tensors: tuple[str, ...]
    channels: int


def find_groups(module: fx.GraphModule) -> list[ScaleGroup]:
    """Return all groups of tensors whose channels can be rescaled together, in graph order.

    A group holds tensors joined by ReLU, ReLU6 (any clip from 0), additions and pooling. It is left
    out if anything else reads or writes one of them: the network's input and output, other
    activations, multiplications, concatenations, grouped convolutions, layers used twice.

    Args:
        module: Folded canonical graph after :func:`fat.graph.tracing.capture.mark_data`.
    """
    nodes = list(module.graph.nodes)
    uses = Counter(str(node.target) for node in nodes if node.op == "call_module")
    parent: dict[fx.Node, fx.Node] = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    blocked = []
    for node in nodes:
        if is_compute(module, node):
            if uses[str(node.target)] > 1 or len(node.meta["shape"] or ()) not in (2, 4):
                blocked += [node, *node.all_input_nodes]
            elif not _reads_channels(module_of(module, node)):
                blocked += node.all_input_nodes
        elif _passes_scale(module, node):
            for source in node.all_input_nodes:
                parent[root(node)] = root(source)
        else:
            blocked += [node, *node.all_input_nodes]
    closed = {root(node) for node in blocked}

    members: dict[fx.Node, list[fx.Node]] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(root(node), []).append(node)
        if is_compute(module, node):
            readers.setdefault(root(node.all_input_nodes[0]), []).append(node)
    return [
        _group(module, tensors, readers[key])
        for key, tensors in members.items()
        if key not in closed and key in readers
    ]


def find_pairs(module: fx.GraphModule) -> list[ScaleGroup]:
    """Return groups of one layer, at most one activation, and one reading layer (Nagel et al.)."""
    return [
        group
        for group in find_groups(module)
        if len(group.first) == len(group.following) == 1 and len(group.activations) <= 1
    ]


def find_depthwise_pairs(module: fx.GraphModule) -> list[ScaleGroup]:
    """Return pairs depthwise convolution → ReLU, ReLU6 or nothing → convolution."""
    return [
        pair
        for pair in find_pairs(module)
        if is_depthwise(module.get_submodule(pair.first[0]))
        and isinstance(module.get_submodule(pair.following[0]), nn.Conv2d)
        and len(pair.tensors) == 1 + len(pair.activations)
    ]


@torch.no_grad()
def rescale(module: fx.GraphModule, group: ScaleGroup, scales: Tensor) -> None:
    """Multiply the group's channel k by s_k and divide it in the reading layers, in place.

    Args:
        module: Folded canonical graph.
        group: From :func:`find_groups`.
        scales: s, [channels], above 0, on any device.
    """
    for name in group.first:
        layer = _layer(module, name)
        own = scales.to(layer.weight)
        layer.weight.mul_(own.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(own)
    for name in group.following:
        layer = _layer(module, name)
        inverse = (1 / scales).to(layer.weight)
        if is_grouped(layer):  # filter k reads channel k // multiplier alone
            inverse = inverse.repeat_interleave(layer.weight.shape[0] // len(scales))
            layer.weight.mul_(inverse.reshape(-1, 1, 1, 1))
        else:
            layer.weight.mul_(inverse.reshape(1, -1, *[1] * (layer.weight.dim() - 2)))


def channel_clips(module: fx.GraphModule, group: ScaleGroup, scales: Tensor) -> None:
    """Replace the group's clips at c by clips at c·s_k per channel, which keeps the function.

    Args:
        module: Folded canonical graph.
        group: From :func:`find_groups`.
        scales: Scales passed to :func:`rescale`.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    for clip in group.clips:
        node = nodes[clip.node]
        name = str(node.target)
        if sum(str(other.target) == name for other in module.graph.nodes) > 1:
            name = f"{name}_{node.name}"  # one module used in several places
        clipped = ChannelClip((scales * clip.cap).tolist())
        module.add_submodule(name, clipped.to(_layer(module, group.first[0]).weight.device))
        node.target = name
    module.recompile()


def filter_ranges(layer: nn.Module) -> Tensor:
    """Return max|W| of each output filter, [out] on the CPU."""
    return _weight(layer).abs().flatten(1).amax(1).cpu()


def column_ranges(layer: nn.Module) -> Tensor:
    """Return max|W| over the weights that read each input channel, [in] on the CPU."""
    weight = _weight(layer).abs()
    if is_grouped(layer):
        assert isinstance(layer, nn.Conv2d)
        return weight.reshape(layer.in_channels, -1).amax(1).cpu()
    return weight.transpose(0, 1).flatten(1).amax(1).cpu()


def is_depthwise(layer: nn.Module | None) -> bool:
    """Return True for a convolution whose filter k reads channel k alone."""
    return is_grouped(layer) and isinstance(layer, nn.Conv2d) and layer.out_channels == layer.groups


def is_grouped(layer: nn.Module | None) -> bool:
    """Return True for a convolution whose filters each read a single channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def _group(module: fx.GraphModule, tensors: list[fx.Node], readers: list[fx.Node]) -> ScaleGroup:
    clips, activations = [], []
    for node in tensors:
        target = module_of(module, node)
        if isinstance(target, (nn.ReLU, nn.Hardtanh)):
            activations.append(str(node.target))
            cap = activation_cap(target)
            if cap is not None:
                clips.append(Clip(node.name, node.all_input_nodes[0].name, cap))
    first = [node for node in tensors if is_compute(module, node)]
    return ScaleGroup(
        tuple(str(node.target) for node in first),
        tuple(str(node.target) for node in readers),
        tuple(activations),
        tuple(clips),
        tuple(node.name for node in tensors),
        first[0].meta["shape"][1],
    )


def _passes_scale(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if scaling channel k of all inputs by s_k > 0 scales channel k of the result."""
    shapes = [source.meta.get("shape") for source in node.all_input_nodes]
    if node.target is operator.add:
        return len(shapes) == 2 and None not in shapes and shapes[0] == shapes[1]
    target = module_of(module, node)
    if isinstance(target, nn.Hardtanh):
        return target.min_val == 0  # other lower bounds do not commute with scaling
    if isinstance(target, nn.Flatten) or node.target in KEEPING:
        # Only for one pixel, or a mean over pixels: otherwise channels are mixed.
        before, after = shapes[0], node.meta.get("shape")
        return before is not None and after is not None and before[:2] == after[:2]
    return isinstance(target, (nn.ReLU, *POOLS))


def _reads_channels(layer: nn.Module | None) -> bool:
    """Return True if each weight of a layer reads one input channel given by its position."""
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.groups in (1, layer.in_channels)
    )


def _layer(module: fx.GraphModule, name: str) -> nn.Conv2d | nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    return layer


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    return layer.weight.detach()
