from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant.observers import HistogramStatistics, RangeStatistics, SampleStatistics

SHARES = (0.5, 0.9, 0.99, 0.9999)


def heavy_tailed(seed: int, count: int, scale: float = 1.0) -> Tensor:
    """Return values over several orders of magnitude, so that the range doubles many times."""
    generator = np.random.default_rng(seed)
    values = scale * generator.standard_t(1.5, size=count)
    return torch.from_numpy(values.astype(np.float32))


def fill(statistics: RangeStatistics, x: Tensor, cuts: list[int]) -> None:
    edges = [0, *sorted({cut % len(x) for cut in cuts} - {0}), len(x)]
    for start, end in itertools.pairwise(edges):
        statistics.update(x[start:end])


def check_counts(statistics: HistogramStatistics, x: Tensor) -> None:
    edges = statistics.edges().numpy()
    assert edges[0] == -edges[-1]
    assert edges[-1] > float(x.abs().max()) >= edges[-1] / 2
    wanted, _ = np.histogram(x.double().numpy(), bins=edges)
    np.testing.assert_array_equal(statistics.counts().numpy(), wanted)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    bins=st.sampled_from([4, 64, 1024, 8192]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e25]),
)
@settings(deadline=None, max_examples=60)
def test_histogram_equals_numpys_for_any_batches(
    seed: int, count: int, cuts: list[int], bins: int, scale: float
) -> None:
    x = heavy_tailed(seed, count, scale)
    statistics = HistogramStatistics(bins)
    fill(statistics, x, cuts)
    check_counts(statistics, x)
    at_once = HistogramStatistics(bins)
    at_once.update(x)
    assert torch.equal(statistics.edges(), at_once.edges())
    assert torch.equal(statistics.counts(), at_once.counts())
    assert statistics.minimum().item() == x.min().item()
    assert statistics.maximum().item() == x.max().item()


def test_values_on_the_edges_of_bins() -> None:
    x = torch.arange(-64.0, 65.0) / 64  # on the edges of bins at any range
    statistics = HistogramStatistics(128)
    for value in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]:
        statistics.update(value)
    check_counts(statistics, x)


@pytest.mark.parametrize("first", [0.25, 1.0, 0.3])
def test_doubling_merges_neighboring_bins(first: float) -> None:
    statistics = HistogramStatistics(64)
    values = torch.tensor([first * 2**k * sign for k in range(12) for sign in (1, -0.9)])
    for value in values:
        statistics.update(value)
        check_counts(statistics, values[: int(statistics.counts().sum())])


