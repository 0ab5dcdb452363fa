"""Constant folding: results that do not depend on the images become buffers or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["drop_unused", "fold_constants", "free_name", "run_node", "write"]


def run_node(root: nn.Module, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """Compute the result of one node.

    Args:
        root: Module with the submodules and tensors that the graph uses.
        node: Any node but input and output.
        known: Results of the nodes that it reads.
    """
    target: Any = node.target
    if node.op == "get_attr":
        return attrgetter(target)(root)
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_module":
        return root.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


@torch.no_grad()
def fold_constants(module: fx.GraphModule, counts: Sequence[Mapping[fx.Node, Any]] = ()) -> None:
    """Replace every result that does not depend on the input by a buffer or number, in place.

    Args:
        module: Graph of a network in eval mode.
        counts: Results that depend on the number of images, for two such numbers. What depends on
            these alone and is equal for every image is folded, too, and expanded to the batch.
    """
    runs = [_constants(module, count) for count in counts or ({},)]
    for node in [node for node in module.graph.nodes if all(node in known for known in runs)]:
        if node.op == "get_attr" or any(node in count for count in counts):
            continue
        if all(user in known for user in node.users for known in runs):
            continue
        values = [known[node] for known in runs]
        if not all(isinstance(value, Tensor) for value in values):
            if values[0] == values[-1] and isinstance(values[0], (bool, int, float, torch.Size)):
                write(node, values[0])
            continue
        if _equal(values[0], values[-1]):
            _store(module, node, values[0])
        elif _equal(values[0][:1], values[-1][:1]) and all(map(_repeats, values)):
            _store(module, node, values[0][:1], repeated=True)
    module.graph.eliminate_dead_code()
    drop_unused(module)


def _constants(module: fx.GraphModule, counts: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Return the results of all nodes that do not depend on the images."""
    known = dict(counts)
    for node in module.graph.nodes:
        if node in known or not (node.op == "get_attr" or node.op.startswith("call")):
            continue
        reads = node.all_input_nodes
        made = reads or node.op in ("get_attr", "call_function")
        if made and all(source in known for source in reads):
            known[node] = run_node(module, node, known)
    return known


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _repeats(value: Tensor) -> bool:
    """Return True if a tensor is equal for every image."""
    return value.dim() > 0 and torch.equal(value, value[:1].expand_as(value))


def _store(module: fx.GraphModule, node: fx.Node, value: Tensor, *, repeated: bool = False) -> None:
    graph = module.graph
    name = free_name(module, f"constant_{node.name}")
    module.register_buffer(name, value.detach().clone())
    with graph.inserting_before(node):
        stored = graph.get_attr(name)
        if repeated:
            images = next(iter(graph.find_nodes(op="placeholder")))
            count = graph.call_method("size", (images, 0))
            stored = graph.call_method("expand", (stored, count, *[-1] * (value.dim() - 1)))
    node.replace_all_uses_with(stored)


def drop_unused(module: fx.GraphModule) -> None:
    """Delete modules and tensors that the graph does not use, in place."""
    module.delete_all_unused_submodules()
    called = [
        module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"
    ]
    kept = {part for layer in called for part in layer.modules()}
    named = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for prefix, owner in list(module.named_modules()):
        if owner in kept:
            continue
        tensors = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
        for name, _ in tensors:
            if (f"{prefix}.{name}" if prefix else name) not in named:
                delattr(owner, name)


def free_name(module: nn.Module, wanted: str) -> str:
    """Return the wanted name, with a number appended if it is taken."""
    taken = {name for name, _ in module.named_modules()}
    name, count = wanted, 1
    while name in taken or hasattr(module, name):
        name, count = f"{wanted}_{count}", count + 1
    return name


def write(node: fx.Node, value: Any) -> None:
    """Replace all uses of a node by a number."""
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda read: value if read is node else read
        )
