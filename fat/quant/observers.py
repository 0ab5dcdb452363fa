"""Observers: statistics of tensors, for the range estimators.

Statistics of weights hold all values. Those of activations are updated batch by batch in memory
that does not depend on the number of images.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fat.utils import distributed

__all__ = ["HistogramStatistics", "RangeStatistics", "SampleStatistics", "Statistics"]


class Statistics(Protocol):
    """Statistics that init strategies may use. All results are float64, one row per threshold."""

    def minimum(self) -> Tensor:
        """Return the smallest value of each row, [rows]."""
        ...

    def maximum(self) -> Tensor:
        """Return the largest value of each row, [rows]."""
        ...

    def quantile(self, fraction: float) -> Tensor:
        """Return the value below which a fraction (0…1) of each row lies, [rows]."""
        ...

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the quantile of each row's absolute values, [rows]."""
        ...

    def mean(self) -> Tensor:
        """Return the mean of each row, [rows]."""
        ...

    def mean_magnitude(self) -> Tensor:
        """Return the mean absolute value of each row, [rows]."""
        ...

    def mean_square(self) -> Tensor:
        """Return the mean square of each row, [rows]."""
        ...

    def mean_deviation(self) -> Tensor:
        """Return the mean absolute deviation from the mean of each row, [rows]."""
        ...

    def points(self) -> tuple[Tensor, Tensor | None]:
        """Return values [rows, n] that represent each row, and their counts if not all 1."""
        ...

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return the number of nonzero values in each bin, and the width of a bin.

        Returns:
            counts [rows, bins], where bin j covers (j − bins/2)·width up to (j + 1 − bins/2)·width,
            and width [rows], which is 0 for a row that is all zero.
        """
        ...


_SAMPLE_BINS = 4096


class SampleStatistics:
    """Exact statistics of values in memory, such as a weight.

    Args:
        values: [rows, values per row].
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().double()

    def minimum(self) -> Tensor:
        """Return the smallest value of each row, [rows]."""
        return self._values.amin(dim=1)

    def maximum(self) -> Tensor:
        """Return the largest value of each row, [rows]."""
        return self._values.amax(dim=1)

    def quantile(self, fraction: float) -> Tensor:
        """Return the linearly interpolated quantile of each row, [rows]."""
        return _quantile(self._values, fraction)

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the quantile of each row's absolute values, [rows]."""
        return _quantile(self._values.abs(), fraction)

    def mean(self) -> Tensor:
        """Return the mean of each row, [rows]."""
        return self._values.mean(dim=1)

    def mean_magnitude(self) -> Tensor:
        """Return the mean absolute value of each row, [rows]."""
        return self._values.abs().mean(dim=1)

    def mean_square(self) -> Tensor:
        """Return the mean square of each row, [rows]."""
        return self._values.square().mean(dim=1)

    def mean_deviation(self) -> Tensor:
        """Return the mean absolute deviation from the mean of each row, [rows]."""
        return (self._values - self._values.mean(dim=1, keepdim=True)).abs().mean(dim=1)

    def points(self) -> tuple[Tensor, None]:
        """Return the values, [rows, values per row]."""
        return self._values, None

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return counts [rows, 4096] of the nonzero values, and the bin width of each row, [rows].

        The largest magnitude of a row lies on the outer edge of its first or last bin.
        """
        half = _SAMPLE_BINS // 2
        width = self._values.abs().amax(dim=1) / half
        bins = (self._values / width.unsqueeze(1)).floor_().add_(half).nan_to_num_(half)
        counts = self._values.new_zeros(len(width), _SAMPLE_BINS)
        inside = bins.clamp_(max=_SAMPLE_BINS - 1).long()
        return counts.scatter_add_(1, inside, (self._values != 0.0).double()), width


def _quantile(values: Tensor, fraction: float) -> Tensor:
    # Sort, because torch.quantile rejects more than 16 million values.
    ordered = values.sort(dim=1).values
    position = fraction * (values.shape[1] - 1)
    below = int(position)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below)


class RangeStatistics:
    """Running minimum and maximum of a tensor, which is all that ``minmax`` needs."""

    def __init__(self) -> None:
        self._minimum = float("inf")
        self._maximum = float("-inf")

    def update(self, x: Tensor) -> None:
        """Add one batch of any shape."""
        self._widen(*(float(value) for value in torch.aminmax(x.detach())))

    def merge(self) -> None:
        """Combine the statistics of all processes, each of which must call this."""
        if distributed.size() == 1:
            return
        # Gathered instead of reduced, because reductions may drop NaN.
        for low, high in distributed.gather_rows(self._range()).tolist():
            self._widen(low, high)

    def _range(self) -> Tensor:
        return torch.tensor([self._minimum, self._maximum], dtype=torch.float64)

    def _widen(self, low: float, high: float) -> None:
        # Python's min and max may drop NaN, which has to be reported.
        self._minimum = low if math.isnan(low) else min(self._minimum, low)
        self._maximum = high if math.isnan(high) else max(self._maximum, high)

    @property
    def seen(self) -> bool:
        """True after the first batch."""
        return self._minimum != math.inf or self._maximum != -math.inf

    def minimum(self) -> Tensor:
        """Return the smallest value, [1]."""
        return torch.tensor([self._minimum], dtype=torch.float64)

    def maximum(self) -> Tensor:
        """Return the largest value, [1]."""
        return torch.tensor([self._maximum], dtype=torch.float64)


_PART = 2**16
"""Values that are processed at a time, few enough for the processor's cache."""


