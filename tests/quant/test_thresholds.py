from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant.functional import fake_quantize, quantize
from fat.quant.thresholds import (
    FatAsymmetric,
    FatSymmetric,
    FrozenThresholds,
    Thresholds,
    make_thresholds,
)
from fat.spec import Grid, QuantSpec

BITS = st.integers(2, 8)
ROWS = st.sampled_from([None, 1, 5])
ALPHA = (0.5, 1.0)
SHIFT = (-0.2, 0.4)


def numbers(seed: int, low: float, high: float, rows: int | None) -> Tensor:
    shape = () if rows is None else (rows,)
    drawn = np.random.default_rng(seed).uniform(low, high, shape)
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def symmetric(
    grid: Grid, top: Tensor, alpha: Tensor | float = 1.0, limits: tuple[float, float] = ALPHA
) -> FatSymmetric:
    thresholds = FatSymmetric(grid, None if not top.dim() else len(top), limits)
    thresholds.calibrated(-top if grid.kind == "signed" else 0 * top, top)
    thresholds.alpha.data.copy_(torch.as_tensor(alpha))
    return thresholds


def asymmetric(
    bits: int, low: Tensor, high: Tensor, alpha: Tensor | float = 1.0, shift: Tensor | float = 0.0
) -> FatAsymmetric:
    grid = Grid(bits, "asymmetric")
    thresholds = FatAsymmetric(grid, None if not low.dim() else len(low), ALPHA, SHIFT)
    thresholds.calibrated(low, high)
    thresholds.alpha.data.copy_(torch.as_tensor(alpha))
    thresholds.shift.data.copy_(torch.as_tensor(shift))
    return thresholds


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    kind=st.sampled_from(["signed", "unsigned"]),
    rows=ROWS,
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=60)
def test_symmetric_step(seed: int, bits: int, kind: str, rows: int | None, exponent: int) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    top = numbers(seed, 0.5, 2.0, rows) * 10.0**exponent
    alpha = numbers(seed + 1, 0.3, 1.2, rows)
    scale, zero_point = symmetric(grid, top, alpha)()
    steps = 2 ** (bits - 1) - 1 if kind == "signed" else 2**bits - 1
    wanted = np.clip(double(alpha), 0.5, 1.0) * double(top) / steps
    np.testing.assert_allclose(double(scale), wanted, rtol=1e-6)
    assert scale.shape == top.shape
    assert torch.equal(zero_point, torch.zeros_like(top))


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    kind=st.sampled_from(["signed", "unsigned"]),
    vector=st.booleans(),
    limits=st.sampled_from([(0.5, 1.0), (0.5, 1.3), (1.0, 1.0)]),
)
@settings(deadline=None, max_examples=60)
def test_gradient_of_alpha_through_the_quantizer(
    seed: int, bits: int, kind: str, vector: bool, limits: tuple[float, float]
) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    rows = 6 if vector else None
    top = numbers(seed, 0.5, 2.0, rows)
    alpha = numbers(seed + 1, 0.3, 1.5, rows)
    if vector:  # both ends, and a little past them
        alpha[:4] = torch.tensor([limits[0], limits[1], limits[0] - 1e-4, limits[1] + 1e-4])
    thresholds = symmetric(grid, top, alpha, limits)
    scale, zero_point = (t.reshape(-1, 1) if vector else t for t in thresholds())
    generator = np.random.default_rng(seed + 2)
    integers = generator.integers(grid.qmin - 3, grid.qmax + 4, (6, 20))
    x = torch.from_numpy(integers + generator.uniform(-0.4, 0.4, (6, 20))).float() * scale.detach()
    grad = torch.from_numpy(generator.normal(size=(6, 20))).float()
    fake_quantize(x, scale, zero_point, grid.qmin, grid.qmax).backward(grad)

    used = np.clip(double(alpha), *limits) * double(top) / grid.qmax
    ratio = double(x) / (used[:, None] if vector else used)
    rounded = np.rint(ratio)
    clipped = np.clip(rounded, grid.qmin, grid.qmax)
    terms = double(grad) * np.where(rounded == clipped, rounded - ratio, clipped)
    terms = np.sum(terms, axis=1) if vector else np.sum(terms)
    data = double(alpha)
    passes = (data >= np.float32(limits[0])) & (data <= np.float32(limits[1]))
    assert thresholds.alpha.grad is not None
    np.testing.assert_allclose(
        double(thresholds.alpha.grad),
        terms * passes * double(top) / grid.qmax,
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", ["signed", "unsigned", "asymmetric"])
@pytest.mark.parametrize("rows", [None, 4])
def test_alpha_starts_at_its_upper_end_and_moves(kind: str, rows: int | None) -> None:
    grid = Grid(4, kind)  # type: ignore[arg-type]
    thresholds = make_thresholds(QuantSpec(thresholds="fat", alpha_range=ALPHA), grid, rows)
    top = torch.ones(()) if rows is None else torch.ones(rows)
    thresholds.calibrated(0 * top if kind == "unsigned" else -top, top)
    alpha = thresholds.get_parameter("alpha")
    assert torch.equal(alpha.detach(), torch.full_like(top, ALPHA[1]))
    x = torch.linspace(-0.3, 0.3, 50).expand(4, 50)  # far too small for the range
    optimizer = torch.optim.Adam(thresholds.parameters(), lr=0.02)
    errors = []
    for step in range(12):
        optimizer.zero_grad()
        scale, zero_point = (t if rows is None else t.reshape(-1, 1) for t in thresholds())
        loss = (fake_quantize(x, scale, zero_point, grid.qmin, grid.qmax) - x).square().sum()
        loss.backward()
        if not step:
            assert alpha.grad is not None
            assert (alpha.grad != 0).all()
        optimizer.step()
        thresholds.project()
        errors.append(loss.item())
    assert (alpha < ALPHA[1]).all()
    assert (alpha >= ALPHA[0]).all()
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("kind", ["signed", "asymmetric"])
def test_alpha_pushed_past_its_end_is_projected_and_comes_back(kind: str) -> None:
    grid = Grid(8, kind)  # type: ignore[arg-type]
    thresholds = make_thresholds(QuantSpec(thresholds="fat", alpha_range=ALPHA), grid, None)
    thresholds.calibrated(torch.tensor(-1.0), torch.tensor(1.0))
    alpha = thresholds.get_parameter("alpha")
    optimizer = torch.optim.SGD([alpha], lr=1.0)

    def move(direction: float) -> None:
        optimizer.zero_grad()
        (direction * 10 * thresholds()[0]).backward()
        optimizer.step()

    move(-1.0)
    assert alpha.item() > 1.0
    # Left there, it is dead: this is why there is a projection.
    assert thresholds()[0].item() == pytest.approx(2 / 255 if kind == "asymmetric" else 1 / 127)
    optimizer.zero_grad()
    thresholds()[0].backward()
    assert alpha.grad is not None
    assert alpha.grad.item() == 0.0
    thresholds.project()
    assert alpha.item() == 1.0
    move(1.0)
    assert 0.5 < alpha.item() < 1.0


@pytest.mark.parametrize("start", [-3.0, 0.49, 0.5, 0.7, 1.0, 1.01, 9.0])
def test_projection_is_numpys_clip(start: float) -> None:
    thresholds = symmetric(Grid(8, "signed"), torch.ones(3), start)
    thresholds.project()
    wanted = np.full(3, np.clip(np.float32(start), 0.5, 1.0))
    np.testing.assert_array_equal(thresholds.alpha.detach().numpy(), wanted)
    assert torch.equal(thresholds.factors()["alpha"], thresholds.alpha.detach())


def test_factors_are_those_that_act() -> None:
    thresholds = asymmetric(8, torch.tensor(-1.0), torch.tensor(1.0), 1.7, -0.9)
    assert {k: v.item() for k, v in thresholds.factors().items()} == pytest.approx(
        {"alpha": 1.0, "shift": -0.2}
    )
    assert not any(value.requires_grad for value in thresholds.factors().values())


RANGES = {
    "seed": st.integers(0, 2**31),
    "bits": BITS,
    "rows": ROWS,
    "exponent": st.integers(-20, 20),
    "reach": st.sampled_from([(-1.0, 1.0), (-1.0, 0.0), (0.0, 1.0), (-0.01, 1.0)]),
}


def draw_range(
    seed: int, rows: int | None, exponent: int, reach: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    unit = 10.0**exponent
    low = unit * reach[0] * numbers(seed, 0.1, 1.0, rows)
    high = unit * reach[1] * numbers(seed + 1, 0.1, 1.0, rows)
    return low, high


@given(**RANGES, alpha=st.floats(0.3, 1.2), shift=st.floats(-0.4, 0.6))
@settings(deadline=None, max_examples=80)
def test_asymmetric_step_and_zero_point(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    alpha: float,
    shift: float,
) -> None:
    low, high = draw_range(seed, rows, exponent, reach)
    thresholds = asymmetric(bits, low, high, alpha, shift)
    scale, zero_point = thresholds()
    steps = 2**bits - 1
    extent = double(high) - double(low)
    step = np.clip(alpha, *ALPHA) * extent / steps
    np.testing.assert_allclose(double(scale), step, rtol=1e-5)
    exact = -(double(low) + np.clip(shift, *SHIFT) * extent) / step
    wanted = np.clip(exact, 0, steps)
    # Rounding moves it by at most a half, and it is an integer of the grid.
    assert np.all(np.abs(double(zero_point) - wanted) <= 0.5 + 1e-3)
    assert np.all(double(zero_point) == np.rint(double(zero_point)))
    assert np.all((double(zero_point) >= 0) & (double(zero_point) <= steps))
    # So zero is exact whatever the factors are.
    zeros = torch.zeros_like(low)
    assert torch.equal(fake_quantize(zeros, scale, zero_point, 0, steps), zeros)
    assert torch.equal(quantize(zeros, scale, zero_point, 0, steps), zero_point.int())


@given(
    **RANGES,
    alpha=st.sampled_from([0.4, 0.5, 0.77, 1.0, 1.1]),
    shift=st.sampled_from([-0.3, -0.2, -0.03, 0.0, 0.11, 0.4, 0.5]),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
@settings(deadline=None, max_examples=150)
def test_gradients_of_alpha_and_shift_are_the_closed_form(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    alpha: float,
    shift: float,
    weights: tuple[float, float],
) -> None:
    low, high = draw_range(seed, rows, exponent, reach)
    thresholds = asymmetric(bits, low, high, alpha, shift)
    scale, zero_point = thresholds()
    unit = float(np.float32(10.0**exponent))
    (weights[0] * scale / unit + weights[1] * zero_point).sum().backward()

    steps = 2**bits - 1
    extent = double(high) - double(low)
    alpha_in = float(ALPHA[0] <= alpha <= ALPHA[1])
    shift_in = float(SHIFT[0] <= shift <= SHIFT[1])
    start = double(low) + np.clip(shift, *SHIFT) * extent
    step = np.clip(alpha, *ALPHA) * extent / steps
    position = -start / step
    # Float32 may round a half to the other side.
    assume(np.all(np.abs(position - np.floor(position) - 0.5) > 1e-3))
    z_in = 1.0 * ((np.rint(position) >= 0) & (np.rint(position) <= steps))
    step_by_alpha = alpha_in * extent / steps
    z_by_alpha = z_in * start / step**2 * step_by_alpha
    z_by_shift = -z_in * shift_in * extent / step
    by_alpha = weights[0] * step_by_alpha / unit + weights[1] * z_by_alpha
    assert thresholds.alpha.grad is not None
    assert thresholds.shift.grad is not None
    np.testing.assert_allclose(double(thresholds.alpha.grad), by_alpha, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        double(thresholds.shift.grad), weights[1] * z_by_shift, rtol=1e-3, atol=1e-3
    )


@given(seed=st.integers(0, 2**31), bits=BITS)
@settings(deadline=None, max_examples=60)
def test_gradients_through_the_asymmetric_quantizer(seed: int, bits: int) -> None:
    generator = np.random.default_rng(seed)
    low, high = -numbers(seed, 0.2, 1.0, None), numbers(seed + 1, 0.2, 1.0, None)
    alpha, shift = generator.uniform(0.5, 1.0), generator.uniform(-0.2, 0.2)
    thresholds = asymmetric(bits, low, high, alpha, shift)
    steps = 2**bits - 1
    scale, zero_point = thresholds()
    integers = generator.integers(-3, steps + 4, 60)
    offset = generator.uniform(-0.4, 0.4, 60)
    x = torch.from_numpy(integers + offset).float()
    x = (x - zero_point.detach()) * scale.detach()
    grad = torch.from_numpy(generator.normal(size=60)).float()
    fake_quantize(x, scale, zero_point, 0, steps).backward(grad)

    extent = double(high) - double(low)
    data_alpha, data_shift = double(thresholds.alpha), double(thresholds.shift)
    start, step = double(low) + data_shift * extent, data_alpha * extent / steps
    position = -start / step
    assume(abs(position - np.floor(position) - 0.5) > 1e-3)
    z = np.clip(np.rint(position), 0, steps)
    z_in = 0 <= np.rint(position) <= steps
    ratio = double(x) / step
    q = np.rint(ratio) + z
    inside = (q >= 0) & (q <= steps)
    by_step = np.sum(double(grad) * np.where(inside, q - z - ratio, np.clip(q, 0, steps) - z))
    by_z = np.sum(double(grad) * np.where(inside, 0.0, -step))
    by_alpha = extent / steps * (by_step + by_z * z_in * start / step**2)
    by_shift = -by_z * z_in * extent / step
    assert thresholds.alpha.grad is not None
    assert thresholds.shift.grad is not None
    np.testing.assert_allclose(double(thresholds.alpha.grad), by_alpha, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(double(thresholds.shift.grad), by_shift, rtol=1e-3, atol=2e-3)


@given(**RANGES, alpha=st.floats(-1.0, 2.0), shift=st.floats(-2.0, 2.0))
@settings(deadline=None, max_examples=80)
def test_projection_keeps_zero_between_the_thresholds(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    alpha: float,
    shift: float,
) -> None:
    low, high = draw_range(seed, rows, exponent, reach)
    thresholds = asymmetric(bits, low, high, alpha, shift)
    thresholds.project()
    data_alpha, data_shift = double(thresholds.alpha), double(thresholds.shift)
    assert np.all((data_alpha >= ALPHA[0]) & (data_alpha <= ALPHA[1]))
    assert np.all((data_shift >= np.float32(SHIFT[0])) & (data_shift <= np.float32(SHIFT[1])))
    extent = double(high) - double(low)
    start = double(low) + data_shift * extent
    assert np.all(start <= 1e-6 * extent)
    assert np.all(start + data_alpha * extent >= -1e-6 * extent)
    # Both factors can move on from there.
    thresholds()[1].sum().backward()
    assert thresholds.shift.grad is not None
    assert (thresholds.shift.grad != 0).all()
    before = [p.detach().clone() for p in thresholds.parameters()]
    thresholds.project()
    for parameter, old in zip(thresholds.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old)


def test_projection_leaves_factors_that_are_in_order() -> None:
    thresholds = asymmetric(8, torch.tensor(-1.0), torch.tensor(3.0), 0.8, 0.1)
    thresholds.project()
    assert (thresholds.alpha.item(), thresholds.shift.item()) == pytest.approx((0.8, 0.1))


@pytest.mark.parametrize("kind", ["signed", "unsigned", "asymmetric"])
@pytest.mark.parametrize("thresholds", ["fat", "frozen"])
@pytest.mark.parametrize("extent", [0.0, 1e-40])
def test_no_extent_gives_a_finite_step(kind: str, thresholds: str, extent: float) -> None:
    spec = QuantSpec(thresholds=thresholds)  # type: ignore[arg-type]
    module = make_thresholds(spec, Grid(8, kind), 2)  # type: ignore[arg-type]
    module.calibrated(torch.tensor([0.0, 0.0]), torch.tensor([extent, 1.0]))
    scale, zero_point = module()
    assert scale[0].item() == 1.0
    assert zero_point[0].item() == 0.0
    assert scale[1].item() == pytest.approx(1 / module.grid.qmax)
    if scale.requires_grad:
        (scale.sum() + zero_point.sum()).backward()
    module.project()
    for parameter in module.parameters():
        assert parameter.isfinite().all()
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    values = fake_quantize(torch.zeros(2), scale, zero_point, module.grid.qmin, module.grid.qmax)
    assert torch.equal(values, torch.zeros(2))


def test_small_filters_keep_their_own_step() -> None:
    top = torch.tensor([1e-30, 1e-10, 1.0])
    scale, _ = symmetric(Grid(8, "signed"), top)()
    np.testing.assert_allclose(double(scale), double(top) / 127, rtol=1e-6)


@pytest.mark.parametrize(
    ("thresholds", "kind", "wanted", "parameters"),
    [
        ("frozen", "signed", FrozenThresholds, set()),
        ("frozen", "asymmetric", FrozenThresholds, set()),
        ("fat", "signed", FatSymmetric, {"alpha"}),
        ("fat", "unsigned", FatSymmetric, {"alpha"}),
        ("fat", "asymmetric", FatAsymmetric, {"alpha", "shift"}),
    ],
)
@pytest.mark.parametrize("rows", [None, 3])
def test_parameters_exist_from_the_start(
    thresholds: str, kind: str, wanted: type[Thresholds], parameters: set[str], rows: int | None
) -> None:
    spec = QuantSpec(thresholds=thresholds)  # type: ignore[arg-type]
    module = make_thresholds(spec, Grid(8, kind), rows)  # type: ignore[arg-type]
    assert type(module) is wanted
    named = dict(module.named_parameters())
    assert set(named) == parameters == set(module.factors())
    assert all(p.shape == (() if rows is None else (rows,)) for p in named.values())
    assert {"low", "high"} <= set(module.state_dict())


def test_calibrating_again_starts_anew() -> None:
    thresholds = asymmetric(8, torch.tensor(-1.0), torch.tensor(1.0), 0.6, 0.2)
    thresholds.calibrated(torch.tensor([-2.0]), torch.tensor([3.0]))
    assert (thresholds.alpha.item(), thresholds.shift.item()) == (1.0, 0.0)
    assert [t.item() for t in thresholds.range()] == [-2.0, 3.0]
    plain = symmetric(Grid(8, "signed"), torch.tensor(1.0), 0.6)
    plain.calibrated(torch.tensor([-2.0]), torch.tensor([2.0]))
    assert [t.item() for t in plain.range()] == [-2.0, 2.0]


def test_a_saved_state_gives_the_same_grid() -> None:
    source = asymmetric(6, torch.tensor(-1.0), torch.tensor(2.0), 0.7, 0.1)
    target = asymmetric(6, torch.tensor(0.0), torch.tensor(1.0))
    target.load_state_dict(source.state_dict())
    for own, other in zip(target(), source(), strict=True):
        assert torch.equal(own, other)
