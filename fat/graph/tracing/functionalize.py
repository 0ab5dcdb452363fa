"""Replacement of in-place operations: after ``x.add_(y)`` all readers of x read the sum.

In-place operations also affect readers that the graph does not connect to them: readers of the
tensor under its old name, and of views of it. The former are connected here; a later read of a view
is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import fx, nn

from fat.graph.patterns import (
    PRESERVING_ATTRIBUTES,
    PRESERVING_METHODS,
    function_name,
    module_of,
    source,
)
from fat.utils.errors import FatError

__all__ = ["are_slices", "functionalize"]

COPIES = {"clone", "flip", "repeat", "repeat_interleave", "roll", "tile", "unfold"}
VIEWS = (PRESERVING_METHODS - COPIES) | {"detach", "getitem"}
"""Functions and methods whose result may share its input's memory."""
Index = slice | EllipsisType


def are_slices(index: object) -> bool:
    """Return True for slices with literal bounds and no step: ``x[:, 1:, ..., -2:]``."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is Ellipsis
        or (
            isinstance(part, slice)
            and part.step in (None, 1)
            and all(bound is None or type(bound) is int for bound in (part.start, part.stop))
        )
        for part in parts
    )


def functionalize(
    module: fx.GraphModule,
    name: Callable[[fx.Node], str],
    share_memory: Callable[[fx.Node, fx.Node], bool],
) -> None:
    """Let later readers of a tensor that is modified in place read the modified value.

    ``x[:, 1:] = y`` becomes a concatenation.

    Args:
        module: Traced graph; changed in place.
        name: Returns the name of an operation for error messages.
        share_memory: Returns True if two results, one a view of the other, share memory.

    Raises:
        FatError: If another view of the tensor's memory is read later.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node, place in order.items():
        written = source(node)
        if written is None or not _writes(module, node):
            continue

        def is_later(user: fx.Node, place: int = place) -> bool:
            return order.get(user, -1) > place  # new nodes compute the modified value

        for other, readers in _other_views(module, written, is_later):
            if any(map(is_later, readers)) and (
                not {written, other} <= order.keys() or share_memory(written, other)
            ):
                raise FatError(
                    f"'{name(node)}' modifies a tensor in place, and its view '{name(other)}' is "
                    "read later. Use an operation that is not in place, such as x = x + y or "
                    "x = torch.cat([…])."
                )
        result = node
        if node.target is operator.setitem:
            with module.graph.inserting_before(node):
                result = _joined(module.graph, *node.args)
        written.replace_all_uses_with(result, is_later)
        if result is not node:
            module.graph.erase_node(node)


def _writes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if an operation writes its result into its first input."""
    if node.op == "call_module":
        return bool(getattr(module_of(module, node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = function_name(node)
    return (
        node.target is operator.setitem
        or node.kwargs.get("inplace") is True
        or (name.endswith("_") and not name.endswith("__"))
    )


def _other_views(
    module: fx.GraphModule, written: fx.Node, is_later: Callable[[fx.Node], bool]
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield the views that may share a tensor's memory, with the readers of the shared part.

    These are the tensors it is a view of, and their and its own earlier views.
    """
    below: dict[fx.Node, fx.Node] = {}  # path from the base tensor down to the written one
    whole = written
    while _is_view(module, whole) and (above := source(whole)) is not None:
        below[above] = whole
        whole = above
    found = [whole]
    while found:
        view = found.pop()
        readers = [user for user in view.users if not _are_apart(user, below.get(view))]
        if view is not written:
            yield view, readers
        found += [
            user
            for user in readers
            if _is_view(module, user) and source(user) is view and not is_later(user)
        ]


def _is_view(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module_of(module, node), (nn.Flatten, nn.Unflatten))
    if node.target is getattr:
        return node.args[1] in PRESERVING_ATTRIBUTES
    return node.op in ("call_function", "call_method") and function_name(node) in VIEWS


def _are_apart(one: fx.Node, other: fx.Node | None) -> bool:
    """Return True for different items of the same tensor or list."""
    if other is None or not one.target == other.target == operator.getitem:
        return False
    items = one.args[1], other.args[1]
    return all(type(item) is int and item >= 0 for item in items) and len({*items}) == 2


def _joined(graph: fx.Graph, whole: Any, index: Any, value: Any) -> fx.Node:
    """Return the node of ``whole`` with a part replaced by ``value``."""
    parts: tuple[Index, ...] = index if isinstance(index, tuple) else (index,)
    dots = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    real = [
        (place if place < dots else place - len(parts), part)
        for place, part in enumerate(parts)
        if isinstance(part, slice) and (part.start or part.stop is not None)
    ]
    return _replaced(graph, whole, real, value)


def _replaced(
    graph: fx.Graph, whole: fx.Node, parts: list[tuple[int, slice]], value: fx.Node
) -> fx.Node:
    if not parts:
        return value
    (dim, part), *rest = parts

    def of(start: int | None, stop: int | None) -> fx.Node:
        before = (slice(None),) * dim if dim >= 0 else (Ellipsis,)
        after = (slice(None),) * (-1 - dim)  # empty if dim counts from the front
        index = (*before, slice(start, stop), *after)
        return graph.call_function(operator.getitem, (whole, index))

    joined = [of(None, part.start)] if part.start else []
    joined.append(_replaced(graph, of(part.start, part.stop), rest, value) if rest else value)
    joined += [of(part.stop, None)] if part.stop is not None else []
    return graph.call_function(torch.cat, (joined, dim))
