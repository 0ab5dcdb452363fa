"""Partition of a network into blocks, and access to their outputs.

A cut point is a node that every path from the input to the output passes through: the rest of the
network can be computed from its result alone. The outputs of a network's blocks are cut points;
nodes inside a residual block are not.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fat.graph.patterns import FUSED_ACTIVATIONS, is_compute, module_of, only_user, source
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.errors import FatError

__all__ = ["block_outputs", "counterpart", "cut_points", "segment", "with_outputs"]

ACTIVATIONS = (
    *FUSED_ACTIVATIONS,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.Mish,
    nn.Softplus,
)
MERGES: frozenset[Any] = frozenset({operator.add, torch.cat})
"""Operations that join branches. Multiplications are gates (squeeze-excite) instead."""


def cut_points(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that every path from the input to the output passes through.

    Works on any graph: on a float graph of :func:`fat.graph.tracing.capture.trace`, folded or not,
    and on a student's. Constants may be read across a cut, sizes of tensors may not.

    Returns:
        Nodes in graph order, without the input; the last one computes the logits.

    Examples:
        >>> class Block(nn.Module):
        ...     def forward(self, x):
        ...         y = torch.relu(x)
        ...         return torch.tanh(y + torch.exp(y))
        >>> cut_points(fx.symbolic_trace(Block()))
        [relu, add, tanh]
    """
    nodes = list(module.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    flow = _flow(module)
    found = []
    furthest = 0  # position of the last reader of any node so far
    for index, node in enumerate(nodes):
        if node not in flow:
            continue
        if furthest <= index and node.op not in ("placeholder", "output"):
            found.append(node)
        furthest = max([furthest, *(place[reader] for reader in node.users if reader in flow)])
    return found


def block_outputs(module: fx.GraphModule) -> list[fx.Node]:
    """Return the cut points that end a block, in graph order, without the logits.

    A block ends with one of the following, including an activation that alone reads it:

    * an addition or concatenation of branches (residual blocks);
    * a convolution without activation that is not depthwise (linear projection of an inverted
      residual block without addition);
    * a convolution that reads an activated depthwise convolution (depthwise separable block).

    Other layers of a chain (the stem, the last convolution before pooling, the layers of VGG) end
    no block, so the list may be empty.

    Args:
        module: Folded canonical float graph.

    Raises:
        FatError: For a student's graph; use :func:`counterpart` for the teacher's nodes.
    """
    nodes = list(module.graph.nodes)
    if any(isinstance(module_of(module, node), ActivationQuantizer) for node in nodes):
        raise FatError(
            "block_outputs needs a float graph, and this one holds quantizers. Use "
            "block_outputs(student.teacher), then counterpart(student.network, node) for each node."
        )
    last = max((i for i, node in enumerate(nodes) if is_compute(module, node)), default=0)
    cuts, flow = set(cut_points(module)), _flow(module)
    found = []
    for node in nodes[:last]:
        reader = only_user(node)
        activated = reader is not None and isinstance(module_of(module, reader), ACTIVATIONS)
        merges = node.target in MERGES and sum(n in flow for n in node.all_input_nodes) > 1
        projects = _is_dense(module, node) and (not activated or _separable(module, node))
        result = reader if activated else node
        if (merges or projects) and result in cuts:
            assert result is not None
            found.append(result)
    return found


def counterpart(student: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the student's node that corresponds to a node of its float teacher.

    This is the activation quantizer after the operation, or the operation itself if it keeps its
    input's grid (flatten, max-pool).

    Args:
        student: ``Student.network``, prepared or loaded.
        node: A node of ``Student.teacher``.

    Raises:
        FatError: If the student does not compute this tensor, such as before a fused activation.
    """
    twins: dict[str, fx.Node] = {twin.name: twin for twin in student.graph.nodes}
    fused = node.name not in twins  # fused activations are part of their quantizer
    same = source(node) if fused else node
    twin = None if same is None else twins.get(same.name)
    reader = None if twin is None else only_user(twin)
    quantizer = None if reader is None else module_of(student, reader)
    if isinstance(quantizer, ActivationQuantizer) and (quantizer.activation is not None) == fused:
        assert reader is not None
        return reader
    if twin is not None and not fused and not isinstance(quantizer, ActivationQuantizer):
        return twin
    raise FatError(
        f"The student does not compute '{node.name}'. Pass a node of its own teacher; if an "
        "activation is fused into the operation, pass the activation's node."
    )


def with_outputs(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a graph with the outputs (output of ``module``, [results of ``nodes``]).

    It shares all submodules and tensors with ``module``: training or moving one affects the other.
    Replacing a submodule of one does not.

    Args:
        module: Any graph; not changed.
        nodes: Nodes of the graph.

    Examples:
        >>> net = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Flatten()))
        >>> relu = next(node for node in net.graph.nodes if node.op == "call_module")
        >>> flat, (features,) = with_outputs(net, [relu])(torch.zeros(2, 3, 4, 4))
        >>> flat.shape, features.shape
        (torch.Size([2, 48]), torch.Size([2, 3, 4, 4]))
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copies)
    graph.output((result, [copies[node] for node in nodes]))
    return fx.GraphModule(module, graph, type(module).__name__)


def logits_node(module: fx.GraphModule) -> fx.Node:
    """Return the node whose result the graph returns."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return result


def segment(module: fx.GraphModule, start: fx.Node | None, end: fx.Node | None) -> fx.GraphModule:
    """Return the part of a graph between two cut points, from the result of one to the other.

    It shares submodules and tensors with ``module``.

    Args:
        module: Any graph with one input; not changed.
        start: A cut point; ``None`` for the network's input.
        end: A later cut point; ``None`` for the network's output.

    Raises:
        FatError: If ``start`` is not a cut point: the part reads earlier results.
    """
    end = end or logits_node(module)
    needed: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in needed or node is start:
            continue
        needed.add(node)
        waiting += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copies[start] = graph.placeholder("x")
    for node in module.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder" and start is not None:
            raise FatError(f"'{start.name}' is not a cut point: later nodes read earlier results.")
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[end])
    return fx.GraphModule(module, graph, type(module).__name__)


def _flow(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on the input and affect the output."""
    depends: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    matters: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op == "output" or any(reader in matters for reader in node.users):
            matters.add(node)
    return depends & matters


def _is_dense(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True for a convolution that mixes channels."""
    layer = module_of(module, node)
    return isinstance(layer, nn.Conv2d) and (layer.groups == 1 or layer.groups < layer.in_channels)


def _separable(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a convolution reads an activated depthwise convolution."""
    before = source(node)
    if before is None or not isinstance(module_of(module, before), ACTIVATIONS):
        return False
    first = source(before)
    layer = None if first is None else module_of(module, first)
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
