"""Bit-widths of layers under a size budget, and the size of a student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fat.evaluation.sensitivity_analysis import TensorSensitivity
from fat.models.student import Student
from fat.utils.errors import FatError

__all__ = ["Allocation", "choose_bits", "mean_bits", "size_mb"]

BITS_PER_MB = 8_000_000
"""One megabyte is 10^6 bytes."""
BIAS_BITS = 32
"""Biases are stored as int32, or as float32 in the float network."""


@dataclass(frozen=True)
class Allocation:
    """Bit-widths of all weights, with the size and SQNR to expect.

    Attributes:
        bits: Bit-width by layer, in the order of the graph.
        size_mb: Size of the weights and biases in megabytes.
        predicted_db: Predicted SQNR of the logits from the noise of the weights alone, dB.
        bound_db: Upper bound on the predicted SQNR within the budget, dB.
    """

    bits: Mapping[str, int]
    size_mb: float
    predicted_db: float
    bound_db: float


def choose_bits(
    rows: Sequence[TensorSensitivity],
    budget_mb: float,
    *,
    first_bits: int | None = None,
    last_bits: int | None = None,
) -> Allocation:
    """Choose the bit-width of each weight that minimizes the predicted noise within a budget.

    Layer i at b bits has the noise f_i(b) = 10^(−SQNR_i(b)/10), measured when its weight alone is
    quantized, and the size b·n_i. The noise of several layers is assumed to be additive:

        minimize Σ f_i(b_i)  subject to  Σ b_i·n_i + 32·(biases) ≤ budget,  b_i in 2…8

    This multiple-choice knapsack problem is solved greedily: every layer starts at its fewest bits
    and moves along the lower convex hull of its f_i, always taking the step that saves the most
    noise per stored bit, until a step does not fit. Then changes of single layers that still fit
    are made, in order of decreasing savings. Before the step that did not fit, the choice is
    optimal for its size, so the noise exceeds the optimum by less than that step would have saved.
    ``bound_db`` is the optimum of the linear relaxation, which takes the fitting part of that step.

    Source: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988.

    Args:
        rows: Results of :func:`fat.evaluation.sensitivity` for all weights.
        budget_mb: Size of weights and int32 biases in megabytes (10^6 bytes).
        first_bits: Bit-width of the first layer, if it is fixed.
        last_bits: Bit-width of the last layer, if it is fixed; takes precedence over
            ``first_bits`` in a network of one layer.

    Raises:
        FatError: If the budget is below the size at the fewest bits, or above the size at 8 bits.
    """
    layers = sorted((row for row in rows if row.kind == "weight"), key=lambda row: row.position)
    noise = [{bits: 10 ** (-db / 10) for bits, db in row.bits_db.items()} for row in layers]
    for index, fixed in ((0, first_bits), (-1, last_bits)):
        if fixed is not None:
            row = layers[index]
            noise[index] = {fixed: 10 ** (-row.bits_db[fixed] / 10)}
    counts = [row.parameters for row in layers]
    biases = BIAS_BITS * sum(row.biases for row in layers)
    budget = _budget_bits(budget_mb, counts, noise, biases)

    chosen = [min(options) for options in noise]
    left = budget - biases - sum(n * bits for n, bits in zip(counts, chosen, strict=True))
    steps = sorted(
        (step for index, options in enumerate(noise) for step in _hull(index, options, counts)),
        key=lambda step: -step.saving / step.cost,  # stable: ties keep the order of the graph
    )
    missed = 0.0
    for step in steps:
        if step.cost > left:
            missed = step.saving * left / step.cost
            break
        chosen[step.index] = step.bits
        left -= step.cost
    bound = sum(f[bits] for f, bits in zip(noise, chosen, strict=True)) - missed
    while (change := _best_change(chosen, noise, counts, left)) is not None:
        chosen[change.index] = change.bits
        left -= change.cost
    return Allocation(
        bits={row.layer: bits for row, bits in zip(layers, chosen, strict=True)},
        size_mb=(budget - left) / BITS_PER_MB,
        predicted_db=_db(sum(f[bits] for f, bits in zip(noise, chosen, strict=True))),
        bound_db=_db(bound),
    )


def size_mb(student: Student) -> dict[str, float]:
    """Return the size of a student's weights and biases in megabytes (10^6 bytes).

    ``quantized`` counts bits·n/8 bytes for the n weights of a layer and 4 bytes per int32 bias,
    ``float`` 4 bytes for each. Scales and zero points, at most 5 bytes per threshold, are not
    counted.
    """
    counts = [(x.weight.numel(), x.weight_quantizer.grid.bits) for x in student.layers()]
    biases = BIAS_BITS * sum(x.bias.numel() for x in student.layers() if x.bias is not None)
    return {
        "float": (32 * sum(n for n, _ in counts) + biases) / BITS_PER_MB,
        "quantized": (sum(n * bits for n, bits in counts) + biases) / BITS_PER_MB,
    }


def mean_bits(student: Student) -> float:
    """Return the mean number of bits per weight; an integer if the division leaves no remainder."""
    counts = [(x.weight.numel(), x.weight_quantizer.grid.bits) for x in student.layers()]
    stored, weights = sum(n * bits for n, bits in counts), sum(n for n, _ in counts)
    return stored // weights if stored % weights == 0 else stored / weights


@dataclass(frozen=True)
class _Step:
    """Change of layer ``index`` to ``bits``, which costs ``cost`` stored bits and saves noise."""

    index: int
    bits: int
    cost: int
    saving: float


def _budget_bits(
    budget_mb: float, counts: list[int], noise: list[dict[int, float]], biases: int
) -> int:
    least, most = (
        biases + sum(n * end(options) for n, options in zip(counts, noise, strict=True))
        for end in (min, max)
    )
    # Sizes in megabytes are rounded to a whole number of bits.
    budget = round(budget_mb * BITS_PER_MB) if math.isfinite(budget_mb) else -1
    if not least <= budget <= most:
        # Rounded inward, so that both ends are valid budgets.
        low = math.ceil(least / BITS_PER_MB * 1e6) / 1e6
        high = math.floor(most / BITS_PER_MB * 1e6) / 1e6
        raise FatError(
            f"quant.budget_mb is {budget_mb:g}; the weights and biases of this network take from "
            f"{low:.6f} MB ({_widths(map(min, noise))}) to {high:.6f} MB "
            f"({_widths(map(max, noise))}). Type quant.budget_mb=MB with a number in between."
        )
    return budget


def _widths(bits: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(bits)))) + " bits"


def _hull(index: int, options: dict[int, float], counts: list[int]) -> list[_Step]:
    """Return the steps along the lower convex hull of noise over bits, from the fewest bits."""
    steps: list[_Step] = []
    current = min(options)
    while True:
        slopes = {
            bits: (options[current] - noise) / (bits - current)
            for bits, noise in options.items()
            if bits > current and noise < options[current]
        }
        if not slopes:
            return steps
        best = max(slopes, key=lambda bits: (slopes[bits], bits))
        saving = options[current] - options[best]
        steps.append(_Step(index, best, (best - current) * counts[index], saving))
        current = best


def _best_change(
    chosen: list[int], noise: list[dict[int, float]], counts: list[int], left: int
) -> _Step | None:
    """Return the change of one layer that saves most within the remaining bits, if any."""
    changes = [
        _Step(index, bits, (bits - chosen[index]) * counts[index], options[chosen[index]] - value)
        for index, options in enumerate(noise)
        for bits, value in options.items()
    ]
    fitting = [change for change in changes if change.saving > 0.0 and change.cost <= left]
    return max(fitting, key=lambda change: (change.saving, -change.cost), default=None)


def _db(noise: float) -> float:
    return -10.0 * math.log10(noise)
