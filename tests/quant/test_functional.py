from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant import kernels
from fat.quant.config import Grid
from fat.quant.functional import (
    INT32_MAX,
    Adjust,
    clip_inclusive,
    dequantize,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_lanes,
    fake_quantize_weight,
    quantize,
    round_ste,
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "symmetric_unsigned", "affine"]),
)
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(seed: int, shape: tuple[int, ...], grid: Grid, scale: float, per_channel: bool) -> Drawn:
    """Return x, scale, zero point and the incoming gradient, float32.

    x lies up to 0.45 steps around integers from 4 below to 4 above the grid, so that a rounding
    error of the division cannot change an integer.
    """
    generator = np.random.default_rng(seed)
    size = (shape[0],) + (1,) * (len(shape) - 1) if per_channel else ()
    steps = np.float32(scale) * generator.uniform(0.5, 2.0, size).astype(np.float32)
    zeros = generator.integers(0, grid.qmax + 1, size) * (grid.kind == "affine")
    integers = generator.integers(grid.qmin - 4, grid.qmax + 5, shape) - zeros
    x = (integers + generator.uniform(-0.45, 0.45, shape)) * steps
    grad = generator.normal(size=shape)
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in (x, steps, zeros, grad)
    )


def rounding_of_a_byte(x: Tensor, scale: Tensor, grad: Tensor) -> float:
    """Return the error of the scale's gradient by keeping one byte per element."""
    one_byte = not scale.dim() and x.dtype == torch.float32 and kernels.backend() == "compiled"
    return float(grad.abs().sum()) / 504 if one_byte else 0.0


