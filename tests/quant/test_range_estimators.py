from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant.config import Grid, GridKind, InitSpec, QuantSpec
from fat.quant.functional import fake_quantize
from fat.quant.observers import HistogramStatistics, RangeStatistics, SampleStatistics, Statistics
from fat.quant.range_estimators import HISTOGRAM_STRATEGIES, STRATEGIES, initial_thresholds
from fat.quant.thresholds import Thresholds

KINDS: tuple[GridKind, ...] = get_args(GridKind)
NAMES = tuple(STRATEGIES)


# Thresholds of −2, −1, …, 10 and 40 on an affine 4-bit grid. A new strategy needs one row here.
EXPECTED = {
    "minmax": (-2.0, 40.0),
    "percentile": (-1.35, 20.5),
    "mse": (-2.0, 40.0),
    "lp": (-2.0, 40.0),
    "entropy": (-2.0, 40.0),
    "aciq": (-2.0, 36.1275),
    "lsq": (-2.582, 51.6398),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_thresholds_of_a_few_values(name: str) -> None:
    statistics = SampleStatistics(torch.tensor([[*range(-2, 11), 40.0]]))
    low, high = initial_thresholds(statistics, Grid(4, "affine"), InitSpec(name, percentile=90))
    assert (low.item(), high.item()) == pytest.approx(EXPECTED[name], abs=1e-4)


def test_expected_thresholds_and_strategies_have_the_same_names() -> None:
    assert set(STRATEGIES) == set(EXPECTED)
    assert set(STRATEGIES) >= HISTOGRAM_STRATEGIES == set(STRATEGIES) - {"minmax"}


def wanted_thresholds(
    values: np.ndarray, kind: str, options: InitSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) of [rows, values] in float64, by numpy."""
    share = 1.0 if options.name == "minmax" else options.percentile / 100
    if kind == "symmetric":
        high = np.quantile(np.abs(values), share, axis=1)
        return -high, high
    if kind == "symmetric_unsigned":
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
        name=st.sampled_from(["minmax", "percentile"]),
        percentile=st.floats(50.5, 100.0) | st.just(100.0),
    ),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=100)
def test_weight_thresholds_equal_numpys_per_row(
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
def test_activation_percentiles_equal_numpys_within_a_bin(
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
    values = np.sort((x.double().abs() if kind == "symmetric" else x.double()).numpy())
    cut = (1 - percentile / 100) / (2 if kind == "affine" else 1)
    positions = {"high": (1 - cut) * (count - 1), "low": cut * (count - 1)}
    for name, own in zip(("low", "high"), found, strict=True):
        if name == "low" and kind != "affine":
            wanted = -found[1] if kind == "symmetric" else torch.zeros(1)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_zero_gives_an_empty_range(name: str, kind: GridKind) -> None:
    for statistics in everything(torch.zeros(100)):
        low, high = initial_thresholds(statistics, Grid(8, kind), InitSpec(name))
        assert (low.item(), high.item()) == (0.0, 0.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lsq"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e-40, -1e-40, 2.5, -2.5, 1e30, -1e30])
def test_a_constant_is_inside_its_range(name: str, kind: GridKind, value: float) -> None:
    x = torch.full((100,), value)
    exact = float(x[0])
    for statistics in everything(x):
        low, high = initial_thresholds(statistics, Grid(8, kind), InitSpec(name))
        wanted = {
            "symmetric": (-abs(exact), abs(exact)),
            "symmetric_unsigned": (0.0, max(exact, 0.0)),
            "affine": (min(exact, 0.0), max(exact, 0.0)),
        }[kind]
        assert (low.item(), high.item()) == pytest.approx(wanted, rel=1e-3)


def test_an_outlier_affects_minmax_but_not_percentile() -> None:
    x = torch.cat([torch.linspace(-1, 1, 50_001), torch.tensor([1000.0])])
    grid = Grid(8, "symmetric")
    for statistics in everything(x):
        assert initial_thresholds(statistics, grid, InitSpec("minmax"))[1].item() == 1000.0
        high = initial_thresholds(statistics, grid, InitSpec("percentile", 99.9))[1].item()
        assert high == pytest.approx(0.999, abs=0.3)


# --- strategies that search; the references are numpy over the values ----------------------------


def numpy_error(
    x: np.ndarray, low: float, high: float, kind: str, bits: int, exponent: float = 2.0
) -> float:
    """Return Σ |x − Q(x)|^exponent by the definition of the grid."""
    if kind == "symmetric":
        q = 2 ** (bits - 1) - 1
        step, bottom, top = high / q, -q, q
    else:
        q = 2**bits - 1
        step = (high - low) / q
        zero = np.rint(-low / step)
        bottom, top = -zero, q - zero
    return float((np.abs(x - step * np.clip(np.rint(x / step), bottom, top)) ** exponent).sum())


def student_error(x: Tensor, low: Tensor, high: Tensor, grid: Grid, exponent: float) -> Tensor:
    """Return the error [rows] of a network with these thresholds."""
    thresholds = Thresholds(QuantSpec(thresholds="frozen"), grid, len(x))
    thresholds.set_range(low, high)
    scale, zero_point = (t[:, None] for t in thresholds())
    out = fake_quantize(x, scale, zero_point, grid.qmin, grid.qmax)
    return (out.double() - x.double()).abs().pow(exponent).sum(1)


def streamed(x: Tensor, parts: int = 3) -> HistogramStatistics:
    statistics = HistogramStatistics()
    for part in x.flatten().tensor_split(parts):
        statistics.update(part)
    return statistics


def sample(shape: str, count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = {
        "gauss": generator.normal(size=count),
        "laplace": generator.laplace(size=count),
        "heavy": generator.standard_t(3, size=count),
        "relu": np.maximum(generator.laplace(size=count), 0.0),
        "relu heavy": np.maximum(generator.standard_t(3, size=count), 0.0),
        "skewed": generator.lognormal(size=count) - 0.5,
        "shifted": generator.normal(1.0, 0.5, size=count),
    }[shape]
    return values.astype(np.float32).astype(np.float64)


def both(x: np.ndarray) -> list[Statistics]:
    tensor = torch.from_numpy(x).float()
    return [SampleStatistics(tensor[None]), streamed(tensor)]


@pytest.mark.parametrize("exponent", [2.0, 2.4, 3.5])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("gauss", "symmetric"),
        ("laplace", "symmetric"),
        ("heavy", "symmetric"),
        ("relu", "symmetric_unsigned"),
        ("relu heavy", "symmetric_unsigned"),
    ],
)
def test_no_symmetric_threshold_has_a_smaller_error(
    shape: str, kind: GridKind, bits: int, exponent: float
) -> None:
    x = sample(shape, 8_000)
    top = float(np.abs(x).max())
    tried = np.linspace(top / 400, top, 400)
    low = -1.0 if kind == "symmetric" else 0.0
    least = min(numpy_error(x, low * t, t, kind, bits, exponent) for t in tried)
    options = InitSpec("mse") if exponent == 2.0 else InitSpec("lp", exponent=exponent)
    for statistics, slack in zip(both(x), (1.001, 1.01), strict=True):
        found = [t.item() for t in initial_thresholds(statistics, Grid(bits, kind), options)]
        assert found[0] == low * found[1]
        assert found[1] <= top
        assert numpy_error(x, found[0], found[1], kind, bits, exponent) <= slack * least


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", ["gauss", "heavy", "skewed", "shifted", "relu"])
def test_hardly_any_affine_range_has_a_smaller_error(shape: str, bits: int) -> None:
    """Optimizing one end at a time may be a few percent worse than both at once."""
    x = sample(shape, 2_000)
    bottom, top = min(float(x.min()), 0.0), float(x.max())
    shares = np.linspace(0.0, 1.0, 41)
    least = min(
        numpy_error(x, low, high, "affine", bits)
        for low in bottom * shares
        for high in top * shares[1:]
    )
    for statistics, slack in zip(both(x), (1.05, 1.07), strict=True):
        found = initial_thresholds(statistics, Grid(bits, "affine"), InitSpec("mse"))
        low, high = (t.item() for t in found)
        assert bottom <= low <= 0.0 <= high <= top
        assert numpy_error(x, low, high, "affine", bits) <= slack * least


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    count=st.integers(1, 60),
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    options=st.sampled_from([InitSpec("mse"), InitSpec("lp"), InitSpec("mse", candidates=17)]),
    offset=st.sampled_from([0.0, 2.0, -2.0]),
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=60)
def test_the_error_in_the_network_is_never_above_that_of_minmax(
    seed: int,
    rows: int,
    count: int,
    kind: GridKind,
    bits: int,
    options: InitSpec,
    offset: float,
    exponent: int,
) -> None:
    values = np.random.default_rng(seed).standard_t(2, (rows, count)) + offset
    x = torch.from_numpy((values * 10.0**exponent).astype(np.float32))
    grid, power = Grid(bits, kind), 2.0 if options.name == "mse" else options.exponent
    errors = [
        student_error(x, *initial_thresholds(SampleStatistics(x), grid, each), grid, power)
        for each in (options, InitSpec("minmax"))
    ]
    # The network computes in float32, the search in float64.
    reach = x.double().abs().amax(1)
    assert (errors[0] <= errors[1] * (1 + 1e-4) + count * (1e-6 * reach) ** power).all()


def test_rows_are_searched_independently_and_in_blocks() -> None:
    x = torch.from_numpy(sample("heavy", 5 * 20_000)).float().reshape(5, -1)
    x = x * torch.tensor([1.0, 1e-3, 50.0, 0.0, 1e20])[:, None]
    for name in ("mse", "lp", "entropy"):
        options = InitSpec(name)  # type: ignore[arg-type]
        together = initial_thresholds(SampleStatistics(x), Grid(4, "symmetric"), options)[1]
        for row, wanted in zip(x, together, strict=True):
            alone = initial_thresholds(SampleStatistics(row[None]), Grid(4, "symmetric"), options)[
                1
            ]
            assert alone.item() == wanted.item()


def test_exact_zeros_do_not_affect_activation_thresholds() -> None:
    x = torch.from_numpy(sample("relu", 20_000)).float()
    crowded = torch.cat([torch.zeros(10**6), x])
    for name in ("mse", "lp", "entropy"):
        options, grid = InitSpec(name), Grid(4, "symmetric_unsigned")  # type: ignore[arg-type]
        wanted = initial_thresholds(streamed(x), grid, options)[1].item()
        assert initial_thresholds(streamed(crowded), grid, options)[1].item() == wanted


def numpy_divergence(counts: np.ndarray, start: int, end: int, levels: int) -> float:
    """Return KL(P‖Q) bin by bin, as the docstring defines it."""
    p = counts[start:end].copy()
    q = np.zeros_like(p)
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    middles = (np.arange(levels + 1) - 0.5) * ((end - start) / (levels - 1))
    edges = np.clip(np.rint(middles), 0, end - start).astype(int)
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        inside = counts[start + a : start + b].sum()
        if inside == 0 and k in (0, levels - 1):
            inside = 0.5
        filled = p[a:b] > 0
        q[a:b][filled] = inside / max(filled.sum(), 1)
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("gauss", "symmetric"),
        ("heavy", "symmetric"),
        ("relu heavy", "symmetric_unsigned"),
        ("skewed", "affine"),
        ("shifted", "affine"),
    ],
)
def test_no_candidate_loses_less_information(shape: str, kind: GridKind, bits: int) -> None:
    x = sample(shape, 50_000)
    grid = Grid(bits, kind)
    for statistics in both(x):
        counts, width = (t[0].numpy() for t in statistics.histogram())
        zero = len(counts) // 2
        if kind != "affine":
            folded = counts[:zero][::-1] if kind == "symmetric" else 0.0
            counts, zero = counts[zero:] + folded, 0
        held = np.flatnonzero(counts)
        below, above = max(zero - held[0], 0), held[-1] + 1 - zero
        losses = {}
        for i in range(1, 101):
            a, b = int(np.ceil(below * i / 100)), int(np.ceil(above * i / 100))
            if a + b > grid.qmax:
                losses[i] = numpy_divergence(counts, zero - a, zero + b, grid.qmax + 1)
        low, high = (t.item() for t in initial_thresholds(statistics, grid, InitSpec("entropy")))
        a = 0 if kind != "affine" else round(-low / width)
        b = int(np.ceil(high / width - 1e-3))
        if low == min(float(x.min()), 0.0):
            a = below
        found = numpy_divergence(counts, zero - a, zero + b, grid.qmax + 1)
        assert found <= min(losses.values()) + 1e-9
        # The search refined around the best only.
        best = min(losses, key=losses.__getitem__)
        assert abs(b - above * best / 100) <= above / 100 + 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [("heavy", "symmetric"), ("relu heavy", "symmetric_unsigned"), ("heavy", "affine")],
)
def test_entropy_clips_a_heavy_tail(shape: str, kind: GridKind, bits: int) -> None:
    x = sample(shape, 100_000, seed=1)
    for statistics in both(x):
        high = initial_thresholds(statistics, Grid(bits, kind), InitSpec("entropy"))[1].item()
        assert 2.0 < high < 0.7 * np.abs(x).max()


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), count=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_entropy_of_rows_with_few_values_is_sane(seed: int, rows: int, count: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_t(2, (rows, count))).float()
    high = initial_thresholds(SampleStatistics(x), Grid(8, "symmetric"), InitSpec("entropy"))[1]
    assert (high > 0).all()
    assert (high <= x.abs().amax(1)).all()


# 2 to 8 bits, two-sided: arXiv 1810.05723 and the authors' code.
GAUSS = {2: 1.71, 3: 2.15, 4: 2.559, 5: 2.936, 6: 3.287, 7: 3.615, 8: 3.924}


@pytest.mark.parametrize("bits", range(2, 9))
def test_aciq_of_a_gaussian_equals_the_published_table(bits: int) -> None:
    x = sample("gauss", 400_000)
    one_sided = np.maximum(x, 0.0)
    for statistics in both(x):
        high = initial_thresholds(statistics, Grid(bits, "symmetric"), InitSpec("aciq"))[1].item()
        assert high == pytest.approx(GAUSS[bits], rel=5e-3)
    for statistics in both(x + 2.0):  # around the mean
        options, grid = InitSpec("aciq"), Grid(bits, "affine")
        low, high = (t.item() for t in initial_thresholds(statistics, grid, options))
        assert low == pytest.approx(min(2.0 - GAUSS[bits], 0.0), abs=0.02)
        assert high == pytest.approx(2.0 + GAUSS[bits], rel=5e-3)
    for statistics in both(one_sided):
        high = initial_thresholds(statistics, Grid(bits, "symmetric_unsigned"), InitSpec("aciq"))[
            1
        ].item()
        if bits < 8:
            assert high == pytest.approx(GAUSS[bits + 1], rel=5e-3)
        assert high <= one_sided.max()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_aciq_of_a_laplace_uses_lamberts_function(bits: int, scale: float) -> None:
    x = sample("laplace", 400_000) * scale
    for kind, values, goal in (
        ("symmetric", x, 3 * 4**bits),
        ("symmetric_unsigned", np.maximum(x, 0.0), 12 * 4**bits),
    ):
        for statistics in both(values):
            grid = Grid(bits, kind)  # type: ignore[arg-type]
            high = initial_thresholds(statistics, grid, InitSpec("aciq"))[1].item()
            wanted = scipy.special.lambertw(goal).real * scale
            assert high == pytest.approx(min(wanted, values.max()), rel=0.01)


@pytest.mark.parametrize(
    ("shape", "kind", "bits"),
    [
        ("laplace", "symmetric", 4),
        ("laplace", "symmetric", 6),
        ("gauss", "symmetric", 4),
        ("relu", "symmetric_unsigned", 4),
        ("shifted", "affine", 4),
    ],
)
def test_aciq_is_near_optimal_for_its_distributions(shape: str, kind: GridKind, bits: int) -> None:
    x = sample(shape, 100_000)
    errors = []
    for name in ("aciq", "mse"):
        found = initial_thresholds(both(x)[0], Grid(bits, kind), InitSpec(name))  # type: ignore[arg-type]
        errors.append(numpy_error(x, found[0].item(), found[1].item(), kind, bits))
    assert errors[1] <= errors[0] <= 1.1 * errors[1]


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    kind=st.sampled_from(KINDS),
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=40)
def test_lsq_equals_its_formula(seed: int, bits: int, kind: GridKind, exponent: int) -> None:
    values = np.random.default_rng(seed).normal(0.5, 1.0, 100) * 10.0**exponent
    x = torch.from_numpy(values).float()
    exact = x.double().numpy()
    q = 2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1
    step = 2 * np.abs(exact).mean() / np.sqrt(q)
    for statistics in everything(x):
        low, high = (
            t.item() for t in initial_thresholds(statistics, Grid(bits, kind), InitSpec("lsq"))
        )
        assert high - min(low, 0.0) * (kind == "affine") == pytest.approx(step * q, rel=1e-5)
        if kind == "affine":
            ends = min(exact.min(), 0.0), max(exact.max(), 0.0)
            assert low * ends[1] == pytest.approx(high * ends[0], rel=1e-5)
    # May exceed every value by its formula.
    if kind == "symmetric_unsigned" and bits == 8:
        assert high > exact.max()


@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    power=st.integers(-60, 60),
)
@settings(deadline=None, max_examples=40)
def test_scaling_by_a_power_of_two_scales_thresholds_exactly(
    seed: int, name: str, kind: GridKind, bits: int, power: int
) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_t(2, 200)).float()
    grid, options = Grid(bits, kind), InitSpec(name, candidates=20)
    for plain, scaled in zip(everything(x), everything(x * 2.0**power), strict=True):
        for before, after in zip(
            initial_thresholds(plain, grid, options),
            initial_thresholds(scaled, grid, options),
            strict=True,
        ):
            assert after.item() == before.item() * 2.0**power


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("outlier", [0.0, 1000.0, -1000.0])
def test_every_result_is_a_usable_range(
    name: str, kind: GridKind, scale: float, outlier: float
) -> None:
    x = torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([outlier])]) * scale
    if kind == "symmetric_unsigned":
        x = x.abs()
    for statistics in everything(x):
        options = InitSpec(name, candidates=20)
        low, high = initial_thresholds(statistics, Grid(4, kind), options)
        assert torch.isfinite(low).all()
        assert torch.isfinite(high).all()
        assert low <= 0 <= high
        assert high > low
        if name != "lsq":
            reach = x.abs().max()
            assert low >= (-reach if kind == "symmetric" else min(x.min(), torch.tensor(0.0)))
            assert high <= (reach if kind == "symmetric" else x.max())
