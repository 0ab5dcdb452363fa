"""Bit allocation against brute force over all choices, and sizes against closed forms."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec
from fat.evaluation.bit_allocation import choose_bits, mean_bits, size_mb
from fat.evaluation.sensitivity_analysis import TensorSensitivity

BITS = range(2, 9)


def row(
    position: int, decibels: Sequence[float], weights: int, biases: int = 0
) -> TensorSensitivity:
    return TensorSensitivity(
        position=position,
        layer=f"layer{position}",
        kind="weight",
        bits=8,
        alone_db=0.0,
        alone_agreement=0.0,
        without_db=0.0,
        without_agreement=0.0,
        parameters=weights,
        biases=biases,
        bits_db=dict(zip(BITS, decibels, strict=True)),
    )


def noise(rows: Sequence[TensorSensitivity], bits: Sequence[int]) -> float:
    return sum(10 ** (-row.bits_db[b] / 10) for row, b in zip(rows, bits, strict=True))


def stored(rows: Sequence[TensorSensitivity], bits: Sequence[int]) -> int:
    return sum(row.parameters * b + 32 * row.biases for row, b in zip(rows, bits, strict=True))


def best(rows: Sequence[TensorSensitivity], budget: int) -> float:
    """Return the smallest noise of all choices within the budget."""
    choices = itertools.product(BITS, repeat=len(rows))
    return min(noise(rows, bits) for bits in choices if stored(rows, bits) <= budget)


ROWS = st.lists(
    st.tuples(
        st.lists(st.floats(-20.0, 60.0), min_size=7, max_size=7),
        st.integers(1, 5000),
        st.integers(0, 20),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
).map(
    lambda drawn: [
        # Most real layers gain from every bit, but some do not.
        row(i, sorted(decibels) if ordered else decibels, weights, biases)
        for i, (decibels, weights, biases, ordered) in enumerate(drawn)
    ]
)


@given(rows=ROWS, share=st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=150)
def test_within_one_step_of_the_optimum(rows: list[TensorSensitivity], share: float) -> None:
    least, most = stored(rows, [2] * len(rows)), stored(rows, [8] * len(rows))
    budget = round(least + share * (most - least))
    chosen = choose_bits(rows, budget / 8e6)
    bits = list(chosen.bits.values())
    assert stored(rows, bits) <= budget
    assert chosen.size_mb == pytest.approx(stored(rows, bits) / 8e6)
    assert chosen.predicted_db == pytest.approx(-10 * math.log10(noise(rows, bits)))

    optimum, bound = best(rows, budget), 10 ** (-chosen.bound_db / 10)
    assert bound <= optimum * (1 + 1e-9)
    assert noise(rows, bits) >= optimum * (1 - 1e-9)
    # One step saves at most the noise of its layer at the fewest bits.
    largest = max(10 ** (-row.bits_db[2] / 10) for row in rows)
    assert noise(rows, bits) <= bound + largest * (1 + 1e-9)


@given(rows=ROWS, share=st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=100)
def test_it_is_the_optimum_for_the_size_where_its_bound_is_met(
    rows: list[TensorSensitivity], share: float
) -> None:
    """A budget equal to a size on the greedy path gives the optimum."""
    least, most = stored(rows, [2] * len(rows)), stored(rows, [8] * len(rows))
    first = choose_bits(rows, round(least + share * (most - least)) / 8e6)
    again = choose_bits(rows, first.size_mb)
    assume(again.predicted_db == pytest.approx(again.bound_db, abs=1e-9))
    bits = list(again.bits.values())
    assert noise(rows, bits) == pytest.approx(best(rows, stored(rows, bits)))


def test_the_step_that_saves_most_per_bit_comes_first() -> None:
    small = row(0, [10, 20, 30, 40, 50, 60, 70], weights=10)
    large = row(1, [10, 20, 30, 40, 50, 60, 70], weights=1000)
    # All bits of the small layer together cost less than one bit of the large one.
    chosen = choose_bits([large, small], (2020 + 60) / 8e6)
    assert dict(chosen.bits) == {"layer0": 8, "layer1": 2}
    assert list(chosen.bits) == ["layer0", "layer1"]  # in the order of the graph, not of the ranks


def test_what_is_left_is_filled_with_what_fits() -> None:
    large = row(0, [0, 30, 31, 32, 33, 34, 35], weights=1000)
    small = row(1, [20, 21, 22, 23, 24, 25, 26], weights=10)
    chosen = choose_bits([large, small], (2020 + 999) / 8e6)  # one large bit costs 1000
    assert dict(chosen.bits) == {"layer0": 2, "layer1": 8}


def test_a_width_that_is_no_better_is_not_paid_for() -> None:
    flat = row(0, [10, 30, 29, 30, 30, 20, 30], weights=100)
    assert dict(choose_bits([flat], 800 / 8e6).bits) == {"layer0": 3}


def test_first_and_last_are_fixed_and_counted() -> None:
    rows = [row(i, [10, 15, 20, 25, 30, 35, 40], weights=100, biases=1) for i in range(3)]
    activation = TensorSensitivity(9, "layer9", "activation", 8, 0.0, 0.0, 0.0, 0.0)
    chosen = choose_bits(
        [rows[2], activation, rows[0], rows[1]],
        (800 + 200 + 400 + 96) / 8e6,
        first_bits=8,
        last_bits=2,
    )
    assert dict(chosen.bits) == {"layer0": 8, "layer1": 4, "layer2": 2}
    alone = choose_bits([rows[0]], (32 + 600) / 8e6, first_bits=3, last_bits=6)
    assert dict(alone.bits) == {"layer0": 6}


@pytest.mark.parametrize("budget", [0.0, -1.0, 0.0012, 0.5, math.nan, math.inf])
def test_a_budget_out_of_range_is_answered_with_the_range(budget: float) -> None:
    rows = [row(0, range(7), weights=5003, biases=7), row(1, range(7), weights=3, biases=1)]
    text = re.escape("from 0.001284 MB (2 bits) to 0.005038 MB (8 bits)")
    with pytest.raises(FatError, match=text):
        choose_bits(rows, budget)
    for end, bits in ((0.001284, 2), (0.005038, 8)):
        assert choose_bits(rows, end).bits["layer0"] == bits


def test_sizes_are_those_of_the_weights_and_biases(tiny: nn.Module, images: Tensor) -> None:
    spec = QuantSpec(bits=8, weight_bits=4, first_bits=6, layer_bits={"blocks.0.conv_dw": 3})
    student = fat.prepare(tiny, images, spec)
    weights = {
        name: module.weight.numel()
        for name, module in tiny.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    biases = 8 + 2 * (32 + 32 + 8) + 10  # batch norms folded
    total = sum(weights.values())
    in_bits = 4 * total + 2 * weights["stem"] - weights["blocks.0.conv_dw"]
    assert size_mb(student) == {
        "float": pytest.approx((4 * total + 4 * biases) / 1e6),
        "quantized": pytest.approx((in_bits / 8 + 4 * biases) / 1e6),
    }
    assert mean_bits(student) == pytest.approx(in_bits / total)
    uniform = fat.prepare(tiny, images, QuantSpec(bits=5))
    assert mean_bits(uniform) == 5
    assert isinstance(mean_bits(uniform), int)


def test_a_student_of_chosen_bits_has_the_size_that_was_promised(
    tiny: nn.Module, images: Tensor, tmp_path: Any
) -> None:
    first = fat.prepare(tiny, images)
    fat.calibrate(first, images)
    rows = fat.sensitivity(first, images)
    uniform = fat.prepare(tiny, images, QuantSpec(weight_bits=4))
    budget = size_mb(uniform)["quantized"]
    chosen = choose_bits(rows, budget)
    student = fat.prepare(tiny, images, QuantSpec(layer_bits=chosen.bits))
    fat.calibrate(student, images)
    assert {x.layer: x.weight_quantizer.grid.bits for x in student.layers()} == chosen.bits
    assert size_mb(student)["quantized"] == pytest.approx(chosen.size_mb)
    assert chosen.size_mb <= budget

    # Less noise, predicted and measured, than a uniform bit-width of the same size.
    layers = sorted((r for r in rows if r.kind == "weight"), key=lambda r: r.position)
    assert chosen.predicted_db > -10 * math.log10(noise(layers, [4] * len(layers)))
    fat.calibrate(uniform, images)
    ours, evenly = (fat.evaluate(s, images)["quantized"]["sqnr_db"] for s in (student, uniform))
    assert ours > evenly

    fat.save(student, tmp_path / "student.safetensors")
    loaded = fat.load(tmp_path / "student.safetensors")
    assert loaded.spec == student.spec
    assert loaded.spec.layer_bits == tuple(sorted(chosen.bits.items()))
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
