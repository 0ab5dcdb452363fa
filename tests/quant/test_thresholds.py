from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant.config import Grid, QuantSpec
from fat.quant.functional import fake_quantize, quantize
from fat.quant.thresholds import LARGEST_FACTOR, SMALLEST_FACTOR, Thresholds, power_of_two_ste

BITS = st.integers(2, 8)
ROWS = st.sampled_from([None, 1, 5])
ALPHA = (0.5, 1.0)
SHIFT = (-0.2, 0.4)
TRAINED = ("fat", "lsq", "tqt")
START = {"fat": 1.0, "lsq": 1.0, "tqt": 0.0}
REACH = {
    "fat": ALPHA,
    "lsq": (SMALLEST_FACTOR, LARGEST_FACTOR),
    "tqt": (math.log2(SMALLEST_FACTOR), math.log2(LARGEST_FACTOR)),
}


def numbers(seed: int, low: float, high: float, rows: int | None) -> Tensor:
    shape = () if rows is None else (rows,)
    drawn = np.random.default_rng(seed).uniform(low, high, shape)
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def calibrated(
    grid: Grid, low: Tensor, high: Tensor, elements: int | None = None, **options: Any
) -> Thresholds:
    """Return thresholds with one row for each of low and high."""
    thresholds = Thresholds(QuantSpec(**options), grid, len(low) if low.dim() else None)
    thresholds.set_range(low, high, elements)
    return thresholds


def symmetric(grid: Grid, top: Tensor, alpha: Tensor | float = 1.0, **options: Any) -> Thresholds:
    thresholds = calibrated(grid, -top if grid.kind == "symmetric" else 0 * top, top, **options)
    thresholds.get_parameter("alpha").data.copy_(torch.as_tensor(alpha))
    return thresholds


def asymmetric(
    bits: int,
    low: Tensor,
    high: Tensor,
    alpha: Tensor | float = 1.0,
    shift: Tensor | float = 0.0,
    **options: Any,
) -> Thresholds:
    thresholds = calibrated(Grid(bits, "affine"), low, high, **options)
    thresholds.get_parameter("alpha").data.copy_(torch.as_tensor(alpha))
    thresholds.get_parameter("shift").data.copy_(torch.as_tensor(shift))
    return thresholds


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    kind=st.sampled_from(["symmetric", "symmetric_unsigned"]),
    rows=ROWS,
    exponent=st.integers(-30, 30),
)
@settings(deadline=None, max_examples=60)
def test_symmetric_step(seed: int, bits: int, kind: str, rows: int | None, exponent: int) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    top = numbers(seed, 0.5, 2.0, rows) * 10.0**exponent
    alpha = numbers(seed + 1, 0.3, 1.2, rows)
    scale, zero_point = symmetric(grid, top, alpha)()
    steps = 2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1
    wanted = np.clip(double(alpha), 0.5, 1.0) * double(top) / steps
    np.testing.assert_allclose(double(scale), wanted, rtol=1e-6)
    assert scale.shape == top.shape
    assert torch.equal(zero_point, torch.zeros_like(top))


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    kind=st.sampled_from(["symmetric", "symmetric_unsigned"]),
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
    if vector:  # both ends, and slightly beyond
        alpha[:4] = torch.tensor([limits[0], limits[1], limits[0] - 1e-4, limits[1] + 1e-4])
    thresholds = symmetric(grid, top, alpha, alpha_range=limits)
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
    assert thresholds.alpha is not None
    assert thresholds.alpha.grad is not None
    by_step = double(top) / grid.qmax
    # With one threshold the kernels store rounding errors in one byte.
    byte = 0.0 if vector else np.sum(np.abs(double(grad))) / 504
    room = 1e-4 + passes * byte * by_step
    assert np.all(
        np.abs(double(thresholds.alpha.grad) - terms * passes * by_step)
        <= room + 1e-3 * np.abs(terms * by_step)
    )


