"""Predicates and accessors for the nodes of a canonical graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.quant.layers import ChannelClip

__all__ = [
    "FUSED_ACTIVATIONS",
    "activation_cap",
    "constant_of",
    "function_name",
    "input_node",
    "is_compute",
    "is_fused_activation",
    "is_softmax",
    "is_value_preserving",
    "module_of",
    "non_negative",
    "only_divides",
    "only_user",
    "padded_with",
    "source",
]

FUSED_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, ChannelClip)
"""Clipping activations, which integer runtimes fuse into the rescaling of the layer before."""

PRESERVING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Unfold,
    nn.ChannelShuffle,
)
# Operations that torch has as functions and as methods.
_RESHAPE = {"flatten", "movedim", "permute", "reshape", "squeeze", "swapaxes", "transpose"}
_SELECT = {"chunk", "flip", "narrow", "repeat_interleave", "roll", "select", "split", "unbind"}
_MOVE = _RESHAPE | _SELECT | {"unsqueeze"}
PRESERVING_FUNCTIONS: frozenset[Any] = frozenset(
    {getattr(torch, name) for name in _MOVE}
    | {operator.getitem, F.max_pool2d, F.adaptive_max_pool2d}
    | {F.pixel_shuffle, F.pixel_unshuffle, F.unfold}
)
PRESERVING_METHODS = frozenset(
    _MOVE
    | {"clone", "contiguous", "float", "to"}
    | {"expand", "expand_as", "repeat", "tile"}
    | {"reshape_as", "unflatten", "unfold", "view"}
)
PRESERVING_ATTRIBUTES = frozenset({"T", "mT"})
SOFTMAX = frozenset({torch.softmax, F.softmax, "softmax"})
DIVISIONS = frozenset({operator.truediv, torch.div, "div", "div_"})
RECIPROCAL_ROOTS = frozenset({torch.rsqrt, "rsqrt"})
PRODUCTS = frozenset({operator.mul, torch.mul, "mul"})
_REDUCE = {"add", "clamp", "mean", "norm", "pow", "sqrt", "square", "sub", "sum"}
STATISTICS: frozenset[Any] = frozenset(
    PRODUCTS
    | _REDUCE
    | {getattr(torch, name) for name in _REDUCE}
    | {operator.add, operator.sub, operator.pow, "abs", "clamp_min"}
)
"""Operations by which a norm computes its divisor."""
POSITIVE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    ChannelClip,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Softmax,
)
MEAN_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def module_of(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or ``None``."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls; empty if it has none."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def source(node: fx.Node) -> fx.Node | None:
    """Return the node's first input."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return first if isinstance(first, fx.Node) else None


def constant_of(module: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the network's tensor that a node gets, or ``None``."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    value = attrgetter(str(node.target))(module)
    return value.detach() if isinstance(value, Tensor) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that reads this one, or ``None`` if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def input_node(module: fx.GraphModule, layer: fx.Node) -> fx.Node | None:
    """Return the node whose grid the layer's input is on."""
    before = source(layer)
    while before is not None and before.op != "placeholder" and is_value_preserving(module, before):
        before = source(before)
    return before


feeding = input_node  # earlier name


def is_compute(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True for a convolution or linear layer."""
    return isinstance(module_of(module, node), (nn.Conv2d, nn.Linear))


def is_fused_activation(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True for a clipping activation that alone reads a computing operation."""
    before = source(node)
    return (
        isinstance(module_of(module, node), FUSED_ACTIVATIONS)
        and before is not None
        and only_user(before) is node
        and before.op != "placeholder"
        and not is_value_preserving(module, before)
    )


def is_value_preserving(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if every value of the result is a value of the input, or zero.

    Padding with −∞ before max pooling counts, too: no maximum is −∞.
    """
    if node.op == "call_module":
        target = module_of(module, node)
        return isinstance(target, PRESERVING_MODULES) or (
            isinstance(target, nn.ConstantPad2d) and float(target.value) == 0.0
        )
    if node.op == "call_function":
        if node.target is F.pad:
            mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
            value = padded_with(node)
            for_maxima = value == -math.inf and all(_is_max_pool(module, n) for n in node.users)
            return bool(mode != "constant" or value == 0 or for_maxima)
        if node.target is getattr:
            return node.args[1] in PRESERVING_ATTRIBUTES
        return node.target in PRESERVING_FUNCTIONS
    return node.op == "call_method" and node.target in PRESERVING_METHODS


def padded_with(node: fx.Node) -> float:
    """Return the value that a call of ``F.pad`` pads with."""
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return float(cast(float, value or 0.0))


def _is_max_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.target is F.max_pool2d or isinstance(module_of(module, node), nn.MaxPool2d)


def is_softmax(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True for a softmax module, function or method."""
    return node.target in SOFTMAX or isinstance(module_of(module, node), nn.Softmax)


def only_divides(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if the result is only used in divisors, like x² in x / √(mean x² + ε).

    Multiplying by a reciprocal root, as in x · 1/√(…), counts as a division.
    """
    if _divides_by_root(node):
        return True
    todo, seen = [node], set[fx.Node]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if not value.users:
            return False
        for reader in value.users:
            if _divides_by_root(reader) or _is_divisor(value, reader):
                continue
            if reader.target not in STATISTICS and not is_value_preserving(module, reader):
                return False
            todo.append(reader)
    return True


def _divides_by_root(node: fx.Node) -> bool:
    products = bool(node.users) and all(reader.target in PRODUCTS for reader in node.users)
    return node.target in RECIPROCAL_ROOTS and products


def _is_divisor(node: fx.Node, reader: fx.Node) -> bool:
    divides = reader.target in DIVISIONS and len(reader.args) > 1
    return divides and reader.args[1] is node and reader.args[0] is not node


def activation_cap(activation: nn.Module | None) -> float | None:
    """Return the upper bound of a clipping activation: 6 for ReLU6, ``None`` for no bound.

    Examples:
        >>> activation_cap(nn.ReLU6()), activation_cap(nn.ReLU())
        (6.0, None)
    """
    return float(activation.max_val) if isinstance(activation, nn.Hardtanh) else None


def non_negative(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if the structure of the graph guarantees that no value is below 0."""
    target = module_of(module, node)
    if isinstance(target, nn.Hardtanh):
        return float(target.min_val) >= 0.0
    if isinstance(target, POSITIVE_MODULES):
        return True
    averages = isinstance(target, MEAN_MODULES) or node.target in (
        torch.mean,
        F.avg_pool2d,
        F.adaptive_avg_pool2d,
        "mean",
        operator.add,
        operator.mul,
        torch.cat,
    )
    if not (averages or is_value_preserving(module, node)):
        return False
    return all(
        non_negative(module, value) if isinstance(value, fx.Node) else float(value) >= 0
        for value in _operands(node)
    )


def _operands(node: fx.Node) -> Iterator[fx.Node | float]:
    """Yield the tensors and numbers that determine the sign of a result."""
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        yield from cast(list[fx.Node], first)
        return
    yield cast(fx.Node, first)
    if node.target in (operator.add, operator.mul):
        yield cast(fx.Node, node.args[1])
