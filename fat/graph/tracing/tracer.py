"""A symbolic tracer that knows the sizes of tensors.

torch.fx follows a forward method with stand-ins for tensors, and stops where Python asks one for a
value: ``if height % window``, ``range(len(levels))``, ``math.ceil(width / 2)``. Those are questions
about sizes, which follow from the images' size alone. This tracer answers them from a second,
weightless copy of the network on torch's meta device, where tensors have sizes and no values, so
that a question about values still fails. The graph is then for images of that size; networks that
ask nothing keep graphs for any size.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import timm.layers
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fat.graph.tracing.constant_folding import run_node, write
from fat.graph.tracing.functionalize import are_slices
from fat.utils.errors import first_line

__all__ = ["FROZEN_NORMS", "SizeTracer", "WritesIntoPart"]

_timm: Any = timm.layers  # only partly typed

FROZEN_NORMS: tuple[type[nn.Module], ...] = (
    _timm.FrozenBatchNormAct2d,
    torchvision.ops.FrozenBatchNorm2d,
)
"""Batch norms of frozen statistics that are no subclasses of torch's."""
BATCHES = (2, 3)
"""An answer must be the same for both: graphs are for any number of images."""
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
"""Functions of torch that make tensors from sizes alone, which may be stand-ins."""


class AskedForValue(Exception):
    """The network's forward decides on something that sizes do not tell."""


class WritesIntoPart(Exception):
    """The network's forward writes into a part of a tensor."""


class _Answers:
    """What a stand-in answers to questions about sizes."""

    node: fx.Node
    tracer: Any  # a SizeTracer

    def __getattr__(self, name: str) -> Any:
        return _Attribute(cast(fx.Proxy, self), name)

    def __setitem__(self, index: object, value: object) -> None:
        """Kept for a part that is told by slices, if the value has its shape."""
        shape_of = self.tracer.shape_of
        if not (
            isinstance(value, fx.Proxy)
            and are_slices(index)
            and shape_of(value)
            and shape_of(value) == shape_of(cast(Any, self)[index])
        ):
            raise WritesIntoPart("it writes into a part of a tensor, x[…] = …")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return len(self._value())

    def __index__(self) -> int:
        return int(self._value().__index__())

    def __int__(self) -> int:
        return int(self._value())

    def __float__(self) -> float:
        return float(self._value())

    def __ceil__(self) -> Any:
        return math.ceil(self._value())

    def __floor__(self) -> Any:
        return math.floor(self._value())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._value(), digits)

    def _value(self) -> Any:
        return self.tracer.ask(self.node)


class _Proxy(_Answers, fx.Proxy):
    pass


class _Attribute(_Answers, fx.proxy.Attribute):
    pass


