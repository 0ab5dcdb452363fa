"""Statistics of a tensor, gathered in memory that does not grow with the number of images."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["HistogramStatistics", "RangeStatistics", "SampleStatistics", "Statistics"]


class Statistics(Protocol):
    """What an init strategy may ask of a tensor. All results are float64, one row per threshold."""

    def minimum(self) -> Tensor:
        """Smallest value of each row, [rows]."""
        ...

    def maximum(self) -> Tensor:
        """Largest value of each row, [rows]."""
        ...

    def quantile(self, share: float) -> Tensor:
        """Value below which the given share (0…1) of each row lies, [rows]."""
        ...

    def magnitude_quantile(self, share: float) -> Tensor:
        """Value below which the given share (0…1) of each row's absolute values lies, [rows]."""
        ...


class SampleStatistics:
    """Statistics of values that are all in memory: the weights. Exact.

    Args:
        values: [rows, values per row].
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().double()

    def minimum(self) -> Tensor:
        """Smallest value of each row, [rows]."""
        return self._values.amin(dim=1)

    def maximum(self) -> Tensor:
        """Largest value of each row, [rows]."""
        return self._values.amax(dim=1)

    def quantile(self, share: float) -> Tensor:
        """Value below which the given share of each row lies, linearly interpolated, [rows]."""
        return _quantile(self._values, share)

    def magnitude_quantile(self, share: float) -> Tensor:
        """The same of the absolute values, [rows]."""
        return _quantile(self._values.abs(), share)


def _quantile(values: Tensor, share: float) -> Tensor:
    # torch.quantile refuses more than 16 million values; sorting does not.
    ordered = values.sort(dim=1).values
    position = share * (values.shape[1] - 1)
    below = int(position)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)


class RangeStatistics:
    """Running minimum and maximum of a whole tensor: all that ``minmax`` needs, in one pass."""

    def __init__(self) -> None:
        self._minimum = float("inf")
        self._maximum = float("-inf")

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        # Python's min and max would pass over NaN, which has to be reported.
        self._minimum = low if math.isnan(low) else min(self._minimum, low)
        self._maximum = high if math.isnan(high) else max(self._maximum, high)

    @property
    def seen(self) -> bool:
        """Whether any batch came."""
        return self._minimum != math.inf or self._maximum != -math.inf

    def minimum(self) -> Tensor:
        """Smallest value so far, [1]."""
        return torch.tensor([self._minimum], dtype=torch.float64)

    def maximum(self) -> Tensor:
        """Largest value so far, [1]."""
        return torch.tensor([self._maximum], dtype=torch.float64)


_PART = 2**18


class HistogramStatistics(RangeStatistics):
    """A histogram whose range grows by exact doubling, so that no count is ever moved by guess.

    The bins lie symmetrically around 0, up to a power of two, so that their edges and the bin of a
    value are exact. When a value falls outside, the range is doubled until it fits and pairs of
    neighbouring bins are added; a count never crosses a bin edge, and the result is the same
    however the values came in batches. A bin is at most 4/``bins`` of the largest magnitude wide.

    Args:
        bins: Number of bins, a power of two and at least 4.
    """

    def __init__(self, bins: int = 8192) -> None:
        super().__init__()
        self._bins = bins
        self._limit = 0.0
        self._counts = torch.zeros(bins, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        super().update(x)
        reach = max(-self._minimum, self._maximum)
        if not math.isfinite(self._minimum + self._maximum):
            return  # there is nothing to count; the range tells
        half = self._bins // 2
        if reach == 0.0:
            self._counts[half] += x.numel()
            return
        if self._limit == 0.0:
            self._limit = math.ldexp(1.0, math.frexp(reach)[1])
        # Above every value: one on the last bin's closed end would change its bin by doubling.
        while self._limit <= reach:
            self._double()
        # In parts, so that the float64 copy is small, as float32 would lose counts above 2^24.
        for part in torch.split(x.detach().flatten(), _PART):
            bins = torch.mul(part.double(), half / self._limit).floor_()
            self._counts += torch.histc(bins, bins=self._bins, min=-half, max=half).cpu()

    def _double(self) -> None:
        quarter = self._bins // 4
        merged = self._counts.view(-1, 2).sum(dim=1)
        self._counts = torch.zeros_like(self._counts)
        self._counts[quarter : quarter + len(merged)] = merged
        self._limit *= 2

    def edges(self) -> Tensor:
        """Edges of the bins, float64 [bins + 1]."""
        return torch.linspace(-self._limit, self._limit, self._bins + 1, dtype=torch.float64)

    def counts(self) -> Tensor:
        """How many values each bin holds, float64 [bins]."""
        return self._counts

    def quantile(self, share: float) -> Tensor:
        """Value below which the given share lies, linear inside a bin, [1]."""
        value = _histogram_quantile(self.counts(), self.edges(), share)
        return value.clamp(self._minimum, self._maximum)

    def magnitude_quantile(self, share: float) -> Tensor:
        """Value below which the given share of absolute values lies, linear inside a bin, [1]."""
        half = self._bins // 2
        folded = self._counts[half:] + self._counts[:half].flip(0)
        value = _histogram_quantile(folded, self.edges()[half:], share)
        return value.clamp(max=max(-self._minimum, self._maximum))


def _histogram_quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    total = counts.cumsum(0)
    target = share * float(total[-1])
    # Counts are whole, so that looking for at least one skips empty bins at the start.
    bin_index = int(torch.searchsorted(total, max(target, 1.0)).clamp(max=len(counts) - 1))
    before = float(total[bin_index - 1]) if bin_index else 0.0
    inside = (target - before) / max(float(counts[bin_index]), 1.0)
    width = edges[bin_index + 1] - edges[bin_index]
    return (edges[bin_index] + width * min(max(inside, 0.0), 1.0)).reshape(1)
