"""Observers: statistics of tensors, for the range estimators.

Statistics of weights hold all values. Those of activations are updated batch by batch in memory
that does not depend on the number of images; on a GPU without waiting for it.

All results are on the CPU, and so are the thresholds that init strategies compute from them. Range
and counts of bins are exact, so that the same values give the same thresholds on every device, bit
for bit, with strategies that use nothing else: ``minmax``, ``percentile``, ``mse``, ``lp`` and
``entropy``. Means of activations are summed in float64 in an order that depends on the device: with
``aciq`` and ``lsq`` a threshold may, rarely, differ in the last bit of float32.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fat.utils import distributed

__all__ = ["HistogramStatistics", "RangeStatistics", "SampleStatistics", "Statistics"]


class Statistics(Protocol):
    """Statistics that init strategies may use.

    All results are float64 on the CPU, one row per threshold.
    """

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

    They are computed on the CPU wherever the values are, because means and errors are float sums:
    their order depends on the device, and a candidate of a search may win by the last bit.

    Args:
        values: [rows, values per row], on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().cpu().double()

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
    """Running minimum and maximum of a tensor, which is all that ``minmax`` needs.

    They stay on the tensor's device until a result is asked for.
    """

    def __init__(self) -> None:
        self._minimum = torch.tensor(math.inf)
        self._maximum = torch.tensor(-math.inf)

    def update(self, x: Tensor) -> None:
        """Add one batch of any shape."""
        low, high = torch.aminmax(x.detach())
        # NaN stays NaN in both, which has to be reported.
        self._minimum = torch.minimum(self._minimum.to(low.device), low)
        self._maximum = torch.maximum(self._maximum.to(low.device), high)

    def merge(self) -> None:
        """Move the statistics to the CPU, and combine those of all processes.

        With several processes, each of them must call this.
        """
        ends = torch.stack([self._minimum, self._maximum]).cpu().double()
        if distributed.size() > 1:
            # Gathered instead of reduced, because reductions may drop NaN.
            rows = distributed.gather_rows(ends)
            ends = torch.stack([rows[:, 0].amin(), rows[:, 1].amax()])
        self._minimum, self._maximum = ends.unbind()

    @property
    def seen(self) -> bool:
        """True after the first batch."""
        return self.minimum().item() != math.inf or self.maximum().item() != -math.inf

    def minimum(self) -> Tensor:
        """Return the smallest value, [1]."""
        return self._minimum.cpu().double().reshape(1)

    def maximum(self) -> Tensor:
        """Return the largest value, [1]."""
        return self._maximum.cpu().double().reshape(1)


_PART = 2**16
"""Values that the CPU processes at a time, few enough for its cache."""
_DEVICE_PART = 2**24
"""Values that other devices process at a time, which takes about half a gigabyte."""


class HistogramStatistics(RangeStatistics):
    """Histogram whose range doubles when a value falls outside.

    The bins lie symmetrically around 0 and end at a power of two, so that their edges and the bin
    of a value are exact. Doubling merges neighboring bins: no count crosses an edge, and the result
    does not depend on how the values were batched. A bin is at most 4/``bins`` of the largest
    magnitude wide.

    Exact zeros (half of all values after a ReLU) are counted separately, and moments are summed in
    float64 from the values: an outlier coarsens the bins but not the moments.

    Args:
        bins: Number of bins, a power of two and at least 4.
    """

    def __init__(self, bins: int = 2**14) -> None:
        super().__init__()
        self._bins = bins
        self._limit = torch.tensor(0.0, dtype=torch.float64)
        self._counts = torch.zeros(bins, dtype=torch.int64)
        # The number of zeros, and the sums of x, |x| and x².
        self._sums = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add one batch of any shape.

        NaN and infinity make the counts invalid; they are reported by the range.
        """
        x = x.detach()
        if x.device.type == "mps":  # has no float64
            x = x.cpu()
        super().update(x)
        self._limit, self._counts, self._sums = (
            state.to(x.device) for state in (self._limit, self._counts, self._sums)
        )
        reach = torch.maximum(-self._minimum, self._maximum).double()
        # The power of two strictly above every value: doubling would move a value on the last edge
        # to another bin. The quotient is exact.
        power = reach / torch.frexp(reach).mantissa
        self._extend(torch.where((reach > 0.0) & (reach < math.inf), power, self._limit))
        half = self._bins // 2
        # Bins per unit; 0 instead of half / 0 as long as all values are zero.
        density = (torch.full_like(self._limit, half) / self._limit).nan_to_num_(posinf=0.0)
        # In float64, because float32 would overflow when tiny values are scaled to bins.
        for part in torch.split(x.flatten(), _PART if x.device.type == "cpu" else _DEVICE_PART):
            values = part.double()
            bins = torch.mul(values, density).floor_().add_(half).int()
            self._counts += _count(bins.clamp_(0, self._bins - 1), self._bins)
            zeros, total, square = (part == 0).sum(), values.sum(), torch.dot(values, values)
            self._sums += torch.stack([zeros.double(), total, values.abs().sum(), square])

    def merge(self) -> None:
        """Move the statistics to the CPU, and combine those of all processes.

        With several processes, each of them must call this.
        """
        super().merge()
        state = torch.cat([self._limit.reshape(1), self._sums, self._counts.double()]).cpu()
        self._limit, self._sums, self._counts = state[0], state[1:5], state[5:].long()
        self._extend(distributed.all_max(self._limit))
        self._counts = distributed.all_sum(self._counts)
        self._sums = distributed.all_sum(self._sums)

    def _extend(self, limit: Tensor) -> None:
        """Extend the bins to ±limit, a power of two not below the present one, or 0."""
        half = self._bins // 2
        # 0 / 0 if there were only zeros, which lie in the same bin at any width.
        ratio = (self._limit / limit).nan_to_num_(0.0)
        place = torch.arange(-half, half, dtype=torch.float64, device=limit.device)
        place = place.mul_(ratio).floor_().add_(half).long()
        self._counts = torch.zeros_like(self._counts).scatter_add_(0, place, self._counts)
        self._limit = limit

    def edges(self) -> Tensor:
        """Return the edges of the bins, float64 [bins + 1]."""
        limit = self._limit.item()
        return torch.linspace(-limit, limit, self._bins + 1, dtype=torch.float64)

    def counts(self) -> Tensor:
        """Return the number of values in each bin, float64 [bins]."""
        return self._counts.cpu().double()

    def quantile(self, fraction: float) -> Tensor:
        """Return the quantile, linearly interpolated within a bin, [1]."""
        value = _histogram_quantile(self.counts(), self.edges(), fraction)
        return value.clamp(self.minimum(), self.maximum())

    def magnitude_quantile(self, fraction: float) -> Tensor:
        """Return the quantile of absolute values, linearly interpolated within a bin, [1]."""
        half = self._bins // 2
        counts = self.counts()
        folded = counts[half:] + counts[:half].flip(0)
        value = _histogram_quantile(folded, self.edges()[half:], fraction)
        return value.clamp(max=torch.maximum(-self.minimum(), self.maximum()))

    def mean(self) -> Tensor:
        """Return the exact mean, [1]."""
        return self._sums[1].cpu().reshape(1) / self.counts().sum()

    def mean_magnitude(self) -> Tensor:
        """Return the exact mean absolute value, [1]."""
        return self._sums[2].cpu().reshape(1) / self.counts().sum()

    def mean_square(self) -> Tensor:
        """Return the exact mean square, [1]."""
        return self._sums[3].cpu().reshape(1) / self.counts().sum()

    def mean_deviation(self) -> Tensor:
        """Return the mean absolute deviation from the mean, by the centers of bins, [1]."""
        values, counts = self.points()
        return ((values - self.mean()).abs() * counts).sum(dim=1) / counts.sum()

    def points(self) -> tuple[Tensor, Tensor]:
        """Return 0 and the centers of bins with nonzero values, [1, n], and their counts."""
        counts, width = self.histogram()
        held = counts[0].nonzero()[:, 0]
        # The center of an outermost bin may lie beyond every value.
        centers = ((held + 0.5 - self._bins // 2) * width).clamp(self.minimum(), self.maximum())
        zeros = self._sums[:1].cpu()
        return torch.cat([0 * zeros, centers])[None], torch.cat([zeros, counts[0, held]])[None]

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return counts [1, bins] of the nonzero values, and the width [1] of a bin."""
        counts = self.counts()
        counts[self._bins // 2] -= self._sums[0].cpu()
        width = torch.tensor([self._limit.item() / (self._bins // 2)], dtype=torch.float64)
        return counts[None], width


def _count(bins: Tensor, length: int) -> Tensor:
    """Return how often each of 0…length − 1 occurs in an int32 tensor, int64 [length]."""
    if bins.device.type == "cpu":
        return torch.bincount(bins, minlength=length)
    # On other devices bincount would wait for the largest value. Sums of integers are the same in
    # any order.
    counts = torch.zeros(length, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins.long(), torch.ones_like(counts[:1]).expand(len(bins)))


def _histogram_quantile(counts: Tensor, edges: Tensor, fraction: float) -> Tensor:
    total = counts.cumsum(0)
    target = fraction * float(total[-1])
    # A target of at least one skips empty bins at the start.
    bin_index = int(torch.searchsorted(total, max(target, 1.0)).clamp(max=len(counts) - 1))
    before = float(total[bin_index - 1]) if bin_index else 0.0
    inside = (target - before) / max(float(counts[bin_index]), 1.0)
    width = edges[bin_index + 1] - edges[bin_index]
    return (edges[bin_index] + width * min(max(inside, 0.0), 1.0)).reshape(1)
