from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat.quant.config import Grid, QuantSpec
from fat.quant.policy import activation_grid, weight_grid

OPTIONAL_BITS = st.none() | st.integers(2, 8)
SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    weight_bits=OPTIONAL_BITS,
    activation_bits=OPTIONAL_BITS,
    first_bits=OPTIONAL_BITS,
    last_bits=OPTIONAL_BITS,
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
)


def first_given(*bits: int | None) -> int:
    return next(b for b in bits if b is not None)


@given(spec=SPECS, first=st.booleans(), last=st.booleans(), non_negative=st.booleans())
@settings(deadline=None, max_examples=150)
def test_the_most_specific_rule_wins(
    spec: QuantSpec, first: bool, last: bool, non_negative: bool
) -> None:
    edges = [spec.last_bits if last else None, spec.first_bits if first else None]
    weight = weight_grid(spec, "conv", first=first, last=last)
    assert weight == Grid(first_given(*edges, spec.weight_bits, spec.bits), "symmetric")
    kind = {
        (True, "symmetric"): "symmetric_unsigned",
        (True, "asymmetric"): "symmetric_unsigned",
        (False, "symmetric"): "symmetric",
        (False, "asymmetric"): "affine",
    }[non_negative, spec.scheme]
    activation = activation_grid(
        spec, non_negative=non_negative, feeds_first=first, feeds_last=last
    )
    bits = first_given(*edges, spec.activation_bits, spec.bits)
    assert activation == Grid(bits, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "last", "bits"),
    [(False, False, 4), (True, False, 8), (False, True, 6), (True, True, 6)],
)
def test_the_edges_of_a_network_of_four_bits(first: bool, last: bool, bits: int) -> None:
    spec = QuantSpec(bits=4, first_bits=8, last_bits=6)
    assert weight_grid(spec, "conv", first=first, last=last).bits == bits
    grid = activation_grid(spec, non_negative=True, feeds_first=first, feeds_last=last)
    assert grid == Grid(bits, "symmetric_unsigned")


@given(spec=SPECS, first=st.booleans(), last=st.booleans(), bits=st.integers(2, 8))
@settings(deadline=None, max_examples=50)
def test_layer_bits_apply_to_that_layer_only(
    spec: QuantSpec, first: bool, last: bool, bits: int
) -> None:
    ruled = replace(spec, layer_bits={"conv": bits})
    assert weight_grid(ruled, "conv", first=first, last=last).bits == bits
    for other in ("con", "conv2"):
        wanted = weight_grid(spec, other, first=first, last=last)
        assert weight_grid(ruled, other, first=first, last=last) == wanted
