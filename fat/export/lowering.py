"""Lower a student to a graph of integer tensors, the common input of all exporters.

The graph has the reference form of torch's PT2E quantization: weights and biases are integer
tensors followed by ``dequantize``, and every activation passes ``quantize`` and ``dequantize``
(``torch.ops.quantized_decomposed``), so that runtimes can fuse dequantize → operation → quantize
into one integer kernel.

A student fuses a clipping activation into the grid of its result; here it becomes bounds on the
integers. Rounding is monotonic, so clip(x, a, b) on the grid is clip(q, q(a), q(b)).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (defines quantized_decomposed)
from torch.nn import functional as F

from fat.graph.patterns import constant_of, is_value_preserving, module_of, padded_with, source
from fat.graph.tracing.capture import layer_name, mark_data
from fat.models.student import Student
from fat.quant.layers import ChannelClip, pad_same_sides
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.errors import FatError

__all__ = ["Lowered", "LoweringStyle", "StoredGrid", "contiguous_copy", "lower", "stored_grid"]

M = TypeVar("M", bound=nn.Module)

_OPS: Any = torch.ops.quantized_decomposed
INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class LoweringStyle:
    """Form of the integer graph that a target expects.

    Attributes:
        dtype: Type of all activations, ``torch.uint8`` or ``torch.int8``: kernels with two inputs
            require the same type.
        bias: ``int32``, or ``float`` for converters that quantize biases to the grid s_w·s_x
            themselves; the values lie on that grid either way.
        clip: Whether bounds narrower than the type are applied to the integers, or to the
            dequantized values between two roundings onto the same grid.
        channel_clip: Operation that applies per-channel bounds: ``minimum`` of dequantized values
            between two roundings, or two ``sums``, for runtimes with integer kernels for those.
        padding: Asymmetric padding is a separate operation before the convolution; ``quantized``
            also quantizes its result, ``layer`` does not.
    """

    dtype: torch.dtype
    bias: Literal["int32", "float"] = "int32"
    clip: Literal["integer", "float"] = "integer"
    channel_clip: Literal["minimum", "sums"] = "minimum"
    padding: Literal["layer", "quantized"] = "layer"


@dataclass(frozen=True)
class StoredGrid:
    """Quantization grid of one activation as stored in a file.

    Attributes:
        key: Unique name of the quantizer in the student's network.
        layer: Name of the operation that produces the activation.
        scale: Step d, real = (q − zero_point)·d.
        zero_point: Integer that represents 0.0.
        offset: Stored integer − the student's integer.
        low: Smallest possible integer, given the fused activation.
        high: Largest possible integer.
        type_low: Smallest integer of the type.
        type_high: Largest integer of the type.
    """

    key: str
    layer: str
    scale: float
    zero_point: int
    offset: int
    low: int
    high: int
    type_low: int
    type_high: int


@dataclass(frozen=True)
class Lowered:
    """A student as a graph of integer tensors.

    Attributes:
        network: Images [N, 3, H, W] → (logits [N, classes], integers of every quantizer, …).
        tensors: Grids of the results after the first.
        weight_bits: Bits of each weight, by the name of its tensor.
    """

    network: fx.GraphModule
    tensors: tuple[StoredGrid, ...]
    weight_bits: Mapping[str, int]


def stored_grid(key: str, quantizer: ActivationQuantizer, dtype: torch.dtype) -> StoredGrid:
    """Return the grid of an activation in an 8-bit type.

    Grids that start at 0 are shifted to the smallest integer of the type, and symmetric grids are
    centered in it, so that saturation of the type applies at least one of the bounds.

    Raises:
        FatError: If the step or the zero point is not finite, or the quantizer is switched off.
    """
    info, grid = torch.iinfo(dtype), quantizer.grid
    middle = (info.min + info.max + 1) // 2
    offset = middle if grid.kind == "symmetric" else info.min
    with torch.no_grad():
        scale, zero_point = quantizer.thresholds()
    if not quantizer.enabled:
        raise FatError(f"The quantizer of '{quantizer.layer}' is switched off.")
    if not (torch.isfinite(scale) and torch.isfinite(zero_point) and scale > 0.0):
        raise FatError(
            f"The grid of '{quantizer.layer}' has step {float(scale)} and zero point "
            f"{float(zero_point)}: training diverged. Train again from the calibrated student, "
            "with a smaller learning rate (optim.lr)."
        )
    low, high = quantizer.integer_bounds()
    return StoredGrid(
        key,
        quantizer.layer,
        float(scale),
        int(zero_point) + offset,
        offset,
        low + offset,
        high + offset,
        info.min,
        info.max,
    )


def lower(student: Student, example: Tensor, style: LoweringStyle) -> Lowered:
    """Lower a student to a graph of integer tensors.

    Args:
        student: Calibrated student on the CPU; it is not modified.
        example: One batch of images of the final size.
        style: Form of the graph that the target expects.

    Raises:
        FatError: If the student is not calibrated or in training mode, or a grid is not finite; the
            layer is named.
    """
    student.check_calibrated()
    if student.training:
        raise FatError(
            "The student is in training mode, so its thresholds are half trained. Let fat.fit "
            "finish, or call student.eval() to export it as it is."
        )
    with torch.no_grad():
        mark_data(student.network, example)
        return _Lowering(student, style).run()


def contiguous_copy(module: M) -> M:
    """Return a copy whose tensors are contiguous: exporters do not support channels-last."""
    module = copy.deepcopy(module)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return module


class _Lowering:
    def __init__(self, student: Student, style: LoweringStyle) -> None:
        self.source = student.network
        self.style = style
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.grids: dict[fx.Node, StoredGrid] = {}  # of nodes of the student's graph
        self.results: list[tuple[StoredGrid, fx.Node]] = []
        self.weight_bits: dict[str, int] = {}

    def run(self) -> Lowered:
        for node in self.source.graph.nodes:
            module = module_of(self.source, node)
            if node.op == "output":
                logits = self.new[node.args[0]]
                self.graph.output((logits, *(integers for _, integers in self.results)))
            elif isinstance(module, ActivationQuantizer):
                self._quantizer(node, module)
            elif isinstance(module, QuantLayer):
                self.new[node] = self._layer(node, module)
            else:
                _reject_dynamic_groups(node)
                if module is not None:
                    self.attributes[str(node.target)] = contiguous_copy(module)
                constant = constant_of(self.source, node)
                if constant is not None:
                    self._constant(str(node.target), constant)
                self.new[node] = self.graph.node_copy(node, self.new.__getitem__)
                self._keep_grid(node)
        network = fx.GraphModule(self.attributes, self.graph, "Integers")
        tensors = tuple(grid for grid, _ in self.results)
        return Lowered(network.eval(), tensors, self.weight_bits)

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        self.attributes[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return self.graph.get_attr(name)

    def _quantizer(self, node: fx.Node, quantizer: ActivationQuantizer) -> None:
        grid = stored_grid(str(node.target), quantizer, self.style.dtype)
        x = self.new[node.args[0]]  # type: ignore[index]
        integers = self._quantize(x, grid)
        if isinstance(quantizer.activation, ChannelClip):
            integers = self._channel_clip(str(node.target), integers, quantizer, grid)
        elif (grid.low, grid.high) != (grid.type_low, grid.type_high):
            if self.style.clip == "integer":
                integers = self._call(torch.clamp, integers, grid.low, grid.high)
            else:
                low, high = ((q - grid.zero_point) * grid.scale for q in (grid.low, grid.high))
                x = self._call(torch.clamp, self._dequantize(integers, grid), low, high)
                integers = self._quantize(x, grid)
        self.results.append((grid, integers))
        self.new[node], self.grids[node] = self._dequantize(integers, grid), grid

    def _keep_grid(self, node: fx.Node) -> None:
        """Quantize the result of an operation that only moves values to the grid of its input."""
        before = source(node)
        if before not in self.grids or not is_value_preserving(self.source, node):
            return
        grid = self.grids[node] = self.grids[before]
        if node.target is F.pad and padded_with(node) == -math.inf:
            lowest = (grid.type_low - grid.zero_point) * grid.scale
            self.new[node].args = (*self.new[node].args[:2], "constant", lowest)
            self.new[node].kwargs = {}
        if node.meta["data"]:
            self.new[node] = self._dequantize(self._quantize(self.new[node], grid), grid)

    def _quantize(self, x: fx.Node, grid: StoredGrid) -> fx.Node:
        return self._call(_OPS.quantize_per_tensor.default, x, *self._arguments(grid))

    def _dequantize(self, x: fx.Node, grid: StoredGrid) -> fx.Node:
        return self._call(_OPS.dequantize_per_tensor.default, x, *self._arguments(grid))

    def _arguments(self, grid: StoredGrid) -> tuple[Any, ...]:
        return grid.scale, grid.zero_point, grid.type_low, grid.type_high, self.style.dtype

    def _channel_clip(
        self, name: str, integers: fx.Node, quantizer: ActivationQuantizer, grid: StoredGrid
    ) -> fx.Node:
        """Compute min(q, b) for the bound b of each channel.

        As sums: sat(q + (t − b)) − (t − b), saturating at t, the largest integer of the type.
        """
        bounds = quantizer.channel_bounds()
        assert bounds is not None
        bounds = (bounds + grid.offset).reshape(1, -1, 1, 1)

        def constant(role: str, stored: Tensor, grid: StoredGrid) -> fx.Node:
            held = self._constant(f"{name}.{role}", stored.to(self.style.dtype))
            return self._dequantize(held, grid)

        x = self._dequantize(integers, grid)
        if self.style.channel_clip == "minimum":
            return self._quantize(
                self._call(torch.minimum, x, constant("bound", bounds, grid)), grid
            )
        top = grid.type_high
        up = constant("up", grid.zero_point + (top - bounds), grid)
        down = constant("down", bounds, replace(grid, zero_point=top))  # represents b − t
        raised = self._quantize(self._call(torch.add, x, up), grid)
        return self._quantize(self._call(torch.add, self._dequantize(raised, grid), down), grid)

    def _layer(self, node: fx.Node, layer: QuantLayer) -> fx.Node:
        name, x = str(node.target), self.new[node.args[0]]  # type: ignore[index]
        weight, bias = self._parameters(name, layer)
        if isinstance(layer, QuantLinear):
            return self._call(F.linear, x, weight, bias)
        assert isinstance(layer, QuantConv2d)
        top, bottom, left, right = _padding(layer, source(node))
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = self._call(F.pad, x, [left, right, top, bottom]), (0, 0)
            if self.style.padding == "quantized":
                grid = self.grids[node.args[0]]  # type: ignore[index]
                x = self._dequantize(self._quantize(x, grid), grid)
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        return self._call(F.conv2d, x, weight, bias, *geometry)

    def _parameters(self, name: str, layer: QuantLayer) -> tuple[fx.Node, fx.Node | None]:
        weight, scale, bias = layer.integers()
        if not torch.isfinite(scale).all():
            raise FatError(
                f"The steps of the weights of '{name}' are not finite: training diverged. Train "
                "again from the calibrated student, with a smaller learning rate (optim.lr)."
            )
        limit = layer.weight_quantizer.grid.qmax
        self.weight_bits[f"{name}.weight"] = layer.weight_quantizer.grid.bits
        stored = self._parameter(f"{name}.weight", weight, scale, (-limit, limit))
        if bias is None:
            return stored, None
        step = scale * layer.input_quantizer.thresholds()[0]
        if self.style.bias == "float":
            return stored, self._constant(f"{name}.bias", bias * step)
        return stored, self._parameter(f"{name}.bias", bias, step, INT32)

    def _parameter(
        self, name: str, integers: Tensor, scale: Tensor, bounds: tuple[int, int]
    ) -> fx.Node:
        stored = self._constant(name, integers)
        if not scale.dim():
            return self._call(
                _OPS.dequantize_per_tensor.default, stored, float(scale), 0, *bounds, integers.dtype
            )
        scales = self._constant(f"{name}_scale", scale)
        zeros = self._constant(f"{name}_zero_point", torch.zeros_like(scale, dtype=torch.int64))
        return self._call(
            _OPS.dequantize_per_channel.default, stored, scales, zeros, 0, *bounds, integers.dtype
        )


def _reject_dynamic_groups(node: fx.Node) -> None:
    """Raise a FatError for a convolution that has one group of filters per image."""
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups")
    if node.target is F.conv2d and isinstance(groups, fx.Node):
        raise FatError(
            f"'{layer_name(node)}' is a convolution with separate filters for each image (one "
            "group per image), which no file format supports. Choose a network without such layers "
            "(timm's CondConv2d)."
        )


def _padding(layer: QuantConv2d, before: fx.Node | None) -> tuple[int, int, int, int]:
    """Return the padding at the top, bottom, left and right of a convolution's input."""
    kernel = (layer.weight.shape[2], layer.weight.shape[3])
    if layer.padding == "dynamic_same":
        assert before is not None
        height, width = before.meta["shape"][2:]
        left, right, top, bottom = pad_same_sides(
            (height, width), kernel, layer.stride, layer.dilation
        )
        return top, bottom, left, right
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":  # allowed at stride 1 only; an odd pixel goes to the end
        (down, across) = (d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True))
        return down // 2, down - down // 2, across // 2, across - across // 2
    down, across = layer.padding
    return down, down, across, across
