"""Steps, zero points and biases of many quantizers, computed together.

A training step needs the step of every quantizer and the quantized bias of every layer: a dozen
operations on a few numbers each. One by one they are thousands of operations, which take longer on
a GPU than the network itself. Here the values of all quantizers are concatenated, computed in a few
dozen operations, and handed to the modules for one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fat.quant import kernels
from fat.quant.functional import fake_quantize_bias
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.quant.thresholds import Parametrization, Thresholds, ThresholdValues

__all__ = ["QuantizerBatch"]

_Steps = tuple[Thresholds, tuple[Tensor, Tensor]]
"""Thresholds with their scale and zero point."""


class QuantizerBatch:
    """The quantizers of a network or of a part of it.

    The modules stay what they are: the batch reads their tensors at each call, so it follows
    training, loading, moves between devices and quantizers that are switched off. Copy the network
    and make a new batch; a batch does not follow the copy.

    Args:
        quantizers: Activation quantizers.
        layers: Quantized layers. The quantizers of their inputs need not be among ``quantizers``;
            those that are not get no gradient.
    """

    def __init__(
        self, quantizers: Iterable[ActivationQuantizer], layers: Iterable[QuantLayer]
    ) -> None:
        self._quantizers = tuple(quantizers)
        self._layers = tuple(layers)
        self._own = [
            *(quantizer.thresholds for quantizer in self._quantizers),
            *(layer.weight_quantizer.thresholds for layer in self._layers),
        ]
        own = set(self._quantizers)
        linked = [layer for layer in self._layers if layer.linked]
        inputs = dict.fromkeys(layer.input_quantizer for layer in linked)
        self._inputs = [quantizer for quantizer in inputs if quantizer not in own]
        self._plan: tuple[Any, _Plan] | None = None
        self._all: tuple[Any, list[_Group]] | None = None

    def all_enabled(self) -> bool:
        """Return True if all quantizers are enabled and none is being calibrated."""
        return all(x.enabled and not x.observing for x in self._quantizers) and all(
            x.weight_quantizer.enabled for x in self._layers
        )

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Compute all values, and hand them to the modules within this context.

        The modules then use these values instead of computing their own, with the same results and
        gradients bit for bit. Parameters must not change inside.
        """
        steps, biases = self._current_plan().compute()
        results: list[tuple[Any, Any]] = [*steps, *biases]
        try:
            for owner, result in results:
                owner._computed = result
            yield
        finally:
            # Not the earlier values: if threads overlap, they would be another thread's, and stay.
            for owner, _ in results:
                owner._computed = None

    def values(self) -> dict[Thresholds, tuple[Tensor, Tensor]]:
        """Return :meth:`fat.quant.thresholds.Thresholds.lanes` of every enabled quantizer."""
        return dict(self._current_plan().compute()[0])

    @torch.no_grad()
    def project(self) -> None:
        """Clip all trained factors to their ranges; call after each optimizer step."""
        for group in self._groups():
            group.project()
        factors: dict[tuple[float, float], list[Tensor]] = {}
        for layer in self._layers:
            if layer.factor is not None:
                factors.setdefault(layer.factor_range, []).append(layer.factor)
        for (low, high), tensors in factors.items():
            torch._foreach_clamp_min_(tensors, low)
            torch._foreach_clamp_max_(tensors, high)

    def _current_plan(self) -> _Plan:
        """Return the plan for the quantizers that are enabled now."""
        quantizers = [*self._quantizers, *self._inputs]
        enabled = [x.enabled and not x.observing for x in quantizers]
        enabled_weights = [x.weight_quantizer.enabled for x in self._layers]
        key = (self._place(), enabled, enabled_weights)
        if self._plan is None or self._plan[0] != key:
            active = [x for x, on in zip(quantizers, enabled, strict=True) if on]
            layers = [x for x, on in zip(self._layers, enabled_weights, strict=True) if on]
            frozen = {quantizer.thresholds for quantizer in self._inputs}
            # Constants made in inference mode could not be used in training.
            with torch.inference_mode(False):
                self._plan = key, _Plan(active, layers, frozen)
        return self._plan[1]

    def _groups(self) -> list[_Group]:
        key = self._place()
        if self._all is None or self._all[0] != key:
            with torch.inference_mode(False):
                self._all = key, _grouped(self._own)
        return self._all[1]

    def _place(self) -> tuple[torch.device, torch.dtype] | None:
        """Return what the constants have to follow."""
        return (self._own[0].high.device, self._own[0].high.dtype) if self._own else None