@pytest.mark.parametrize("parametrization", TRAINED)
@pytest.mark.parametrize("kind", ["symmetric", "symmetric_unsigned", "affine"])
@pytest.mark.parametrize("rows", [None, 4])
def test_alpha_starts_neutral_and_trains(parametrization: str, kind: str, rows: int | None) -> None:
    """FAT's α starts at the upper end of its range, where torch.clamp has no gradient."""
    grid = Grid(4, kind)  # type: ignore[arg-type]
    top = torch.ones(()) if rows is None else torch.ones(rows)
    low = 0 * top if kind == "symmetric_unsigned" else -top
    thresholds = calibrated(grid, low, top, thresholds=parametrization, alpha_range=ALPHA)
    alpha = thresholds.get_parameter("alpha")
    start = START[parametrization]
    assert torch.equal(alpha.detach(), torch.full_like(top, start))
    assert parametrization != "fat" or start == ALPHA[1]
    assert all(torch.equal(*pair) for pair in zip(thresholds.range(), (low, top), strict=True))
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
    assert (alpha < start).all()
    assert (alpha >= REACH[parametrization][0]).all()
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("kind", ["symmetric", "affine"])
def test_alpha_beyond_its_range_is_projected_and_can_return(kind: str) -> None:
    grid = Grid(8, kind)  # type: ignore[arg-type]
    thresholds = calibrated(grid, torch.tensor(-1.0), torch.tensor(1.0), alpha_range=ALPHA)
    alpha = thresholds.get_parameter("alpha")
    optimizer = torch.optim.SGD([alpha], lr=1.0)

    def move(direction: float) -> None:
        optimizer.zero_grad()
        (direction * 10 * thresholds()[0]).backward()
        optimizer.step()

    move(-1.0)
    assert alpha.item() > 1.0
    # Without projection it would get no gradient.
    assert thresholds()[0].item() == pytest.approx(2 / 255 if kind == "affine" else 1 / 127)
    optimizer.zero_grad()
    thresholds()[0].backward()
    assert alpha.grad is not None
    assert alpha.grad.item() == 0.0
    thresholds.project()
    assert alpha.item() == 1.0
    move(1.0)
    assert 0.5 < alpha.item() < 1.0


@pytest.mark.parametrize("parametrization", TRAINED)
@pytest.mark.parametrize("start", [-30.0, -3.0, 1e-4, 0.49, 0.5, 0.7, 1.0, 1.01, 9.0, 11.0, 2000.0])
def test_projection_equals_numpys_clip(parametrization: str, start: float) -> None:
    thresholds = symmetric(Grid(8, "symmetric"), torch.ones(3), start, thresholds=parametrization)
    thresholds.project()
    wanted = np.full(3, np.clip(np.float32(start), *np.float32(REACH[parametrization])))
    alpha = thresholds.get_parameter("alpha").detach().numpy()
    np.testing.assert_array_equal(alpha, wanted)
    factor = np.exp2(wanted) if parametrization == "tqt" else wanted
    np.testing.assert_allclose(thresholds.factors()["alpha"].numpy(), factor, rtol=1e-6)


