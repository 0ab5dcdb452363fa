"""Symbolic tracer that knows the sizes of tensors.

torch.fx runs a forward method with proxies for tensors and fails where Python needs a value:
``if height % window``, ``range(len(levels))``, ``math.ceil(width / 2)``. Such values follow from
the image size alone. This tracer evaluates them on a copy of the network on torch's meta device,
where tensors have sizes but no values, so that control flow on values still fails. The graph is
then valid for that image size only; networks that need no sizes keep graphs for any size.
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

__all__ = ["FROZEN_NORMS", "PartialWrite", "SizeTracer"]

_timm: Any = timm.layers  # only partly typed

FROZEN_NORMS: tuple[type[nn.Module], ...] = (
    _timm.FrozenBatchNormAct2d,
    torchvision.ops.FrozenBatchNorm2d,
)
"""Batch norms with frozen statistics that are not subclasses of torch's."""
BATCHES = (2, 3)
"""Batch sizes that must give the same values: graphs work for any number of images."""
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
"""Functions of torch that create tensors from sizes, which may be proxies."""


class UnknownValue(Exception):
    """The forward method needs a value that does not follow from sizes."""


class PartialWrite(Exception):
    """The forward method writes into part of a tensor."""


class _SizeMixin:
    """Conversions of a proxy to Python numbers, evaluated from sizes."""

    node: fx.Node
    tracer: Any  # a SizeTracer

    def __getattr__(self, name: str) -> Any:
        return _Attribute(cast(fx.Proxy, self), name)

    def __setitem__(self, index: object, value: object) -> None:
        """Record the assignment to a part given by slices, if the value has its shape."""
        shape_of = self.tracer.shape_of
        if not (
            isinstance(value, fx.Proxy)
            and are_slices(index)
            and shape_of(value)
            and shape_of(value) == shape_of(cast(Any, self)[index])
        ):
            raise PartialWrite("it writes into part of a tensor, x[…] = …")
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
        return self.tracer.evaluate(self.node)


class _Proxy(_SizeMixin, fx.Proxy):
    pass


class _Attribute(_SizeMixin, fx.proxy.Attribute):
    pass


