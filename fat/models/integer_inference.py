"""What an integer runtime computes, integer by integer: a student's inference.

Training fakes integers with real values that lie on grids; sums of such values are rounded, and one
activation in a hundred thousand falls to the other side of a rounding. A network amplifies that:
one step of difference in an early layer moves the logits by a third of the quantization noise. So
inference takes the runtime's own arithmetic, ONNX Runtime's on x64:

* convolution, linear: q_y = clip(round(a · M) + z_y), with the accumulator
  a = Σ (q_x − z_x)·q_w + q_b exact and M = s_x·s_w / s_y in float32;
* addition: round(q_a·(s_a/s_y) + (q_b·(s_b/s_y) + c)), two fused multiply-adds in float32, with
  c = z_y − (s_a/s_y·z_a + s_b/s_y·z_b);
* multiplication: round(a·b · (s_a·s_b/s_y) + z_y);
* global average pooling: round(Σ(q_x − z_x) · (s_x / (s_y·N)) + z_y);
* anything else: on real values, round(x / s_y) + z_y;
* what only moves values moves integers.

Rounding is half to even. Accumulators are exact as long as their partial sums are below 2^24, which
float32 holds as they are. Integers are kept as float32 less their zero point, as convolutions want
them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.patterns import is_value_preserving, module_of
from fat.graph.tracing.capture import layer_name
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer

__all__ = [
    "IntegerInterpreter",
    "OnGrid",
    "averages_pixels",
    "in_integers",
    "real_operations",
    "requantize",
    "run_integers",
]


@dataclass(frozen=True)
class OnGrid:
    """A tensor of integers.

    Attributes:
        values: Integers less the zero point, float32.
        scale: Step, 0-dim float32.
        stored_zero: The zero point as runtimes store it in uint8: signed grids lie around 128.
    """

    values: Tensor
    scale: Tensor
    stored_zero: int

    def real(self) -> Tensor:
        """The real values that the integers stand for."""
        return self.values * self.scale


@dataclass(frozen=True)
class _Accumulated:
    """What a layer or a sum has before it is brought onto the next grid: values · scale."""

    values: Tensor
    scale: Tensor  # 0-dim, or one per channel in a shape that broadcasts
    count: int = 1  # what the values are still to be divided by


@dataclass(frozen=True)
class _Pair:
    kind: str
    first: OnGrid
    second: OnGrid


def real_operations(network: fx.GraphModule) -> list[str]:
    """Names of the operations that compute on real values, in the order of the graph.

    Args:
        network: A student's graph on which :func:`fat.graph.tracing.capture.mark_data` was run.
    """
    return [
        layer_name(node)
        for node in network.graph.nodes
        if node.op.startswith("call")
        and node.meta.get("data")
        and not isinstance(module_of(network, node), (ActivationQuantizer, QuantLayer))
        and not is_value_preserving(network, node)
        and not _has_integer_form(network, node)
    ]


def _has_integer_form(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a sum, a product or a mean is one of those of the module's text."""
    reads = node.all_input_nodes
    if node.target in (operator.add, operator.mul):
        return len(reads) == 2 and all(source.op != "get_attr" for source in reads)
    return averages_pixels(node, module_of(network, node), reads[0].meta.get("shape") or ())


def in_integers(quantizers: Iterable[ActivationQuantizer], layers: Iterable[QuantLayer]) -> bool:
    """Whether everything is on its grid: nothing is switched off or being calibrated."""
    return all(x.enabled and not x.observing for x in quantizers) and all(
        x.weight_quantizer.enabled for x in layers
    )


def run_integers(network: fx.GraphModule, images: Tensor) -> Tensor:
    """Logits [N, classes] of images [N, 3, H, W], by the arithmetic of the module's text.

    Args:
        network: A student's graph, calibrated, everything on its grid.
        images: Normalised images.
    """
    logits: Tensor = IntegerInterpreter(network).run(images)
    return logits


