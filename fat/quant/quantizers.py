"""Quantizers of activations and weights: calibration, thresholds and fake quantization."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fat.quant.config import Grid, InitSpec, QuantSpec
from fat.quant.functional import fake_quantize_lanes, quantize
from fat.quant.layers import ChannelClip
from fat.quant.observers import HistogramStatistics, RangeStatistics, SampleStatistics, Statistics
from fat.quant.range_estimators import HISTOGRAM_STRATEGIES, initial_thresholds
from fat.quant.thresholds import Thresholds
from fat.utils import distributed
from fat.utils.errors import FatError

__all__ = ["ActivationQuantizer", "WeightQuantizer"]


class ActivationQuantizer(nn.Module):
    """Fake-quantize an activation with one threshold for the whole tensor.

    Includes the clipping activation (ReLU, ReLU6) that integer runtimes fuse. An unsigned grid
    whose upper threshold cannot exceed the clip's bound does the clipping, which saves time and
    memory; otherwise, and for a clip per channel, the activation is applied before rounding.

    Args:
        layer: Name of the operation that computes the tensor, for messages and tables.
        spec: Quantization options.
        grid: Integer grid of the tensor.
        activation: Fused ReLU, Hardtanh (includes ReLU6) or :class:`fat.quant.layers.ChannelClip`,
            or ``None``.

    Attributes:
        enabled: If false, only the activation is applied.
        may_overwrite: True if nothing else needs the input, not even for the backward pass.
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
        unsigned = activation is not None and grid.kind == "symmetric_unsigned"
        self._grid_clips = unsigned and not isinstance(activation, ChannelClip)
        if unsigned and isinstance(activation, nn.Hardtanh):
            self.thresholds.limit = float(activation.max_val)
            self._grid_clips = not spec.power_of_two  # the next power of two may exceed the bound
        elif unsigned and isinstance(activation, ChannelClip):
            self.thresholds.limit = max(activation.bounds)
        self.enabled = True
        self.may_overwrite = False
        self._statistics: RangeStatistics | None = None
        self._elements = 1  # per image

    def start_observing(self) -> None:
        """Start calibration: pass tensors unchanged and collect their statistics."""
        wants_histogram = self.init.name in HISTOGRAM_STRATEGIES
        self._statistics = HistogramStatistics() if wants_histogram else RangeStatistics()

    def stop_observing(self, *, keep: bool) -> None:
        """End calibration.

        Args:
            keep: Set the thresholds from the statistics; ``False`` discards them.

        Raises:
            FatError: If there were no images, or if the values are not finite.
        """
        statistics, self._statistics = self._statistics, None
        if not keep or statistics is None:
            return
        statistics.merge()
        self._elements = int(distributed.all_max(torch.tensor(self._elements)))
        if not statistics.seen:
            raise FatError(
                f"'{self.layer}' received no images during calibration: the calibration set is "
                "empty."
            )
        low, high = statistics.minimum(), statistics.maximum()
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise FatError(
                f"The output of '{self.layer}' ranges from {low.item()} to {high.item()} on the "
                "calibration images: check the weights and the images' normalization."
            )
        # start_observing chose statistics with everything that the strategy needs.
        full = cast(Statistics, statistics)
        initial = initial_thresholds(full, self.grid, self.init)
        self.thresholds.set_range(*initial, elements=self._elements)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the fused activation, if any, without quantization."""
        return x if self.activation is None else cast(Tensor, self.activation(x))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize the activation of ``x``, or observe it during calibration."""
        if self._statistics is not None:
            x = self.activate(x)
            self._statistics.update(x)
            self._elements = x[0].numel()
            return x
        if not self.enabled:
            return self.activate(x)
        if not self._grid_clips:
            x = self.activate(x)
        lanes = self.thresholds.lanes()
        inplace = self.may_overwrite and (self._grid_clips or self.activation is None)
        return fake_quantize_lanes(x, *lanes, self.grid.qmin, self.grid.qmax, inplace=inplace)

    @property
    def observing(self) -> bool:
        """True during calibration, while tensors pass unchanged."""
        return self._statistics is not None

    @torch.no_grad()
    def integer_bounds(self) -> tuple[int, int]:
        """Return the smallest and largest integer within the grid and the fused activation.

        Rounding is monotonic, so clip(x, a, b) becomes clip(q, q(a), q(b)) on integers.
        """
        ends = torch.tensor([-torch.inf, torch.inf], device=self.thresholds.high.device)
        if isinstance(self.activation, ChannelClip):  # its upper bounds are channel_bounds()
            ends = ends.clamp(min=0.0)
        elif self.activation is not None:
            ends = self.activation(ends)
        scale, zero_point = self.thresholds()
        q = quantize(ends, scale, zero_point, self.grid.qmin, self.grid.qmax)
        return int(q[0]), int(q[1])

    @torch.no_grad()
    def channel_bounds(self) -> Tensor | None:
        """Return the largest integer of each channel, int32 [C], if a clip per channel is fused."""
        if not isinstance(self.activation, ChannelClip):
            return None
        scale, zero_point = self.thresholds()
        bound = self.activation.bound
        return quantize(bound, scale, zero_point, self.grid.qmin, self.grid.qmax)

    def project(self) -> None:
        """Clip the trained factors of the thresholds to their ranges."""
        self.thresholds.project()

    def extra_repr(self) -> str:
        """Return layer, bits and kind of grid."""
        return f"{self.layer}, bits={self.grid.bits}, grid={self.grid.kind}"


class WeightQuantizer(nn.Module):
    """Symmetric grid of a weight and its thresholds.

    Args:
        spec: Quantization options; ``per_channel`` has one threshold per output filter.
        grid: Integer grid of the weight.
        shape: Shape of the weight, output filters first.
    """

    def __init__(self, spec: QuantSpec, grid: Grid, shape: Sequence[int]) -> None:
        super().__init__()
        self.grid = grid
        self.init: InitSpec = spec.weight_init
        rows = shape[0] if spec.granularity == "per_channel" else None
        self.thresholds = Thresholds(spec, grid, rows)
        self._broadcast = (-1, *[1] * (len(shape) - 1)) if rows else ()
        self.enabled = True

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """Set the thresholds from the weight."""
        rows = weight.flatten(1) if self._broadcast else weight.reshape(1, -1)
        initial = initial_thresholds(SampleStatistics(rows), self.grid, self.init)
        self.thresholds.set_range(*initial, elements=rows.shape[1])

    @torch.no_grad()
    def widen(self, minimum: Tensor) -> int:
        """Raise thresholds that are below ``minimum``; return the number of raised ones."""
        high = self.thresholds.high
        minimum = minimum.to(high) if self._broadcast else minimum.max().to(high)
        raised = torch.maximum(high, minimum)
        changed = int((raised > high).sum())
        if changed:
            self.thresholds.set_range(-raised, raised)
        return changed

    def scale(self) -> Tensor:
        """Return the step per output filter, [C], or 0-dim."""
        return cast(Tensor, self.thresholds()[0])

    def extra_repr(self) -> str:
        """Return bits and number of thresholds."""
        return f"bits={self.grid.bits}, thresholds={self.thresholds.high.numel()}"


def __getattr__(name: str) -> Any:
    """Resolve the layers that FAT 0.1 defined here."""
    if name in ("QuantConv2d", "QuantLayer", "QuantLinear"):
        return getattr(importlib.import_module("fat.quant.quantized_layers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
