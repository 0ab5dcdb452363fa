"""Insertion of quantizers where integer runtimes quantize.

* the network's input;
* weight and bias of every convolution and linear layer;
* the result of every computing operation. A layer and a clipping activation (ReLU, ReLU6) that
  alone reads it form one operation, and the quantizer includes the activation; other activations
  (hard-swish, SiLU, sigmoid) are separate operations, because no runtime fuses them.

Not quantized are inputs of a softmax other than layers' results, because a softmax computes in
float everywhere and a mask added before it may hold −∞, and values that are only used in divisors,
such as a norm's variance, because a grid contains zero. Operations that move values without
computing keep their input's grid.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fat.graph.patterns import (
    input_node,
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
    "constants_to_buffers",
    "find_quantized",
    "insert_quantizers",
    "link_inputs",
]

QUANTIZERS = "activation_quantizers"
"""Name of the submodule that holds all activation quantizers."""


@dataclass(frozen=True)
class InsertReport:
    """Keys of the inserted activation quantizers and names of the quantized layers."""

    activations: tuple[str, ...]
    layers: tuple[str, ...]


def find_quantized(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes whose result is quantized, in graph order (see the module's docstring)."""
    found = []
    for node in module.graph.nodes:
        if node.op == "output" or not node.meta.get("data", False):
            continue
        if node.op == "get_attr" or (node.op != "placeholder" and _keeps_grid(module, node)):
            continue
        reader = only_user(node)
        if reader is not None and is_fused_activation(module, reader):
            continue
        unquantized = (reader is not None and is_softmax(module, reader)) or only_divides(
            module, node
        )
        if unquantized and not (is_compute(module, node) or is_fused_activation(module, node)):
            continue
        found.append(node)
    return found


def insert_quantizers(module: fx.GraphModule, spec: QuantSpec, example: Tensor) -> InsertReport:
    """Insert quantizers in place.

    Args:
        module: Folded canonical graph.
        spec: Quantization options.
        example: One batch of images, to distinguish data from sizes.

    Raises:
        FatError: If the graph has no convolution or linear layer, uses one more than once, or does
            not have a layer that ``spec.layer_bits`` names.
    """
    mark_data(module, example)
    compute = [node for node in module.graph.nodes if is_compute(module, node)]
    if not compute:
        raise FatError("The network has no convolution or linear layer: nothing to quantize.")
    first, last = compute[0], compute[-1]
    quantized = find_quantized(module)
    feeds_first, feeds_last = input_node(module, first), input_node(module, last)
    # Before quantizers are inserted, because the check follows the graph.
    unsigned = {n for n in quantized if n.op != "placeholder" and non_negative(module, n)}

    layers = []
    for node in compute:
        if not node.meta.get("data", False):
            continue
        name = str(node.target)
        if isinstance(module.get_submodule(name), QuantLayer):
            raise FatError(f"'{name}' is used more than once: give each use its own layer.")
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
            non_negative=node in unsigned,
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
    constants_to_buffers(module)
    link_inputs(module)
    return InsertReport(tuple(names), tuple(layers))


def link_inputs(module: fx.GraphModule) -> None:
    """Set the input quantizer of every quantized layer, which determines the grid of its bias.

    Also set whether a quantizer may overwrite its input: nothing else needs the results of layers
    and additions, neither forward nor backward.
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
            raise FatError(f"The input of '{node.target}' is not quantized.")
        quantizer = module_of(module, before)
        assert isinstance(quantizer, ActivationQuantizer)
        layer.set_input_quantizer(quantizer)


def constants_to_buffers(module: nn.Module) -> None:
    """Convert tensors outside quantized layers to buffers, which are not trained, in place."""
    quantized = [m for m in module.modules() if isinstance(m, (QuantLayer, ActivationQuantizer))]
    trained = {part for owner in quantized for part in owner.modules()}
    for owner in module.modules():
        if owner in trained:
            continue
        parts = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in parts:  # including non-persistent buffers, for the student's file
            delattr(owner, name)
            owner.register_buffer(name, tensor.detach())


def quant_layer(name: str, layer: nn.Module, spec: QuantSpec, grid: Grid) -> QuantLayer:
    """Return the quantized form of a convolution or linear layer."""
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
        stride=layer.stride,  # type: ignore[arg-type]
        padding=padding,
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
    )


def _keeps_grid(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if the node's result is on its input's grid.

    Constants have no grid; it is set where a constant is first moved, such as expanded to a batch.
    """
    before: fx.Node | None = node
    while before is not None and before.op != "placeholder":
        if not is_value_preserving(module, before):
            constant = before.op == "get_attr"
            return before is not node and not (constant and source(node) is before)
        before = source(before)
    return before is not None


def _key(name: str, taken: list[str]) -> str:
    """Return an unused submodule name for a layer name, which may contain dots."""
    wanted = key = name.replace(".", "_")
    count = 1
    while key in taken:
        key, count = f"{wanted}_{count}", count + 1
    return key