def test_factors_are_the_effective_ones() -> None:
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
def test_affine_step_and_zero_point(
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
    # Rounding changes it by at most 1/2, to an integer of the grid.
    assert np.all(np.abs(double(zero_point) - wanted) <= 0.5 + 1e-3)
    assert np.all(double(zero_point) == np.rint(double(zero_point)))
    assert np.all((double(zero_point) >= 0) & (double(zero_point) <= steps))
    # Zero is exact for all factors.
    zeros = torch.zeros_like(low)
    assert torch.equal(fake_quantize(zeros, scale, zero_point, 0, steps), zeros)
    assert torch.equal(quantize(zeros, scale, zero_point, 0, steps), zero_point.int())


ALPHAS = {  # below, at and above both ends, and between
    "fat": [0.4, 0.5, 0.77, 1.0, 1.1],
    "lsq": [2.0**-11, 2.0**-10, 0.3, 1.0, 1.7, 1024.0, 1025.0],
    "tqt": [-10.5, -10.0, -1.3, 0.0, 0.6, 10.0, 10.5],
}


@given(
    **RANGES,
    kind=st.sampled_from(["symmetric", "symmetric_unsigned", "affine"]),
    choice=st.sampled_from([(name, alpha) for name in TRAINED for alpha in ALPHAS[name]]),
    shift=st.sampled_from([-0.3, -0.2, -0.03, 0.0, 0.11, 0.4, 0.5]),
    power_of_two=st.booleans(),
    elements=st.integers(1, 10**6),
    weights=st.tuples(*[st.sampled_from([-1.7, -0.3, 0.0, 0.8, 2.0])] * 2),
)
@settings(deadline=None, max_examples=300)
def test_gradients_are_the_closed_form(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    kind: str,
    choice: tuple[str, float],
    shift: float,
    power_of_two: bool,
    elements: int,
    weights: tuple[float, float],
) -> None:
    """Return ∂(a·step + b·zero point)/∂α and /∂shift in float64."""
    name, alpha = choice
    low, high = draw_range(seed, rows, exponent, reach)
    if kind == "symmetric":
        high = torch.maximum(-low, high)
        low = -high
    elif kind == "symmetric_unsigned":
        high = torch.maximum(-low, high)
        low = 0 * high
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    thresholds = calibrated(
        grid,
        low,
        high,
        elements,
        thresholds=name,
        power_of_two=power_of_two,
        alpha_range=ALPHA,
        shift_range=SHIFT,
    )
    thresholds.get_parameter("alpha").data.fill_(alpha)
    if kind == "affine":
        thresholds.get_parameter("shift").data.fill_(shift)
    scale, zero_point = thresholds()
    unit = float(np.float32(10.0**exponent))
    (weights[0] * scale / unit + weights[1] * zero_point).sum().backward()

    share = 1 / math.sqrt(elements * grid.qmax) if name == "lsq" else 1.0
    reached = np.clip(alpha, *REACH[name])
    alpha_in = float(reached == alpha)
    factor = 2.0**reached if name == "tqt" else reached
    by_factor = alpha_in * (factor * math.log(2) if name == "tqt" else share)
    extent = double(high) - (double(low) if kind == "affine" else 0.0)
    step = factor * extent / grid.qmax
    step_by_alpha = by_factor * extent / grid.qmax
    if power_of_two:
        logarithm = np.log2(step)
        # Float32 may round a step close to a power of two to its other side.
        assume(np.all(np.abs(logarithm - np.rint(logarithm)) > 1e-5))
        rounded = 2.0 ** np.ceil(logarithm)
        step, step_by_alpha = rounded, step_by_alpha * rounded / step
    np.testing.assert_allclose(double(scale), step, rtol=1e-5)
    terms = [weights[0] * step_by_alpha / unit]
    by_shift = np.zeros_like(step)
    if kind == "affine":
        span = SHIFT if name == "fat" else (-LARGEST_FACTOR, LARGEST_FACTOR)
        moved = np.clip(np.float64(np.float32(shift)), *np.float32(span))
        shift_in = float(moved == np.float32(shift)) * share
        start = double(low) + moved * extent
        position = -start / step
        # Float32 may round halves differently.
        fraction = np.abs(position - np.floor(position) - 0.5)
        assume(np.all((fraction > 1e-3) | (position < -1) | (position > grid.qmax + 1)))
        z_in = 1.0 * ((np.rint(position) >= 0) & (np.rint(position) <= grid.qmax))
        terms.append(weights[1] * z_in * start / step**2 * step_by_alpha)
        by_shift = -weights[1] * z_in * shift_in * extent / step
        found = thresholds.get_parameter("shift").grad
        assert found is not None
        np.testing.assert_allclose(double(found), by_shift, rtol=1e-4)
    found = thresholds.get_parameter("alpha").grad
    assert found is not None
    # The two parts may almost cancel; so may start = T_l + shift·R.
    room = 1e-5 * sum(np.abs(term) for term in terms)
    if len(terms) == 2:
        room = room + 1e-5 * np.abs(weights[1] * z_in / step * step_by_alpha * extent / step)
    assert np.all(np.abs(double(found) - sum(terms)) <= room)


@given(bits=st.integers(1, 0x7F7FFFFF), grad=st.floats(-2, 2, width=32))
@settings(deadline=None, max_examples=200)
def test_powers_of_two_are_exact_and_pass_the_gradient(bits: int, grad: float) -> None:
    """Any float32 above 0: denormals, powers of two, and the largest numbers."""
    step = torch.tensor([bits] * 9, dtype=torch.int32).view(torch.float32).requires_grad_()
    out = power_of_two_ste(step)
    out.backward(torch.full((9,), grad))
    value = float(step[0].detach())
    mantissa, exponent = math.frexp(value)
    wanted = math.ldexp(1.0, min(exponent - (mantissa == 0.5), 127))
    assert out.tolist() == [wanted] * 9  # as vectors and individually
    assert step.grad is not None
    np.testing.assert_allclose(step.grad.numpy(), np.float32(grad) * (wanted / value), rtol=1e-6)


@pytest.mark.parametrize("exponent", range(-149, 128))
def test_a_power_of_two_is_unchanged(exponent: int) -> None:
    step = torch.tensor(2.0**exponent)
    assert power_of_two_ste(step).item() == 2.0**exponent == step.item()
    if exponent > -149:
        below = torch.nextafter(step, torch.tensor(0.0))
        assert power_of_two_ste(below).item() == (step if exponent > -148 else below).item()


@pytest.mark.parametrize("kind", ["symmetric", "symmetric_unsigned", "affine"])
@pytest.mark.parametrize("bits", [2, 8])
def test_lsqs_gradient_is_scaled_by_the_elements_and_the_levels(kind: str, bits: int) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    grads = {}
    for name in ("fat", "lsq"):
        low, high = torch.tensor(0.0 if kind == "symmetric_unsigned" else -3.0), torch.tensor(3.0)
        thresholds = calibrated(grid, low, high, 150_528, thresholds=name)
        thresholds()[0].backward()
        grads[name] = thresholds.get_parameter("alpha").grad
    levels = {"symmetric": 2 ** (bits - 1) - 1}.get(kind, 2**bits - 1)
    assert float(grads["lsq"] / grads["fat"]) == pytest.approx(1 / math.sqrt(150_528 * levels))


def test_lsq_number_of_elements_is_saved() -> None:
    grid = Grid(8, "symmetric")
    one = torch.tensor([1.0, 2.0])
    source = calibrated(grid, -one, one, 36, thresholds="lsq")
    source.set_range(-2 * one, 2 * one)  # widened: another range of the same elements
    target = Thresholds(QuantSpec(thresholds="lsq"), grid, 2)
    target.load_state_dict(source.state_dict())
    assert source.elements.item() == target.elements.item() == 36
    target()[0].sum().backward()
    wanted = 2 * one / 127 / math.sqrt(36 * 127)
    torch.testing.assert_close(target.get_parameter("alpha").grad, wanted)


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 0.7])
def test_tqts_step_and_its_gradient(alpha: float) -> None:
    """Jain et al. 2019, eq. 7: ∂step/∂log2 T = step · ln 2, with the rounded step."""
    for power_of_two in (False, True):
        thresholds = symmetric(
            Grid(8, "symmetric"),
            torch.tensor(3.0),
            alpha,
            thresholds="tqt",
            power_of_two=power_of_two,
        )
        step = thresholds()[0]
        step.backward()
        exact = 3.0 * 2.0**alpha / 127
        wanted = 2.0 ** math.ceil(math.log2(exact)) if power_of_two else exact
        assert step.item() == pytest.approx(wanted, rel=1e-6)
        grad = thresholds.get_parameter("alpha").grad
        assert grad is not None
        assert grad.item() == pytest.approx(wanted * math.log(2), rel=1e-6)