def test_counts_above_what_float32_can_hold() -> None:
    many = 2**24 + 100
    statistics = HistogramStatistics(16)
    statistics.update(torch.zeros(1).expand(many))
    statistics.update(torch.tensor([1.0]))
    statistics.update(torch.zeros(1).expand(many))
    assert statistics.counts()[8].item() == 2 * many
    assert statistics.counts().sum().item() == 2 * many + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    x = heavy_tailed(3, 500).to(dtype)
    before = x.clone()
    statistics = HistogramStatistics(256)
    fill(statistics, x, [100, 101])
    assert torch.equal(x, before)
    check_counts(statistics, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_layout_is_observed_and_not_changed(memory_format: torch.memory_format) -> None:
    x = heavy_tailed(4, 240).reshape(2, 3, 8, 5).contiguous(memory_format=memory_format)
    x.requires_grad_()
    before = x.detach().clone()
    statistics = HistogramStatistics(256)
    statistics.update(x[:, :, ::2])
    statistics.update(x[:, :, 1::2])
    check_counts(statistics, x.detach())
    assert torch.equal(x.detach(), before)
    assert not statistics.counts().requires_grad


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(20, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    share=st.floats(0.0, 1.0),
)
@settings(deadline=None, max_examples=80)
def test_histogram_quantiles_are_close_to_numpys(
    seed: int, count: int, cuts: list[int], share: float
) -> None:
    x = heavy_tailed(seed, count)
    statistics = HistogramStatistics(4096)
    fill(statistics, x, cuts)
    width = float(statistics.edges()[1] - statistics.edges()[0])
    assert width <= 4 / 4096 * float(x.abs().max())
    for values, found in (
        (x.double().numpy(), statistics.quantile(share)),
        (x.double().abs().numpy(), statistics.magnitude_quantile(share)),
    ):
        # Between the neighbors of numpy's order statistics, to within a bin.
        step = 1 / (count - 1)
        low = np.quantile(values, max(share - step, 0.0), method="lower") - width
        high = np.quantile(values, min(share + step, 1.0), method="higher") + width
        assert found.shape == (1,)
        assert low <= found.item() <= high
        assert values.min() - width <= found.item() <= values.max()
        assert found.dtype == torch.float64


def test_quantiles_of_many_values_equal_numpys_within_a_bin() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    statistics = HistogramStatistics()
    for part in x.split(7_000):
        statistics.update(part)
    width = float(statistics.edges()[1] - statistics.edges()[0])
    for share in (0.0001, 0.01, *SHARES):
        wanted = np.quantile(x.double().numpy(), share)
        assert statistics.quantile(share).item() == pytest.approx(wanted, abs=2 * width + 0.02)
    for share in SHARES:
        wanted = np.quantile(x.double().abs().numpy(), share)
        assert statistics.magnitude_quantile(share).item() == pytest.approx(
            wanted, abs=2 * width + 0.02
        )


def test_minimum_and_maximum_are_those_of_the_data() -> None:
    statistics = HistogramStatistics(64)
    statistics.update(torch.tensor([-0.3, 0.1, 6.0]))
    assert statistics.quantile(0.0).item() == pytest.approx(-0.3)
    assert statistics.quantile(1.0).item() == pytest.approx(6.0)
    assert statistics.magnitude_quantile(1.0).item() == pytest.approx(6.0)


@pytest.mark.parametrize("kind", [RangeStatistics, HistogramStatistics])
def test_memory_does_not_grow_with_the_images(kind: type[RangeStatistics]) -> None:
    statistics = kind()
    sizes = set()
    for seed in range(30):
        statistics.update(heavy_tailed(seed, 500))
        sizes.add(len(pickle.dumps(statistics)))
    assert len(sizes) == 1


@pytest.mark.parametrize("value", [1e-40, 1e-30, 0.1, 1.0, 3.0, 1e30, 3e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_constant_tensor(value: float, sign: float) -> None:
    x = torch.full((2, 50), sign * value)
    statistics = HistogramStatistics()
    for _ in range(3):
        statistics.update(x)
    exact = float(x[0, 0])
    assert statistics.counts().sum().item() == 300
    assert int((statistics.counts() > 0).sum()) == 1
    for share in (0.001, *SHARES, 1.0):
        assert statistics.quantile(share).item() == pytest.approx(exact, rel=1e-3)
        assert statistics.magnitude_quantile(share).item() == pytest.approx(abs(exact), rel=1e-3)
    assert statistics.minimum().item() == statistics.maximum().item() == exact


def test_an_all_zero_tensor() -> None:
    statistics = HistogramStatistics()
    for _ in range(3):
        statistics.update(torch.zeros(10))
    assert statistics.seen
    assert statistics.counts().sum().item() == 30
    for share in (0.0, *SHARES, 1.0):
        assert statistics.quantile(share).item() == 0.0
        assert statistics.magnitude_quantile(share).item() == 0.0


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e30])
def test_zeros_first_and_data_later(scale: float) -> None:
    data = heavy_tailed(1, 500)
    data = data / data.abs().max() * scale
    x = torch.cat([torch.zeros(300), data, torch.zeros(7)])
    statistics = HistogramStatistics(1024)
    for part in (x[:100], x[100:300], x[300:500], x[500:]):
        statistics.update(part)
    check_counts(statistics, x)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e30])
def test_one_outlier_moves_the_range_but_not_the_quantile(scale: float) -> None:
    bulk = torch.linspace(-1, 1, 100_001) * scale
    statistics = HistogramStatistics()
    statistics.update(bulk[:5000])
    statistics.update(torch.tensor([100.0 * scale]))
    statistics.update(bulk[5000:])
    assert statistics.maximum().item() == pytest.approx(100.0 * scale, rel=1e-3)
    width = 256 * scale / 8192
    assert statistics.magnitude_quantile(0.999).item() == pytest.approx(0.999 * scale, abs=width)
    assert statistics.quantile(0.001).item() == pytest.approx(-0.998 * scale, abs=width)


@pytest.mark.parametrize("kind", [RangeStatistics, HistogramStatistics])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_values_that_are_not_finite_are_reported(
    kind: type[RangeStatistics], bad: float, when: int
) -> None:
    batches = [torch.tensor([1.0, -2.0]), torch.tensor([3.0])]
    batches.insert(when, torch.tensor([0.5, bad]))
    statistics = kind()
    for batch in batches:
        statistics.update(batch)
    assert statistics.seen
    found = [statistics.minimum().item(), statistics.maximum().item()]
    np.testing.assert_array_equal(
        found, [np.min(torch.cat(batches).numpy()), np.max(torch.cat(batches).numpy())]
    )


