"""Inference of a student with the arithmetic of an integer runtime.

Training represents integers by real values on grids. Sums of such values are rounded, so that one
activation in a hundred thousand rounds differently than in a runtime, and one step of difference in
an early layer moves the logits by a third of the quantization noise. Inference therefore uses the
arithmetic of ONNX Runtime on x64:

* convolution, linear: q_y = clip(round(a · M) + z_y), with the accumulator
  a = Σ (q_x − z_x)·q_w + q_b and M = s_x·s_w / s_y in float32;
* addition: round(q_a·(s_a/s_y) + (q_b·(s_b/s_y) + c)), two fused multiply-adds in float32 with
  c = z_y − (s_a/s_y·z_a + s_b/s_y·z_b);
* multiplication: round(a·b · (s_a·s_b/s_y) + z_y);
* global average pooling: round(Σ(q_x − z_x) · (s_x / (s_y·N)) + z_y);
* operations that only move values (reshape, concatenation, …): on integers;
* any other operation: on real values, then round(x / s_y) + z_y.

Rounding is half to even. Integers are stored as floating-point numbers minus their zero point, the
operand of convolutions.

Accumulators are exact on every device. No partial sum, in any order, exceeds the bound
max over filters Σ|q_w| · max|q_x − z_x|, and float32 represents all integers up to 2^24. Below
that bound convolutions on the CPU, and matrix products (linear layers and 1×1 convolutions) on
other devices, are computed in float32 without TF32. Everything else is computed in float64 and
rounded to the nearest integer, since GPU libraries may use algorithms with intermediate results
that are not integers (Winograd, FFT), whose errors float64 keeps far below 1/2. On the CPU, where
convolutions in float64 are slow, dense ones add those of a few groups of input channels that are
below the bound. The int32 bias is added exactly, and the sum is rounded to float32 once, as in
runtimes with int32 accumulators.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.patterns import is_value_preserving, module_of
from fat.graph.tracing.capture import layer_name
from fat.quant import kernels
from fat.quant.batched import QuantizerBatch
from fat.quant.kernels.requantization_reference import accumulate, along
from fat.quant.layers import ChannelClip
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from fat.quant.thresholds import Thresholds
from fat.utils.precision import full_precision

__all__ = [
    "IntegerGrid",
    "IntegerInterpreter",
    "IntegerLayer",
    "IntegerTensor",
    "accumulator_bounds",
    "exact_weights",
    "float_operations",
    "is_fully_quantized",
    "is_global_average_pool",
    "is_matrix_product",
    "requantize",
    "requantize_layer",
    "run_integers",
]

EXACT = 2.0**24
"""float32 represents all integers up to this one."""


@dataclass(frozen=True)
class IntegerGrid:
    """Constants of an activation quantizer.

    Attributes:
        scale: Step size, float32 0-dim.
        zero_point: Integer that represents 0.0, float32 0-dim.
        offset: Difference between integers as runtimes store them in uint8 and the student's: 128
            for signed grids.
        floor: Smallest real value that the fused activation returns; −∞ without one.
        ceiling: Largest real value that the fused activation returns.
        ceilings: Largest real value of each channel, float32 [C], or ``None``.
        qmin: Smallest integer of the grid.
        qmax: Largest integer of the grid.
    """

    scale: Tensor
    zero_point: Tensor
    offset: int
    floor: float
    ceiling: float
    ceilings: Tensor | None
    qmin: int
    qmax: int

    @classmethod
    def of(cls, quantizer: ActivationQuantizer, scale: Tensor, zero_point: Tensor) -> IntegerGrid:
        """Return the constants of a quantizer with the results of its ``thresholds.lanes()``."""
        grid, activation = quantizer.grid, quantizer.activation
        floor, ceiling, ceilings = -torch.inf, torch.inf, None
        if isinstance(activation, ChannelClip):
            floor, ceilings = 0.0, activation.bound
        elif activation is not None:
            floor, ceiling = activation(torch.tensor([floor, ceiling], device="cpu")).tolist()
        offset = 128 if grid.kind == "symmetric" else 0
        return cls(scale[0], zero_point[0], offset, floor, ceiling, ceilings, grid.qmin, grid.qmax)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the operators of :mod:`fat.quant.kernels`."""
        ends = (self.floor, self.ceiling, self.ceilings)
        return (self.scale, self.zero_point, *ends, self.qmin, self.qmax)

    def reach(self) -> Tensor:
        """Return the largest possible |q − z|, float32 0-dim."""
        return torch.maximum(self.qmax - self.zero_point, self.zero_point - self.qmin)