@given(
    **RANGES,
    kind=st.sampled_from(["symmetric", "symmetric_unsigned", "affine"]),
    thresholds=st.sampled_from([*TRAINED, "frozen"]),
)
@settings(deadline=None, max_examples=100)
def test_steps_that_are_powers_of_two(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    kind: str,
    thresholds: str,
) -> None:
    low, high = draw_range(seed, rows, exponent, reach)
    if kind != "affine":
        high = torch.maximum(-low, high)
        low = -high if kind == "symmetric" else 0 * high
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    options: dict[str, Any] = {"thresholds": thresholds}
    module = calibrated(grid, low, high, **options, power_of_two=True)
    plain = calibrated(grid, low, high, **options)()[0]
    scale, zero_point = module()
    assert np.all(np.frexp(scale.detach().numpy())[0] == 0.5)
    assert torch.all((scale >= plain) & (scale < 2 * plain))
    # The grid reaches both thresholds to within half a step, because z is rounded.
    step, z = double(scale), double(zero_point)
    assert np.all((grid.qmax - z + 0.5) * step >= double(high) * (1 - 1e-6))
    if kind != "symmetric_unsigned":
        assert np.all((grid.qmin - z - 0.5) * step <= double(low) * (1 - 1e-6))


@given(seed=st.integers(0, 2**31), bits=BITS)
@settings(deadline=None, max_examples=60)
def test_gradients_through_the_affine_quantizer(seed: int, bits: int) -> None:
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
    data_alpha, data_shift = (double(thresholds.get_parameter(n)) for n in ("alpha", "shift"))
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
    alpha_grad, shift_grad = (thresholds.get_parameter(name).grad for name in ("alpha", "shift"))
    assert alpha_grad is not None
    assert shift_grad is not None
    byte = np.sum(np.abs(double(grad))) / 504 * extent / steps
    np.testing.assert_allclose(double(alpha_grad), by_alpha, rtol=1e-3, atol=2e-3 + byte)
    np.testing.assert_allclose(double(shift_grad), by_shift, rtol=1e-3, atol=2e-3)