class HistogramStatistics(RangeStatistics):
    """Histogram whose range doubles when a value falls outside.

    The bins lie symmetrically around 0 and end at a power of two, so that their edges and the bin
    of a value are exact. Doubling merges pairs of neighboring bins: no count crosses an edge, and
    the result does not depend on how the values were batched. A bin is at most 4/``bins`` of the
    largest magnitude wide.

    Exact zeros (half of all values after a ReLU) are counted separately, and moments are summed in
    float64 from the values: an outlier coarsens the bins but not the moments.

    Args:
        bins: Number of bins, a power of two and at least 4.
    """

    def __init__(self, bins: int = 2**14) -> None:
        super().__init__()
        self._bins = bins
        self._limit = 0.0
        self._counts = torch.zeros(bins, dtype=torch.float64)
        # The number of zeros, and the sums of x, |x| and x².
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add one batch of any shape."""
        super().update(x)
        reach = max(-self._minimum, self._maximum)
        if not math.isfinite(self._minimum + self._maximum):
            return  # NaN or infinity cannot be counted; the range reports it
        half = self._bins // 2
        if reach == 0.0:
            self._counts[half] += x.numel()
            self._sums[0] += x.numel()
            return
        if self._limit == 0.0:
            self._limit = math.ldexp(1.0, math.frexp(reach)[1])
        # Strictly above every value: doubling would move a value on the last edge to another bin.
        while self._limit <= reach:
            self._double()
        counts, sums = self._counts.to(x.device), self._sums.to(x.device)
        # In float64, because float32 would overflow when tiny values are scaled to bins.
        for part in torch.split(x.detach().flatten(), _PART):
            values = part.double()
            bins = torch.mul(values, half / self._limit).floor_().add_(half).int()
            counts += torch.bincount(bins, minlength=self._bins)
            zeros, total, square = (part == 0).sum(), values.sum(), torch.dot(values, values)
            sums += torch.stack([zeros.double(), total, values.abs().sum(), square])
        self._counts, self._sums = counts.cpu(), sums.cpu()

    def merge(self) -> None:
        """Combine the statistics of all processes, each of which must call this."""
        super().merge()
        limit = float(distributed.all_max(torch.tensor(self._limit, dtype=torch.float64)))
        if limit > 0.0:
            if self._limit == 0.0:  # only zeros, which lie in the same bin at any width
                self._limit = limit
            while self._limit < limit:
                self._double()
        self._counts = distributed.all_sum(self._counts)
        self._sums = distributed.all_sum(self._sums)

    def _double(self) -> None:
        quarter = self._bins // 4
        merged = self._counts.view(-1, 2).sum(dim=1)
        self._counts = torch.zeros_like(self._counts)
        self._counts[quarter : quarter + len(merged)] = merged
        self._limit *= 2

    def edges(self) -> Tensor:
        """Return the edges of the bins, float64 [bins + 1]."""
        return torch.linspace(-self._limit, self._limit, self._bins + 1, dtype=torch.float64)

    def counts(self) -> Tensor:
        """Return the number of values in each bin, float64 [bins]."""
        return self._counts

    def quantile(self, fraction: float) -> Tensor:
        """Return the quantile, linearly interpolated within a bin, [1]."""
        value = _histogram_quantile(self.counts(), self.edges(), fraction)
        return value.clamp(self._minimum, self._maximum)

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the quantile of absolute values, linearly interpolated within a bin, [1]."""
        half = self._bins // 2
        folded = self._counts[half:] + self._counts[:half].flip(0)
        value = _histogram_quantile(folded, self.edges()[half:], fraction)
        return value.clamp(max=max(-self._minimum, self._maximum))

    def mean(self) -> Tensor:
        """Return the exact mean, [1]."""
        return self._sums[1].reshape(1) / self._counts.sum()

    def mean_magnitude(self) -> Tensor:
        """Return the exact mean absolute value, [1]."""
        return self._sums[2].reshape(1) / self._counts.sum()

    def mean_square(self) -> Tensor:
        """Return the exact mean square, [1]."""
        return self._sums[3].reshape(1) / self._counts.sum()

    def mean_deviation(self) -> Tensor:
        """Return the mean absolute deviation from the mean, by the centers of bins, [1]."""
        values, counts = self.points()
        return ((values - self.mean()).abs() * counts).sum(dim=1) / counts.sum()

    def points(self) -> tuple[Tensor, Tensor]:
        """Return 0 and the centers of bins with nonzero values, [1, n], and their counts."""
        counts, width = self.histogram()
        held = counts[0].nonzero()[:, 0]
        # The center of an outermost bin may lie beyond every value.
        centers = ((held + 0.5 - self._bins // 2) * width).clamp(self._minimum, self._maximum)
        zeros = self._sums[:1]
        return torch.cat([0 * zeros, centers])[None], torch.cat([zeros, counts[0, held]])[None]

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return counts [1, bins] of the nonzero values, and the width [1] of a bin."""
        counts = self._counts.clone()
        counts[self._bins // 2] -= self._sums[0]
        width = torch.tensor([self._limit / (self._bins // 2)], dtype=torch.float64)
        return counts[None], width


def _histogram_quantile(counts: Tensor, edges: Tensor, fraction: float) -> Tensor:
    total = counts.cumsum(0)
    target = fraction * float(total[-1])
    # A target of at least one skips empty bins at the start.
    bin_index = int(torch.searchsorted(total, max(target, 1.0)).clamp(max=len(counts) - 1))
    before = float(total[bin_index - 1]) if bin_index else 0.0
    inside = (target - before) / max(float(counts[bin_index]), 1.0)
    width = edges[bin_index + 1] - edges[bin_index]
    return (edges[bin_index] + width * min(max(inside, 0.0), 1.0)).reshape(1)
