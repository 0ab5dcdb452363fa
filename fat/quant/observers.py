"""Statistics of a tensor, gathered in memory that does not grow with the number of images."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fat.utils import distributed

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

    def mean(self) -> Tensor:
        """Mean of each row, [rows]."""
        ...

    def mean_magnitude(self) -> Tensor:
        """Mean absolute value of each row, [rows]."""
        ...

    def mean_square(self) -> Tensor:
        """Mean square of each row, [rows]."""
        ...

    def mean_deviation(self) -> Tensor:
        """Mean absolute deviation from the mean of each row, [rows]."""
        ...

    def points(self) -> tuple[Tensor, Tensor | None]:
        """Values [rows, n] that stand for each row, and how often each was seen, if not once."""
        ...

    def histogram(self) -> tuple[Tensor, Tensor]:
        """How many values fell into each bin, exact zeros left out, and the width of a bin.

        Returns:
            counts [rows, bins], where bin j covers (j − bins/2)·width up to (j + 1 − bins/2)·width,
            and width [rows], which is 0 for a row that is all zero.
        """
        ...


_SAMPLE_BINS = 4096


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

    def mean(self) -> Tensor:
        """Mean of each row, [rows]."""
        return self._values.mean(dim=1)

    def mean_magnitude(self) -> Tensor:
        """Mean absolute value of each row, [rows]."""
        return self._values.abs().mean(dim=1)

    def mean_square(self) -> Tensor:
        """Mean square of each row, [rows]."""
        return self._values.square().mean(dim=1)

    def mean_deviation(self) -> Tensor:
        """Mean absolute deviation from the mean of each row, [rows]."""
        return (self._values - self._values.mean(dim=1, keepdim=True)).abs().mean(dim=1)

    def points(self) -> tuple[Tensor, None]:
        """The values themselves, [rows, values per row]."""
        return self._values, None

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Counts [rows, 4096] of the values that are not 0, and width [rows] of a row's bins.

        The largest magnitude of a row lies on the outer edge of its first or last bin.
        """
        half = _SAMPLE_BINS // 2
        width = self._values.abs().amax(dim=1) / half
        bins = (self._values / width.unsqueeze(1)).floor_().add_(half).nan_to_num_(half)
        counts = self._values.new_zeros(len(width), _SAMPLE_BINS)
        inside = bins.clamp_(max=_SAMPLE_BINS - 1).long()
        return counts.scatter_add_(1, inside, (self._values != 0.0).double()), width


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
        self._widen(*(float(value) for value in torch.aminmax(x.detach())))

    def merge(self) -> None:
        """Make these the statistics of what all processes saw; all must call it."""
        if distributed.size() == 1:
            return
        # Gathered and compared here, as collectives pass over NaN.
        for low, high in distributed.gather_rows(self._range()).tolist():
            self._widen(low, high)

    def _range(self) -> Tensor:
        return torch.tensor([self._minimum, self._maximum], dtype=torch.float64)

    def _widen(self, low: float, high: float) -> None:
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


# Few enough that the copies of a part stay in the cache.
_PART = 2**16


class HistogramStatistics(RangeStatistics):
    """A histogram whose range grows by exact doubling, so that no count is ever moved by guess.

    The bins lie symmetrically around 0, up to a power of two, so that their edges and the bin of a
    value are exact. When a value falls outside, the range is doubled until it fits and pairs of
    neighbouring bins are added; a count never crosses a bin edge, and the result is the same
    however the values came in batches. A bin is at most 4/``bins`` of the largest magnitude wide.

    Beside it, exact zeros (half of all values after a ReLU) are counted apart, and the moments are
    summed in float64 from the values themselves: an outlier coarsens the bins, but not the moments.

    Args:
        bins: Number of bins, a power of two and at least 4.
    """

    def __init__(self, bins: int = 2**14) -> None:
        super().__init__()
        self._bins = bins
        self._limit = 0.0
        self._counts = torch.zeros(bins, dtype=torch.float64)
        # How many zeros, and the sums of x, |x| and x².
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        super().update(x)
        reach = max(-self._minimum, self._maximum)
        if not math.isfinite(self._minimum + self._maximum):
            return  # there is nothing to count; the range tells
        half = self._bins // 2
        if reach == 0.0:
            self._counts[half] += x.numel()
            self._sums[0] += x.numel()
            return
        if self._limit == 0.0:
            self._limit = math.ldexp(1.0, math.frexp(reach)[1])
        # Above every value: one on the last bin's closed end would change its bin by doubling.
        while self._limit <= reach:
            self._double()
        counts, sums = self._counts.to(x.device), self._sums.to(x.device)
        # In float64, as float32 cannot hold the scaled values of a tensor that all but vanishes.
        for part in torch.split(x.detach().flatten(), _PART):
            values = part.double()
            bins = torch.mul(values, half / self._limit).floor_().add_(half).int()
            counts += torch.bincount(bins, minlength=self._bins)
            zeros, total, square = (part == 0).sum(), values.sum(), torch.dot(values, values)
            sums += torch.stack([zeros.double(), total, values.abs().sum(), square])
        self._counts, self._sums = counts.cpu(), sums.cpu()

    def merge(self) -> None:
        """Make these the statistics of what all processes saw; all must call it."""
        super().merge()
        limit = float(distributed.all_max(torch.tensor(self._limit, dtype=torch.float64)))
        if limit > 0.0:
            if self._limit == 0.0:  # nothing but zeros came, which lie in the same bin of any width
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

    def mean(self) -> Tensor:
        """Mean of the values themselves, [1]."""
        return self._sums[1].reshape(1) / self._counts.sum()

    def mean_magnitude(self) -> Tensor:
        """Mean absolute value of the values themselves, [1]."""
        return self._sums[2].reshape(1) / self._counts.sum()

    def mean_square(self) -> Tensor:
        """Mean square of the values themselves, [1]."""
        return self._sums[3].reshape(1) / self._counts.sum()

    def mean_deviation(self) -> Tensor:
        """Mean absolute deviation from the mean, of the centres of bins, [1]."""
        values, counts = self.points()
        return ((values - self.mean()).abs() * counts).sum(dim=1) / counts.sum()

    def points(self) -> tuple[Tensor, Tensor]:
        """0 and the centres of bins that hold more than zeros, [1, n], and how many values each."""
        counts, width = self.histogram()
        held = counts[0].nonzero()[:, 0]
        # No further out than any value: a bin's centre can be.
        centres = ((held + 0.5 - self._bins // 2) * width).clamp(self._minimum, self._maximum)
        zeros = self._sums[:1]
        return torch.cat([0 * zeros, centres])[None], torch.cat([zeros, counts[0, held]])[None]

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Counts [1, bins] of the values that are not 0, and the width [1] of a bin."""
        counts = self._counts.clone()
        counts[self._bins // 2] -= self._sums[0]
        width = torch.tensor([self._limit / (self._bins // 2)], dtype=torch.float64)
        return counts[None], width


def _histogram_quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    total = counts.cumsum(0)
    target = share * float(total[-1])
    # Counts are whole, so that looking for at least one skips empty bins at the start.
    bin_index = int(torch.searchsorted(total, max(target, 1.0)).clamp(max=len(counts) - 1))
    before = float(total[bin_index - 1]) if bin_index else 0.0
    inside = (target - before) / max(float(counts[bin_index]), 1.0)
    width = edges[bin_index + 1] - edges[bin_index]
    return (edges[bin_index] + width * min(max(inside, 0.0), 1.0)).reshape(1)