class IntegerInterpreter(fx.Interpreter):
    """Runs a student's graph; what stands between two quantizers may be any of the above."""

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        if n.op == "output":
            return fx.map_arg(n.args[0], lambda node: _real(self.env[node]))
        if n.op == "placeholder" or n.op == "get_attr":
            return super().run_node(n)
        given = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in n.args]
        module = module_of(self.module, n)  # type: ignore[arg-type]
        if isinstance(module, ActivationQuantizer):
            return self.quantize(n, module, given[0])
        first = given[0] if given else None
        if n.target is operator.getitem and isinstance(first, (tuple, list)):  # what was split
            return first[n.args[1]]  # type: ignore[index]
        if isinstance(first, OnGrid):
            if isinstance(module, QuantLayer):
                return _layer(module, first)
            if is_value_preserving(self.module, n):  # type: ignore[arg-type]
                return _moved(self._call(n, lambda value: _values(value)), first)
            if averages_pixels(n, module, first.values.shape):
                return _pooled(n, first)
            second = given[1] if len(given) > 1 else None
            if isinstance(second, OnGrid) and n.target in (operator.add, operator.mul):
                return _Pair("add" if n.target is operator.add else "mul", first, second)
        return self._call(n, _real)

    def quantize(self, node: fx.Node, quantizer: ActivationQuantizer, x: Any) -> OnGrid:
        """The integers of one activation."""
        return requantize(x, quantizer)

    def _call(self, node: fx.Node, unpack: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: unpack(self.env[arg]))
        return getattr(self, node.op)(node.target, args, kwargs)


def requantize(x: Any, quantizer: ActivationQuantizer) -> OnGrid:
    """Bring a real tensor, or what a layer, a sum or a product accumulated, onto a grid."""
    scale, zero_point = quantizer.thresholds()
    zero = int(zero_point)
    stored = zero + (128 if quantizer.grid.kind == "symmetric" else 0)
    shift = 0  # of the values, against integers less the zero point
    if isinstance(x, _Accumulated):
        divisor = scale * x.count if x.count != 1 else scale
        values = torch.mul(x.values, x.scale / divisor)
    elif isinstance(x, _Pair):
        values = (_add if x.kind == "add" else _mul)(x.first, x.second, scale, stored)
        shift = stored
    else:
        values = torch.div(x, scale)
    values.round_()
    if shift:
        values.sub_(shift)
    low, high = quantizer.integer_bounds()
    values.clamp_(low - zero, high - zero)
    bounds = quantizer.channel_bounds()
    if bounds is not None:
        limit = (bounds - zero).to(values).reshape(-1, *[1] * (values.dim() - 2))
        values = torch.minimum(values, limit)
    return OnGrid(values, scale, stored)


def _add(a: OnGrid, b: OnGrid, scale: Tensor, zero: int) -> Tensor:
    """In float64, rounded to float32 where the runtime's fused multiply-adds round."""
    by_a, by_b = (a.scale / scale).double(), (b.scale / scale).double()
    zeros = (by_a * a.stored_zero + (by_b * b.stored_zero).float().double()).float()
    partial = ((b.values.double() + b.stored_zero) * by_b + (zero - zeros).double()).float()
    return ((a.values.double() + a.stored_zero) * by_a + partial.double()).float()


def _mul(a: OnGrid, b: OnGrid, scale: Tensor, zero: int) -> Tensor:
    return (a.values * b.values) * (a.scale * b.scale / scale) + float(zero)


def _layer(layer: QuantLayer, x: OnGrid) -> _Accumulated:
    weight, step, bias = layer.integers()
    sums = layer.compute(x.values, weight.float(), None if bias is None else bias.float())
    scale = x.scale * step
    if scale.dim():
        dims = sums.dim() - 2 if sums.dim() > 2 and layer.weight.dim() > 2 else 0
        scale = scale.reshape(-1, *[1] * dims)
    return _Accumulated(sums, scale)


def averages_pixels(node: fx.Node, module: nn.Module | None, shape: Sequence[int]) -> bool:
    """Whether a node averages what it reads, of some shape, over all of height and width."""
    if len(shape) != 4:
        return False
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return size in (1, (1, 1), [1, 1])
    if node.target not in (torch.mean, "mean"):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]


def _pooled(node: fx.Node, x: OnGrid) -> _Accumulated:
    keep = True
    if node.target in (torch.mean, "mean"):
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    sums = x.values.sum((2, 3), keepdim=keep)
    return _Accumulated(sums, x.scale, x.values.shape[2] * x.values.shape[3])


def _real(value: Any) -> Any:
    if isinstance(value, OnGrid):
        return value.real()
    if isinstance(value, _Accumulated):
        return value.values * (value.scale / value.count)
    if isinstance(value, _Pair):
        function = operator.add if value.kind == "add" else operator.mul
        return function(value.first.real(), value.second.real())
    if isinstance(value, (tuple, list)):
        return type(value)(_real(part) for part in value)
    return value


def _values(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_values(part) for part in value)
    return value.values if isinstance(value, OnGrid) else value


def _moved(result: Any, like: OnGrid) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(_moved(part, like) for part in result)
    return OnGrid(result, like.scale, like.stored_zero) if isinstance(result, Tensor) else result