@dataclass(frozen=True)
class IntegerTensor:
    """A quantized tensor.

    Attributes:
        values: Integers minus the zero point, float32.
        grid: Grid of the integers.
    """

    values: Tensor
    grid: IntegerGrid

    @property
    def scale(self) -> Tensor:
        """Step size, float32 0-dim."""
        return self.grid.scale

    def real(self) -> Tensor:
        """Return the real values that the integers represent."""
        return self.values * self.scale


@dataclass(frozen=True)
class _Accumulated:
    """The accumulators of a layer or a sum, (values + bias) · scales / count, not requantized."""

    values: Tensor
    bias: Tensor | None  # int32 [C]
    scale: Tensor  # of the input
    weight_scale: Tensor | None = None  # 0-dim or [C]
    count: int = 1
    dim: int = 1  # of the channels

    def real(self) -> Tensor:
        sums = accumulate(self.values, self.bias, self.dim)
        scale = self.scale
        if self.weight_scale is not None:
            scale = scale * along(self.weight_scale, sums, self.dim)
        # On a GPU division by a Python number would be a product with its rounded reciprocal.
        return sums * (scale / torch.full_like(scale, self.count))


@dataclass(frozen=True)
class _Pair:
    kind: str
    first: IntegerTensor
    second: IntegerTensor


@dataclass(frozen=True)
class IntegerLayer:
    """A layer in integers.

    Attributes:
        layer: The quantized layer.
        weights: Integers of the layer's weight, in the floating-point type that represents all
            accumulators. Several tensors are parts along the input channels, of which float32
            represents the accumulators.
        scale: Steps of the weight, float32 [C] or 0-dim.
        bias: int32 [C] or ``None``.
    """

    layer: QuantLayer
    weights: tuple[Tensor, ...]
    scale: Tensor
    bias: Tensor | None

    def accumulate(self, x: Tensor) -> Tensor:
        """Return the accumulators without bias.

        Args:
            x: Integers minus their zero point, float32.

        Returns:
            Exact float32, or float64 that is exact after rounding to the nearest integer.
        """
        if len(self.weights) > 1:
            sizes = [weight.shape[1] for weight in self.weights]
            total, *others = (
                self.layer.compute(part, weight, None)
                for part, weight in zip(torch.split(x, sizes, 1), self.weights, strict=True)
            )
            total = total.double()
            for sums in others:
                total += sums
            return total
        (weight,) = self.weights
        x = x.to(weight.dtype)
        if x.device.type == "cpu" or not is_matrix_product(self.layer):
            return self.layer.compute(x, weight, None)
        if isinstance(self.layer, QuantLinear):
            return F.linear(x, weight)
        # A convolution might use an algorithm that is not exact on integers.
        assert isinstance(self.layer, QuantConv2d)
        down, across = self.layer.stride
        x, rows = x[:, :, ::down, ::across], weight.flatten(1)
        if x.is_contiguous(memory_format=torch.channels_last):  # each form without a copy
            return F.linear(x.permute(0, 2, 3, 1), rows).permute(0, 3, 1, 2)
        return torch.matmul(rows, x.flatten(2)).reshape(len(x), -1, *x.shape[2:])


def is_matrix_product(layer: QuantLayer) -> bool:
    """Return True for a linear layer and for a 1×1 convolution without groups and padding."""
    if not isinstance(layer, QuantConv2d):
        return isinstance(layer, QuantLinear)
    unpadded = isinstance(layer.padding, str) or not any(layer.padding)
    return layer.weight.shape[2:] == (1, 1) and layer.groups == 1 and unpadded


def accumulator_bounds(
    weights: Sequence[Tensor], qmax: Sequence[int], grids: Sequence[IntegerGrid], *, exact: bool
) -> list[float]:
    """Return bounds of the accumulators of layers without bias, and of all partial sums.

    Args:
        weights: Integers of the layers' weights, float32, output filters first.
        qmax: Largest integer of each weight's grid.
        grids: Grid of each layer's input.
        exact: Compute max over filters Σ|q_w| · max|q_x − z_x| for the weights as they are where
            the bound for any weights is too large for float32. This waits for their device once.
    """
    bounds = [
        float(weight[0].numel() * largest * max(grid.qmax, -grid.qmin))
        for weight, largest, grid in zip(weights, qmax, grids, strict=True)
    ]
    large = [index for index, bound in enumerate(bounds) if bound >= EXACT]
    if exact and large:
        found = [_largest_sum(weights[index]) * grids[index].reach() for index in large]
        for index, bound in zip(large, torch.stack(found).tolist(), strict=True):
            bounds[index] = bound
    return bounds


