"""A student → the same network spelled in integers, the form that every exporter reads.

This is the reference form of torch's PT2E quantization: weights and biases are integer tensors
behind ``dequantize``, and every activation passes ``quantize`` and ``dequantize``
(``torch.ops.quantized_decomposed``), so that a runtime sees dequantize → operation → quantize and
computes the three as one integer kernel.

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

__all__ = ["Integers", "Lowered", "Style", "in_order", "lower", "stored_grid"]

M = TypeVar("M", bound=nn.Module)

_OPS: Any = torch.ops.quantized_decomposed
INT32 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Style:
    """How a target wants integers spelled.

    Attributes:
        dtype: Type of activations: ``torch.uint8`` or ``torch.int8``. All of them have it, since
            kernels that read two tensors want one type.
        bias: ``int32``, or ``float`` for targets that put biases on the grid s_w·s_x themselves;
            the values lie on it either way.
        clip: Where bounds narrower than the type are applied: to the integers, or to the real
            values that they stand for, between two roundings onto the same grid.
        channel_clip: What applies a bound of each channel: a ``minimum`` of real values between two
            roundings, or two ``sums`` of integers, for runtimes that compute those in integers.
        padding: Uneven padding is an operation before its convolution: part of the ``layer``, or
            ``quantized``, an operation on integers of its own.
    """

    dtype: torch.dtype
    bias: Literal["int32", "float"] = "int32"
    clip: Literal["integer", "float"] = "integer"
    channel_clip: Literal["minimum", "sums"] = "minimum"
    padding: Literal["layer", "quantized"] = "layer"


@dataclass(frozen=True)
class Integers:
    """The grid of one activation as a target stores it.

    Attributes:
        key: Name of the quantizer in the student's network, one of a kind.
        layer: The operation whose result it is.
        scale: Step d, real = (q − zero_point)·d.
        zero_point: The integer that stands for 0.0.
        offset: Stored integer − the student's integer.
        low: Smallest integer that occurs, the fused activation included.
        high: Largest integer that occurs.
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
    """A network in integers.

    Attributes:
        network: Images [N, 3, H, W] → (logits [N, classes], integers of every quantizer, …).
        tensors: What the results after the first are, in order.
        weight_bits: Bits of each weight, by the name of its tensor.
    """

    network: fx.GraphModule
    tensors: tuple[Integers, ...]
    weight_bits: Mapping[str, int]


