"""Tracing of a network into a graph in canonical form with readable names.

After :func:`trace` every activation is a module, additions are ``operator.add``, batch norms with a
built-in activation are two modules, and operations without effect at inference (dropout, identity)
are removed, so that the passes need to match one form only.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fat.graph.patterns import constant_of, function_name
from fat.graph.tracing.canonicalize import (
    MATRIX_PRODUCTS,
    conv2d_of,
    conv2d_of_transposed,
    plain_activation,
    plain_call,
    plain_layer,
    plain_norm,
    reparameterized,
    unpadded,
)
from fat.graph.tracing.constant_folding import drop_unused, fold_constants, free_name
from fat.graph.tracing.functionalize import functionalize
from fat.graph.tracing.tracer import FROZEN_NORMS, PartialWrite, SizeTracer
from fat.utils.errors import FatError

__all__ = ["layer_name", "mark_data", "trace"]

ACTIVATIONS: dict[Callable[..., Any] | str, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: nn.Hardtanh(min_val, max_val),
    F.hardtanh_: lambda min_val=-1.0, max_val=1.0: nn.Hardtanh(min_val, max_val),
    F.silu: lambda inplace=False: nn.SiLU(),
    F.hardswish: lambda inplace=False: nn.Hardswish(),
    F.hardsigmoid: lambda inplace=False: nn.Hardsigmoid(),
    F.gelu: lambda approximate="none": nn.GELU(approximate),
    F.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    F.sigmoid: nn.Sigmoid,
    F.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "sigmoid_": nn.Sigmoid,
    "tanh": nn.Tanh,
    "tanh_": nn.Tanh,
}
"""Functions and tensor methods → the equivalent module."""

ASSERTIONS = (torch._assert,)

CLAMPS: tuple[Callable[..., Any] | str, ...] = (torch.clamp, torch.clip, "clamp", "clamp_", "clip")

ARITHMETIC: dict[Callable[..., Any] | str, Callable[..., Any]] = {
    operator.iadd: operator.add,
    torch.add: operator.add,
    "add": operator.add,
    "add_": operator.add,
    operator.imul: operator.mul,
    torch.mul: operator.mul,
    "mul": operator.mul,
    "mul_": operator.mul,
}


@torch.random.fork_rng(devices=[])  # constructing layers draws random weights
def trace(network: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Trace a copy of the network into a canonical graph.

    Args:
        network: Module in eval mode whose forward takes one batch of images.
        example: Images [N, 3, H, W]. If the network's forward method depends on sizes (attention
            windows, position grids), the graph is valid for this height and width only.

    Returns:
        Equivalent graph whose modules keep the network's names.

    Raises:
        FatError: If the network is in training mode or cannot be traced; the module is named.
    """
    if any(module.training for module in network.modules()):
        raise FatError("The network is in training mode; call network.eval() first.")
    size = None if example is None else (example.shape[2], example.shape[3])
    tracer = SizeTracer(size)
    root = reparameterized(copy.deepcopy(network))
    try:
        graph = tracer.trace(root)
        counts = tracer.write_numbers(graph)
    except Exception as error:
        where = next((path for path in reversed(tracer.path) if path), "the network's own forward")
        kind = type(root.get_submodule(where)).__name__ if tracer.path and where else ""
        named = f"'{where}' {f'({kind}) ' if kind else ''}cannot be traced: {error} "
        if isinstance(error, PartialWrite):
            raise FatError(named + "Use torch.cat or torch.where instead.") from error
        raise FatError(
            named
            + "Its forward method depends on values or sizes of its input. "
            + (
                "Rewrite that line to depend on sizes only."
                if size
                else "Rewrite that line, pass example images, or keep the module as one operation "
                "with timm.layers.register_notrace_module(its class)."
            )
        ) from error
    module = fx.GraphModule(tracer.root, graph, type(network).__name__)
    functionalize(module, layer_name, tracer.share_memory)
    _canonicalize(module, counts)
    return module


