from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat.quant.config import EqualizeSpec, Grid, InitSpec, QuantSpec
from fat.quant.range_estimators import STRATEGIES
from fat.training.config import LossName, ScheduleName, TrainSpec
from fat.utils.errors import FatError


@pytest.mark.parametrize("bits", range(2, 9))
def test_grid_against_the_papers_counts(bits: int) -> None:
    signed, unsigned, asymmetric = (
        Grid(bits, kind) for kind in ("symmetric", "symmetric_unsigned", "affine")
    )
    # The symmetric grid gives up one of the 2^n codes so that it has a middle.
    assert len(range(signed.qmin, signed.qmax + 1)) == 2**bits - 1
    assert signed.qmin == -signed.qmax
    for grid in (unsigned, asymmetric):
        assert len(range(grid.qmin, grid.qmax + 1)) == 2**bits
        assert grid.qmin == 0


def test_grids_of_eight_bits_fit_the_machines_types() -> None:
    assert Grid(8, "symmetric").qmax == np.iinfo(np.int8).max
    assert Grid(8, "symmetric").qmin == np.iinfo(np.int8).min + 1
    assert Grid(8, "symmetric_unsigned").qmax == Grid(8, "affine").qmax == np.iinfo(np.uint8).max


def test_specs_are_frozen() -> None:
    for spec, name in (
        (Grid(8, "symmetric"), "bits"),
        (InitSpec(), "name"),
        (EqualizeSpec(), "cap"),
        (QuantSpec(), "bits"),
        (TrainSpec(), "lr"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, name, 4)


BIT_FIELDS = ("bits", "weight_bits", "activation_bits", "first_bits", "last_bits")


@pytest.mark.parametrize("name", BIT_FIELDS)
@pytest.mark.parametrize("value", [1, 9, 0, -8, 8.0, True, "8"])
def test_bits_out_of_range(name: str, value: object) -> None:
    key = "quant." + name.replace("_", ".")
    null = "" if name == "bits" else ", or null"
    text = f"{key} is {value!r}; allowed are whole numbers from 2 to 8{null}, as in {key}=8."
    with pytest.raises(FatError, match=re.escape(text)):
        QuantSpec(**{name: value})  # type: ignore[arg-type]


def test_only_bits_may_not_be_none() -> None:
    assert QuantSpec(**dict.fromkeys(BIT_FIELDS[1:])).bits == 8
    with pytest.raises(FatError, match="bits is None; allowed are whole numbers"):
        QuantSpec(bits=None)  # type: ignore[arg-type]


def test_bits_on_a_grid() -> None:
    with pytest.raises(FatError, match="bits is 16"):
        Grid(16, "symmetric")
    with pytest.raises(FatError, match=r"Unknown grid 'sined'\. Did you mean 'symmetric'"):
        Grid(8, "sined")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: QuantSpec(granularity="vektor"),  # type: ignore[arg-type]
            "Unknown quant.granularity 'vektor'. Did you mean 'per_channel' or 'per_tensor'? "
            "Allowed: per_channel, per_tensor.",
        ),
        (
            lambda: QuantSpec(scheme="asymetric"),  # type: ignore[arg-type]
            "Unknown quant.scheme 'asymetric'. Did you mean 'asymmetric' or 'symmetric'?",
        ),
        (
            lambda: QuantSpec(thresholds="lsc"),  # type: ignore[arg-type]
            "Unknown quant.thresholds 'lsc'. Did you mean 'lsq'? Allowed: fat, lsq, tqt, frozen.",
        ),
        (
            lambda: QuantSpec(bias="train"),  # type: ignore[arg-type]
            "Unknown quant.bias 'train'. Did you mean 'trained'?",
        ),
        (
            lambda: QuantSpec(weights="pointwize"),  # type: ignore[arg-type]
            "Unknown quant.weights 'pointwize'. Did you mean 'scale'? Allowed: frozen, scale, "
            "adaround.",
        ),
        (
            lambda: InitSpec(name="percentil"),  # type: ignore[arg-type]
            "Unknown init.activation.name 'percentil'. Did you mean 'percentile'?",
        ),
        (
            lambda: EqualizeSpec(method="depthwize"),  # type: ignore[arg-type]
            "Unknown quant.equalize.method 'depthwize'. Did you mean 'depthwise'? Allowed: none, "
            "depthwise, cross_layer, balanced, exact.",
        ),
        (
            lambda: TrainSpec(loss="rms"),  # type: ignore[arg-type]
            "Unknown optim.loss 'rms'. Did you mean 'rmse' or 'mse'? "
            "Allowed: rmse, authors_code, mse, kl, cosine.",
        ),
        (
            lambda: TrainSpec(schedule="cosin"),  # type: ignore[arg-type]
            "Unknown optim.schedule 'cosin'. Did you mean 'cosine'?",
        ),
    ],
)
def test_unknown_names(make: Any, text: str) -> None:
    with pytest.raises(FatError, match=re.escape(text)):
        make()


