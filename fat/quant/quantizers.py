"""Quantizers for activations and weights, and the layers that compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fat import distributed
from fat.errors import FatError
from fat.layers import ChannelClip, pad_same
from fat.quant.functional import (
    INT32_MAX,
    Adjust,
    adjust_weight,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_weight,
    quantize,
    quantize_bias,
)
from fat.quant.init import HISTOGRAM_STRATEGIES, initial_thresholds
from fat.quant.observers import (
    HistogramStatistics,
    RangeStatistics,
    SampleStatistics,
    Statistics,
)
from fat.quant.thresholds import Thresholds
from fat.spec import Grid, InitSpec, QuantSpec

__all__ = ["ActivationQuantizer", "QuantConv2d", "QuantLayer", "QuantLinear", "WeightQuantizer"]


class ActivationQuantizer(nn.Module):
    """Puts an activation, one threshold for the whole tensor, on its grid.

    It also does the clipping activation (ReLU, ReLU6) that runtimes fuse: an unsigned grid whose
    upper threshold does not pass the clip's bound clips by itself, so that nothing is computed and
    nothing kept for the clip; elsewhere it is applied before rounding. So is a clip per channel:
    the grid knows the largest bound alone.

    Args:
        layer: Name of the operation whose output this is, for messages and tables.
        spec: What is asked of the network.
        grid: The integers of this tensor.
        activation: The fused activation, a ReLU, Hardtanh (ReLU6 is one) or
            :class:`fat.layers.ChannelClip`, or ``None``.

    Attributes:
        enabled: When false the tensor passes the activation only.
        may_overwrite: Whether nothing but this needs its input, not even for a backward pass.
    """

    def __init__(
        self, layer: str, spec: QuantSpec, grid: Grid, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.grid = grid
        self.init: InitSpec = spec.activation_init
        self.thresholds = Thresholds(spec, grid, None)
        self.activation = activation
        unsigned = activation is not None and grid.kind == "unsigned"
        self._grid_clips = unsigned and not isinstance(activation, ChannelClip)
        if unsigned and isinstance(activation, nn.Hardtanh):
            self.thresholds.limit = float(activation.max_val)
            self._grid_clips = not spec.power_of_two  # the next power of two may pass the bound
        elif unsigned and isinstance(activation, ChannelClip):
            self.thresholds.limit = max(activation.bounds)
        self.enabled = True
        self.may_overwrite = False
        self._statistics: RangeStatistics | None = None
        self._elements = 1  # of one image

    def start_observing(self) -> None:
        """Pass tensors unchanged from now on and gather their statistics."""
        wants_histogram = self.init.name in HISTOGRAM_STRATEGIES
        self._statistics = HistogramStatistics() if wants_histogram else RangeStatistics()

    def stop_observing(self, *, keep: bool) -> None:
        """Turn what was seen into thresholds (``keep``), or forget it.

        Raises:
            FatError: If nothing was seen, or what was seen is not finite.
        """
        statistics, self._statistics = self._statistics, None
        if not keep or statistics is None:
            return
        statistics.merge()
        self._elements = int(distributed.all_max(torch.tensor(self._elements)))
        if not statistics.seen:
            raise FatError(f"No image reached '{self.layer}' during calibration: the set is empty.")
        low, high = statistics.minimum(), statistics.maximum()
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise FatError(
                f"The output of '{self.layer}' ranges from {low.item()} to {high.item()} on the "
                "calibration images: check the weights and the images' normalisation."
            )
        # start_observing chose a kind of statistics that answers all that the strategy asks.
        full = cast(Statistics, statistics)
        initial = initial_thresholds(full, self.grid, self.init)
        self.thresholds.calibrated(*initial, elements=self._elements)

    def exact(self, x: Tensor) -> Tensor:
        """What the float network has here: the fused activation of ``x``, or ``x``."""
        return x if self.activation is None else cast(Tensor, self.activation(x))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize the activation of ``x``, or observe it while calibrating."""
        if self._statistics is not None:
            x = self.exact(x)
            self._statistics.update(x)
            self._elements = x[0].numel()
            return x
        if not self.enabled:
            return self.exact(x)
        if not self._grid_clips:
            x = self.exact(x)
        scale, zero_point = self.thresholds()
        inplace = self.may_overwrite and (self._grid_clips or self.activation is None)
        return fake_quantize(x, scale, zero_point, self.grid.qmin, self.grid.qmax, inplace=inplace)

    @property
    def observing(self) -> bool:
        """Whether tensors pass unchanged, for their statistics."""
        return self._statistics is not None

    @torch.no_grad()
    def integer_bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer that the grid and the fused activation leave.

        Rounding is monotonic, so an activation clip(x, a, b) is clip(q, q(a), q(b)) on integers.
        """
        ends = torch.tensor([-torch.inf, torch.inf], device=self.thresholds.high.device)
        if isinstance(self.activation, ChannelClip):  # channel_bounds come on top
            ends = ends.clamp(min=0.0)
        elif self.activation is not None:
            ends = self.activation(ends)
        scale, zero_point = self.thresholds()
        q = quantize(ends, scale, zero_point, self.grid.qmin, self.grid.qmax)
        return int(q[0]), int(q[1])

    @torch.no_grad()
    def channel_bounds(self) -> Tensor | None:
        """The largest integer of each channel, int32 [C], where a clip per channel is fused."""
        if not isinstance(self.activation, ChannelClip):
            return None
        scale, zero_point = self.thresholds()
        bound = self.activation.bound
        return quantize(bound, scale, zero_point, self.grid.qmin, self.grid.qmax)

    def project(self) -> None:
        """Bring the thresholds' factors back into their ranges."""
        self.thresholds.project()

    def extra_repr(self) -> str:
        """Layer, bits and kind of grid."""
        return f"{self.layer}, bits={self.grid.bits}, grid={self.grid.kind}"