def closed_form(
    x: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor, grid: Grid
) -> tuple[np.ndarray, ...]:
    """Return output and gradients in float64, from the definition."""
    x64, d, z, g = (t.detach().numpy().astype(np.float64) for t in (x, scale, zero_point, grad))
    rounded = np.rint(x64 / d) + z
    below, above = rounded < grid.qmin, rounded > grid.qmax
    inside = ~below & ~above
    out = (np.where(below, grid.qmin, np.where(above, grid.qmax, rounded)) - z) * d
    by_scale = np.select([below, above], [grid.qmin - z, grid.qmax - z], rounded - z - x64 / d)
    by_zero_point = np.where(inside, 0.0, -d)
    axes = tuple(range(1, x64.ndim)) if d.ndim else None
    keep = bool(d.ndim)
    return (
        out,
        g * inside,
        np.sum(g * by_scale, axis=axes, keepdims=keep),
        np.sum(g * by_zero_point, axis=axes, keepdims=keep),
    )


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 4, 5, 2), (8, 1, 3, 3), (1, 6, 1, 1), (2, 3, 4, 4)]),
    grid=GRIDS,
    scale=st.floats(1e-6, 1e3),
    per_channel=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from(list(LAYOUTS)),
)
@settings(deadline=None, max_examples=150)
def test_value_and_gradients_are_the_closed_form(
    seed: int,
    shape: tuple[int, ...],
    grid: Grid,
    scale: float,
    per_channel: bool,
    layout: str,
    grad_layout: str,
) -> None:
    x, step, zero_point, grad = draw(seed, shape, grid, scale, per_channel)
    x, grad = LAYOUTS[layout](x), LAYOUTS[grad_layout](grad)
    inputs = [t.requires_grad_() for t in (x, step, zero_point)]
    out = fake_quantize(x, step, zero_point, grid.qmin, grid.qmax)
    out.backward(grad)
    wanted = closed_form(x, step, zero_point, grad, grid)
    np.testing.assert_allclose(out.detach().numpy(), wanted[0], rtol=1e-6, atol=1e-6 * scale)
    # x gets the incoming gradient or 0, without rounding.
    assert inputs[0].grad is not None
    np.testing.assert_array_equal(inputs[0].grad.numpy(), wanted[1])
    reach = 1e-6 * float(grad.abs().sum()) * grid.qmax
    rooms = (reach + rounding_of_a_byte(x, step, grad), reach * scale)
    for tensor, gradient, room in zip(inputs[1:], wanted[2:], rooms, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-4, atol=room)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 3)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_any_number_of_dimensions(shape: tuple[int, ...], per_channel: bool) -> None:
    grid = Grid(4, "affine")
    x, step, zero_point, grad = (t.double() for t in draw(1, shape, grid, 0.1, per_channel))
    inputs = [t.requires_grad_() for t in (x, step, zero_point)]
    out = fake_quantize(x, step, zero_point, grid.qmin, grid.qmax)
    out.backward(grad)
    wanted = closed_form(x, step, zero_point, grad, grid)
    found = [out.detach(), *(t.grad for t in inputs)]
    for own, reference in zip(found, wanted, strict=True):
        assert own is not None
        np.testing.assert_allclose(own.numpy(), reference, rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 2**31), grid=GRIDS, scale=st.floats(1e-4, 1e2), per_channel=st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_value_and_gradients_equal_torchs(
    seed: int, grid: Grid, scale: float, per_channel: bool
) -> None:
    x, step, zero_point, grad = draw(seed, (4, 3, 5, 5), grid, scale, per_channel)
    own = [t.clone().requires_grad_() for t in (x, step, zero_point)]
    out = fake_quantize(*own, grid.qmin, grid.qmax)
    out.backward(grad)
    other = [
        x.clone().requires_grad_(),
        *(t.reshape(-1).requires_grad_() for t in (step, zero_point)),
    ]
    if per_channel:
        reference = torch._fake_quantize_learnable_per_channel_affine(
            *other, 0, grid.qmin, grid.qmax, 1.0
        )
    else:
        reference = torch._fake_quantize_learnable_per_tensor_affine(
            *other, grid.qmin, grid.qmax, 1.0
        )
    reference.backward(grad)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5 * scale)
    reach = 1e-6 * float(grad.abs().sum()) * grid.qmax
    rooms = (reach, reach + rounding_of_a_byte(x, step, grad), reach * scale)
    for mine, theirs, room in zip(own, other, rooms, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(
            mine.grad.reshape(theirs.grad.shape), theirs.grad, rtol=1e-4, atol=room
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, per_channel: bool, layout: str
) -> None:
    grid = Grid(8, "affine")
    x, step, zero_point, grad = draw(5, (4, 3, 5, 2), grid, 0.1, per_channel)
    x, grad = LAYOUTS[layout](x.to(dtype)), grad.to(dtype)
    inputs = [t.requires_grad_() for t in (x, step, zero_point)]
    out = fake_quantize(x, step, zero_point, grid.qmin, grid.qmax)
    assert out.dtype == dtype
    wide = fake_quantize(x.detach().float(), step, zero_point, grid.qmin, grid.qmax)
    assert torch.equal(out, wide.to(dtype))
    out.backward(grad)
    wanted = closed_form(x.float(), step, zero_point, grad.float(), grid)
    np.testing.assert_allclose(wide.detach().numpy(), wanted[0], rtol=1e-6, atol=1e-7)
    found = [t.grad for t in inputs]
    assert [t.dtype for t in found if t is not None] == [dtype, torch.float32, torch.float32]
    assert found[0] is not None
    np.testing.assert_array_equal(found[0].float().numpy(), wanted[1])
    size = float(grad.abs().float().sum())
    byte = 0.0 if per_channel or kernels.backend() == "torch" else size / 504
    for own, reference, room in zip(found[1:], wanted[2:], (byte, 0.0), strict=True):
        assert own is not None
        reach = room + 1e-5 * size * grid.qmax * (1.0 if room else 0.1)
        np.testing.assert_allclose(own.numpy(), reference, rtol=1e-4, atol=reach)


@pytest.mark.parametrize("lanes", [1, 2, 1024])
def test_lanes_give_the_gradients_of_a_scalar(lanes: int) -> None:
    grid = Grid(4, "affine")
    x, step, zero_point, grad = draw(6, (3, 4, 20, 21), grid, 0.1, False)

    def run(expand: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, step, zero_point)]
        bounds = (grid.qmin, grid.qmax)
        if expand:
            scale, zero = (t.expand(lanes) for t in inputs[1:])
            out = fake_quantize_lanes(inputs[0] * 1.0, scale, zero, *bounds, inplace=True)
        else:
            out = fake_quantize(*inputs, *bounds)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in inputs if t.grad is not None)]

    found, wanted = run(expand=True), run(expand=False)
    assert len(found) == len(wanted) == 4
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(own, other)
    with torch.no_grad():
        out = fake_quantize_lanes(
            x, step.expand(lanes), zero_point.expand(lanes), grid.qmin, grid.qmax
        )
    assert torch.equal(out, wanted[0])


