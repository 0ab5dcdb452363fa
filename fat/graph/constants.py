"""What no image changes is computed once: biases of attention, grids of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["drop_unused", "fold_constants", "free_name", "run_node"]


def run_node(root: nn.Module, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What a node of a graph gives.

    Args:
        root: Holds the modules and tensors that the graph names.
        node: Neither input nor output.
        known: What the nodes give that it reads.
    """
    target: Any = node.target
    if node.op == "get_attr":
        value: Any = root
        for part in target.split("."):
            value = getattr(value, part)
        return value
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_module":
        return root.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


@torch.no_grad()
def fold_constants(module: fx.GraphModule) -> None:
    """Replace every result that depends on no input of the graph by a buffer or a number, in place.

    Args:
        module: Graph of a network in eval mode.
    """
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        reads = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op.startswith("call")
            and all(source in known for source in reads)
            and (reads or node.op == "call_function")
        ):
            known[node] = run_node(module, node, known)
    for node, value in known.items():
        if node.op == "get_attr" or all(user in known for user in node.users):
            continue
        if isinstance(value, Tensor):
            name = free_name(module, f"constant_{node.name}")
            module.register_buffer(name, value.detach().clone())
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
        elif isinstance(value, (bool, int, float, torch.Size)):
            _write(node, value)
    module.graph.eliminate_dead_code()
    drop_unused(module)


def drop_unused(module: fx.GraphModule) -> None:
    """Delete the modules and the tensors that the graph does not name, in place."""
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
    """The wanted name, with a number if a submodule or a tensor has it already."""
    taken = {name for name, _ in module.named_modules()}
    name, count = wanted, 1
    while name in taken or hasattr(module, name):
        name, count = f"{wanted}_{count}", count + 1
    return name


def _write(node: fx.Node, value: Any) -> None:
    """Write a number wherever the node that gave it was read."""
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda read: value if read is node else read
        )