class SizeTracer(fx.Tracer):
    """Tracer that keeps modules whole that the passes match or that cannot be traced.

    Args:
        size: Height and width of the images; with ``None`` no sizes are known.

    Attributes:
        path: Names of the modules around the current position.
        uses_size: True if the graph is valid for this image size only.
    """

    proxy_buffer_attributes = True

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        # timm's lists of functions and modules that cannot be traced without sizes.
        functions = () if size else tuple(_timm.get_notrace_functions())
        modules: Any = () if size else (math,)
        super().__init__(modules, functions)
        self._whole = (nn.Conv2d, nn.Linear, _BatchNorm, *FROZEN_NORMS)
        self._whole += () if size else tuple(_timm.get_notrace_modules())
        self._size = size
        self._known: list[dict[fx.Node, Any]] = [{} for _ in BATCHES]
        self._sizes: nn.Module | None = None
        self._evaluating = False
        self.path: list[str] = []
        self.uses_size = False

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Return the graph of a module's forward method."""
        with _factories():
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Create a proxy for the images; other arguments, such as masks, keep their defaults."""
        parameters = list(inspect.signature(root_fn).parameters.values())
        images = int(is_module)
        others = parameters[images + 1 :]
        if not others or others[0].default is inspect.Parameter.empty:
            return super().create_args_for_root(root_fn, is_module, concrete_args)

        def images_alone(self: nn.Module, x: Any) -> Any:
            return root_fn(self, x)

        return super().create_args_for_root(images_alone, is_module, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True if the module becomes one node."""
        return isinstance(m, self._whole) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module, or make it one node."""
        if self._evaluating:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not reached on failure, so that the path names the failing module
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
        """Create a node; attention is brought into the form [N, heads, tokens, channels].

        torch's ONNX exporter supports no other form. Leading dimensions (blocks) become images, and
        attention without heads gets one.
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
            self.uses_size = True  # for the number of blocks
            args = (*(x.flatten(0, len(shape) - 4) for x in args[:3]), *args[3:])
            return create(args, kwargs, *more, **options).unflatten(0, (-1, *shape[1:-3]))
        return create(args, kwargs, *more, **options)

    def shape_of(self, tensor: Any) -> tuple[int, ...]:
        """Return the shape of a proxy's tensor; empty if unknown."""
        try:
            return tuple(self.peek(tensor.node).shape) if isinstance(tensor, fx.Proxy) else ()
        except UnknownValue:
            return ()

    def share_memory(self, one: fx.Node, other: fx.Node) -> bool:
        """Return True if two results share memory, or may share it."""
        try:
            found = [self.peek(node) for node in (one, other)]
        except UnknownValue:
            return True
        return not all(isinstance(value, Tensor) for value in found) or (
            found[0].untyped_storage()._cdata == found[1].untyped_storage()._cdata
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy for a node's result."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Evaluate a proxy as a condition."""
        return bool(self.evaluate(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over proxies for the items."""
        items: Any = obj
        return (items[index] for index in range(len(self.evaluate(obj.node))))

    def evaluate(self, node: fx.Node) -> Any:
        """Return the value of a node that the forward method depends on."""
        value = self.peek(node)
        self.uses_size = True
        return value

    def peek(self, node: fx.Node) -> Any:
        """Return the value of a node from sizes.

        Raises:
            UnknownValue: If it does not follow from sizes, or depends on the number of images.
        """
        if self._size is None:
            raise UnknownValue("it depends on sizes, and the image size is unknown.")
        found = self._meta_values(node)
        for value in found:
            if isinstance(value, Exception):
                raise UnknownValue(
                    f"a value does not follow from sizes ({first_line(value)})."
                ) from value
        if any(isinstance(value, Tensor) and not value.dim() for value in found):
            raise UnknownValue("it depends on values, not only on sizes.")
        if isinstance(found[0], (bool, int, float)) and found[0] != found[1]:
            raise UnknownValue("it depends on the number of images.")
        return found[0]

    def literal(self, argument: Any) -> Any:
        """Return the value of a proxy if it follows from sizes, else the argument unchanged.

        Results of literals alone are constants of the network.
        """
        if not isinstance(argument, fx.Proxy):
            return argument
        try:
            value = self.evaluate(argument.node)
        except UnknownValue:
            return argument
        if isinstance(value, torch.device):  # the meta device
            return next(self.root.parameters()).device
        return value if isinstance(value, (int, float, torch.dtype)) else argument

    def write_numbers(self, graph: fx.Graph) -> list[dict[fx.Node, Any]]:
        """Replace nodes whose results are numbers that follow from sizes by those numbers.

        In graphs for any image size this only concerns the geometry of convolutions, such as one
        group per channel.

        Returns:
            For each batch size of ``BATCHES``, the results that are numbers.
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
            if not node.op.startswith("call") or not (self.uses_size or node in geometry):
                continue
            found = self._meta_values(node)
            numbers = (bool, int, float, torch.Size, torch.dtype)
            if not all(isinstance(value, numbers) for value in found):
                continue
            if found[0] == found[1]:
                write(node, found[0])
            for count, value in zip(counts, found, strict=True):
                count[node] = value
        return counts

    def _meta_values(self, node: fx.Node) -> list[Any]:
        """Return a node's result, or the exception it raises, for each batch size."""
        if self._sizes is None:
            self._sizes = copy.deepcopy(self.root).to("meta")
        self._evaluating = True
        try:
            for batch, known in zip(BATCHES, self._known, strict=True):
                while node not in known:  # continue in graph order after the last known node
                    last = next(reversed(known), None)
                    following = last.next if last else next(iter(node.graph.nodes))
                    known[following] = self._try_run(following, batch, known)
        finally:
            self._evaluating = False
        return [known[node] for known in self._known]

    def _try_run(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
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
    """Record calls of functions that create tensors if one of their arguments is a proxy."""
    originals = {name: getattr(torch, name) for name in FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            proxies: list[fx.Proxy] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None
            )
            if not proxies:
                return original(*args, **kwargs)
            tracer = proxies[0].tracer
            assert isinstance(tracer, SizeTracer)
            values: Any = fx.node.map_aggregate((args, kwargs), tracer.literal)
            return tracer.create_proxy("call_function", original, values[0], dict(values[1]))

        return call

    for name, original in originals.items():
        setattr(torch, name, recording(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