@pytest.mark.parametrize("value", [50.0, 0.0, 100.1, -1.0, math.nan])
def test_percentile_out_of_range(value: float) -> None:
    with pytest.raises(
        FatError, match=r"above 50 and up to 100, as in init\.activation\.percentile=99\.999"
    ):
        InitSpec("percentile", value)


@pytest.mark.parametrize("value", [0.9, 10.1, -2.0, math.nan, math.inf])
def test_exponent_out_of_range(value: float) -> None:
    with pytest.raises(
        FatError, match=r"exponent is .*allowed are numbers from 1 to 10.*exponent=2\.4"
    ):
        InitSpec("lp", exponent=value)


@pytest.mark.parametrize("value", [9, 0, -1, 10_001, 99.5, True])
def test_candidates_out_of_range(value: int) -> None:
    with pytest.raises(
        FatError, match=r"candidates is .*whole numbers from 10 to 10000.*candidates=100"
    ):
        InitSpec("mse", candidates=value)


@pytest.mark.parametrize("value", [50.1, 99.99, 100.0])
def test_percentile_in_range(value: float) -> None:
    assert InitSpec("percentile", value).percentile == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("locked_from", 0.0), ("locked_from", 6.1), ("cap", -1.0), ("cap", 7.0), ("cap", math.nan)],
)
def test_equalization_outside_relu6(name: str, value: float) -> None:
    with pytest.raises(
        FatError, match=rf"equalize\.{name} is .*; allowed are numbers above 0 and up to 6"
    ):
        EqualizeSpec(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["", "none+exact+", "depthwise cross_layer", "exact+exactly"])
def test_every_part_of_a_joined_equalization_is_checked(method: str) -> None:
    with pytest.raises(
        FatError, match=r"Unknown quant.equalize.method .* Allowed: none, depthwise, "
    ):
        EqualizeSpec(method)


@pytest.mark.parametrize("method", ["depthwise+depthwise", "exact+depthwise", "none+depthwise"])
def test_joined_equalizations_that_make_no_sense(method: str) -> None:
    with pytest.raises(FatError, match=r"named once.*exact only as the last.*none only alone"):
        EqualizeSpec(method)


def test_methods_of_an_equalization() -> None:
    assert EqualizeSpec().methods == ()
    assert EqualizeSpec("depthwise+cross_layer").methods == ("depthwise", "cross_layer")


