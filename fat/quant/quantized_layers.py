"""Convolution and linear layers with quantized weights and biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat.quant import kernels
from fat.quant.config import Grid, QuantSpec
from fat.quant.functional import (
    INT32_MAX,
    Adjust,
    adjust_weight,
    fake_quantize_bias,
    fake_quantize_weight,
)
from fat.quant.layers import pad_same
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["QuantConv2d", "QuantLayer", "QuantLinear"]


class QuantLayer(nn.Module):
    """Base class of quantized convolution and linear layers.

    Frozen tensors are buffers: the parameters of a quantized network are exactly what is trained.

    Args:
        layer: Name of the layer in the network.
        weight: float32, output filters first.
        bias: float32 [C] or ``None``.
        spec: Quantization options.
        grid: Integer grid of the weight.
    """

    weight: Tensor
    bias: Tensor | None
    _computed: Tensor | None = None
    """Quantized bias that :class:`fat.quant.batched.QuantizerBatch` computed."""

    def __init__(
        self, layer: str, weight: Tensor, bias: Tensor | None, spec: QuantSpec, grid: Grid
    ) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("weight", weight.detach().clone())
        own_bias = None if bias is None else bias.detach().clone()
        if own_bias is not None and spec.bias == "trained":
            self.bias = nn.Parameter(own_bias)
        else:
            self.register_buffer("bias", own_bias)
        self.weight_quantizer = WeightQuantizer(spec, grid, weight.shape)
        self._smallest_factor = spec.alpha_range[0]
        self.adjust = {"scale": Adjust.MULTIPLY, "adaround": Adjust.MOVE}.get(
            spec.weights, Adjust.NOTHING
        )
        self._bounds = spec.weight_scale_range if spec.weights == "scale" else spec.adaround_range
        self.factor: nn.Parameter | None = None
        if self.adjust is not Adjust.NOTHING:
            self.factor = nn.Parameter(torch.full_like(self.weight, self._neutral))
        self._computed = None
        # In a list, so that it is no submodule: the quantizer belongs to the preceding operation.
        self._input: list[ActivationQuantizer] = []

    @property
    def factor_range(self) -> tuple[float, float]:
        """Range of the trained factor of each weight."""
        return self._bounds

    @property
    def linked(self) -> bool:
        """True if the quantizer of the layer's input is set."""
        return bool(self._input)

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """Quantizer of the layer's input."""
        return self._input[0]

    def set_input_quantizer(self, quantizer: ActivationQuantizer) -> None:
        """Set the quantizer of the layer's input."""
        self._input = [quantizer]

    def calibrate(self) -> int:
        """Set the weight's thresholds; return the number raised so that the bias fits int32.

        A filter of almost vanished weights has so small a step that its bias, on the grid s_w·s_x,
        would exceed 31 bits and saturate. Its threshold is raised until the bias fits, with room
        for the range of the trained factors; weights that small have no effect anyway.
        """
        self.weight_quantizer.calibrate(self.weight)
        if self.factor is not None:
            with torch.no_grad():
                self.factor.fill_(self._neutral)
        if self.bias is None:
            return 0
        input_scale = self.input_quantizer.thresholds()[0]
        room = INT32_MAX / 2 * self._smallest_factor**2  # leaves one bit for training
        smallest_step = self.bias.detach().abs() / (room * input_scale)
        return self.weight_quantizer.widen(smallest_step * self.weight_quantizer.grid.qmax)

    @property
    def _neutral(self) -> float:
        """Factor that leaves the weight unchanged."""
        return 1.0 if self.adjust is Adjust.MULTIPLY else 0.0

    def adjusted_weight(self) -> Tensor:
        """Return the weight with its trained factors, before rounding."""
        scale = self.weight_quantizer.scale()
        return adjust_weight(self.weight, scale, self.factor, self.adjust, self._bounds)

    @torch.no_grad()
    def project(self) -> None:
        """Clip the trained factors of thresholds and weights to their ranges."""
        self.weight_quantizer.thresholds.project()
        if self.factor is not None:
            self.factor.clamp_(*self.factor_range)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer's operation with the given weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with fake-quantized weight and bias."""
        return self.compute(x, *self.quantized())

    def quantized(self) -> tuple[Tensor, Tensor | None]:
        """Return the fake-quantized weight, and the bias on the int32 grid s_w·s_x."""
        if not self.weight_quantizer.enabled:
            return self.adjusted_weight(), self.bias
        lanes, per_channel = self._lanes()
        weight = self._round_weight(lanes, per_channel)
        if self.bias is None or not self.input_quantizer.enabled:
            return weight, self.bias
        if self._computed is not None:
            return weight, self._computed
        with torch.no_grad():
            scale = lanes if per_channel else lanes[0]
            # In float64, because the product of two tiny steps underflows to 0 in float32.
            step = scale.double() * self.input_quantizer.thresholds()[0].double()
        return weight, fake_quantize_bias(self.bias, step)

    def _lanes(self) -> tuple[Tensor, bool]:
        """Return the step of the weight as the kernels take it, and whether it is per filter."""
        thresholds = self.weight_quantizer.thresholds
        return thresholds.lanes()[0], thresholds.high.dim() > 0

    def _round_weight(
        self, lanes: Tensor, per_channel: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        return fake_quantize_weight(
            self.weight,
            lanes,
            self.weight_quantizer.grid.qmax,
            self.factor,
            self.adjust,
            self.factor_range,
            per_channel=per_channel,
            dtype=dtype,
        )

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the layer in integers.

        Returns:
            int8 weight, its step ([C] or 0-dim), int32 bias [C] on the grid s_w·s_x or ``None``.
        """
        input_scale = self.input_quantizer.thresholds()[0]
        weight, scale, bias = self.integer_parameters(self._lanes()[0], input_scale)
        return weight.to(torch.int8), scale, bias

    @torch.no_grad()
    def integer_parameters(
        self, lanes: Tensor, input_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the layer in integers as :meth:`integers` does, with the weight in float32.

        Args:
            lanes: Step of the weight, the first result of
                :meth:`fat.quant.thresholds.Thresholds.lanes`.
            input_scale: Step s_x of the input, 0-dim.
        """
        per_channel = self.weight_quantizer.thresholds.high.dim() > 0
        weight = kernels.integer_weight(
            self.weight,
            self.weight if self.factor is None else self.factor,
            lanes,
            self.weight_quantizer.grid.qmax,
            self.adjust,
            *self.factor_range,
            per_channel,
            torch.float32,
        )
        scale = lanes if per_channel else lanes[0]
        if self.bias is None:
            return weight, scale, None
        return weight, scale, kernels.integer_bias(self.bias, scale, input_scale)

    def extra_repr(self) -> str:
        """Return layer and shape."""
        return f"{self.layer}, weight={list(self.weight.shape)}, bias={self.bias is not None}"


class QuantLinear(QuantLayer):
    """Quantized linear layer: y = x·W^T + b."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the given weight and bias to [..., in_features]."""
        return F.linear(x, weight, bias)


class QuantConv2d(QuantLayer):
    """Quantized two-dimensional convolution.

    Args:
        layer: See :class:`QuantLayer`.
        weight: See :class:`QuantLayer`.
        bias: See :class:`QuantLayer`.
        spec: See :class:`QuantLayer`.
        grid: See :class:`QuantLayer`.
        stride: As in torch.
        padding: As in torch, or ``"dynamic_same"``, see :func:`fat.quant.layers.pad_same`.
        dilation: As in torch.
        groups: As in torch.
    """

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        grid: Grid,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(layer, weight, bias, spec, grid)
        self.stride = (stride[0], stride[1])
        self.dilation = (dilation[0], dilation[1])
        self.groups = groups
        self.padding: Any = padding if isinstance(padding, str) else tuple(padding)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve [N, C, H, W] with the given weight and bias in the layer's geometry."""
        padding = self.padding
        if padding == "dynamic_same":
            kernel = (self.weight.shape[2], self.weight.shape[3])
            x, padding = pad_same(x, kernel, self.stride, self.dilation), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
