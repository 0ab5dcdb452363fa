"""Put quantizers where integer runtimes have theirs.

* on the network's input;
* on every convolution's and linear layer's weight and bias;
* on the result of every computing operation. A layer and the clipping activation (ReLU, ReLU6) that
  alone reads it count as one operation, whose quantizer takes the activation over; others
  (hard-swish, SiLU, sigmoid) are operations of their own, because no runtime fuses them. What only
  a softmax reads, and is no layer's result, has none: a softmax computes in real values
  everywhere, and the mask that is added before it may hold −∞. Nor has what is only divided by,
  such as a norm's variance: a grid holds zero, which the ε that is added to it is there to avoid.

Operations that move values without computing keep their input's grid.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fat.graph.patterns import (
    feeding,
    is_compute,
    is_fused_activation,
    is_softmax,
    is_value_preserving,
    module_of,
    non_negative,
    only_divides,
    only_user,
    source,
)
from fat.graph.tracing.capture import layer_name, mark_data
from fat.quant.config import Grid, QuantSpec
from fat.quant.layers import SameConv2d
from fat.quant.policy import activation_grid, weight_grid
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.errors import FatError, unknown_name

__all__ = [
    "QUANTIZERS",
    "InsertReport",
    "find_quantized",
    "hold_constants",
    "insert_quantizers",
    "link_inputs",
]

QUANTIZERS = "activation_quantizers"
"""The submodule that holds all activation quantizers."""


@dataclass(frozen=True)
class InsertReport:
    """Names of what got a quantizer, and of what computes in float because none exists for it."""

    activations: tuple[str, ...]
    layers: tuple[str, ...]


def find_quantized(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes whose result goes onto a grid, in the order of the graph (see the module's text)."""
    found = []
    for node in module.graph.nodes:
        if node.op == "output" or not node.meta.get("data", False):
            continue
        if node.op == "get_attr" or (node.op != "placeholder" and _keeps_grid(module, node)):
            continue
        reader = only_user(node)
        if reader is not None and is_fused_activation(module, reader):
            continue
        real = (reader is not None and is_softmax(module, reader)) or only_divides(module, node)
        if real and not (is_compute(module, node) or is_fused_activation(module, node)):
            continue
        found.append(node)
    return found


def insert_quantizers(module: fx.GraphModule, spec: QuantSpec, example: Tensor) -> InsertReport:
    """Insert quantizers in place.

    Args:
        module: Folded canonical graph.
        spec: What is asked of the network.
        example: One batch, to tell tensors of data from sizes.

    Raises:
        FatError: If the graph holds no convolution or linear layer, or one of a kind without an
            integer form, or ``spec.layer_bits`` names a layer that is not there.
    """
    mark_data(module, example)
    compute = [node for node in module.graph.nodes if is_compute(module, node)]
    if not compute:
        raise FatError("The network holds no convolution or linear layer: nothing to quantize.")
    first, last = compute[0], compute[-1]
    quantized = find_quantized(module)
    feeds_first, feeds_last = feeding(module, first), feeding(module, last)
    # Asked before any quantizer stands between an operation and what it reads.
    non_negatives = {node for node in quantized if _float_non_negative(module, node)}

    layers = []
    for node in compute:
        if not node.meta.get("data", False):
            continue
        name = str(node.target)
        if isinstance(module.get_submodule(name), QuantLayer):
            raise FatError(f"'{name}' is used more than once: give each use a layer of its own.")
        grid = weight_grid(spec, name, first=node is first, last=node is last)
        module.set_submodule(name, quant_layer(name, module.get_submodule(name), spec, grid))
        layers.append(name)
    for name in dict(spec.layer_bits):
        if name not in layers:
            raise unknown_name("layer in layer_bits", name, layers)

    module.add_submodule(QUANTIZERS, nn.Module())
    names: list[str] = []
    for node in quantized:
        name = layer_name(node)
        grid = activation_grid(
            spec,
            non_negative=node in non_negatives,
            feeds_first=node is feeds_first,
            feeds_last=node is feeds_last,
        )
        key = _key(name, names)
        names.append(key)
        clip = module_of(module, node) if is_fused_activation(module, node) else None
        quantizer = ActivationQuantizer(name, spec, grid, clip)
        module.get_submodule(QUANTIZERS).add_module(key, quantizer)
        with module.graph.inserting_after(node):
            call = module.graph.call_module(f"{QUANTIZERS}.{key}")
        node.replace_all_uses_with(call)
        call.args = (node,) if clip is None else node.args
        if clip is not None:
            module.graph.erase_node(node)
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    hold_constants(module)
    link_inputs(module)
    return InsertReport(tuple(names), tuple(layers))


