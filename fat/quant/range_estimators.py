"""Range estimators (init strategies): statistics of a tensor → its initial thresholds.

A strategy takes the statistics (:mod:`fat.quant.observers`), the integer grid and the options, and
returns (low, high), float64 [rows]. Symmetric grids use ``high`` alone. :func:`strategy` registers
a function under its own name, which ``init.weight.name`` and ``init.activation.name`` then accept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fat.quant.observers import Statistics

if TYPE_CHECKING:
    from fat.quant.config import Grid, InitSpec

__all__ = ["HISTOGRAM_STRATEGIES", "STRATEGIES", "initial_thresholds", "strategy"]

Strategy = Callable[[Statistics, "Grid", "InitSpec"], tuple[Tensor, Tensor]]
STRATEGIES: dict[str, Strategy] = {}
"""The registered strategies by name."""
HISTOGRAM_STRATEGIES: set[str] = set()
"""Strategies that need more of an activation than its minimum and maximum."""


def strategy(*, histogram: bool = True) -> Callable[[Strategy], Strategy]:
    """Register the decorated function as an init strategy under its own name.

    Args:
        histogram: Gather a histogram of activations; ``False`` if minimum and maximum are enough.
    """

    def register(function: Strategy) -> Strategy:
        STRATEGIES[function.__name__] = function
        if histogram:
            HISTOGRAM_STRATEGIES.add(function.__name__)
        return function

    return register


@strategy(histogram=False)
def minmax(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value seen: nothing saturates, outliers set the step."""
    del options
    low, high = statistics.minimum(), statistics.maximum()
    if grid.kind == "symmetric":
        high = torch.maximum(-low, high)
    return low, high


