"""Statistics → first thresholds: one function per strategy.

Every strategy takes the statistics of a tensor, the grid that the tensor will live on and the
strategy's options, and returns (low, high), float64 [rows]: the thresholds before any factor is
applied. Symmetric grids use high alone; low is then −high or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fat.quant.observers import Statistics

if TYPE_CHECKING:
    from fat.spec import Grid, InitName, InitSpec

__all__ = ["HISTOGRAM_STRATEGIES", "STRATEGIES", "initial_thresholds"]

Strategy = Callable[[Statistics, "Grid", "InitSpec"], tuple[Tensor, Tensor]]


def minmax(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds at the smallest and largest value seen: nothing saturates, outliers rule."""
    del options
    low, high = statistics.minimum(), statistics.maximum()
    if grid.kind == "signed":
        high = torch.maximum(-low, high)
    return low, high


def percentile(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds with ``options.percentile`` % of the values between them.

    Symmetric grids take the percentile of the absolute values; asymmetric ones cut half of the rest
    at each end.
    """
    share = options.percentile / 100.0
    if grid.kind == "signed":
        high = statistics.magnitude_quantile(share)
        return -high, high
    if grid.kind == "unsigned":
        high = statistics.quantile(share)
        return torch.zeros_like(high), high
    tail = (1.0 - share) / 2
    return statistics.quantile(tail), statistics.quantile(1.0 - tail)


STRATEGIES: dict[InitName, Strategy] = {"minmax": minmax, "percentile": percentile}
HISTOGRAM_STRATEGIES: frozenset[InitName] = frozenset({"percentile"})
"""Strategies that ask for more than the range of an activation."""


def initial_thresholds(
    statistics: Statistics, grid: Grid, options: InitSpec
) -> tuple[Tensor, Tensor]:
    """Apply the strategy named in ``options`` and make the result a range that contains 0.

    Args:
        statistics: What was seen of the tensor.
        grid: The integers it will be put on.
        options: Strategy and its options.

    Returns:
        (low, high), float32 [rows] each, low ≤ 0 ≤ high. Both are 0 for a tensor that is all zero.
    """
    low, high = STRATEGIES[options.name](statistics, grid, options)
    high = high.clamp(min=0.0)
    low = {"signed": -high, "unsigned": torch.zeros_like(high), "asymmetric": low.clamp(max=0.0)}[
        grid.kind
    ]
    return low.float(), high.float()