def _largest_sum(weight: Tensor) -> Tensor:
    """Return the largest Σ|q_w| of all filters, 0-dim; sums below 2^24 are exact."""
    rows = weight.movedim(1, -1).flatten(1)  # in the order of memory of channels-last tensors
    exact = 127 * rows.shape[1] < EXACT
    sums = torch.linalg.vector_norm(rows, 1, 1, dtype=torch.float32 if exact else torch.float64)
    return cast(Tensor, sums).amax().double()


def exact_weights(
    layer: QuantLayer, weight: Tensor, grid: IntegerGrid, bound: float
) -> tuple[Tensor, ...]:
    """Return integers of a weight in the form in which a layer's accumulators are exact.

    Args:
        layer: The layer.
        weight: Integers of its weight, float32.
        grid: Grid of the layer's input.
        bound: Bound of the accumulators, see :func:`accumulator_bounds`.

    Returns:
        See :attr:`IntegerLayer.weights`.
    """
    on_cpu = weight.device.type == "cpu"
    if bound < EXACT and (on_cpu or is_matrix_product(layer)):  # not for NaN
        return (weight,)
    if on_cpu and isinstance(layer, QuantConv2d) and layer.groups == 1 and math.isfinite(bound):
        channels, reach = weight.shape[1], grid.reach()
        for count in range(math.floor(bound / EXACT) + 1, channels + 1):
            split = torch.split(weight, -(-channels // count), 1)
            parts = tuple(part.contiguous(memory_format=torch.channels_last) for part in split)
            if all(bool(_largest_sum(part) * reach < EXACT) for part in parts):
                return parts
    return (weight.double(),)


def _integer_layers(
    layers: Sequence[QuantLayer],
    thresholds: Mapping[Thresholds, tuple[Tensor, Tensor]],
    grids: Mapping[ActivationQuantizer, IntegerGrid],
    *,
    exact: bool,
) -> dict[QuantLayer, IntegerLayer]:
    """Return the integers of layers, each in the type that represents its accumulators."""
    inputs = [grids[layer.input_quantizer] for layer in layers]
    found = [
        layer.integer_parameters(thresholds[layer.weight_quantizer.thresholds][0], grid.scale)
        for layer, grid in zip(layers, inputs, strict=True)
    ]
    qmax = [layer.weight_quantizer.grid.qmax for layer in layers]
    bounds = accumulator_bounds([weight for weight, _, _ in found], qmax, inputs, exact=exact)
    return {
        layer: IntegerLayer(layer, exact_weights(layer, weight, grid, bound), scale, bias)
        for layer, grid, bound, (weight, scale, bias) in zip(
            layers, inputs, bounds, found, strict=True
        )
    }


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
    return QuantizerBatch(quantizers, layers).all_enabled()


def run_integers(network: fx.GraphModule, images: Tensor) -> Tensor:
    """Compute logits [N, classes] with integer arithmetic.

    Args:
        network: A student's graph, calibrated and with all quantizers enabled.
        images: Normalized images [N, 3, H, W].
    """
    return IntegerInterpreter(network).run(images)


class IntegerInterpreter(fx.Interpreter):
    """Runs a student's graph with integer arithmetic.

    The integers of weights, biases and grids are computed once, when the interpreter is made.

    Args:
        network: A student's graph, calibrated and with all quantizers enabled.
        quantizers: All quantizers of the network; ``None`` collects them.
        exact_bounds: Bound the accumulators by the weights as they are, which waits once for the
            network's device, and computes more layers in float32. By default on the CPU, where
            waiting costs nothing; the results are the same.

    Attributes:
        grids: Constants of the activation quantizers.
        layers: Layers in integers.
    """

    @torch.no_grad()
    def __init__(
        self,
        network: fx.GraphModule,
        quantizers: QuantizerBatch | None = None,
        *,
        exact_bounds: bool | None = None,
    ) -> None:
        super().__init__(network)
        # Looking up a module by its name takes as long as launching a kernel.
        self._modules = {node: module_of(network, node) for node in network.graph.nodes}
        self._preserving: dict[fx.Node, bool] = {}
        modules = self._modules.values()
        activations = [module for module in modules if isinstance(module, ActivationQuantizer)]
        layers = [module for module in modules if isinstance(module, QuantLayer)]
        quantizers = quantizers or QuantizerBatch(activations, layers)
        thresholds = quantizers.values()
        self.grids = {x: IntegerGrid.of(x, *thresholds[x.thresholds]) for x in activations}
        if exact_bounds is None:
            exact_bounds = all(layer.weight.device.type == "cpu" for layer in layers)
        self.layers = _integer_layers(layers, thresholds, self.grids, exact=exact_bounds)

    def run(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Compute logits [N, classes] of normalized images [N, 3, H, W]."""
        # Without oneDNN, such as on Apple silicon, NNPACK computes convolutions of large batches on
        # the CPU by Winograd's algorithm and FFT, which are not exact on integers.
        exact = torch.backends.nnpack.flags(enabled=False)
        with torch.no_grad(), full_precision(images.device), exact:
            logits: Tensor = super().run(images)
        return logits

    def run_node(self, n: fx.Node) -> Any:
        """Compute the value of one node."""
        if n.op == "output":
            return fx.map_arg(n.args[0], lambda node: _real(self.env[node]))
        if n.op == "placeholder" or n.op == "get_attr":
            return super().run_node(n)
        given = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in n.args]
        module = self._modules[n]
        if isinstance(module, ActivationQuantizer):
            return self.quantize(n, module, given[0])
        first = given[0] if given else None
        if n.target is operator.getitem and isinstance(first, (tuple, list)):
            return first[n.args[1]]  # type: ignore[index]
        if isinstance(first, IntegerTensor):
            if isinstance(module, QuantLayer):
                return _layer(self.layers[module], first)
            if self._preserves_values(n):
                return _moved(self._call(n, lambda value: _values(value)), first)
            if is_global_average_pool(n, module, first.values.shape):
                return _pooled(n, first)
            second = given[1] if len(given) > 1 else None
            if isinstance(second, IntegerTensor) and n.target in (operator.add, operator.mul):
                return _Pair("add" if n.target is operator.add else "mul", first, second)
        return self._call(n, _real)

    def quantize(self, node: fx.Node, quantizer: ActivationQuantizer, x: Any) -> IntegerTensor:
        """Return the integers of one activation."""
        return requantize(x, self.grids[quantizer])

    def _preserves_values(self, node: fx.Node) -> bool:
        if node not in self._preserving:
            network = cast(fx.GraphModule, self.module)
            self._preserving[node] = is_value_preserving(network, node)
        return self._preserving[node]

    def _call(self, node: fx.Node, unpack: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: unpack(self.env[arg]))
        return getattr(self, node.op)(node.target, args, kwargs)


def requantize(x: Any, grid: IntegerGrid) -> IntegerTensor:
    """Quantize a real tensor, or the accumulators of a layer, a sum or a product."""
    if isinstance(x, _Accumulated):
        values = kernels.requantize(
            x.values, x.bias, x.scale, x.weight_scale, x.count, x.dim, *grid.arguments
        )
    elif isinstance(x, _Pair):
        a, b = x.first, x.second
        if x.kind == "add":
            values = kernels.requantize_sum(
                a.values,
                a.scale,
                a.grid.zero_point,
                a.grid.offset,
                b.values,
                b.scale,
                b.grid.zero_point,
                b.grid.offset,
                grid.offset,
                *grid.arguments,
            )
        else:
            values = kernels.requantize_product(
                a.values, a.scale, b.values, b.scale, grid.offset, *grid.arguments
            )
    else:
        values = kernels.requantize_real(x, *grid.arguments)
    return IntegerTensor(values, grid)


def requantize_layer(
    layer: IntegerLayer, sums: Tensor, inputs: IntegerGrid, outputs: IntegerGrid
) -> Tensor:
    """Return the integers of a layer's output, minus their zero point.

    Args:
        layer: The layer.
        sums: Result of :meth:`IntegerLayer.accumulate`.
        inputs: Grid of the layer's input.
        outputs: Grid of its output.
    """
    return requantize(_accumulated(layer, sums, inputs), outputs).values


def _layer(layer: IntegerLayer, x: IntegerTensor) -> _Accumulated:
    return _accumulated(layer, layer.accumulate(x.values), x.grid)


def _accumulated(layer: IntegerLayer, sums: Tensor, inputs: IntegerGrid) -> _Accumulated:
    dim = 1 if isinstance(layer.layer, QuantConv2d) else -1
    return _Accumulated(sums, layer.bias, inputs.scale, layer.scale, dim=dim)


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
    count = x.values.shape[2] * x.values.shape[3]
    exact = count * max(x.grid.qmax, -x.grid.qmin) < EXACT
    sums = x.values.sum((2, 3), keepdim=keep, dtype=torch.float32 if exact else torch.float64)
    return _Accumulated(sums, None, x.scale, count=count)


def _real(value: Any) -> Any:
    if isinstance(value, (IntegerTensor, _Accumulated)):
        return value.real()
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
        return IntegerTensor(result, like.grid)
    return result