@given(
    **RANGES,
    name=st.sampled_from(TRAINED),
    power_of_two=st.booleans(),
    alpha=st.floats(-12.0, 12.0) | st.floats(-1.0, 2.0) | st.sampled_from([-1e4, 1e4]),
    shift=st.floats(-2.0, 2.0) | st.sampled_from([-1e4, 1e4]),
)
@settings(deadline=None, max_examples=150)
def test_projection_keeps_zero_between_the_thresholds(
    seed: int,
    bits: int,
    rows: int | None,
    exponent: int,
    reach: tuple[float, float],
    name: str,
    power_of_two: bool,
    alpha: float,
    shift: float,
) -> None:
    low, high = draw_range(seed, rows, exponent, reach)
    options: dict[str, Any] = {"thresholds": name, "power_of_two": power_of_two}
    thresholds = asymmetric(bits, low, high, alpha, shift, **options)
    thresholds.project()
    data_alpha, data_shift = (double(thresholds.get_parameter(n)) for n in ("alpha", "shift"))
    smallest, largest = np.float32(REACH[name])
    assert np.all((data_alpha >= smallest) & (data_alpha <= largest))
    span = np.float32(SHIFT if name == "fat" else (-LARGEST_FACTOR, LARGEST_FACTOR))
    assert np.all((data_shift >= span[0]) & (data_shift <= span[1]))
    extent = double(high) - double(low)
    factor = np.exp2(data_alpha) if name == "tqt" else data_alpha
    start = double(low) + data_shift * extent
    size = 1e-6 * extent * (1 + np.abs(data_shift) + factor)
    assert np.all(start <= size)
    assert np.all(start + factor * extent >= -size)
    # Both factors can still be trained.
    thresholds()[1].sum().backward()
    grad = thresholds.get_parameter("shift").grad
    assert grad is not None
    assert (grad != 0).all()
    before = [p.detach().clone() for p in thresholds.parameters()]
    thresholds.project()
    for parameter, old in zip(thresholds.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old)


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    rows=ROWS,
    name=st.sampled_from(TRAINED),
    kind=st.sampled_from(["symmetric", "symmetric_unsigned"]),
    alpha=st.floats(-12.0, 12.0) | st.sampled_from([-1e4, 1e4]),
)
@settings(deadline=None, max_examples=80)
def test_no_threshold_exceeds_its_limit(
    seed: int, bits: int, rows: int | None, name: str, kind: str, alpha: float
) -> None:
    """Calibration and training are limited to 6 after ReLU6; smaller α is not changed."""
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    thresholds = Thresholds(QuantSpec(thresholds=name, alpha_range=(0.5, 1.3)), grid, rows)  # type: ignore[arg-type]
    thresholds.limit = 6.0
    top = numbers(seed, 0.5, 9.0, rows)
    thresholds.set_range(-top if kind == "symmetric" else 0 * top, top)
    assert torch.equal(thresholds.high, top.clamp(max=6.0))
    thresholds.get_parameter("alpha").data.fill_(alpha)
    thresholds.project()
    high = double(thresholds.range()[1])
    assert np.all(high <= 6.0 * (1 + 1e-6))
    reach = (0.5, 1.3) if name == "fat" else REACH[name]
    factor = np.clip(alpha, *np.float64(np.float32(reach)))
    factor = 2.0**factor if name == "tqt" else factor
    wanted = np.minimum(factor * np.minimum(double(top), 6.0), 6.0)
    np.testing.assert_allclose(high, wanted, rtol=1e-5)
    before = thresholds.get_parameter("alpha").detach().clone()
    thresholds.project()
    assert torch.equal(thresholds.get_parameter("alpha"), before)