@pytest.mark.parametrize("wanting", [(True, False), (False, True)])
def test_a_gradient_of_the_step_or_zero_point_alone(wanting: tuple[bool, bool]) -> None:
    """Neither depends on the input requiring a gradient."""
    grid = Grid(5, "affine")
    x, step, zero_point, grad = draw(7, (4, 2, 3, 3), grid, 1.0, False)
    inputs = [t.requires_grad_(on) for t, on in zip((step, zero_point), wanting, strict=True)]
    fake_quantize(x, *inputs, grid.qmin, grid.qmax, inplace=True).backward(grad)
    wanted = closed_form(x, step, zero_point, grad, grid)[2:]
    for tensor, on, reference in zip(inputs, wanting, wanted, strict=True):
        assert (tensor.grad is not None) is on
        if tensor.grad is not None:
            room = rounding_of_a_byte(x, step, grad) + 1e-4
            np.testing.assert_allclose(tensor.grad.numpy(), reference, rtol=1e-4, atol=room)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_torch_compile_traces_forward_and_backward(inplace: bool, per_channel: bool) -> None:
    """In one graph: no operation reads a value on the host."""
    generator = torch.Generator().manual_seed(0)
    x, weight, factor = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 3, 5, 7), (4, 3, 3, 3), (4, 3, 3, 3))
    )
    steps = torch.rand(4, generator=generator) + 0.1 if per_channel else torch.tensor(0.2)
    grad = torch.randn(2, 4, 3, 5, generator=generator)

    def step(x: Tensor, scale: Tensor, zero: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
        y = fake_quantize(x * 1.0, scale, zero, 0, 15, inplace=inplace)
        w = fake_quantize_weight(weight, steps, 7, factor, Adjust.MOVE, (-1.0, 1.0))
        return torch.nn.functional.conv2d(y, w)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        given = (x, torch.tensor(0.1), torch.tensor(7.0), steps, factor)
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    torch._dynamo.reset()
    wanted = run(step)
    found = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    assert len(found) == len(wanted) == 6
    if kernels.backend() == "torch":  # torch operations keep floats, operators one byte
        torch.testing.assert_close(found.pop(3), wanted.pop(3))  # the zero point's
        torch.testing.assert_close(found.pop(2), wanted.pop(2), rtol=0.0, atol=x.numel() / 100)
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(own, other)


# --- weights; test_kernels.py has their values and gradients --------------------------------------


def test_weights_come_in_the_dtype_of_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, factor, grad = (torch.randn(4, 3, generator=generator) for _ in range(3))
    options = (7, factor.requires_grad_(), Adjust.MOVE, (-1.0, 1.0))
    steps = torch.full((4,), 0.17, requires_grad=True)
    wide = fake_quantize_weight(weight, steps, *options)
    assert wide.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fake_quantize_weight(weight, steps, *options)
        assert (
            fake_quantize_weight(weight, steps, *options, dtype=torch.float32).dtype == wide.dtype
        )
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, wide.bfloat16())
    assert fake_quantize_weight(weight, steps, *options, dtype=torch.float16).dtype == torch.float16

    # The gradient arrives in half precision; that of the parameters is float32.
    half.backward(grad.bfloat16())
    found = (steps.grad, factor.grad)
    steps.grad = factor.grad = None
    wide.backward(grad.bfloat16().float())
    for own, other in zip(found, (steps.grad, factor.grad), strict=True):
        assert own is not None
        assert other is not None
        assert own.dtype == torch.float32
        assert torch.equal(own, other)