@pytest.mark.parametrize("kind", [RangeStatistics, HistogramStatistics])
def test_seen(kind: type[RangeStatistics]) -> None:
    statistics = kind()
    assert not statistics.seen
    statistics.update(torch.tensor([torch.inf]))
    assert statistics.seen


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    count=st.integers(1, 60),
    share=st.floats(0.0, 1.0),
)
@settings(deadline=None, max_examples=60)
def test_sample_statistics_equal_numpys(seed: int, rows: int, count: int, share: float) -> None:
    x = heavy_tailed(seed, rows * count).reshape(rows, count)
    statistics = SampleStatistics(x)
    values = x.double().numpy()
    for found, wanted in (
        (statistics.minimum(), values.min(axis=1)),
        (statistics.maximum(), values.max(axis=1)),
        (statistics.quantile(share), np.quantile(values, share, axis=1)),
        (statistics.magnitude_quantile(share), np.quantile(np.abs(values), share, axis=1)),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), count=st.integers(1, 80))
@settings(deadline=None, max_examples=40)
def test_moments_and_histogram_of_samples_equal_numpys(seed: int, rows: int, count: int) -> None:
    x = heavy_tailed(seed, rows * count).reshape(rows, count)
    x[0, count // 2] = 0.0
    values = x.double().numpy()
    statistics = SampleStatistics(x)
    for found, wanted in (
        (statistics.mean(), values.mean(axis=1)),
        (statistics.mean_magnitude(), np.abs(values).mean(axis=1)),
        (statistics.mean_square(), np.square(values).mean(axis=1)),
        (
            statistics.mean_deviation(),
            np.abs(values - values.mean(axis=1, keepdims=True)).mean(axis=1),
        ),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)
    points, times = statistics.points()
    assert torch.equal(points, x.double())
    assert times is None
    counts, width = statistics.histogram()
    half = counts.shape[1] // 2
    for row, own, step in zip(values, counts.numpy(), width.tolist(), strict=True):
        # numpy's last bin is closed.
        wanted, _ = np.histogram(row[row != 0.0], bins=(np.arange(2 * half + 1) - half) * step)
        assert own.sum() == wanted.sum() == np.count_nonzero(row)
        # A value on an edge may round to either side of it.
        assert np.abs(np.cumsum(own) - np.cumsum(wanted)).max() <= 1


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    scale=st.sampled_from([1e-40, 1e-30, 1.0, 1e30]),
)
@settings(deadline=None, max_examples=40)
def test_moments_and_points_of_a_stream(
    seed: int, count: int, cuts: list[int], scale: float
) -> None:
    x = heavy_tailed(seed, count).clamp(-1e4, 1e4) * scale
    x[::3] = 0.0
    values = x.double().numpy()
    statistics = HistogramStatistics()
    fill(statistics, x, cuts)
    for found, wanted in (
        (statistics.mean(), values.mean()),
        (statistics.mean_magnitude(), np.abs(values).mean()),
        (statistics.mean_square(), np.square(values).mean()),
    ):
        assert found.shape == (1,)
        assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12 * np.abs(values).max())
    width = statistics.histogram()[1].item()
    deviation = np.abs(values - values.mean()).mean()
    assert statistics.mean_deviation().item() == pytest.approx(deviation, abs=width)

    points, times = statistics.points()
    assert times[0, 0].item() == np.count_nonzero(values == 0.0)
    # The center of a bin is at most half a bin from its values.
    repeated = np.sort(np.repeat(points[0].numpy(), times[0].long().numpy()))
    assert np.abs(repeated - np.sort(values)).max() <= 0.51 * width


def test_an_outlier_does_not_move_the_moments() -> None:
    bulk = torch.linspace(-1, 1, 10_001)
    statistics = HistogramStatistics()
    statistics.update(bulk)
    statistics.update(torch.tensor([1e9]))
    values = np.append(bulk.double().numpy(), 1e9)
    assert statistics.mean_magnitude().item() == pytest.approx(np.abs(values).mean(), rel=1e-12)
    assert statistics.mean().item() == pytest.approx(values.mean(), rel=1e-12)


def test_zeros_are_counted_separately_even_when_first() -> None:
    statistics = HistogramStatistics(64)
    for part in (torch.zeros(5), torch.tensor([0.001, -0.0, 1.0]), torch.zeros(2)):
        statistics.update(part)
    points, times = statistics.points()
    assert times.tolist() == [[8.0, 1.0, 1.0]]
    assert points[0, 0].item() == 0.0
    assert statistics.histogram()[0].sum().item() == 2.0