def layer_name(node: fx.Node) -> str:
    """Return a readable name: that of the module, or of the owner of a function with its name."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "placeholder":
        return "input"
    stack = node.meta.get("nn_module_stack") or {}
    owner = next(reversed([path for path in stack if path]), "") if stack else ""
    owner = re.sub(r"@\d+", "", owner)  # torch.fx numbers repeated calls of a module
    function = function_name(node) or "op"
    return f"{owner}.{function}" if owner else function


def mark_data(module: fx.GraphModule, example: Tensor) -> None:
    """Run the graph once and set ``node.meta``: ``data`` for real-valued tensors, and ``shape``."""

    class Marker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["data"] = isinstance(result, Tensor) and result.is_floating_point()
            n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
            return result

    with torch.no_grad():
        Marker(module).run(example)


def _canonicalize(module: fx.GraphModule, counts: Sequence[Mapping[fx.Node, Any]]) -> None:
    for node in reversed(list(module.graph.nodes)):
        if node.target in ASSERTIONS:  # of sizes, which are known now
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    fold_constants(module, counts)
    _duplicate_shared_layers(module)
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            _canonical_module(module, node)
        elif node.op in ("call_function", "call_method"):
            _canonical_function(module, node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    drop_unused(module)
    module.recompile()


def _duplicate_shared_layers(module: fx.GraphModule) -> None:
    """Duplicate layers that are used more than once: each use has its own thresholds."""
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        if name in seen and module.get_submodule(name).state_dict():
            node.target = free_name(module, name)
            module.add_submodule(node.target, copy.deepcopy(module.get_submodule(name)))
        seen.add(str(node.target))


def _canonical_module(module: fx.GraphModule, node: fx.Node) -> None:
    name = str(node.target)
    target = module.get_submodule(name)
    if isinstance(target, (nn.Identity, _DropoutNd)):
        _bypass(node)
    elif isinstance(target, (nn.Conv2d, nn.Linear)):
        module.set_submodule(name, plain_layer(name, target))
    elif isinstance(target, (_BatchNorm, *FROZEN_NORMS)):
        _split_norm_and_activation(module, node, target)
    elif type(target) is nn.Conv1d:
        _replace_conv1d(module, node, target)
    elif type(target) is nn.ConvTranspose2d:
        _replace_conv_transpose(module, node, target)
    elif hasattr(target, "inplace"):
        module.set_submodule(name, plain_activation(target))
    layer = module.get_submodule(name)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        _separate_padding(module, node, layer)


def _split_norm_and_activation(module: fx.GraphModule, node: fx.Node, target: Any) -> None:
    name = str(node.target)
    module.set_submodule(name, plain_norm(target))
    last = node
    for part in ("drop", "act"):
        child = getattr(target, part, None)
        if child is None or isinstance(child, (nn.Identity, _DropoutNd)):
            continue
        child_name = f"{name}_{part}"
        module.add_submodule(child_name, plain_activation(child))
        with module.graph.inserting_after(last):
            following = module.graph.call_module(child_name)
        following.meta = dict(node.meta)
        last.replace_all_uses_with(following)
        following.args = (last,)
        last = following


def _canonical_function(module: fx.GraphModule, node: fx.Node) -> None:
    if not node.args:  # the passes expect the input among the positional arguments
        for name in ("input", "tensors"):
            if name in node.kwargs:
                rest = {key: value for key, value in node.kwargs.items() if key != name}
                node.args, node.kwargs = (node.kwargs[name],), rest
    if node.target in ARITHMETIC and len(node.args) == 2 and not node.kwargs:
        node.op, node.target = "call_function", ARITHMETIC[node.target]
        return
    if node.target in (F.dropout, F.dropout2d):
        _bypass(node)
        return
    replacement: nn.Module | None = None
    if node.target in {F.conv2d, F.linear} | MATRIX_PRODUCTS:
        replacement = plain_call(module, node)
    elif node.target in ACTIVATIONS:
        replacement = ACTIVATIONS[node.target](*node.args[1:], **node.kwargs)
    elif node.target in CLAMPS:
        bounds = {"min": None, "max": None, **node.kwargs}
        bounds.update(zip(("min", "max"), node.args[1:], strict=False))
        low, high = (_number(module, bounds[key]) for key in ("min", "max"))
        if low == 0 and high is None:
            replacement = nn.ReLU()
        elif isinstance(low, (int, float)) and isinstance(high, (int, float)):
            replacement = nn.Hardtanh(float(low), float(high))
    if replacement is None:
        return
    name = free_name(module, layer_name(node))
    module.add_submodule(name, replacement.eval())
    node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


def _number(module: fx.GraphModule, bound: Any) -> Any:
    """Return a bound as a number, also if the network stores it as a tensor."""
    kept = constant_of(module, bound)
    return bound if kept is None or kept.numel() != 1 else kept.item()


def _replace_conv1d(module: fx.GraphModule, node: fx.Node, layer: nn.Conv1d) -> None:
    """Replace a 1d convolution by a 2d convolution of height 1."""
    name, graph = str(node.target), module.graph
    module.set_submodule(name, conv2d_of(layer))
    with graph.inserting_before(node):
        node.args = (graph.call_function(torch.unsqueeze, (*node.args, 2)),)
    with graph.inserting_after(node):
        narrow = graph.call_function(torch.squeeze, (node, 2))
    node.replace_all_uses_with(narrow)
    narrow.args = (node, 2)


def _replace_conv_transpose(
    module: fx.GraphModule, node: fx.Node, layer: nn.ConvTranspose2d
) -> None:
    """Replace a transposed convolution by a plain one whose input is spread apart with zeros.

    Runtimes have no integer kernel for the transposed form, while spreading only moves integers.
    """
    graph = module.graph
    down, across = (stride - 1 for stride in layer.stride)
    sides: list[int] = []
    for axis in (1, 0):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - int(layer.padding[axis])
        sides += [reach, reach + layer.output_padding[axis] - layer.stride[axis] + 1]
    with graph.inserting_before(node):
        x = node.args[0]
        for place in (3, 5):
            x = graph.call_function(torch.unsqueeze, (x, place))
        x = graph.call_function(F.pad, (x, [0, across, 0, 0, 0, down]))
        for place in (4, 2):
            x = graph.call_function(torch.flatten, (x, place, place + 1))
        node.args = (graph.call_function(F.pad, (x, sides)),)
    module.set_submodule(str(node.target), conv2d_of_transposed(layer))


def _separate_padding(module: fx.GraphModule, node: fx.Node, layer: nn.Conv2d) -> None:
    """Make padding with other values than zero a separate operation."""
    sides = list(layer._reversed_padding_repeated_twice)
    with module.graph.inserting_before(node):
        node.args = (module.graph.call_function(F.pad, (*node.args, sides, layer.padding_mode)),)
    module.set_submodule(str(node.target), unpadded(layer))


def _bypass(node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