def stored_grid(key: str, quantizer: ActivationQuantizer, dtype: torch.dtype) -> Integers:
    """The grid of an activation in a type of 8 bits.

    Grids that start at 0 start at the type's smallest integer, and the signed grid lies around its
    zero, so that rounding into the type does one bound, if not both, by itself.

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
            f"{float(zero_point)}: training broke down. Train again from the calibrated student, "
            "with a smaller learning rate (optim.lr)."
        )
    low, high = quantizer.integer_bounds()
    return Integers(
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


def lower(student: Student, example: Tensor, style: Style) -> Lowered:
    """Spell a student in integers.

    Args:
        student: Calibrated, on the CPU; it is not changed.
        example: One batch of the shape that the network is for; sizes are read from it.
        style: What the target wants.

    Raises:
        FatError: If the student is not calibrated, still in training, or a grid is broken; the
            layer is named.
    """
    student.check_calibrated()
    if student.training:
        raise FatError(
            "The student is in training mode, so its thresholds are half trained. Let fat.fit end, "
            "or call student.eval() to take it as it is."
        )
    with torch.no_grad():
        mark_data(student.network, example)
        return _Lowering(student, style).run()


def in_order(module: M) -> M:
    """A copy whose tensors are not channels-last in memory, which exporters take amiss."""
    module = copy.deepcopy(module)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return module


class _Lowering:
    def __init__(self, student: Student, style: Style) -> None:
        self.source = student.network
        self.style = style
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.grids: dict[fx.Node, Integers] = {}  # of nodes of the student's graph
        self.taps: list[tuple[Integers, fx.Node]] = []
        self.weight_bits: dict[str, int] = {}

    def run(self) -> Lowered:
        for node in self.source.graph.nodes:
            module = module_of(self.source, node)
            if node.op == "output":
                logits = self.new[node.args[0]]
                self.graph.output((logits, *(integers for _, integers in self.taps)))
            elif isinstance(module, ActivationQuantizer):
                self._quantizer(node, module)
            elif isinstance(module, QuantLayer):
                self.new[node] = self._layer(node, module)
            else:
                _refuse_images_groups(node)
                if module is not None:
                    self.attributes[str(node.target)] = in_order(module)
                constant = constant_of(self.source, node)
                if constant is not None:
                    self._constant(str(node.target), constant)
                self.new[node] = self.graph.node_copy(node, self.new.__getitem__)
                self._keep_grid(node)
        network = fx.GraphModule(self.attributes, self.graph, "Integers")
        tensors = tuple(grid for grid, _ in self.taps)
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
        self.taps.append((grid, integers))
        self.new[node], self.grids[node] = self._dequantize(integers, grid), grid

    def _keep_grid(self, node: fx.Node) -> None:
        """What only moves values is done on the integers: its result goes onto its input's grid."""
        before = source(node)
        if before not in self.grids or not is_value_preserving(self.source, node):
            return
        grid = self.grids[node] = self.grids[before]
        if node.target is F.pad and padded_with(node) == -math.inf:  # the least that there is
            least = (grid.type_low - grid.zero_point) * grid.scale
            self.new[node].args = (*self.new[node].args[:2], "constant", least)
            self.new[node].kwargs = {}
        if node.meta["data"]:
            self.new[node] = self._dequantize(self._quantize(self.new[node], grid), grid)

    def _quantize(self, x: fx.Node, grid: Integers) -> fx.Node:
        return self._call(_OPS.quantize_per_tensor.default, x, *self._arguments(grid))

    def _dequantize(self, x: fx.Node, grid: Integers) -> fx.Node:
        return self._call(_OPS.dequantize_per_tensor.default, x, *self._arguments(grid))

    def _arguments(self, grid: Integers) -> tuple[Any, ...]:
        return grid.scale, grid.zero_point, grid.type_low, grid.type_high, self.style.dtype

    def _channel_clip(
        self, name: str, integers: fx.Node, quantizer: ActivationQuantizer, grid: Integers
    ) -> fx.Node:
        """min(q, b) for each channel's bound b, of integers on ``grid``.

        As sums it is sat(q + (t − b)) − (t − b), where t, the type's largest, is what saturates.
        """
        bounds = quantizer.channel_bounds()
        assert bounds is not None
        bounds = (bounds + grid.offset).reshape(1, -1, 1, 1)

        def constant(role: str, stored: Tensor, grid: Integers) -> fx.Node:
            held = self._constant(f"{name}.{role}", stored.to(self.style.dtype))
            return self._dequantize(held, grid)

        x = self._dequantize(integers, grid)
        if self.style.channel_clip == "minimum":
            return self._quantize(
                self._call(torch.minimum, x, constant("bound", bounds, grid)), grid
            )
        top = grid.type_high
        up = constant("up", grid.zero_point + (top - bounds), grid)
        down = constant("down", bounds, replace(grid, zero_point=top))  # stands for b − t
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
                f"The steps of the weights of '{name}' are not finite: training broke down. Train "
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


def _refuse_images_groups(node: fx.Node) -> None:
    """Raise a FatError for a convolution with a group of filters for each image."""
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups")
    if node.target is F.conv2d and isinstance(groups, fx.Node):
        raise FatError(
            f"'{layer_name(node)}' is a convolution with filters of its own for each image, as "
            "many groups as images: no file format has it. Choose a network without such layers "
            "(timm's CondConv2d)."
        )


def _padding(layer: QuantConv2d, before: fx.Node | None) -> tuple[int, int, int, int]:
    """Zeros at the top, bottom, left and right of a convolution's input."""
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
    if layer.padding == "same":  # torch allows it at stride 1 only; an odd pixel goes to the end
        (down, across) = (d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True))
        return down // 2, down - down // 2, across // 2, across - across // 2
    down, across = layer.padding
    return down, down, across, across