def test_projection_keeps_valid_factors() -> None:
    thresholds = asymmetric(8, torch.tensor(-1.0), torch.tensor(3.0), 0.8, 0.1)
    thresholds.project()
    factors = {name: value.item() for name, value in thresholds.factors().items()}
    assert factors == pytest.approx({"alpha": 0.8, "shift": 0.1})


@pytest.mark.parametrize("kind", ["symmetric", "symmetric_unsigned", "affine"])
@pytest.mark.parametrize("thresholds", [*TRAINED, "frozen"])
@pytest.mark.parametrize("extent", [0.0, 1e-40])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_an_empty_range_gives_a_finite_step(
    kind: str, thresholds: str, extent: float, power_of_two: bool
) -> None:
    grid = Grid(8, kind)  # type: ignore[arg-type]
    high = torch.tensor([extent, 1.0])
    options: dict[str, Any] = {"thresholds": thresholds, "power_of_two": power_of_two}
    module = calibrated(grid, 0 * high, high, 9, **options)
    module.limit = 6.0
    scale, zero_point = module()
    assert scale[0].item() == 1.0
    assert zero_point[0].item() == 0.0
    wanted = 2.0 ** math.ceil(math.log2(1 / grid.qmax)) if power_of_two else 1 / grid.qmax
    assert scale[1].item() == pytest.approx(wanted)
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
    scale, _ = symmetric(Grid(8, "symmetric"), top)()
    np.testing.assert_allclose(double(scale), double(top) / 127, rtol=1e-6)


@pytest.mark.parametrize("thresholds", [*TRAINED, "frozen"])
@pytest.mark.parametrize("kind", ["symmetric", "symmetric_unsigned", "affine"])
@pytest.mark.parametrize("rows", [None, 3])
def test_parameters_exist_from_the_start(thresholds: str, kind: str, rows: int | None) -> None:
    spec = QuantSpec(thresholds=thresholds)  # type: ignore[arg-type]
    module = Thresholds(spec, Grid(8, kind), rows)  # type: ignore[arg-type]
    wanted = {"alpha"} | ({"shift"} if kind == "affine" else set())
    named = dict(module.named_parameters())
    assert set(named) == set(module.factors()) == (set() if thresholds == "frozen" else wanted)
    assert all(p.shape == (() if rows is None else (rows,)) for p in named.values())
    buffers = {"low", "high"} | ({"elements"} if thresholds == "lsq" else set())
    assert set(module.state_dict()) == buffers | set(named)


@pytest.mark.parametrize("name", TRAINED)
def test_recalibration_resets_factors(name: str) -> None:
    thresholds = asymmetric(8, torch.tensor(-1.0), torch.tensor(1.0), 0.6, 0.2, thresholds=name)
    thresholds.set_range(torch.tensor([-2.0]), torch.tensor([3.0]))
    values = {key: value.item() for key, value in thresholds.named_parameters()}
    assert values == {"alpha": START[name], "shift": 0.0}
    assert [t.item() for t in thresholds.range()] == [-2.0, 3.0]
    plain = symmetric(Grid(8, "symmetric"), torch.tensor(1.0), 0.6, thresholds=name)
    plain.set_range(torch.tensor([-2.0]), torch.tensor([2.0]))
    assert [t.item() for t in plain.range()] == [-2.0, 2.0]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_saved_state_gives_the_same_grid(name: str, power_of_two: bool) -> None:
    options: dict[str, Any] = {"thresholds": name, "power_of_two": power_of_two}
    source = asymmetric(6, torch.tensor(-1.0), torch.tensor(2.0), 0.7, 0.1, **options)
    target = asymmetric(6, torch.tensor(0.0), torch.tensor(1.0), **options)
    target.load_state_dict(source.state_dict())
    for own, other in zip(target(), source(), strict=True):
        assert torch.equal(own, other)