@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_iterations_of_cross_layer(value: float) -> None:
    with pytest.raises(FatError, match=r"equalize\.iterations is .* whole numbers from 1"):
        EqualizeSpec(iterations=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_shift_weight_out_of_range(value: float) -> None:
    with pytest.raises(
        FatError, match=r"equalize\.shift_weight is .*; allowed are numbers above 0"
    ):
        EqualizeSpec(shift_weight=value)


@pytest.mark.parametrize(
    ("name", "value", "inside"),
    [
        ("alpha_range", (0.5, 0.9), "1"),
        ("alpha_range", (1.1, 1.3), "1"),
        ("alpha_range", (1.3, 0.5), "1"),
        ("alpha_range", (0.5,), "1"),
        ("alpha_range", (math.nan, 1.0), "1"),
        ("shift_range", (0.1, 0.4), "0"),
        ("shift_range", (-0.2, -0.1), "0"),
        ("weight_scale_range", (1.05, 1.25), "1"),
        ("adaround_range", (0.1, 1.0), "0"),
        ("adaround_range", (-1.0,), "0"),
    ],
)
def test_ranges_must_hold_their_start(name: str, value: tuple[float, ...], inside: str) -> None:
    with pytest.raises(
        FatError, match=rf"quant\.{name} is .*with {inside} \(where training starts\)"
    ):
        QuantSpec(**{name: value})  # type: ignore[arg-type]


def test_ranges_may_end_where_training_starts() -> None:
    spec = QuantSpec(alpha_range=(1.0, 1.3), shift_range=(0.0, 0.0))
    assert (spec.alpha_range, spec.shift_range) == ((1.0, 1.3), (0.0, 0.0))


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_alpha_must_stay_above_zero(low: float) -> None:
    with pytest.raises(FatError, match=r"quant.alpha_range is .*; allowed are two numbers above 0"):
        QuantSpec(alpha_range=(low, 1.0))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "epochs",
            -1,
            "optim.epochs is -1; allowed are whole numbers from 0, as in optim.epochs=3.",
        ),
        (
            "period",
            0,
            "optim.period is 0; allowed are whole numbers from 1, or null, as in optim.period=400.",
        ),
        (
            "validations",
            0,
            "optim.validations is 0; allowed are whole numbers from 1, as in optim.validations=1.",
        ),
        (
            "nan_patience",
            0,
            "optim.nan_patience is 0; allowed are whole numbers from 1, as in "
            "optim.nan_patience=10.",
        ),
        ("lr", 0.0, "optim.lr is 0.0; allowed are numbers above 0, as in optim.lr=0.002."),
        (
            "bias_lr",
            -1e-3,
            "optim.bias_lr is -0.001; allowed are numbers above 0, as in optim.bias_lr=0.0001.",
        ),
        (
            "weight_scale_lr",
            0.0,
            "optim.weight_scale_lr is 0.0; allowed are numbers above 0, as in "
            "optim.weight_scale_lr=0.0001.",
        ),
        (
            "adaround_lr",
            -1.0,
            "optim.adaround_lr is -1.0; allowed are numbers above 0, as in optim.adaround_lr=0.01.",
        ),
        (
            "gradient_clip",
            0.0,
            "optim.gradient_clip is 0.0; allowed are numbers above 0, or null, as in "
            "optim.gradient_clip=1.0.",
        ),
        ("lr", math.nan, "optim.lr is nan; allowed are numbers above 0, as in optim.lr=0.002."),
        (
            "temperature",
            0.0,
            "optim.temperature is 0.0; allowed are numbers above 0, as in optim.temperature=1.0.",
        ),
        (
            "feature_weight",
            -1.0,
            "optim.feature_weight is -1.0; allowed are numbers from 0, as in "
            "optim.feature_weight=0.0.",
        ),
        ("feature_weight", math.nan, "optim.feature_weight is nan; allowed are numbers from 0"),
        ("label_weight", -0.1, "optim.label_weight is -0.1; allowed are numbers from 0"),
        ("label_weight", math.inf, "optim.label_weight is inf; allowed are numbers from 0"),
    ],
)
def test_training_out_of_range(name: str, value: float, text: str) -> None:
    with pytest.raises(FatError, match=re.escape(text)):
        TrainSpec(**{name: value})  # type: ignore[arg-type]


def test_training_may_have_no_epoch() -> None:
    assert TrainSpec(epochs=0, period=None, gradient_clip=None).epochs == 0


@pytest.mark.parametrize(
    ("weight", "activation", "wanted"),
    [(None, None, (6, 6)), (3, None, (3, 6)), (None, 4, (6, 4)), (2, 8, (2, 8))],
)
def test_narrower_bits_win_over_bits(
    weight: int | None, activation: int | None, wanted: tuple[int, int]
) -> None:
    spec = QuantSpec(bits=6, weight_bits=weight, activation_bits=activation)
    assert (spec.for_weights, spec.for_activations) == wanted