class WeightQuantizer(nn.Module):
    """The symmetric signed grid of a weight, and the thresholds that put it there.

    Args:
        spec: What is asked of the network; ``vector`` has one threshold per output filter.
        grid: The integers of this weight.
        shape: Shape of the weight, output filters first.
    """

    def __init__(self, spec: QuantSpec, grid: Grid, shape: Sequence[int]) -> None:
        super().__init__()
        self.grid = grid
        self.init: InitSpec = spec.weight_init
        rows = shape[0] if spec.granularity == "vector" else None
        self.thresholds = Thresholds(spec, grid, rows)
        self._broadcast = (-1, *[1] * (len(shape) - 1)) if rows else ()
        self.enabled = True

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """Set the thresholds from the weight itself."""
        rows = weight.flatten(1) if self._broadcast else weight.reshape(1, -1)
        initial = initial_thresholds(SampleStatistics(rows), self.grid, self.init)
        self.thresholds.calibrated(*initial, elements=rows.shape[1])

    @torch.no_grad()
    def widen(self, minimum: Tensor) -> int:
        """Raise thresholds that are below ``minimum``; return how many were."""
        high = self.thresholds.high
        minimum = minimum.to(high) if self._broadcast else minimum.max().to(high)
        raised = torch.maximum(high, minimum)
        changed = int((raised > high).sum())
        if changed:
            self.thresholds.calibrated(-raised, raised)
        return changed

    def scale(self) -> Tensor:
        """Step per output filter, [C], or 0-dim."""
        return cast(Tensor, self.thresholds()[0])

    def extra_repr(self) -> str:
        """Bits and number of thresholds."""
        return f"bits={self.grid.bits}, thresholds={self.thresholds.high.numel()}"