class _Plan:
    """Order of the concatenated values of the enabled quantizers, and constants on the device."""

    def __init__(
        self,
        quantizers: Sequence[ActivationQuantizer],
        layers: Sequence[QuantLayer],
        frozen: set[Thresholds],
    ) -> None:
        thresholds = [quantizer.thresholds for quantizer in quantizers]
        thresholds += [layer.weight_quantizer.thresholds for layer in layers]
        self._groups = _grouped(thresholds, frozen)
        active = set(quantizers)
        self._layers = [
            layer
            for layer in layers
            if layer.bias is not None and layer.linked and layer.input_quantizer in active
        ]
        if self._layers:
            self._set_positions()

    def _set_positions(self) -> None:
        """Find the steps of weight and input for each bias among the concatenated steps."""
        starts: dict[Thresholds, int] = {}
        end = 0
        for group in self._groups:
            for member, rows in zip(group.members, group.rows, strict=True):
                starts[member] = end
                end += rows
        weights: list[int] = []
        inputs: list[int] = []
        self._sizes = [len(layer.weight) for layer in self._layers]
        for layer, size in zip(self._layers, self._sizes, strict=True):
            own = layer.weight_quantizer.thresholds
            first = starts[own]
            weights += range(first, first + size) if own.high.dim() else [first] * size
            inputs += [starts[layer.input_quantizer.thresholds]] * size
        device = self._layers[0].weight.device
        self._weights = torch.tensor(weights, device=device)
        self._inputs = torch.tensor(inputs, device=device)

    def compute(self) -> tuple[list[_Steps], list[tuple[QuantLayer, Tensor]]]:
        """Return scale and zero point of each quantizer, and the quantized bias of each layer."""
        found: list[_Steps] = []
        flat = []
        for group in self._groups:
            scale, zero_point = group.compute()
            found += group.separate(scale, zero_point)
            flat.append(scale.detach())
        return found, self._biases(flat) if self._layers else []

    def _biases(self, flat: list[Tensor]) -> list[tuple[QuantLayer, Tensor]]:
        scales = flat[0] if len(flat) == 1 else torch.cat(flat)
        # In float64, because the product of two tiny steps underflows to 0 in float32.
        scales = scales.double()
        step = scales[self._weights] * scales[self._inputs]
        biases = torch.cat([cast(Tensor, layer.bias) for layer in self._layers])
        quantized = fake_quantize_bias(biases, step)
        kind = quantized.device.type
        if torch.is_autocast_enabled(kind):
            quantized = quantized.to(torch.get_autocast_dtype(kind))
        return list(zip(self._layers, quantized.split_with_sizes(self._sizes), strict=True))


class _Group:
    """Thresholds with the same formulas.

    Single thresholds come first in the concatenated values, then those per output filter.

    Attributes:
        members: The thresholds in this order.
        rows: Number of values of each.
    """

    def __init__(self, formulas: Parametrization, members: Sequence[_Member]) -> None:
        self._formulas = formulas
        single = [member for member in members if not member.thresholds.high.dim()]
        several = [member for member in members if member.thresholds.high.dim()]
        self._single = len(single)
        self._ordered = [*single, *several]
        self.members = [member.thresholds for member in self._ordered]
        self.rows = [thresholds.high.numel() for thresholds in self.members]
        like = self.members[0].high
        self._qmin = self._constants(like, [x.grid.qmin for x in self.members])
        self._qmax = self._constants(like, [x.grid.qmax for x in self.members])
        limits = [x.limit for x in self.members]
        limited = any(limit < math.inf for limit in limits)
        self._limit = self._constants(like, limits) if limited else None
        owners = [index for index, rows in enumerate(self.rows) for _ in range(rows)]
        self._owners = torch.tensor(owners, device=like.device)
        self._zeros = like.new_zeros(sum(self.rows))

    def _constants(self, like: Tensor, numbers: Sequence[float]) -> Tensor:
        rows = zip(numbers, self.rows, strict=True)
        values = [number for number, count in rows for _ in range(count)]
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the concatenated scales and zero points."""
        scale, zero_point = self._formulas.steps(self._values())
        return scale, self._zeros if zero_point is None else zero_point

    def separate(self, scale: Tensor, zero_point: Tensor) -> list[_Steps]:
        """Separate the result of :meth:`compute` into :meth:`Thresholds.lanes` of each member."""
        lanes = kernels.lanes(scale.device)
        parts = (self._separate(values, lanes) for values in (scale, zero_point))
        return list(zip(self.members, zip(*parts, strict=True), strict=True))

    def _separate(self, values: Tensor, lanes: int) -> list[Tensor]:
        if not self._single:  # an empty part would need a gradient of zeros
            return list(values.split_with_sizes(self.rows))
        single, *several = values.split_with_sizes([self._single, *self.rows[self._single :]])
        return [*single.unsqueeze(1).expand(-1, lanes).unbind(), *several]

    @torch.no_grad()
    def project(self) -> None:
        """Clip the trained factors of the members to their ranges."""
        values = self._values()
        if values.alpha is None:
            return
        alpha, shift = self._formulas.projected(values)
        self._assign("alpha", alpha)
        if shift is not None:
            self._assign("shift", shift)

    def _assign(self, name: str, values: Tensor) -> None:
        single, *several = values.split_with_sizes([self._single, *self.rows[self._single :]])
        targets = [getattr(thresholds, name) for thresholds in self.members]
        torch._foreach_copy_(targets, [*single.unbind(), *several])

    def _values(self) -> ThresholdValues:
        trained = self._formulas.kind != "frozen"
        elements = None
        if self._formulas.kind == "lsq":
            elements = torch.stack([x.elements for x in self.members])[self._owners]
        return ThresholdValues(
            self._gather("low"),
            self._gather("high"),
            self._qmin,
            self._qmax,
            self._limit,
            self._gather("alpha") if trained else None,
            self._gather("shift") if trained and self._formulas.affine else None,
            elements,
        )

    def _gather(self, name: str) -> Tensor:
        """Concatenate one tensor of every member."""
        tensors = [
            getattr(member.thresholds, name).detach()
            if member.frozen
            else getattr(member.thresholds, name)
            for member in self._ordered
        ]
        single, several = tensors[: self._single], tensors[self._single :]
        # One operation for all 0-dim tensors, instead of a view of each.
        stacked = [torch.stack(single)] if single else []
        parts = [*stacked, *several]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Member(NamedTuple):
    thresholds: Thresholds
    frozen: bool


def _grouped(
    thresholds: Iterable[Thresholds], frozen: AbstractSet[Thresholds] = frozenset()
) -> list[_Group]:
    groups: dict[Parametrization, list[_Member]] = {}
    for one in thresholds:
        groups.setdefault(one.parametrization, []).append(_Member(one, one in frozen))
    return [_Group(formulas, members) for formulas, members in groups.items()]
