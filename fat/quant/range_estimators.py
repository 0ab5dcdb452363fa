"""Statistics → first thresholds: one function per strategy.

Every strategy takes the statistics of a tensor, the grid that the tensor will live on and the
strategy's options, and returns (low, high), float64 [rows]: the thresholds before any factor is
applied. Symmetric grids use high alone; low is then −high or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fat.quant.observers import Statistics

if TYPE_CHECKING:
    from fat.quant.config import Grid, InitName, InitSpec

__all__ = ["HISTOGRAM_STRATEGIES", "STRATEGIES", "initial_thresholds"]

Strategy = Callable[[Statistics, "Grid", "InitSpec"], tuple[Tensor, Tensor]]


def minmax(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds at the smallest and largest value seen: nothing saturates, outliers rule."""
    del options
    low, high = statistics.minimum(), statistics.maximum()
    if grid.kind == "symmetric":
        high = torch.maximum(-low, high)
    return low, high


def percentile(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds with ``options.percentile`` % of the values between them.

    Symmetric grids take the percentile of the absolute values; asymmetric ones cut half of the rest
    at each end.
    """
    share = options.percentile / 100.0
    if grid.kind == "symmetric":
        high = statistics.magnitude_quantile(share)
        return -high, high
    if grid.kind == "symmetric_unsigned":
        high = statistics.quantile(share)
        return torch.zeros_like(high), high
    tail = (1.0 - share) / 2
    return statistics.quantile(tail), statistics.quantile(1.0 - tail)


def mse(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds with the smallest Σ (x − Q(x))², found by search; never wider than min/max.

    Symmetric grids try T = T_max·i/c for c = ``options.candidates`` and i = 1…c, then ten times as
    densely around the best. Asymmetric ones shrink both ends alike first, then twice each end by
    itself. Values that are all in memory count exactly, a histogram's as the centres of its bins.
    """
    return _least_error(statistics, grid, options, 2.0)


def lp(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds with the smallest Σ |x − Q(x)|^p, p = ``options.exponent``; see :func:`mse`.

    An exponent above 2 weighs clipped outliers more and clips less.
    """
    return _least_error(statistics, grid, options, options.exponent)


def entropy(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds whose grid loses the least information: smallest KL(P‖Q), found by search.

    P is the histogram between the thresholds, with everything outside added to the bins at its
    ends. Q is the same without what is outside, averaged over the bins with any value that one
    integer of the grid stands for; a range with fewer bins than integers is not tried. Exact zeros,
    which no threshold changes, are left out. Signed grids look at absolute values; asymmetric ones
    shrink both ends alike. The search is that of :func:`mse`.

    This is for activations, millions of values. The row of a weight has fewer values than bins, and
    what a bin holds is mostly chance: a depthwise row of nine gets min/max or close to it, while a
    row of some hundred is clipped far too much.

    Source: Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    counts, width = statistics.histogram()
    zero = counts.shape[1] // 2
    if grid.kind != "affine":
        below = counts[:, :zero].flip(1) if grid.kind == "symmetric" else 0.0
        counts, zero = counts[:, zero:] + below, 0
    filled = counts > 0.0
    bins = counts.shape[1]
    # Bins between zero and the outermost value at each end, [2, rows].
    first, last = filled.int().argmax(dim=1), bins - filled.flip(1).int().argmax(dim=1)
    extent = torch.stack([zero - first, last - zero]).clamp(min=0) * filled.any(dim=1)
    sums = [_running_sum(x) for x in (counts, filled.double(), torch.xlogy(counts, counts))]

    def loss(shares: Tensor) -> Tensor:
        kept = (extent * shares).ceil()
        divergence = _divergence(counts, sums, zero - kept[0], zero + kept[1], grid.qmax + 1)
        return torch.where((kept.sum(dim=0) > grid.qmax) | (shares == 1.0).all(0), divergence, _INF)

    kept = (
        extent * _search(loss, torch.ones_like(width).expand(2, -1), options.candidates, _JOINTLY)
    ).ceil() * width
    low, high = minmax(statistics, grid, options)
    return torch.maximum(-kept[0], low), torch.minimum(kept[1], high)


def aciq(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds that are best for a Laplace or Gaussian distribution, in closed form.

    Which of the two is the one whose ratio of mean absolute to standard deviation, √(1/2) or
    √(2/π), is nearer. With M bits:

    * Laplace of scale b (the mean absolute deviation): T = b·W(3·4^M), W being Lambert's function;
    * Gaussian: T = σ·t, where t minimises the sum of clipping and rounding error,
      2·((1 + t²)·P(x > t) − t·φ(t)) + t²/(3·4^M).

    Signed grids take deviations from 0. Unsigned ones take the values for the positive half of a
    distribution around 0 that was cut there, so that b = 2·E[x] and σ² = 2·E[x²]; half the width
    for the same integers is one bit more. Asymmetric ones put the thresholds around the mean. None
    passes the smallest or largest value seen.

    Source: Banner et al. 2018 (arXiv 1810.05723), sections 3 and 4.
    """
    bits, centre = grid.bits, torch.zeros_like(statistics.mean())
    if grid.kind == "symmetric":
        deviation, variance = statistics.mean_magnitude(), statistics.mean_square()
    elif grid.kind == "symmetric_unsigned":
        deviation, variance = 2 * statistics.mean(), 2 * statistics.mean_square()
        bits += 1
    else:
        centre, deviation = statistics.mean(), statistics.mean_deviation()
        variance = (statistics.mean_square() - centre.square()).clamp(min=0.0)
    sigma = variance.sqrt()
    middle = (math.sqrt(1 / 2) + math.sqrt(2 / math.pi)) / 2
    laplace = deviation < middle * sigma
    reach = torch.where(laplace, _laplace_clip(bits) * deviation, _gauss_clip(bits) * sigma)
    low, high = minmax(statistics, grid, options)
    return torch.maximum(centre - reach, low), torch.minimum(centre + reach, high)


def lsq(statistics: Statistics, grid: Grid, options: InitSpec) -> tuple[Tensor, Tensor]:
    """Thresholds of the step that LSQ starts training from: d = 2·E|x|/√q, q the largest integer.

    T = d·q on symmetric grids; asymmetric ones scale both ends of the range seen so that it is
    d·(2^n − 1) wide. At 8 bits that is usually far beyond the largest value, by intent: the step is
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


STRATEGIES: dict[InitName, Strategy] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "lp": lp,
    "entropy": entropy,
    "aciq": aciq,
    "lsq": lsq,
}
HISTOGRAM_STRATEGIES: frozenset[InitName] = frozenset(STRATEGIES) - {"minmax"}
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
    low = {
        "symmetric": -high,
        "symmetric_unsigned": torch.zeros_like(high),
        "affine": low.clamp(max=0.0),
    }[grid.kind]
    return low.float(), high.float()


_INF = math.inf
_NOTHING = 1e-12
_JOINTLY = [[0, 1]]
_THEN_APART = [[0, 1], [0], [1], [0], [1]]
_BLOCK = 2**16


def _search(
    loss: Callable[[Tensor], Tensor], full: Tensor, candidates: int, turns: Sequence[Sequence[int]]
) -> Tensor:
    """Shares of the low and high end of a range, [2, rows], that make the loss of each row small.

    Args:
        loss: Shares [2, rows] → loss [rows].
        full: Ones, [2, rows]: where the search starts.
        candidates: Shares 0, 1/candidates … 1 are tried, then ten times as many around the best.
        turns: Which ends move together in each turn; the others stay. Of equals the widest wins.
    """
    shares, least = full, loss(full)

    def attempt(ends: Sequence[int], share: Tensor | float) -> None:
        nonlocal shares, least
        trial = shares.clone()
        trial[ends] = share
        found = loss(trial)
        better = found < least
        shares, least = torch.where(better, trial, shares), torch.where(better, found, least)

    for ends in turns:
        for i in reversed(range(candidates)):
            attempt(ends, i / candidates)
        centre = shares[ends]
        for i in reversed(range(-9, 10)):
            attempt(ends, (centre + i / (10 * candidates)).clamp(0.0, 1.0))
    return shares


def _least_error(
    statistics: Statistics, grid: Grid, options: InitSpec, exponent: float
) -> tuple[Tensor, Tensor]:
    low, high = minmax(statistics, grid, options)
    ends = torch.stack([low.clamp(max=0.0), high.clamp(min=0.0)])
    if grid.kind == "symmetric_unsigned":
        ends[0] = 0.0
    elif grid.kind == "symmetric":
        ends[0] = -ends[1]
    # Rows are scaled by powers of two, which is exact, so that no magnitude leaves float32.
    reach = ends.abs().amax(dim=0)
    unit = torch.where(reach > 0.0, reach / torch.frexp(reach).mantissa, 1.0)
    values, counts = statistics.points()
    turns = _THEN_APART if grid.kind == "affine" else _JOINTLY
    found = []
    # A few rows at a time, so that what is computed once per candidate stays in the cache.
    for part in torch.split(torch.arange(len(values)), max(1, _BLOCK // values.shape[1])):
        x = values[part] / unit[part, None]
        span = ends[:, part] / unit[part]

        def loss(shares: Tensor, x: Tensor = x, span: Tensor = span) -> Tensor:
            low, high = span * shares
            return _error(x, counts, low, high, grid, exponent)

        found.append(
            span * _search(loss, torch.ones_like(span), options.candidates, turns) * unit[part]
        )
    low, high = torch.cat(found, dim=1)
    return low, high


def _error(
    x: Tensor, counts: Tensor | None, low: Tensor, high: Tensor, grid: Grid, exponent: float
) -> Tensor:
    """Σ |x − Q(x)|^exponent of each row, [rows], infinite for a range of no width.

    The step and the zero point are those that :mod:`fat.quant.thresholds` takes from the same
    thresholds, in float32 as there.
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
    return torch.where(step > 0.0, total * step**exponent, _INF)


def _running_sum(x: Tensor) -> Tensor:
    """Sums [rows, n + 1] of the first 0…n of each row."""
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))