class QuantLayer(nn.Module):
    """What quantized convolution and linear layers share: a frozen weight, a bias, a quantizer.

    What is frozen is a buffer: the parameters of a quantized network are exactly what is trained.

    Args:
        layer: Name of the layer in the network.
        weight: float32, output filters first.
        bias: float32 [C] or ``None``.
        spec: What is asked of the network.
        grid: The integers of the weight.
    """

    weight: Tensor
    bias: Tensor | None

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
        self.adjust = {"pointwise": Adjust.MULTIPLY, "rounding": Adjust.MOVE}.get(
            spec.weights, Adjust.NOTHING
        )
        self._bounds = spec.pointwise_range if spec.weights == "pointwise" else spec.rounding_range
        self.factor: nn.Parameter | None = None
        if self.adjust is not Adjust.NOTHING:
            self.factor = nn.Parameter(torch.full_like(self.weight, self._neutral))
        # Not a submodule: the input's quantizer belongs to the layer before and is only read here.
        self._input: list[ActivationQuantizer] = []

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """The quantizer that the layer's input passed last."""
        return self._input[0]

    def reads_from(self, quantizer: ActivationQuantizer) -> None:
        """Say which quantizer that is."""
        self._input = [quantizer]

    def calibrate(self) -> int:
        """Set the weight's thresholds; return how many were widened so that the bias fits int32.

        A filter whose weights have all but vanished has so small a step that its bias, on the grid
        s_w·s_x, would pass 31 bits and saturate. Its threshold is raised to where the bias fits,
        with room for the factors' range; its weights stay below half a step of any use.
        """
        self.weight_quantizer.calibrate(self.weight)
        if self.factor is not None:
            self.factor.data.fill_(self._neutral)
        if self.bias is None:
            return 0
        input_scale = self.input_quantizer.thresholds()[0]
        room = INT32_MAX / 2 * self._smallest_factor**2  # one bit to spare for training
        smallest_step = self.bias.detach().abs() / (room * input_scale)
        return self.weight_quantizer.widen(smallest_step * self.weight_quantizer.grid.qmax)

    @property
    def _neutral(self) -> float:
        """The factor that leaves a weight as it is."""
        return 1.0 if self.adjust is Adjust.MULTIPLY else 0.0

    def adjusted_weight(self) -> Tensor:
        """The weight with its factors before rounding, see :func:`adjust_weight`."""
        scale = self.weight_quantizer.scale()
        return adjust_weight(self.weight, scale, self.factor, self.adjust, self._bounds)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the factors of thresholds and weights back into their ranges."""
        self.weight_quantizer.thresholds.project()
        if self.factor is not None:
            self.factor.clamp_(*self._bounds)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does, with another weight and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its weight and bias on their grids."""
        return self.compute(x, *self.quantized())

    def quantized(self) -> tuple[Tensor, Tensor | None]:
        """Weight on its grid and bias on the int32 grid s_w·s_x."""
        if not self.weight_quantizer.enabled:
            return self.adjusted_weight(), self.bias
        scale = self.weight_quantizer.scale()
        weight = fake_quantize_weight(
            self.weight,
            scale,
            self.weight_quantizer.grid.qmax,
            self.factor,
            self.adjust,
            self._bounds,
        )
        if self.bias is None or not self.input_quantizer.enabled:
            return weight, self.bias
        with torch.no_grad():
            # In float64: two tiny steps multiplied in float32 would underflow to 0.
            step = scale.double() * self.input_quantizer.thresholds()[0].double()
        return weight, fake_quantize_bias(self.bias, step)

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(int8 weight, its step [C] or 0-dim, int32 bias [C] on the grid s_w·s_x or None)."""
        scale = self.weight_quantizer.scale()
        rows = scale.reshape(-1, *[1] * (self.weight.dim() - 1)) if scale.dim() else scale
        weight = torch.div(self.quantized()[0], rows).round_().to(torch.int8)
        if self.bias is None:
            return weight, scale, None
        step = scale.double() * self.input_quantizer.thresholds()[0].double()
        return weight, scale, quantize_bias(self.bias, step)

    def extra_repr(self) -> str:
        """Layer and shape."""
        return f"{self.layer}, weight={list(self.weight.shape)}, bias={self.bias is not None}"


class QuantLinear(QuantLayer):
    """A linear layer in integers: y = x·W^T + b."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply another weight and bias to [..., in_features]."""
        return F.linear(x, weight, bias)


class QuantConv2d(QuantLayer):
    """A two-dimensional convolution in integers.

    Args:
        layer: See :class:`QuantLayer`.
        weight: See :class:`QuantLayer`.
        bias: See :class:`QuantLayer`.
        spec: See :class:`QuantLayer`.
        grid: See :class:`QuantLayer`.
        stride: As in torch.
        padding: As in torch, or ``"dynamic_same"``, see :func:`fat.layers.pad_same`.
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
        """Convolve [N, C, H, W] with another weight and bias in the layer's geometry."""
        padding = self.padding
        if padding == "dynamic_same":
            kernel = (self.weight.shape[2], self.weight.shape[3])
            x, padding = pad_same(x, kernel, self.stride, self.dilation), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
