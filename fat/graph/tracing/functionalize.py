"""What is written in place, read: after ``x.add_(y)`` whoever reads x reads the sum.

A graph says who reads what, and in-place operations are seen by readers that it does not connect:
of the tensor under its old name, and of views of it. The first are connected here; the second are
refused, unless the tensor is not read any more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import fx, nn

from fat.graph.patterns import PRESERVING_ATTRIBUTES, function_name, module_of, source
from fat.utils.errors import FatError

__all__ = ["are_slices", "read_what_was_written"]

VIEWS = frozenset(
    {
        "chunk",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "reshape_as",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "to",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    }
)
"""Functions and methods whose result may share its input's memory."""
Index = slice | EllipsisType


def are_slices(index: object) -> bool:
    """Whether an index is of slices with literal bounds and no step: ``x[:, 1:, ..., -2:]``."""
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


def read_what_was_written(
    module: fx.GraphModule,
    name: Callable[[fx.Node], str],
    shares: Callable[[fx.Node, fx.Node], bool],
) -> None:
    """Connect whoever reads a tensor that was written into with what was written.

    ``x[:, 1:] = y`` becomes a concatenation.

    Args:
        module: A graph as it was traced; changed in place.
        name: How an operation is called in a message.
        shares: Whether two results, one a view of the other by :data:`VIEWS`, share memory.

    Raises:
        FatError: If another view of the tensor's memory is read later.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node, place in order.items():
        written = source(node)
        if written is None or not _writes(module, node):
            continue

        def is_later(user: fx.Node, place: int = place) -> bool:
            return order.get(user, -1) > place  # nodes that are new here compute what was written

        for other, readers in _others(module, written, is_later):
            if any(map(is_later, readers)) and (
                not {written, other} <= order.keys() or shares(written, other)
            ):
                raise FatError(
                    f"'{name(node)}' writes into a tensor of which another view ('{name(other)}') "
                    "is read later. Write it without the in-place operation, as in x = x + y or "
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
    """Whether an operation leaves its result in its first input."""
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


def _others(
    module: fx.GraphModule, written: fx.Node, is_later: Callable[[fx.Node], bool]
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Views that may share a tensor's memory, and who reads of each what the tensor may share.

    They are what it is a view of, and the views of that and of itself until then.
    """
    below: dict[fx.Node, fx.Node] = {}  # the way from the whole down to the tensor
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
    """Whether two nodes are different items of the same tensor or list."""
    if other is None or not one.target == other.target == operator.getitem:
        return False
    items = one.args[1], other.args[1]
    return all(type(item) is int and item >= 0 for item in items) and len({*items}) == 2


def _joined(graph: fx.Graph, whole: Any, index: Any, value: Any) -> fx.Node:
    """The whole with a part of it replaced."""
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
        after = (slice(None),) * (-1 - dim)  # none, if counted from the first dimension
        index = (*before, slice(start, stop), *after)
        return graph.call_function(operator.getitem, (whole, index))

    joined = [of(None, part.start)] if part.start else []
    joined.append(_replaced(graph, of(part.start, part.stop), rest, value) if rest else value)
    joined += [of(part.stop, None)] if part.stop is not None else []
    return graph.call_function(torch.cat, (joined, dim))
