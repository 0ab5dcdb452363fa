"""Thresholds of a tensor and what may be trained of them: calibrated range → step and zero point.

A parametrization is a module whose parameters exist from ``__init__`` and whose ``forward`` gives
(scale, zero_point). ``frozen`` trains nothing; ``fat`` trains a factor per threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fat.quant.functional import clip_inclusive, round_ste
from fat.spec import Grid, QuantSpec

__all__ = ["FatAsymmetric", "FatSymmetric", "FrozenThresholds", "Thresholds", "make_thresholds"]


class Thresholds(nn.Module):
    """The calibrated range of a tensor, [rows] thresholds of it, on a grid.

    Args:
        grid: The integers of the tensor.
        rows: One threshold per row (output filter); ``None`` is one for the tensor, 0-dim.

    Attributes:
        low: Calibrated lower threshold T_l ≤ 0.
        high: Calibrated upper threshold T_r ≥ 0, the T_max of symmetric grids.
        limit: The upper threshold never passes this, whatever is trained: 6 after ReLU6.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, rows: int | None) -> None:
        super().__init__()
        self.grid = grid
        self.limit = math.inf
        shape = () if rows is None else (rows,)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.ones(shape))

    def calibrated(self, low: Tensor, high: Tensor) -> None:
        """Take over thresholds from calibration and put every trained factor back to its start."""
        self.low.copy_(low.reshape(self.low.shape))
        self.high.copy_(high.reshape(self.high.shape).clamp(max=self.limit))

    def range(self) -> tuple[Tensor, Tensor]:
        """The adjusted thresholds (T_l, T_r), differentiable in what is trained."""
        return self.low, self.high

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (scale, zero_point), float32 of the thresholds' shape.

        Symmetric: d = T/q. Asymmetric: d = (T_r − T_l)/(2^n−1), z = round(−T_l/d) kept inside the
        grid, so that 0.0 is always represented exactly. A tensor that is all zero gets d = 1.
        """
        low, high = self.range()
        if self.grid.kind != "asymmetric":
            return _step(high, self.grid.qmax), torch.zeros_like(self.high)
        scale = _step(high - low, self.grid.qmax)
        zero_point = clip_inclusive(round_ste(-low / scale), self.grid.qmin, self.grid.qmax)
        return scale, zero_point

    @torch.no_grad()
    def project(self) -> None:
        """Put parameters that an optimizer's step moved out of their range back to its edge."""

    def factors(self) -> dict[str, Tensor]:
        """The trained factors by name, as they act (clipped)."""
        return {}


def _step(extent: Tensor, steps: int) -> Tensor:
    # No floor under the step but that of the number format: a coarser one would silently spoil
    # filters with small weights. All-zero tensors have no extent; any step represents them.
    step = extent / steps
    return torch.where(step >= torch.finfo(step.dtype).tiny, step, torch.ones_like(step))


class FrozenThresholds(Thresholds):
    """Plain post-training quantization: what calibration found is what is used."""


class FatSymmetric(Thresholds):
    """T_adj = clip(α, lo, hi) · T_max with α trained, starting at 1 (arXiv 1812.07872, eq. 13).

    Args:
        grid: A ``signed`` or ``unsigned`` grid.
        rows: See :class:`Thresholds`.
        alpha_range: (lo, hi).
    """

    def __init__(self, grid: Grid, rows: int | None, alpha_range: tuple[float, float]) -> None:
        super().__init__(grid, rows)
        self.alpha_range = alpha_range
        self.alpha = nn.Parameter(torch.ones_like(self.high))

    def calibrated(self, low: Tensor, high: Tensor) -> None:
        """Take over thresholds from calibration; α returns to 1."""
        super().calibrated(low, high)
        self.alpha.data.fill_(1.0)

    def range(self) -> tuple[Tensor, Tensor]:
        """(T_l, T_r) · clip(α, lo, hi)."""
        alpha = clip_inclusive(self.alpha, *self.alpha_range)
        return self.low * alpha, self.high * alpha

    @torch.no_grad()
    def project(self) -> None:
        """Clamp α into its range: outside, the clip passes no gradient and α would never return."""
        self.alpha.clamp_(*self.alpha_range)
        if math.isfinite(self.limit):
            self.alpha.copy_(torch.minimum(self.alpha, self.limit / self.high))

    def factors(self) -> dict[str, Tensor]:
        """α, clipped."""
        return {"alpha": self.alpha.detach().clamp(*self.alpha_range)}


class FatAsymmetric(Thresholds):
    """R_adj = clip(α_R, lo, hi)·R and T_l,adj = T_l + clip(α_T, lo_T, hi_T)·R, both trained.

    R = T_r − T_l. α_R starts at 1, α_T at 0 (arXiv 1812.07872, eqs. 17 and 18).

    Args:
        grid: An ``asymmetric`` grid.
        rows: See :class:`Thresholds`.
        alpha_range: Where α_R may move.
        shift_range: Where α_T may move.
    """

    def __init__(
        self,
        grid: Grid,
        rows: int | None,
        alpha_range: tuple[float, float],
        shift_range: tuple[float, float],
    ) -> None:
        super().__init__(grid, rows)
        self.alpha_range = alpha_range
        self.shift_range = shift_range
        self.alpha = nn.Parameter(torch.ones_like(self.high))
        self.shift = nn.Parameter(torch.zeros_like(self.high))

    def calibrated(self, low: Tensor, high: Tensor) -> None:
        """Take over thresholds from calibration; α_R returns to 1 and α_T to 0."""
        super().calibrated(low, high)
        self.alpha.data.fill_(1.0)
        self.shift.data.zero_()

    def range(self) -> tuple[Tensor, Tensor]:
        """(T_l,adj, T_l,adj + R_adj), which contains 0 as long as :meth:`project` is called."""
        extent = self.high - self.low
        low = self.low + clip_inclusive(self.shift, *self.shift_range) * extent
        return low, low + clip_inclusive(self.alpha, *self.alpha_range) * extent

    @torch.no_grad()
    def project(self) -> None:
        """Clamp both factors into their ranges, and further so that T_l,adj ≤ 0 ≤ T_r,adj.

        Past that the zero point sits at an end of the grid and passes no gradient to the shift,
        which would never return.
        """
        extent = self.high - self.low
        # Where 0 lies in the calibrated range, in units of R: between 0 and 1.
        zero = torch.where(extent > 0.0, -self.low / extent, 0.0)
        low, high = self.alpha_range
        self.shift.clamp_(*self.shift_range)
        self.shift.clamp_((zero - high).clamp(max=0.0), zero)
        self.alpha.clamp_(low, high)
        self.alpha.copy_(torch.maximum(self.alpha, (zero - self.shift).clamp(max=high)))

    def factors(self) -> dict[str, Tensor]:
        """α_R and α_T, clipped."""
        return {
            "alpha": self.alpha.detach().clamp(*self.alpha_range),
            "shift": self.shift.detach().clamp(*self.shift_range),
        }


def make_thresholds(spec: QuantSpec, grid: Grid, rows: int | None) -> Thresholds:
    """Build the parametrization that ``spec.thresholds`` names for a tensor on ``grid``."""
    if spec.thresholds == "frozen":
        return FrozenThresholds(grid, rows)
    if grid.kind == "asymmetric":
        return FatAsymmetric(grid, rows, spec.alpha_range, spec.shift_range)
    return FatSymmetric(grid, rows, spec.alpha_range)
