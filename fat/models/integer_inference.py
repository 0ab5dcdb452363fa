"""Inference of a student with the arithmetic of an integer runtime.

Training represents integers by real values on grids. Sums of such values are rounded, so that one
activation in a hundred thousand rounds differently than in a runtime, and one step of difference in
an early layer moves the logits by a third of the quantization noise. Inference therefore uses the
arithmetic of ONNX Runtime on x64:

* convolution, linear: q_y = clip(round(a · M) + z_y), with the accumulator
  a = Σ (q_x − z_x)·q_w + q_b exact and M = s_x·s_w / s_y in float32;
* addition: round(q_a·(s_a/s_y) + (q_b·(s_b/s_y) + c)), two fused multiply-adds in float32 with
  c = z_y − (s_a/s_y·z_a + s_b/s_y·z_b);
* multiplication: round(a·b · (s_a·s_b/s_y) + z_y);
* global average pooling: round(Σ(q_x − z_x) · (s_x / (s_y·N)) + z_y);
* operations that only move values (reshape, concatenation, …): on integers;
* any other operation: on real values, then round(x / s_y) + z_y.

Rounding is half to even. Accumulators are exact while their partial sums are below 2^24. Integers
are stored as float32 minus their zero point, the operand of convolutions.
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
    "IntegerTensor",
    "float_operations",
    "is_fully_quantized",
    "is_global_average_pool",
    "requantize",
    "run_integers",
]


@dataclass(frozen=True)
class IntegerTensor:
    """A quantized tensor.

    Attributes:
        values: Integers minus the zero point, float32.
        scale: Step size, 0-dim float32.
        stored_zero: Zero point as runtimes store it in uint8, where signed grids are offset by 128.
    """

    values: Tensor
    scale: Tensor
    stored_zero: int

    def real(self) -> Tensor:
        """Return the real values that the integers represent."""
        return self.values * self.scale


@dataclass(frozen=True)
class _Accumulated:
    """The accumulators of a layer or a sum, values · scale / count, before requantization."""

    values: Tensor
    scale: Tensor  # 0-dim, or per channel in a shape that broadcasts
    count: int = 1


@dataclass(frozen=True)
class _Pair:
    kind: str
    first: IntegerTensor
    second: IntegerTensor


def float_operations(network: fx.GraphModule) -> list[str]:
    """Return the names of the operations on real values, in the order of the graph.

    Args:
        network: A student's graph after :func:`fat.graph.tracing.capture.mark_data`.
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
    """Return whether a sum, a product or a mean is computed on integers."""
    reads = node.all_input_nodes
    if node.target in (operator.add, operator.mul):
        return len(reads) == 2 and all(source.op != "get_attr" for source in reads)
    shape = reads[0].meta.get("shape") or ()
    return is_global_average_pool(node, module_of(network, node), shape)


def is_fully_quantized(
    quantizers: Iterable[ActivationQuantizer], layers: Iterable[QuantLayer]
) -> bool:
    """Return whether all quantizers are enabled and none is being calibrated."""
    return all(x.enabled and not x.observing for x in quantizers) and all(
        x.weight_quantizer.enabled for x in layers
    )


def run_integers(network: fx.GraphModule, images: Tensor) -> Tensor:
    """Compute logits [N, classes] with integer arithmetic.

    Args:
        network: A student's graph, calibrated and with all quantizers enabled.
        images: Normalized images [N, 3, H, W].
    """
    logits: Tensor = IntegerInterpreter(network).run(images)
    return logits


class IntegerInterpreter(fx.Interpreter):
    """Runs a student's graph with integer arithmetic."""

    def run_node(self, n: fx.Node) -> Any:
        """Compute the value of one node."""
        if n.op == "output":
            return fx.map_arg(n.args[0], lambda node: _real(self.env[node]))
        if n.op == "placeholder" or n.op == "get_attr":
            return super().run_node(n)
        given = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in n.args]
        module = module_of(self.module, n)  # type: ignore[arg-type]
        if isinstance(module, ActivationQuantizer):
            return self.quantize(n, module, given[0])
        first = given[0] if given else None
        if n.target is operator.getitem and isinstance(first, (tuple, list)):
            return first[n.args[1]]  # type: ignore[index]
        if isinstance(first, IntegerTensor):
            if isinstance(module, QuantLayer):
                return _layer(module, first)
            if is_value_preserving(self.module, n):  # type: ignore[arg-type]
                return _moved(self._call(n, lambda value: _values(value)), first)
            if is_global_average_pool(n, module, first.values.shape):
                return _pooled(n, first)
            second = given[1] if len(given) > 1 else None
            if isinstance(second, IntegerTensor) and n.target in (operator.add, operator.mul):
                return _Pair("add" if n.target is operator.add else "mul", first, second)
        return self._call(n, _real)

    def quantize(self, node: fx.Node, quantizer: ActivationQuantizer, x: Any) -> IntegerTensor:
        """Return the integers of one activation."""
        return requantize(x, quantizer)

    def _call(self, node: fx.Node, unpack: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: unpack(self.env[arg]))
        return getattr(self, node.op)(node.target, args, kwargs)


def requantize(x: Any, quantizer: ActivationQuantizer) -> IntegerTensor:
    """Quantize a real tensor, or the accumulators of a layer, a sum or a product."""
    scale, zero_point = quantizer.thresholds()
    zero = int(zero_point)
    stored = zero + (128 if quantizer.grid.kind == "symmetric" else 0)
    shift = 0
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
    return IntegerTensor(values, scale, stored)


def _add(a: IntegerTensor, b: IntegerTensor, scale: Tensor, zero: int) -> Tensor:
    """Add in float64, rounding to float32 where the runtime's fused multiply-adds round."""
    by_a, by_b = (a.scale / scale).double(), (b.scale / scale).double()
    zeros = (by_a * a.stored_zero + (by_b * b.stored_zero).float().double()).float()
    partial = ((b.values.double() + b.stored_zero) * by_b + (zero - zeros).double()).float()
    return ((a.values.double() + a.stored_zero) * by_a + partial.double()).float()


def _mul(a: IntegerTensor, b: IntegerTensor, scale: Tensor, zero: int) -> Tensor:
    return (a.values * b.values) * (a.scale * b.scale / scale) + float(zero)


def _layer(layer: QuantLayer, x: IntegerTensor) -> _Accumulated:
    weight, step, bias = layer.integers()
    sums = layer.compute(x.values, weight.float(), None if bias is None else bias.float())
    scale = x.scale * step
    if scale.dim():
        dims = sums.dim() - 2 if sums.dim() > 2 and layer.weight.dim() > 2 else 0
        scale = scale.reshape(-1, *[1] * dims)
    return _Accumulated(sums, scale)


def is_global_average_pool(node: fx.Node, module: nn.Module | None, shape: Sequence[int]) -> bool:
    """Return whether a node averages its input, of this shape, over its height and width."""
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


def _pooled(node: fx.Node, x: IntegerTensor) -> _Accumulated:
    keep = True
    if node.target in (torch.mean, "mean"):
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    sums = x.values.sum((2, 3), keepdim=keep)
    return _Accumulated(sums, x.scale, x.values.shape[2] * x.values.shape[3])


def _real(value: Any) -> Any:
    if isinstance(value, IntegerTensor):
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
    return value.values if isinstance(value, IntegerTensor) else value


def _moved(result: Any, like: IntegerTensor) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(_moved(part, like) for part in result)
    if isinstance(result, Tensor):
        return IntegerTensor(result, like.scale, like.stored_zero)
    return result
