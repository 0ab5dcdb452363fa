"""Trainable thresholds: calibrated range and trained factors → scale and zero point.

Every parametrization trains a factor f on the calibrated range R = T_r − T_l, starting at f = 1:

* ``fat``: f = clip(α, lo, hi) (arXiv 1812.07872, eqs. 13 and 17);
* ``lsq``: f = s, the step in units of its calibrated value, s > 0, with the gradient scaled by
  1/√(N·q) for N elements on a grid of q positive levels (arXiv 1902.08153, section 3.1);
* ``tqt``: f = 2^l, l the logarithm of threshold over calibrated threshold (arXiv 1903.08066);
* ``frozen`` trains nothing.

Affine grids also train a shift of the lower threshold, T_l,adj = T_l + shift·R. All parameters are
relative to the calibrated values, so that one learning rate suits every tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from fat.quant import kernels
from fat.quant.config import Grid, QuantSpec
from fat.quant.functional import clip_inclusive, round_ste

__all__ = ["Parametrization", "ThresholdValues", "Thresholds", "power_of_two_ste"]

SMALLEST_FACTOR = 2.0**-10
"""Lower bound of trained factors, as a fraction of the calibrated range."""
LARGEST_FACTOR = 2.0**10
LARGEST_EXPONENT = 127
"""Exponent of the largest power of two in float32."""


class _PowerOfTwo(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, step: Tensor) -> Tensor:
        mantissa, _ = torch.frexp(step)  # step = mantissa · 2^exponent, mantissa in [½, 1)
        # The quotient is a power of two and therefore exact; torch.ldexp need not be.
        above = (step / mantissa).clamp(max=2.0**LARGEST_EXPONENT)
        result = torch.where(mantissa == 0.5, step, above)
        ctx.save_for_backward(result / step)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (ratio,) = ctx.saved_tensors  # type: ignore[attr-defined]
        result: Tensor = grad * ratio
        return result


def power_of_two_ste(step: Tensor) -> Tensor:
    """Round up to a power of two, 2^⌈log2 step⌉, with a straight-through gradient for ⌈·⌉.

    The gradient is ∂/∂step = result/step.

    Source: Jain et al. 2019 (arXiv 1903.08066), eqs. 5 and 7.

    Examples:
        >>> power_of_two_ste(torch.tensor([0.25, 0.26, 3.0])).tolist()
        [0.25, 0.5, 4.0]
    """
    result: Tensor = _PowerOfTwo.apply(step)
    return result


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * factor, None


class _Exp2(Function):
    """2^x, computed in float64 and rounded once."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        result = torch.exp2(x.double()).to(x.dtype)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors  # type: ignore[attr-defined]
        by_x: Tensor = grad * result * math.log(2.0)
        return by_x


class ThresholdValues(NamedTuple):
    """Tensors from which a :class:`Parametrization` computes steps, all of one shape.

    Attributes:
        low: Calibrated lower threshold T_l.
        high: Calibrated upper threshold T_r.
        qmin: Smallest integer of the grid.
        qmax: Largest integer of the grid.
        limit: Upper bound of the trained upper threshold, or ``None`` without a bound.
        alpha: Trained parameter, or ``None`` if frozen.
        shift: Trained shift of an affine grid, or ``None``.
        elements: LSQ's N, or ``None`` for other parametrizations.
    """

    low: Tensor
    high: Tensor
    qmin: Tensor
    qmax: Tensor
    limit: Tensor | None = None
    alpha: Tensor | None = None
    shift: Tensor | None = None
    elements: Tensor | None = None