# --- reported ranges and factors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "low", "high", "ends"),
    [
        (Grid(8, "symmetric"), -3.0, 3.0, (-3.0, 3.0)),
        (Grid(4, "symmetric_unsigned"), 0.0, 6.0, (0.0, 6.0)),
        # d = 5/15, z = round(3) = 3: three steps below 0 and twelve above.
        (Grid(4, "affine"), -1.0, 4.0, (-1.0, 4.0)),
        # d = 1, z = round(2.4) = 2.
        (Grid(4, "affine"), -2.4, 12.6, (-2.0, 13.0)),
    ],
)
def test_range_of_the_grid(grid: Grid, low: float, high: float, ends: tuple[float, float]) -> None:
    found = calibrated(grid, torch.tensor(low), torch.tensor(high))
    for before in (False, True):
        assert [float(end) for end in found.grid_range(calibrated=before)] == pytest.approx(ends)
    found.alpha.data.fill_(0.5)
    assert [float(end) for end in found.grid_range(calibrated=True)] == pytest.approx(ends)
    below, above = found.grid_range()
    assert float(above - below) == pytest.approx(0.5 * (ends[1] - ends[0]), rel=1e-6)


def test_range_of_a_grid_whose_step_is_a_power_of_two() -> None:
    low, high = torch.tensor([-100.0, -127.0]), torch.tensor([100.0, 127.0])
    found = calibrated(Grid(8, "symmetric"), low, high, thresholds="tqt", power_of_two=True)
    assert found.grid_range()[1].tolist() == [127.0, 127.0]
    found.alpha.data = torch.tensor([0.0, 0.01])
    assert found.grid_range()[1].tolist() == [127.0, 254.0]
    assert found.grid_range(calibrated=True)[1].tolist() == [127.0, 127.0]


@pytest.mark.parametrize("kind", TRAINED)
def test_factors_at_an_end_of_their_range(kind: str) -> None:
    low, high = REACH[kind]
    middle = (low + high) / 2
    values = torch.tensor([low, low + 2e-3, middle, high - 2e-3, high])
    found = calibrated(Grid(8, "symmetric"), -torch.ones(5), torch.ones(5), thresholds=kind)
    found.alpha.data = values
    assert found.at_edge().tolist() == [True, False, False, False, True]
    assert found.at_edge(5e-3).tolist() == [True, True, False, True, True]


def test_relu6_limits_a_range() -> None:
    found = Thresholds(QuantSpec(thresholds="lsq"), Grid(8, "symmetric_unsigned"), None)
    found.limit = 6.0
    found.set_range(torch.tensor(0.0), torch.tensor(3.0), elements=1)
    for factor, at_edge in ((1.0, False), (1.99, False), (2.0, True)):
        found.alpha.data.fill_(factor)
        assert bool(found.at_edge()) is at_edge


def test_frozen_thresholds_have_no_range_ends() -> None:
    frozen = calibrated(Grid(8, "symmetric"), -torch.ones(2), torch.ones(2), thresholds="frozen")
    assert frozen.at_edge() is None


def test_tqts_factor_does_not_depend_on_the_shape() -> None:
    """float32 exp2 of a CPU differs between 0-dim tensors and vectors, and from that of a GPU."""
    logarithms = numbers(0, -9.0, 9.0, 2000)
    top = torch.ones(len(logarithms))
    vector = symmetric(Grid(8, "symmetric"), top, logarithms, thresholds="tqt")
    exact = np.exp2(double(logarithms)).astype(np.float32)
    np.testing.assert_array_equal(vector.factors()["alpha"].numpy(), exact)
    for row in range(0, len(logarithms), 100):
        one = symmetric(Grid(8, "symmetric"), top[row], logarithms[row], thresholds="tqt")
        assert torch.equal(one()[0], vector()[0][row])


@pytest.mark.parametrize("rows", [None, 3])
def test_lanes_hold_the_thresholds(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fat.quant.kernels.lanes", lambda device: 16)
    top = torch.tensor(2.0) if rows is None else torch.arange(1.0, 1.0 + rows)
    thresholds = calibrated(Grid(8, "affine"), -top, top)
    single, lanes = thresholds(), thresholds.lanes()
    for value, expanded in zip(single, lanes, strict=True):
        assert value.shape == top.shape
        assert list(expanded.shape) == ([16] if rows is None else [rows])
        assert torch.equal(expanded, value.expand(expanded.shape))
    alpha = thresholds.get_parameter("alpha")
    gradients = []
    for scale in (single[0], lanes[0]):
        alpha.grad = None
        scale.sum().backward(retain_graph=True)
        assert alpha.grad is not None
        gradients.append(alpha.grad / scale.numel())
    torch.testing.assert_close(*gradients)