def _divergence(
    counts: Tensor, sums: Sequence[Tensor], start: Tensor, end: Tensor, levels: int
) -> Tensor:
    """KL(P‖Q) of each row, in nats, see :func:`entropy`.

    Q is constant over the filled bins of a level, so that sums up to the levels' edges are enough.

    Args:
        counts: [rows, bins].
        sums: :func:`_running_sum` of the counts c, of which bins are filled, and of c·log c.
        start: First bin inside, whole, [rows].
        end: First bin after those inside, [rows].
        levels: How many integers share the bins inside.
    """
    width = ((end - start) / (levels - 1))[:, None]
    middles = torch.arange(levels + 1, dtype=torch.float64, device=start.device) - 0.5
    start, end = start[:, None], end[:, None]
    edges = (start + (middles * width).round_()).clamp_(start, end).long()
    first, last = edges[:, :1], edges[:, -1:]
    seen = sums[0]
    outside = torch.cat([seen.gather(1, first), seen[:, -1:] - seen.gather(1, last)], dim=1)
    held, filled, own = (x.gather(1, edges).diff(dim=1) for x in sums)
    # What is outside joins the bins at the ends in P. In Q it does not count; but where nothing
    # else is in the last level, half a value stands there: with none KL(P‖Q) would be infinite,
    # and a single value in a long tail would forbid every threshold below it.
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
    # Rounding must not decide between ranges that lose nothing; one with nothing inside is none.
    divergence = torch.where(divergence > _NOTHING, divergence, 0.0)
    return torch.where(held.sum(dim=1) > 0.0, divergence, _INF)


def _laplace_clip(bits: int) -> float:
    """Best threshold of a Laplace distribution, in units of b: W(3·4^bits).

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
    """Best threshold of a Gaussian distribution, in units of its standard deviation.

    Examples:
        >>> [round(_gauss_clip(bits), 3) for bits in (2, 4, 8)]
        [1.711, 2.559, 3.924]
    """
    rounding = 1 / (6 * 4**bits)
    t = 0.0
    for _ in range(
        100
    ):  # Newton's iteration for the zero of the error's derivative, which is convex
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        beyond = math.erfc(t / math.sqrt(2)) / 2
        t += (density - t * (beyond + rounding)) / (beyond + rounding)
    return t
