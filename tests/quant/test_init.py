from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant.init import HISTOGRAM_STRATEGIES, STRATEGIES, initial_thresholds
from fat.quant.observers import HistogramStatistics, RangeStatistics, SampleStatistics
from fat.spec import Grid, GridKind, InitName, InitSpec

KINDS: tuple[GridKind, ...] = get_args(GridKind)


def test_every_name_has_its_strategy() -> None:
    assert set(STRATEGIES) == set(get_args(InitName))
    assert set(STRATEGIES) >= HISTOGRAM_STRATEGIES


def wanted_thresholds(
    values: np.ndarray, kind: str, options: InitSpec
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of [rows, values] in float64, by numpy."""
    share = 1.0 if options.name == "minmax" else options.percentile / 100
    if kind == "signed":
        high = np.quantile(np.abs(values), share, axis=1)
        return -high, high
    if kind == "unsigned":
        high = np.maximum(np.quantile(values, share, axis=1), 0.0)
        return 0 * high, high
    tail = (1 - share) / 2
    low, high = (np.quantile(values, q, axis=1) for q in (tail, 1 - tail))
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    count=st.integers(1, 200),
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    options=st.builds(
        InitSpec,
        name=st.sampled_from(list(get_args(InitName))),
        percentile=st.floats(50.5, 100.0) | st.just(100.0),
    ),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=100)
def test_weights_thresholds_are_numpys_row_by_row(
    seed: int,
    rows: int,
    count: int,
    kind: GridKind,
    bits: int,
    options: InitSpec,
    offset: float,
    exponent: int,
) -> None:
    values = np.random.default_rng(seed).normal(offset, 1.0, (rows, count))
    x = torch.from_numpy((values * 10.0**exponent).astype(np.float32))
    low, high = initial_thresholds(SampleStatistics(x), Grid(bits, kind), options)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == (rows,)
    wanted = wanted_thresholds(x.double().numpy(), kind, options)
    for found, reference in zip((low, high), wanted, strict=True):
        np.testing.assert_allclose(
            found.double().numpy(), reference, rtol=1e-5, atol=1e-6 * 10.0**exponent
        )
    assert (low <= 0).all()
    assert (high >= 0).all()


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    percentile=st.sampled_from([80.0, 99.0, 99.9, 100.0]),
    parts=st.integers(1, 5),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
)
@settings(deadline=None, max_examples=50)
def test_activations_percentile_is_numpys_but_for_a_bin(
    seed: int, kind: GridKind, percentile: float, parts: int, offset: float
) -> None:
    count = 5000
    x = torch.from_numpy(np.random.default_rng(seed).normal(offset, 1.0, count).astype(np.float32))
    statistics = HistogramStatistics()
    for part in x.tensor_split(parts):
        statistics.update(part)
    options = InitSpec("percentile", percentile)
    found = initial_thresholds(statistics, Grid(8, kind), options)
    width = 4 / 8192 * float(x.abs().max())
    # numpy's value with one value more and one less on each side bounds the histogram's.
    values = np.sort((x.double().abs() if kind == "signed" else x.double()).numpy())
    cut = (1 - percentile / 100) / (2 if kind == "asymmetric" else 1)
    positions = {"high": (1 - cut) * (count - 1), "low": cut * (count - 1)}
    for name, own in zip(("low", "high"), found, strict=True):
        if name == "low" and kind != "asymmetric":
            wanted = -found[1] if kind == "signed" else torch.zeros(1)
            assert torch.equal(own, wanted)
            continue
        below = max(int(np.floor(positions[name])) - 1, 0)
        above = min(int(np.ceil(positions[name])) + 1, count - 1)
        bounds = [values[below] - width, values[above] + width]
        clip = (-np.inf, 0.0) if name == "low" else (0.0, np.inf)
        bounds = [float(np.clip(bound, *clip)) for bound in bounds]
        assert bounds[0] <= own.item() <= bounds[1]


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    offset=st.sampled_from([0.0, 9.0, -9.0]),
)
@settings(deadline=None, max_examples=30)
def test_activations_minmax_is_exact_and_all_statistics_agree(
    seed: int, kind: GridKind, offset: float
) -> None:
    values = np.random.default_rng(seed).normal(offset, 1.0, 300).astype(np.float32)
    wanted = wanted_thresholds(values[None].astype(np.float64), kind, InitSpec("minmax"))
    for statistics in (RangeStatistics(), HistogramStatistics()):
        for part in torch.from_numpy(values).split(70):
            statistics.update(part)
        found = initial_thresholds(statistics, Grid(8, kind), InitSpec("minmax"))  # type: ignore[arg-type]
        assert [t.item() for t in found] == [float(w[0]) for w in wanted]
    full = InitSpec("percentile", 100.0)
    assert [t.item() for t in initial_thresholds(statistics, Grid(8, kind), full)] == pytest.approx(
        [float(w[0]) for w in wanted], rel=1e-3
    )


def everything(x: Tensor) -> list[SampleStatistics | HistogramStatistics]:
    histogram = HistogramStatistics()
    histogram.update(x)
    return [SampleStatistics(x.reshape(1, -1)), histogram]


@pytest.mark.parametrize("name", get_args(InitName))
@pytest.mark.parametrize("kind", KINDS)
def test_all_zero_gives_an_empty_range(name: InitName, kind: GridKind) -> None:
    for statistics in everything(torch.zeros(100)):
        low, high = initial_thresholds(statistics, Grid(8, kind), InitSpec(name))
        assert (low.item(), high.item()) == (0.0, 0.0)


@pytest.mark.parametrize("name", get_args(InitName))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e-40, -1e-40, 2.5, -2.5, 1e30, -1e30])
def test_a_constant_is_inside_its_range(name: InitName, kind: GridKind, value: float) -> None:
    x = torch.full((100,), value)
    exact = float(x[0])
    for statistics in everything(x):
        low, high = initial_thresholds(statistics, Grid(8, kind), InitSpec(name))
        wanted = {
            "signed": (-abs(exact), abs(exact)),
            "unsigned": (0.0, max(exact, 0.0)),
            "asymmetric": (min(exact, 0.0), max(exact, 0.0)),
        }[kind]
        assert (low.item(), high.item()) == pytest.approx(wanted, rel=1e-3)


def test_an_outlier_rules_minmax_and_not_the_percentile() -> None:
    x = torch.cat([torch.linspace(-1, 1, 50_001), torch.tensor([1000.0])])
    grid = Grid(8, "signed")
    for statistics in everything(x):
        assert initial_thresholds(statistics, grid, InitSpec("minmax"))[1].item() == 1000.0
        high = initial_thresholds(statistics, grid, InitSpec("percentile", 99.9))[1].item()
        assert high == pytest.approx(0.999, abs=0.3)