@pytest.mark.parametrize("lanes", [1, 3, 1024])
def test_lanes_of_a_weight(lanes: int) -> None:
    """As many lanes as filters are no steps per filter."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for expand in (True, False):
        step = torch.tensor(0.2, requires_grad=True)
        scale = step.expand(lanes) if expand else step
        out = fake_quantize_weight(weight, scale, 7, per_channel=False)
        out.backward(torch.ones(3, 5))
        results.append((out.detach(), step.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1)])
def test_each_filter_needs_a_step(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one element for each of the 3 output filters"):
        fake_quantize_weight(torch.ones(3, 2), torch.ones(shape), 7)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_gradient(layout: str) -> None:
    grid = Grid(8, "symmetric")
    x, step, zero_point, _ = draw(2, (2, 3, 4, 5), grid, 0.1, False)
    x = LAYOUTS[layout](x)
    step.requires_grad_()
    fake_quantize(x, step, zero_point, grid.qmin, grid.qmax).sum().backward()
    assert step.grad is not None
    ones = torch.ones_like(x)
    wanted = closed_form(x, step, zero_point, ones, grid)[2]
    room = rounding_of_a_byte(x, step, ones)
    np.testing.assert_allclose(step.grad.numpy(), wanted, rtol=1e-4, atol=room)


@pytest.mark.parametrize(
    "wanting", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_tensors_that_require_grad_get_one(wanting: tuple[bool, ...]) -> None:
    grid = Grid(5, "affine")
    x, step, zero_point, grad = (t.double() for t in draw(3, (4, 2, 3, 3), grid, 1.0, False))
    inputs = [t.requires_grad_(on) for t, on in zip((x, step, zero_point), wanting, strict=True)]
    fake_quantize(*inputs, grid.qmin, grid.qmax).backward(grad)
    for tensor, on, wanted in zip(
        inputs, wanting, closed_form(x, step, zero_point, grad, grid)[1:], strict=True
    ):
        assert (tensor.grad is not None) is on
        if tensor.grad is not None:
            np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-12)


def test_inputs_are_not_changed() -> None:
    grid = Grid(4, "affine")
    tensors = draw(4, (3, 4, 5, 2), grid, 0.3, True)
    before = [t.clone() for t in tensors]
    inputs = [t.requires_grad_() for t in tensors[:3]]
    fake_quantize(*inputs, grid.qmin, grid.qmax).backward(tensors[3])
    quantize(*(t.detach() for t in inputs), grid.qmin, grid.qmax)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), copy)


@given(grid=GRIDS, power=st.integers(-20, 20), data=st.data())
@settings(deadline=None, max_examples=50)
def test_halves_are_rounded_to_even(grid: Grid, power: int, data: st.DataObject) -> None:
    # A power of two keeps the halves exact.
    step = 2.0**power
    zero_point = data.draw(st.integers(0, grid.qmax)) if grid.kind == "affine" else 0
    integers = np.arange(grid.qmin - zero_point, grid.qmax - zero_point)
    x = torch.from_numpy(((integers + 0.5) * step).astype(np.float32))
    wanted = integers + integers % 2
    arguments = (torch.tensor(step), torch.tensor(float(zero_point)), grid.qmin, grid.qmax)
    assert quantize(x, *arguments).numpy().tolist() == (wanted + zero_point).tolist()
    assert fake_quantize(x, *arguments).tolist() == (wanted * step).tolist()


@given(
    seed=st.integers(0, 2**31), grid=GRIDS, scale=st.floats(1e-6, 1e3), per_channel=st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_fake_quantization_is_the_integers_times_the_step(
    seed: int, grid: Grid, scale: float, per_channel: bool
) -> None:
    x, step, zero_point, _ = draw(seed, (3, 4, 2, 2), grid, scale, per_channel)
    integers = quantize(x, step, zero_point, grid.qmin, grid.qmax)
    assert integers.dtype == torch.int32
    wanted = np.clip(
        np.rint(x.numpy() / step.numpy()) + zero_point.numpy(), grid.qmin, grid.qmax
    ).astype(np.int64)
    np.testing.assert_array_equal(integers.numpy(), wanted)
    fake = fake_quantize(x, step, zero_point, grid.qmin, grid.qmax)
    assert torch.equal(dequantize(integers, step, zero_point), fake)
    # Values on the grid do not change.
    assert torch.equal(fake_quantize(fake, step, zero_point, grid.qmin, grid.qmax), fake)


@given(grid=GRIDS, scale=st.floats(1e-30, 1e30), data=st.data())
@settings(deadline=None, max_examples=50)
def test_zero_is_exact(grid: Grid, scale: float, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, grid.qmax)) if grid.kind == "affine" else 0
    arguments = (torch.tensor(scale), torch.tensor(float(zero_point)), grid.qmin, grid.qmax)
    assert quantize(torch.zeros(1), *arguments).item() == zero_point
    assert fake_quantize(torch.zeros(1), *arguments).item() == 0.0


@pytest.mark.parametrize("x", [3e38, -3e38, float("inf"), float("-inf")])
def test_overflow_saturates(x: float) -> None:
    values = torch.tensor([x], requires_grad=True)
    step = torch.tensor(1e-6, requires_grad=True)
    out = fake_quantize(values, step, torch.tensor(0.0), -127, 127)
    out.backward()
    sign = 1.0 if x > 0 else -1.0
    assert out.item() == pytest.approx(sign * 127e-6)
    assert values.grad is not None
    assert step.grad is not None
    assert values.grad.item() == 0.0
    assert step.grad.item() == pytest.approx(sign * 127)


def test_nan_is_not_hidden() -> None:
    out = fake_quantize(torch.tensor([torch.nan]), torch.tensor(1.0), torch.tensor(0.0), 0, 255)
    assert out.isnan().all()


def test_a_second_derivative_is_an_error() -> None:
    x, step = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.5))
    out = fake_quantize(x, step, torch.tensor(0.0), -7, 7)
    grad = torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(out, step, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


@given(
    low=st.floats(-10, 10, width=32),
    width=st.floats(0, 10, width=32),
    values=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=60)
def test_clip_passes_gradient_inside_and_at_both_ends(
    low: float, width: float, values: list[float]
) -> None:
    high = float(np.float32(low + width))
    x = torch.tensor([low, high, *values], requires_grad=True)
    grad = torch.arange(1.0, 1 + len(x))
    out = clip_inclusive(x, low, high)
    out.backward(grad)
    data = x.detach().numpy()
    np.testing.assert_array_equal(out.detach().numpy(), np.clip(data, low, high))
    assert x.grad is not None
    inside = (data >= np.float32(low)) & (data <= np.float32(high))
    assert inside[:2].all()
    np.testing.assert_array_equal(x.grad.numpy(), grad.numpy() * inside)


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_round_equals_numpys_and_passes_the_gradient(values: list[float]) -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, *values], requires_grad=True)
    grad = torch.linspace(-2, 3, len(x))
    out = round_ste(x)
    out.backward(grad)
    np.testing.assert_array_equal(out.detach().numpy(), np.rint(x.detach().numpy()))
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


@given(seed=st.integers(0, 2**31), exponent=st.floats(-12, 0), per_channel=st.booleans())
@settings(deadline=None, max_examples=60)
def test_biases_are_on_the_int32_grid(seed: int, exponent: float, per_channel: bool) -> None:
    generator = np.random.default_rng(seed)
    bias = generator.normal(size=6).astype(np.float32)
    step = generator.uniform(0.5, 2, 6 if per_channel else ()).astype(np.float32)
    step = np.asarray(step * np.float32(10**exponent), dtype=np.float32)
    x, scale = torch.from_numpy(bias).requires_grad_(), torch.from_numpy(step).requires_grad_()
    out = fake_quantize_bias(x, scale)
    integers = np.rint(bias.astype(np.float64) / step.astype(np.float64))
    integers = np.clip(integers, -INT32_MAX, INT32_MAX).astype(np.int64)
    np.testing.assert_array_equal(
        out.detach().numpy(), (integers * step.astype(np.float64)).astype(np.float32)
    )
    out.backward(torch.arange(6.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(6.0))
    assert scale.grad is None


def test_biases_keep_31_bits_and_saturate() -> None:
    assert np.iinfo(np.int32).max == INT32_MAX
    step = torch.tensor(2.0**-30)
    # 2^24 + 1 steps and a half: float32 division would lose the last bits of the integer.
    bias = torch.tensor([1.0 + 2.0**-23, 1.5, -1.5, 4.0, -4.0])
    wanted = [1.0 + 2.0**-23, 1.5, -1.5, INT32_MAX * 2.0**-30, -INT32_MAX * 2.0**-30]
    assert fake_quantize_bias(bias, step).tolist() == pytest.approx(wanted, rel=1e-7)
    assert fake_quantize_bias(bias[:1], step).item() == bias[0].item()