def _specs() -> st.SearchStrategy[QuantSpec]:
    bits = st.integers(2, 8)
    init = st.builds(
        InitSpec,
        name=st.sampled_from(tuple(STRATEGIES)),
        percentile=st.floats(51.0, 100.0),
        exponent=st.floats(1.0, 10.0),
        candidates=st.integers(10, 10_000),
    )
    return st.builds(
        QuantSpec,
        bits=bits,
        weight_bits=st.none() | bits,
        activation_bits=st.none() | bits,
        first_bits=st.none() | bits,
        last_bits=st.none() | bits,
        layer_bits=st.dictionaries(st.text(max_size=5), bits, max_size=4),
        granularity=st.sampled_from(["per_tensor", "per_channel"]),
        scheme=st.sampled_from(["symmetric", "asymmetric"]),
        thresholds=st.sampled_from(["fat", "lsq", "tqt", "frozen"]),
        power_of_two=st.booleans(),
        weights=st.sampled_from(["frozen", "scale", "adaround"]),
        bias=st.sampled_from(["trained", "frozen"]),
        weight_scale_range=st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 2.0)),
        adaround_range=st.tuples(st.floats(-1.0, 0.0), st.floats(0.0, 1.0)),
        alpha_range=st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 2.0)),
        shift_range=st.tuples(st.floats(-1.0, 0.0), st.floats(0.0, 1.0)),
        weight_init=init,
        activation_init=init,
        equalize=st.builds(EqualizeSpec, cap=st.floats(0.5, 6.0)),
    )


@given(spec=_specs())
@settings(deadline=None, max_examples=50)
def test_a_spec_survives_json(spec: QuantSpec) -> None:
    loaded = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert loaded == spec
    assert hash(loaded) == hash(spec)  # lists in place of tuples would not hash


def test_bits_of_layers_are_sorted_pairs() -> None:
    spec = QuantSpec(layer_bits={"stem": 8, "conv": 3})
    assert spec.layer_bits == (("conv", 3), ("stem", 8))
    assert spec == QuantSpec(layer_bits=[("stem", 8), ("conv", 3)])
    assert (spec.for_layer("stem"), spec.for_layer("head")) == (8, None)
    assert QuantSpec().layer_bits == ()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"stem": 9}, "layer_bits['stem'] is 9; allowed are whole numbers from 2 to 8"),
        ({"stem": True}, "layer_bits['stem'] is True; allowed are whole numbers"),
        ({3: 8}, "allowed are names of layers with a bit-width each"),
        ([("stem", 8), ("stem", 4)], "every name once"),
        (["stem"], "allowed are names of layers"),
        (8, "layer_bits is 8; allowed are names of layers"),
    ],
)
def test_bits_of_layers_that_are_none(given: Any, text: str) -> None:
    with pytest.raises(FatError, match=re.escape(text)):
        QuantSpec(layer_bits=given)


def test_from_dict_checks_again() -> None:
    with pytest.raises(FatError, match="bits is 9"):
        QuantSpec.from_dict({"bits": 9})
    with pytest.raises(FatError, match=r"Unknown init\.activation\.name"):
        QuantSpec.from_dict({"weight_init": {"name": "minmix"}})
    with pytest.raises(
        FatError, match=r"Unknown option of QuantSpec 'granularty'. Did you mean 'granularity'"
    ):
        QuantSpec.from_dict({"granularty": "per_tensor"})


def test_from_dict_fills_in_defaults() -> None:
    assert QuantSpec.from_dict({}) == QuantSpec()
    given = QuantSpec.from_dict({"activation_init": {"name": "percentile"}})
    assert given.activation_init == InitSpec("percentile")
    assert given.weight_init == InitSpec()


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_is_accepted(name: LossName) -> None:
    assert TrainSpec(loss=name).loss == name


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_schedule_is_accepted(name: ScheduleName) -> None:
    assert TrainSpec(schedule=name).schedule == name
