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

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from fat.quant.config import Grid, QuantSpec
from fat.quant.functional import clip_inclusive, round_ste

__all__ = ["Thresholds", "power_of_two_ste"]

SMALLEST_FACTOR = 2.0**-10
"""Lower bound of trained factors, as a fraction of the calibrated range."""
LARGEST_FACTOR = 2.0**10
LARGEST_EXPONENT = 127
"""Exponent of the largest power of two in float32."""


class _PowerOfTwo(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, step: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(step)  # step = mantissa · 2^exponent, mantissa in [½, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        result = torch.ldexp(torch.ones_like(step), exponent.clamp(max=LARGEST_EXPONENT))
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
    def forward(ctx: FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None  # type: ignore[attr-defined]


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

    def __init__(self, spec: QuantSpec, grid: Grid, rows: int | None) -> None:
        super().__init__()
        self.grid = grid
        self.kind = spec.thresholds
        self.power_of_two = spec.power_of_two
        self.alpha_range, self.shift_range = spec.alpha_range, spec.shift_range
        if self.kind != "fat":
            self.alpha_range = (SMALLEST_FACTOR, LARGEST_FACTOR)
            self.shift_range = (-LARGEST_FACTOR, LARGEST_FACTOR)
        if self.kind == "tqt":
            self.alpha_range = (math.log2(SMALLEST_FACTOR), math.log2(LARGEST_FACTOR))
        self.limit = math.inf
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
        if self.alpha is not None:
            self.alpha.data.fill_(self._start)
        if self.shift is not None:
            self.shift.data.zero_()
        if self.kind == "lsq" and elements is not None:
            self.elements.fill_(elements)

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the adjusted thresholds (T_l, T_r), differentiable in the trained parameters.

        On affine grids they contain 0 as long as :meth:`project` is called after each step.
        """
        low, extent = self._adjusted()
        return low, low + extent if self.grid.kind == "affine" else extent

    def _extent(self) -> Tensor:
        """Return the range that the steps divide: R on affine grids, T on symmetric ones."""
        return self.high - self.low if self.grid.kind == "affine" else self.high

    def _adjusted(self) -> tuple[Tensor, Tensor]:
        """Return T_l and the extent (see :meth:`_extent`) with trained factors applied."""
        extent = self._extent()
        if self.alpha is None:
            return self.low, extent
        factor = self._factor(self.alpha)
        if self.shift is None:
            return self.low * factor, extent * factor
        shift = self._scaled(clip_inclusive(self.shift, *self.shift_range))
        return self.low + shift * extent, extent * factor

    def _factor(self, alpha: Tensor) -> Tensor:
        clipped = clip_inclusive(alpha, *self.alpha_range)
        return torch.exp2(clipped) if self.kind == "tqt" else self._scaled(clipped)

    def _scaled(self, x: Tensor) -> Tensor:
        """Scale the gradient of ``x`` as LSQ does."""
        if self.kind != "lsq":
            return x
        scaled: Tensor = _ScaleGradient.apply(
            x, 1.0 / math.sqrt(float(self.elements) * self.grid.qmax)
        )
        return scaled

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point), float32 of the thresholds' shape.

        Symmetric: d = T/q. Affine: d = (T_r − T_l)/(2^n−1) and z = round(−T_l/d), clipped to the
        grid, so that 0.0 is always represented exactly. A tensor that is all zero gets d = 1.
        """
        return self._steps(*self._adjusted())

    def _steps(self, low: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point) of a range."""
        scale = _step(extent, self.grid.qmax)
        if self.power_of_two:
            scale = power_of_two_ste(scale)
        if self.grid.kind != "affine":
            return scale, torch.zeros_like(self.high)
        zero_point = clip_inclusive(round_ste(-low / scale), self.grid.qmin, self.grid.qmax)
        return scale, zero_point

    @torch.no_grad()
    def project(self) -> None:
        """Clip the trained parameters to their ranges; call after each optimizer step.

        Outside its range a clipped factor gets no gradient and would never return. Affine ranges
        keep T_l ≤ 0 ≤ T_r: beyond that the zero point is clipped to the grid and the shift gets no
        gradient.
        """
        if self.alpha is None:
            return
        self.alpha.clamp_(*self.alpha_range)
        if self.grid.kind != "affine":
            if math.isfinite(self.limit):
                self.alpha.copy_(torch.minimum(self.alpha, self._inverse(self.limit / self.high)))
            return
        assert self.shift is not None
        extent = self.high - self.low
        # Position of 0 in the calibrated range, in units of R: between 0 and 1.
        zero = torch.where(extent > 0.0, -self.low / extent, 0.0)
        largest = self._factor(torch.full_like(self.alpha, self.alpha_range[1]))
        self.shift.clamp_(*self.shift_range)
        self.shift.clamp_((zero - largest).clamp(max=0.0), zero)
        needed = torch.minimum(zero - self.shift, largest).clamp(min=SMALLEST_FACTOR)
        self.alpha.copy_(torch.maximum(self.alpha, self._inverse(needed)))

    def _inverse(self, factor: Tensor) -> Tensor:
        """Return the parameter for a factor."""
        return torch.log2(factor) if self.kind == "tqt" else factor

    @torch.no_grad()
    def grid_range(self, *, calibrated: bool = False) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest real value of the grid, (q_min − z)·d and (q_max − z)·d.

        They differ from the thresholds by the rounding of the zero point and of power-of-two steps.

        Args:
            calibrated: Use the calibrated range, without trained factors.

        Returns:
            Two tensors of the thresholds' shape.
        """
        limits = (self.low, self._extent()) if calibrated else self._adjusted()
        scale, zero_point = self._steps(*limits)
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
        if math.isfinite(self.limit):
            top = torch.minimum(top, self._inverse(self.limit / self.high))
        return (self.alpha <= low + tolerance) | (self.alpha >= top - tolerance)

    def factors(self) -> dict[str, Tensor]:
        """Return the effective trained factors by name: ``alpha`` and ``shift``."""
        found = {}
        if self.alpha is not None:
            found["alpha"] = self._factor(self.alpha.detach())
        if self.shift is not None:
            found["shift"] = self.shift.detach().clamp(*self.shift_range)
        return found


def _step(extent: Tensor, steps: int) -> Tensor:
    # The only lower bound of a step is that of the number format: a larger one would silently
    # damage filters with small weights. An all-zero tensor has no extent; any step represents it.
    # NaN stays NaN, to be reported with the tensor's name.
    step = extent / steps
    return torch.where(step < torch.finfo(step.dtype).tiny, torch.ones_like(step), step)