def link_inputs(module: fx.GraphModule) -> None:
    """Tell every quantized layer which quantizer its input passed: the bias' grid needs it.

    And tell every quantizer whether it may overwrite what it reads: the results of layers and of
    additions are needed by nothing else, neither forward nor backward.
    """
    for node in module.graph.nodes:
        layer = module_of(module, node)
        if isinstance(layer, ActivationQuantizer):
            before = source(node)
            layer.may_overwrite = (
                before is not None
                and only_user(before) is node
                and (
                    before.target in (operator.add, torch.add)
                    or isinstance(module_of(module, before), QuantLayer)
                )
            )
        if not isinstance(layer, QuantLayer):
            continue
        before = source(node)
        while before is not None and not isinstance(module_of(module, before), ActivationQuantizer):
            before = source(before)
        if before is None:
            raise FatError(f"The input of '{node.target}' passes no quantizer.")
        quantizer = module_of(module, before)
        assert isinstance(quantizer, ActivationQuantizer)
        layer.set_input_quantizer(quantizer)


def hold_constants(module: nn.Module) -> None:
    """Turn what stays in float, and is not trained, into buffers, in place."""
    quantized = [m for m in module.modules() if isinstance(m, (QuantLayer, ActivationQuantizer))]
    trained = {part for owner in quantized for part in owner.modules()}
    for owner in module.modules():
        if owner in trained:
            continue
        parts = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in parts:  # buffers too: a student's file holds them whatever they were
            delattr(owner, name)
            owner.register_buffer(name, tensor.detach())


def quant_layer(name: str, layer: nn.Module, spec: QuantSpec, grid: Grid) -> QuantLayer:
    """The quantized form of a convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return QuantLinear(name, layer.weight, layer.bias, spec, grid)
    assert isinstance(layer, nn.Conv2d)
    padding: Any = "dynamic_same" if isinstance(layer, SameConv2d) else layer.padding
    return QuantConv2d(
        name,
        layer.weight,
        layer.bias,
        spec,
        grid,
        stride=_pair(layer.stride),
        padding=padding,
        dilation=_pair(layer.dilation),
        groups=layer.groups,
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _keeps_grid(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node's result lies on its input's grid.

    Constants have none: what first moves one, such as to as many as there are images, gets it.
    """
    before: fx.Node | None = node
    while before is not None and before.op != "placeholder":
        if not is_value_preserving(module, before):
            constant = before.op == "get_attr"
            return before is not node and not (constant and source(node) is before)
        before = source(before)
    return before is not None


def _float_non_negative(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op != "placeholder" and non_negative(module, node)


def _key(name: str, taken: list[str]) -> str:
    """A submodule name for a layer name, which may hold dots, free among those taken."""
    wanted = key = name.replace(".", "_")
    count = 1
    while key in taken:
        key, count = f"{wanted}_{count}", count + 1
    return key


def quantizer_table(module: fx.GraphModule) -> Mapping[str, ActivationQuantizer]:
    """Activation quantizers by key, in the order of the graph."""
    return dict(module.get_submodule(QUANTIZERS).named_children())  # type: ignore[arg-type]