@dataclass(frozen=True)
class Parametrization:
    """Formulas from calibrated ranges and trained factors to steps, elementwise on tensors.

    They are the same for one quantizer and for the concatenated values of many
    (:mod:`fat.quant.batched`). Every operation gives the same bits on a CPU and a GPU: there is no
    division by a Python number, which CUDA replaces by a product with the reciprocal, and exp2 and
    log2, whose float32 implementations differ, are computed in float64 and rounded once.

    Attributes:
        kind: ``fat``, ``lsq``, ``tqt`` or ``frozen``, see the module's docstring.
        affine: True for affine grids, false for symmetric ones.
        power_of_two: Round steps up to powers of two.
        alpha_range: Range of the trained parameter.
        shift_range: Range of the trained shift.
    """

    kind: str
    affine: bool
    power_of_two: bool
    alpha_range: tuple[float, float]
    shift_range: tuple[float, float]

    def extent(self, values: ThresholdValues) -> Tensor:
        """Return the range that the steps divide: R on affine grids, T on symmetric ones."""
        return values.high - values.low if self.affine else values.high

    def factor(self, alpha: Tensor, values: ThresholdValues) -> Tensor:
        """Return f for the parameter ``alpha``."""
        clipped = clip_inclusive(alpha, *self.alpha_range)
        if self.kind == "tqt":
            result: Tensor = _Exp2.apply(clipped)
            return result
        return self._scaled(clipped, values)

    def inverse(self, factor: Tensor) -> Tensor:
        """Return the parameter for a factor."""
        return torch.log2(factor.double()).to(factor.dtype) if self.kind == "tqt" else factor

    def _scaled(self, x: Tensor, values: ThresholdValues) -> Tensor:
        """Scale the gradient of ``x`` as LSQ does."""
        if self.kind != "lsq":
            return x
        assert values.elements is not None
        factor = torch.sqrt(values.elements.double() * values.qmax.double()).reciprocal()
        scaled: Tensor = _ScaleGradient.apply(x, factor.to(x.dtype))
        return scaled

    def adjusted(self, values: ThresholdValues) -> tuple[Tensor, Tensor]:
        """Return T_l and :meth:`extent` with trained factors; T_l only of affine grids is trained.

        Symmetric grids do not need T_l, so it is returned as calibrated.
        """
        extent = self.extent(values)
        if values.alpha is None:
            return values.low, extent
        factor = self.factor(values.alpha, values)
        if values.shift is None:
            return values.low, extent * factor
        shift = self._scaled(clip_inclusive(values.shift, *self.shift_range), values)
        return values.low + shift * extent, extent * factor

    def steps(
        self, values: ThresholdValues, *, calibrated: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point; ``None`` on symmetric grids, whose zero points are 0.

        Args:
            values: Ranges, grids and trained factors.
            calibrated: Use the calibrated range, without trained factors.
        """
        if calibrated:
            low, extent = values.low, self.extent(values)
        else:
            low, extent = self.adjusted(values)
        # The only lower bound of a step is that of the number format: a larger one would silently
        # damage filters with small weights. An all-zero tensor has no extent; any step represents
        # it. NaN stays NaN, to be reported with the tensor's name.
        step = extent / values.qmax
        scale = torch.where(step < torch.finfo(step.dtype).tiny, 1.0, step)
        if self.power_of_two:
            scale = power_of_two_ste(scale)
        if not self.affine:
            return scale, None
        return scale, clip_inclusive(round_ste(-low / scale), values.qmin, values.qmax)

    def bound(self, values: ThresholdValues) -> Tensor | None:
        """Return the largest parameter that ``limit`` allows, or ``None`` without a limit."""
        if values.limit is None:
            return None
        return self.inverse(values.high.reciprocal() * values.limit)

    @torch.no_grad()
    def projected(self, values: ThresholdValues) -> tuple[Tensor, Tensor | None]:
        """Return alpha and shift clipped to their ranges, see :meth:`Thresholds.project`."""
        assert values.alpha is not None
        alpha = values.alpha.clamp(*self.alpha_range)
        if not self.affine:
            bound = self.bound(values)
            if bound is None:
                return alpha, None
            assert values.limit is not None
            return torch.where(values.limit < math.inf, torch.minimum(alpha, bound), alpha), None
        assert values.shift is not None
        extent = self.extent(values)
        # Position of 0 in the calibrated range, in units of R: between 0 and 1.
        zero = torch.where(extent > 0.0, -values.low / extent, 0.0)
        largest = self.factor(torch.full_like(alpha, self.alpha_range[1]), values)
        shift = values.shift.clamp(*self.shift_range)
        shift = shift.clamp((zero - largest).clamp(max=0.0), zero)
        needed = torch.minimum(zero - shift, largest).clamp(min=SMALLEST_FACTOR)
        return torch.maximum(alpha, self.inverse(needed)), shift


class Thresholds(nn.Module):
    """Calibrated range of a tensor with its trained factors; calling it returns the grid's steps.

    Args:
        spec: Quantization options: parametrization, its ranges, powers of two.
        grid: Integer grid of the tensor.
        rows: Number of thresholds (output filters); ``None`` for one 0-dim threshold.

    Attributes:
        low: Calibrated lower threshold T_l ≤ 0.
        high: Calibrated upper threshold T_r ≥ 0, the T_max of symmetric grids.
        limit: Upper bound of the trained upper threshold, such as 6 after ReLU6. Steps that are
            powers of two may exceed it.
        elements: LSQ's N, the number of elements per threshold: of one filter, or of one image.
        alpha: Trained parameter of the shape of ``high``: α, s or l (see the module's docstring);
            ``None`` if frozen.
        shift: Trained shift of T_l in units of R; ``None`` unless the grid is affine.
    """

    low: Tensor
    high: Tensor
    elements: Tensor
    _computed: tuple[Tensor, Tensor] | None = None
    """Result of :meth:`lanes` that :class:`fat.quant.batched.QuantizerBatch` computed."""

    def __init__(self, spec: QuantSpec, grid: Grid, rows: int | None) -> None:
        super().__init__()
        self.grid = grid
        self.kind: str = spec.thresholds
        self.power_of_two = spec.power_of_two
        self.alpha_range, self.shift_range = spec.alpha_range, spec.shift_range
        if self.kind != "fat":
            self.alpha_range = (SMALLEST_FACTOR, LARGEST_FACTOR)
            self.shift_range = (-LARGEST_FACTOR, LARGEST_FACTOR)
        if self.kind == "tqt":
            self.alpha_range = (math.log2(SMALLEST_FACTOR), math.log2(LARGEST_FACTOR))
        self.limit = math.inf
        self._computed = None
        shape = () if rows is None else (rows,)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.ones(shape))
        self.alpha: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        if self.kind != "frozen":
            self.alpha = nn.Parameter(torch.full(shape, self._start))
            if grid.kind == "affine":
                self.shift = nn.Parameter(torch.zeros(shape))
        if self.kind == "lsq":
            self.register_buffer("elements", torch.tensor(1.0))

    @property
    def _start(self) -> float:
        return 0.0 if self.kind == "tqt" else 1.0

    def set_range(self, low: Tensor, high: Tensor, elements: int | None = None) -> None:
        """Set calibrated thresholds and reset all trained factors.

        Args:
            low: T_l, of the shape of ``self.low`` or [rows].
            high: T_r.
            elements: LSQ's N.
        """
        self.low.copy_(low.reshape(self.low.shape))
        self.high.copy_(high.reshape(self.high.shape).clamp(max=self.limit))
        with torch.no_grad():
            if self.alpha is not None:
                self.alpha.fill_(self._start)
            if self.shift is not None:
                self.shift.zero_()
        if self.kind == "lsq" and elements is not None:
            self.elements.fill_(elements)

    @property
    def parametrization(self) -> Parametrization:
        """Formulas from the tensors of :meth:`values` to steps."""
        affine = self.grid.kind == "affine"
        ranges = (self.alpha_range, self.shift_range)
        return Parametrization(self.kind, affine, self.power_of_two, *ranges)

    def values(self) -> ThresholdValues:
        """Return the tensors that the formulas take."""
        high = self.high
        return ThresholdValues(
            self.low,
            high,
            torch.full_like(high, self.grid.qmin),
            torch.full_like(high, self.grid.qmax),
            torch.full_like(high, self.limit) if math.isfinite(self.limit) else None,
            self.alpha,
            self.shift,
            self.elements if self.kind == "lsq" else None,
        )

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the adjusted thresholds (T_l, T_r), differentiable in the trained parameters.

        On affine grids they contain 0 as long as :meth:`project` is called after each step.
        """
        formulas, values = self.parametrization, self.values()
        low, extent = formulas.adjusted(values)
        if formulas.affine:
            return low, low + extent
        if values.alpha is not None:
            low = low * formulas.factor(values.alpha, values)
        return low, extent

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point), float32 of the thresholds' shape.

        Symmetric: d = T/q. Affine: d = (T_r − T_l)/(2^n−1) and z = round(−T_l/d), clipped to the
        grid, so that 0.0 is always represented exactly. A tensor that is all zero gets d = 1.
        """
        if self._computed is not None:
            scale, zero_point = self._computed
            return (scale, zero_point) if self.high.dim() else (scale[0], zero_point[0])
        return self._steps(calibrated=False)

    def lanes(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point) in the form of the kernels' arguments.

        Returns:
            Two tensors [rows]; with one threshold [L] of L equal values that share their memory,
            see :func:`fat.quant.kernels.lanes`.
        """
        if self._computed is not None:
            return self._computed
        scale, zero_point = self._steps(calibrated=False)
        if scale.dim():
            return scale, zero_point
        count = kernels.lanes(scale.device)
        return scale.expand(count), zero_point.expand(count)

    def _steps(self, *, calibrated: bool) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parametrization.steps(self.values(), calibrated=calibrated)
        return scale, torch.zeros_like(self.high) if zero_point is None else zero_point

    @torch.no_grad()
    def project(self) -> None:
        """Clip the trained parameters to their ranges; call after each optimizer step.

        Outside its range a clipped factor gets no gradient and would never return. Affine ranges
        keep T_l ≤ 0 ≤ T_r: beyond that the zero point is clipped to the grid and the shift gets no
        gradient.
        """
        if self.alpha is None:
            return
        alpha, shift = self.parametrization.projected(self.values())
        self.alpha.copy_(alpha)
        if self.shift is not None and shift is not None:
            self.shift.copy_(shift)

    @torch.no_grad()
    def grid_range(self, *, calibrated: bool = False) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest real value of the grid, (q_min − z)·d and (q_max − z)·d.

        They differ from the thresholds by the rounding of the zero point and of power-of-two steps.

        Args:
            calibrated: Use the calibrated range, without trained factors.

        Returns:
            Two tensors of the thresholds' shape.
        """
        scale, zero_point = self._steps(calibrated=calibrated)
        return (self.grid.qmin - zero_point) * scale, (self.grid.qmax - zero_point) * scale

    @torch.no_grad()
    def at_edge(self, tolerance: float = 1e-6) -> Tensor | None:
        """Return a mask of factors at either end of their range, in α's shape; ``None`` if frozen.

        After ReLU6 the upper end is at most the factor that makes the threshold 6.

        Args:
            tolerance: Largest distance from an end, in units of the trained parameter.
        """
        if self.alpha is None:
            return None
        low, high = self.alpha_range
        top = torch.full_like(self.alpha, high)
        bound = self.parametrization.bound(self.values())
        if bound is not None:
            top = torch.minimum(top, bound)
        return (self.alpha <= low + tolerance) | (self.alpha >= top - tolerance)

    def factors(self) -> dict[str, Tensor]:
        """Return the effective trained factors by name: ``alpha`` and ``shift``."""
        found = {}
        if self.alpha is not None:
            found["alpha"] = self.parametrization.factor(self.alpha.detach(), self.values())
        if self.shift is not None:
            found["shift"] = self.shift.detach().clamp(*self.shift_range)
        return found