@strategy()
def percentile(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Return thresholds with ``options.percentile`` percent of the values between them.

    Symmetric grids use the percentile of the absolute values; affine grids cut half of the rest at
    each end.
    """
    fraction = options.percentile / 100.0
    if grid.kind == "symmetric":
        high = statistics.magnitude_quantile(fraction)
        return -high, high
    if grid.kind == "symmetric_unsigned":
        high = statistics.quantile(fraction)
        return torch.zeros_like(high), high
    tail = (1.0 - fraction) / 2
    return statistics.quantile(tail), statistics.quantile(1.0 - tail)


@strategy()
def mse(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Search for the thresholds that minimize Σ (x − Q(x))², within minimum and maximum.

    Symmetric grids try T = T_max·i/c for c = ``options.candidates`` and i = 1…c, then a ten times
    finer grid around the best. Affine grids first shrink both ends by the same factor, then each
    end separately, twice. Weights use all values, activations the bin centers of the histogram.
    """
    return _least_error(statistics, grid, options, 2.0)


@strategy()
def lp(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Search for the thresholds that minimize Σ |x − Q(x)|^p, p = ``options.exponent``.

    An exponent above 2 gives clipped outliers more weight and so clips less. For the search see
    :func:`mse`.
    """
    return _least_error(statistics, grid, options, options.exponent)


@strategy()
def entropy(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Search for the thresholds that minimize the information loss KL(P‖Q).

    P is the histogram between the thresholds, with the values outside added to the outermost bins.
    Q is the same histogram without the values outside, averaged over the non-empty bins that share
    an integer of the grid. Ranges with fewer bins than integers are skipped. Exact zeros, which
    every threshold represents, are left out. Symmetric grids use absolute values; affine grids
    shrink both ends by the same factor. For the search see :func:`mse`.

    Made for activations with millions of values. A row of a weight has fewer values than the
    histogram has bins: nine values of a depthwise filter give about minimum and maximum, some
    hundred are clipped far too much.

    Source: Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    counts, width = statistics.histogram()
    zero = counts.shape[1] // 2
    if grid.kind != "affine":
        below = counts[:, :zero].flip(1) if grid.kind == "symmetric" else 0.0
        counts, zero = counts[:, zero:] + below, 0
    filled = counts > 0.0
    bins = counts.shape[1]
    # Number of bins between zero and the outermost value at each end, [2, rows].
    first, last = filled.int().argmax(dim=1), bins - filled.flip(1).int().argmax(dim=1)
    extent = torch.stack([zero - first, last - zero]).clamp(min=0) * filled.any(dim=1)
    sums = [_running_sum(x) for x in (counts, filled.double(), torch.xlogy(counts, counts))]

    def loss(fractions: Tensor) -> Tensor:
        kept = (extent * fractions).ceil()
        divergence = _divergence(counts, sums, zero - kept[0], zero + kept[1], grid.qmax + 1)
        valid = (kept.sum(dim=0) > grid.qmax) | (fractions == 1.0).all(0)
        return torch.where(valid, divergence, math.inf)

    full = torch.ones_like(width).expand(2, -1)
    kept = (extent * _search(loss, full, options.candidates, _JOINTLY)).ceil() * width
    low, high = minmax(statistics, grid, options)
    return torch.maximum(-kept[0], low), torch.minimum(kept[1], high)


@strategy()
def aciq(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Return the optimal thresholds of a Laplace or Gaussian distribution in closed form.

    The distribution is the one whose ratio of mean absolute to standard deviation, √(1/2) or
    √(2/π), is closer to the tensor's. With M bits:

    * Laplace of scale b (the mean absolute deviation): T = b·W(3·4^M) with Lambert's function W;
    * Gaussian: T = σ·t, where t minimizes the sum of clipping and rounding error,
      2·((1 + t²)·P(x > t) − t·φ(t)) + t²/(3·4^M).

    Symmetric grids measure deviations from 0. Unsigned grids regard the values as the positive half
    of a distribution around 0, so that b = 2·E[x] and σ² = 2·E[x²], with one bit more (half the
    range for the same number of integers). Affine grids center the thresholds on the mean. The
    thresholds never exceed the smallest and largest value seen.

    Source: Banner et al. 2018 (arXiv 1810.05723), sections 3 and 4.
    """
    bits, center = grid.bits, torch.zeros_like(statistics.mean())
    if grid.kind == "symmetric":
        deviation, variance = statistics.mean_magnitude(), statistics.mean_square()
    elif grid.kind == "symmetric_unsigned":
        deviation, variance = 2 * statistics.mean(), 2 * statistics.mean_square()
        bits += 1
    else:
        center, deviation = statistics.mean(), statistics.mean_deviation()
        variance = (statistics.mean_square() - center.square()).clamp(min=0.0)
    sigma = variance.sqrt()
    middle = (math.sqrt(1 / 2) + math.sqrt(2 / math.pi)) / 2
    laplace = deviation < middle * sigma
    reach = torch.where(laplace, _laplace_clip(bits) * deviation, _gauss_clip(bits) * sigma)
    low, high = minmax(statistics, grid, options)
    return torch.maximum(center - reach, low), torch.minimum(center + reach, high)


@strategy()
def lsq(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Return the thresholds of LSQ's initial step: d = 2·E|x|/√q, q the largest integer.

    T = d·q on symmetric grids; affine grids scale the range of the values to the width
    d·(2^n − 1). At 8 bits this is usually far above the largest value, on purpose: the step is
    meant to be trained.

    Source: Esser et al. 2019 (arXiv 1902.08153), section 2.1.
    """
    width = 2 * statistics.mean_magnitude() * math.sqrt(grid.qmax)
    if grid.kind != "affine":
        return -width, width
    low, high = minmax(statistics, grid, options)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    factor = torch.where(high > low, width / (high - low), 0.0)
    return low * factor, high * factor


def initial_thresholds(
    statistics: Statistics, grid: Grid, options: InitSpec
) -> tuple[Tensor, Tensor]:
    """Apply the strategy that ``options`` names and extend its range to contain 0.

    Args:
        statistics: Statistics of the tensor.
        grid: Integer grid of the tensor.
        options: Name and options of the strategy.

    Returns:
        (low, high), float32 [rows], low ≤ 0 ≤ high. Both are 0 for a tensor that is all zero.
    """
    low, high = STRATEGIES[options.name](statistics, grid, options)
    high = high.clamp(min=0.0)
    low = {
        "symmetric": -high,
        "symmetric_unsigned": torch.zeros_like(high),
        "affine": low.clamp(max=0.0),
    }[grid.kind]
    return low.float(), high.float()


_NEGLIGIBLE = 1e-12
_JOINTLY = [[0, 1]]
_THEN_APART = [[0, 1], [0], [1], [0], [1]]
_BLOCK = 2**16


def _search(
    loss: Callable[[Tensor], Tensor], full: Tensor, candidates: int, turns: Sequence[Sequence[int]]
) -> Tensor:
    """Search for the fractions of the low and high end of a range that minimize each row's loss.

    Args:
        loss: Fractions [2, rows] → loss [rows].
        full: Start of the search: ones, [2, rows].
        candidates: Fractions 0, 1/candidates … 1 are tried, then a ten times finer grid around the
            best.
        turns: Ends (0 low, 1 high) that move together in each turn. On a tie the widest range wins.

    Returns:
        [2, rows].
    """
    fractions, least = full, loss(full)

    def attempt(ends: Sequence[int], fraction: Tensor | float) -> None:
        nonlocal fractions, least
        trial = fractions.clone()
        trial[ends] = fraction
        result = loss(trial)
        better = result < least
        fractions, least = torch.where(better, trial, fractions), torch.where(better, result, least)

    for ends in turns:
        for i in reversed(range(candidates)):
            attempt(ends, i / candidates)
        center = fractions[ends]
        for i in reversed(range(-9, 10)):
            attempt(ends, (center + i / (10 * candidates)).clamp(0.0, 1.0))
    return fractions


def _least_error(
    statistics: Statistics, grid: Grid, options: InitSpec, exponent: float
) -> tuple[Tensor, Tensor]:
    low, high = minmax(statistics, grid, options)
    ends = torch.stack([low.clamp(max=0.0), high.clamp(min=0.0)])
    if grid.kind == "symmetric_unsigned":
        ends[0] = 0.0
    elif grid.kind == "symmetric":
        ends[0] = -ends[1]
    # Scale rows by powers of two, which is exact, so that float32 holds every magnitude.
    reach = ends.abs().amax(dim=0)
    unit = torch.where(reach > 0.0, reach / torch.frexp(reach).mantissa, 1.0)
    values, counts = statistics.points()
    turns = _THEN_APART if grid.kind == "affine" else _JOINTLY
    found = []
    # A few rows at a time, so that the processor's cache holds what each candidate computes.
    for part in torch.split(torch.arange(len(values)), max(1, _BLOCK // values.shape[1])):
        x = values[part] / unit[part, None]
        span = ends[:, part] / unit[part]

        def loss(fractions: Tensor, x: Tensor = x, span: Tensor = span) -> Tensor:
            low, high = span * fractions
            return _error(x, counts, low, high, grid, exponent)

        best = _search(loss, torch.ones_like(span), options.candidates, turns)
        found.append(span * best * unit[part])
    low, high = torch.cat(found, dim=1)
    return low, high


def _error(
    x: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, grid: Grid, exponent: float
) -> Tensor:
    """Return Σ |x − Q(x)|^exponent of each row, [rows]; infinite for an empty range.

    Step and zero point are computed in float32, as :mod:`fat.quant.thresholds` does.
    """
    low, high = low.float()[:, None], high.float()[:, None]
    if grid.kind == "affine":
        step = (high - low) / grid.qmax
        zero = (-low / step).round_().clamp_(grid.qmin, grid.qmax).double()
    else:
        step = high / grid.qmax
        zero = torch.zeros_like(step, dtype=torch.float64)
    step = step.double()
    off = x / step
    off -= off.round().clamp_(grid.qmin - zero, grid.qmax - zero)
    off = off.square_() if exponent == 2.0 else off.abs_().pow_(exponent)
    total = (off if counts is None else off.mul_(counts)).sum(dim=1)
    step = step[:, 0]
    return torch.where(step > 0.0, total * step**exponent, math.inf)


def _running_sum(x: Tensor) -> Tensor:
    """Return the sums of the first 0…n values of each row, [rows, n + 1]."""
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))


def _divergence(
    counts: Tensor, sums: Sequence[Tensor], start: Tensor, end: Tensor, levels: int
) -> Tensor:
    """Return KL(P‖Q) of each row in nats, see :func:`entropy`.

    Q is constant over the non-empty bins of a level, so the running sums at the levels' edges are
    enough.

    Args:
        counts: [rows, bins].
        sums: :func:`_running_sum` of the counts c, of the non-empty bins, and of c·log c.
        start: Index of the first bin inside, [rows].
        end: Index after the last bin inside, [rows].
        levels: Number of integers that the bins inside are divided among.
    """
    width = ((end - start) / (levels - 1))[:, None]
    middles = torch.arange(levels + 1, dtype=torch.float64, device=start.device) - 0.5
    start, end = start[:, None], end[:, None]
    edges = (start + (middles * width).round_()).clamp_(start, end).long()
    first, last = edges[:, :1], edges[:, -1:]
    seen = sums[0]
    outside = torch.cat([seen.gather(1, first), seen[:, -1:] - seen.gather(1, last)], dim=1)
    held, filled, own = (x.gather(1, edges).diff(dim=1) for x in sums)
    # P adds the values outside to the outermost bins; Q leaves them out. If nothing else lies in
    # the outermost level, Q counts half a value there: otherwise KL(P‖Q) would be infinite, and a
    # single value in a long tail would rule out every threshold below it.
    at_ends = counts.gather(1, torch.cat([first, last - 1], dim=1).clamp(min=0))
    filled[:, [0, -1]] += ((at_ends == 0.0) & (outside > 0.0)).double()
    kept = held.clone()
    kept[:, [0, -1]] += 0.5 * ((held[:, [0, -1]] == 0.0) & (outside > 0.0)).double()
    joined = at_ends + outside
    own[:, [0, -1]] += torch.xlogy(joined, joined) - torch.xlogy(at_ends, at_ends)
    average = (kept / filled).nan_to_num_(0.0)
    cross = torch.xlogy(held, average)
    cross[:, [0, -1]] += torch.xlogy(outside, average[:, [0, -1]])
    total = seen[:, -1]
    divergence = (own - cross).sum(dim=1) / total - total.log() + kept.sum(dim=1).log()
    # Rounding must not decide between ranges without loss; a range without values is invalid.
    divergence = torch.where(divergence > _NEGLIGIBLE, divergence, 0.0)
    return torch.where(held.sum(dim=1) > 0.0, divergence, math.inf)


def _laplace_clip(bits: int) -> float:
    """Return the optimal threshold of a Laplace distribution in units of b: W(3·4^bits).

    Examples:
        >>> round(_laplace_clip(4), 2), round(_laplace_clip(8), 2)
        (5.03, 9.9)
    """
    goal = math.log(3 * 4**bits)
    t = goal
    for _ in range(20):  # Newton's iteration for t + log t = log(3·4^bits)
        t -= (t + math.log(t) - goal) / (1 + 1 / t)
    return t


def _gauss_clip(bits: int) -> float:
    """Return the optimal threshold of a Gaussian distribution in standard deviations.

    Examples:
        >>> [round(_gauss_clip(bits), 3) for bits in (2, 4, 8)]
        [1.711, 2.559, 3.924]
    """
    rounding = 1 / (6 * 4**bits)
    t = 0.0
    for _ in range(100):  # Newton's iteration for the zero of the error's convex derivative
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        beyond = math.erfc(t / math.sqrt(2)) / 2
        t += (density - t * (beyond + rounding)) / (beyond + rounding)
    return t
