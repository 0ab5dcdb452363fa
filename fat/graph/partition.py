"""Where a network can be cut in two, and what it computes there.

A cut point is a node that everything on the way from the input to the output passes through: the
rest of the network can be computed from its result alone. In networks of blocks the blocks' outputs
are cut points, and nothing inside a residual block is one.
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
"""Operations that join branches. Multiplications are not among them: they gate (squeeze-excite)."""


def cut_points(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that every path from the input to the output passes through, in the graph's order.

    Works on any graph: on the float one of :func:`fat.graph.tracing.capture.trace`, folded or not,
    and on a
    student's. What depends on no input (constants) may be read across a cut; sizes of tensors may
    not. The input is left out; the node of the logits is the last one.

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
    furthest = 0  # where the last reader of anything before the node at hand stands
    for index, node in enumerate(nodes):
        if node not in flow:
            continue
        if furthest <= index and node.op not in ("placeholder", "output"):
            found.append(node)
        furthest = max([furthest, *(place[reader] for reader in node.users if reader in flow)])
    return found


def block_outputs(module: fx.GraphModule) -> list[fx.Node]:
    """The cut points that end a block, in the graph's order; the logits are not among them.

    A block ends with one of these, and with the activation that alone reads it, if there is one:

    * an addition or a concatenation of branches (residual blocks);
    * a convolution without an activation, unless it is depthwise (the linear projection of an
      inverted residual block, where there is no addition after it);
    * a convolution that reads an activated depthwise one (a depthwise separable block).

    Other layers of a chain (the stem, the last convolution before pooling, the layers of VGG) end
    none, so the list may be empty.

    Args:
        module: Folded canonical float graph.

    Raises:
        FatError: For a student's graph, whose places :func:`counterpart` finds by the teacher's.
    """
    nodes = list(module.graph.nodes)
    if any(isinstance(module_of(module, node), ActivationQuantizer) for node in nodes):
        raise FatError(
            "Blocks are found in a float graph, and this one holds quantizers. Ask for "
            "block_outputs(student.teacher), then for counterpart(student.network, node) of each."
        )
    last = max((i for i, node in enumerate(nodes) if is_compute(module, node)), default=0)
    cuts, flow = set(cut_points(module)), _flow(module)
    found = []
    for node in nodes[:last]:
        reader = only_user(node)
        activated = reader is not None and _is_activation(module, reader)
        merges = node.target in MERGES and sum(n in flow for n in node.all_input_nodes) > 1
        projects = _is_dense(module, node) and (not activated or _separable(module, node))
        result = reader if activated else node
        if (merges or projects) and result in cuts:
            assert result is not None
            found.append(result)
    return found


def counterpart(student: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The student's node that gives what a node of its float teacher gives.

    The activation quantizer after the operation; for an operation that keeps its input's grid
    (flatten, max-pool), the operation itself.

    Args:
        student: ``Student.network``, prepared or loaded.
        node: A node of ``Student.teacher``.

    Raises:
        FatError: If the student computes no such tensor, as before a fused activation.
    """
    twins: dict[str, fx.Node] = {twin.name: twin for twin in student.graph.nodes}
    fused = node.name not in twins  # insertion erases an activation that its quantizer takes over
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
        f"The student does not compute '{node.name}' by itself. Ask for a node of its own teacher; "
        "where an activation is fused into the operation before it, for the activation's node."
    )


def with_outputs(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph that returns (what ``module`` returns, [the results of ``nodes``]).

    It shares all submodules and tensors with ``module``: training or moving one is training or
    moving the other. Replacing a submodule of one does not reach the other.

    Args:
        module: Any graph; unchanged.
        nodes: Nodes of its graph.

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
    """The node whose result a graph returns."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return result


def segment(module: fx.GraphModule, start: fx.Node | None, end: fx.Node | None) -> fx.GraphModule:
    """The part of a graph from one cut point (its result is the input) to another (the output).

    It shares submodules and tensors with ``module``.

    Args:
        module: Any graph with one input; unchanged.
        start: A cut point; ``None`` is the network's input.
        end: A later cut point; ``None`` is the network's output.

    Raises:
        FatError: If the part reads what was computed before ``start``: it was no cut point.
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
            raise FatError(f"'{start.name}' is no cut point: what follows reads more than it.")
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[end])
    return fx.GraphModule(module, graph, type(module).__name__)


def _flow(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes between the input and the output: they depend on the one and matter to the other."""
    depends: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    matters: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op == "output" or any(reader in matters for reader in node.users):
            matters.add(node)
    return depends & matters


def _is_activation(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module_of(module, node), ACTIVATIONS)


def _is_dense(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is a convolution that mixes channels."""
    layer = module_of(module, node)
    return isinstance(layer, nn.Conv2d) and (layer.groups == 1 or layer.groups < layer.in_channels)


def _separable(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a convolution reads an activation of a depthwise convolution."""
    before = source(node)
    if before is None or not _is_activation(module, before):
        return False
    first = source(before)
    layer = None if first is None else module_of(module, first)
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