class SizeTracer(fx.Tracer):
    """Keeps whole what the passes match and what cannot be traced, and knows where it is.

    Args:
        size: Height and width of the images; ``None`` answers no question about sizes.

    Attributes:
        path: Names of the modules around the place that is being traced.
        asked: Whether the graph is for images of that size alone.
    """

    proxy_buffer_attributes = True

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        # timm's lists of what asks for sizes, and cannot be traced without them.
        functions = () if size else tuple(_timm.get_notrace_functions())
        modules: Any = () if size else (math,)
        super().__init__(modules, functions)
        self._whole = (nn.Conv2d, nn.Linear, _BatchNorm, *FROZEN_NORMS)
        self._whole += () if size else tuple(_timm.get_notrace_modules())
        self._size = size
        self._known: list[dict[fx.Node, Any]] = [{} for _ in BATCHES]
        self._sizes: nn.Module | None = None
        self._answering = False
        self.path: list[str] = []
        self.asked = False

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of a module's forward."""
        with _factories():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Of the images a stand-in; what else a forward takes, such as masks, keeps its default."""
        parameters = list(inspect.signature(root_fn).parameters.values())
        given = int(is_module) + 1
        if len(parameters) <= given or parameters[given].default is inspect.Parameter.empty:
            return super().create_args_for_root(root_fn, is_module, concrete_args)

        def images_alone(self: nn.Module, x: Any) -> Any:
            return root_fn(self, x)

        return super().create_args_for_root(images_alone, is_module, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node."""
        return isinstance(m, self._whole) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a module, or make it one node."""
        if self._answering:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not reached on failure: the path then names the culprit
        return result

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *more: Any,
        **options: Any,
    ) -> Any:
        """A node of the graph; of attention [N, heads, tokens, channels] where it is another.

        torch's exporter to ONNX knows no other. Blocks become images; without heads there is one.
        """
        create = partial(super().create_proxy, kind, target)
        if target is not F.scaled_dot_product_attention:
            return create(args, kwargs, *more, **options)
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        shape, masks = (self.shape_of(x) for x in (args[0], mask))
        if len(shape) == 3 and (mask is None or len(masks) == 3):
            args = tuple(x.unsqueeze(1) if isinstance(x, fx.Proxy) else x for x in args)
            if isinstance(mask, fx.Proxy) and len(args) < 4:
                kwargs = {**kwargs, "attn_mask": mask.unsqueeze(1)}
            return create(args, kwargs, *more, **options).squeeze(1)
        if len(shape) > 4 and mask is None:
            self.asked = True  # how many blocks there are
            args = (*(x.flatten(0, len(shape) - 4) for x in args[:3]), *args[3:])
            return create(args, kwargs, *more, **options).unflatten(0, (-1, *shape[1:-3]))
        return create(args, kwargs, *more, **options)

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        """Of what a stand-in stands for; empty where sizes do not tell."""
        try:
            return tuple(self.value(tensor.node).shape) if isinstance(tensor, fx.Proxy) else ()
        except AskedForValue:
            return ()

    def shares(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two results share memory, or may, where sizes do not tell."""
        try:
            found = [self.value(node) for node in (one, other)]
        except AskedForValue:
            return True
        return not all(isinstance(value, Tensor) for value in found) or (
            found[0].untyped_storage()._cdata == found[1].untyped_storage()._cdata
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A stand-in for a node's result."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer ``if``."""
        return bool(self.ask(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Answer ``for``: as many stand-ins as there are items."""
        items: Any = obj
        return (items[index] for index in range(len(self.ask(obj.node))))

    def ask(self, node: fx.Node) -> Any:
        """What a node gives, for the network's forward, which goes another way without it."""
        value = self.value(node)
        self.asked = True
        return value

    def value(self, node: fx.Node) -> Any:
        """What a node gives, if sizes tell.

        Raises:
            AskedForValue: If they do not, or if it depends on the number of images.
        """
        if self._size is None:
            raise AskedForValue("it asks for sizes, and no size of images is known.")
        found = self._evaluate(node)
        for value in found:
            if isinstance(value, Exception):
                raise AskedForValue(f"sizes do not tell: {first_line(value)}") from value
        if any(isinstance(value, Tensor) and not value.dim() for value in found):
            raise AskedForValue("it decides on values, not on sizes.")
        if isinstance(found[0], (bool, int, float)) and found[0] != found[1]:
            raise AskedForValue("it decides on the number of images.")
        return found[0]

    def literal(self, argument: Any) -> Any:
        """The value of a stand-in, where sizes tell, else the argument as it is.

        What is made of literals alone is a constant of the network.
        """
        if not isinstance(argument, fx.Proxy):
            return argument
        try:
            value = self.ask(argument.node)
        except AskedForValue:
            return argument
        if isinstance(value, torch.device):  # the sizes' own
            return next(self.root.parameters()).device
        return value if isinstance(value, (int, float, torch.dtype)) else argument

    def write_numbers(self, graph: fx.Graph) -> list[dict[fx.Node, Any]]:
        """Write the numbers that sizes tell where they are read, in place of what computes them.

        All of them, if the graph is for one size of images; else only the geometry of convolutions,
        such as a group per channel.

        Returns:
            For each of two numbers of images, what is left: the results that count images.
        """
        if self._size is None:
            return []
        geometry = {
            argument
            for node in graph.find_nodes(op="call_function", target=F.conv2d)
            for argument in (*node.args[3:], *node.kwargs.values())
        }
        counts: list[dict[fx.Node, Any]] = [{} for _ in BATCHES]
        for node in list(graph.nodes):
            if not node.op.startswith("call") or not (self.asked or node in geometry):
                continue
            found = self._evaluate(node)
            numbers = (bool, int, float, torch.Size, torch.dtype)
            if not all(isinstance(value, numbers) for value in found):
                continue
            if found[0] == found[1]:
                write(node, found[0])
            for count, value in zip(counts, found, strict=True):
                count[node] = value
        return counts

    def _evaluate(self, node: fx.Node) -> list[Any]:
        """What a node gives on torch's meta device for each number of images, or what it raises."""
        if self._sizes is None:
            self._sizes = copy.deepcopy(self.root).to("meta")
        self._answering = True
        try:
            for batch, known in zip(BATCHES, self._known, strict=True):
                while node not in known:  # in the graph's order, on from the last that is known
                    last = next(reversed(known), None)
                    following = last.next if last else next(iter(node.graph.nodes))
                    known[following] = self._tried(following, batch, known)
        finally:
            self._answering = False
        return [known[node] for known in self._known]

    def _tried(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
        for source in node.all_input_nodes:
            if isinstance(known[source], Exception):
                return known[source]
        try:
            return self._run(node, batch, known)
        except Exception as error:
            return error

    def _run(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return torch.empty(batch, 3, *self._size, device="meta")  # type: ignore[misc]
        assert self._sizes is not None
        return run_node(self._sizes, node, known)


@contextlib.contextmanager
def _factories() -> Iterator[None]:
    """Let functions that make tensors be recorded when a size is a stand-in."""
    originals = {name: getattr(torch, name) for name in FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None
            )
            if not found:
                return original(*args, **kwargs)
            tracer = found[0].tracer
            assert isinstance(tracer, SizeTracer)
            told: Any = fx.node.map_aggregate((args, kwargs), tracer.literal)
            return tracer.create_proxy("call_function", original, told[0], dict(told[1]))

        return call

    for name, original in originals.items():
        setattr(torch, name, recording(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
