from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fat.quant.config import Grid, InitSpec, QuantSpec
from fat.quant.functional import fake_quantize_weight
from fat.quant.layers import ChannelClip
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.quant.thresholds import Thresholds
from fat.utils.errors import FatError

INT32_MAX = 2**31 - 1
WEIGHT_GRID = Grid(8, "symmetric")


def spec_of(**options: Any) -> QuantSpec:
    return QuantSpec(**{"weights": "frozen", **options})


def watching(grid: Grid, x: Tensor, spec: QuantSpec) -> ActivationQuantizer:
    """Return an activation quantizer calibrated on x."""
    quantizer = ActivationQuantizer("input", spec, grid)
    quantizer.start_observing()
    quantizer(x)
    quantizer.stop_observing(keep=True)
    return quantizer


TRAINED = ["fat", "lsq", "tqt"]
ALPHAS = {"fat": (0.5, 1.0), "lsq": (0.4, 1.3), "tqt": (-1.2, 0.4)}


def move_factors(module: nn.Module, seed: int) -> None:
    """Set trained factors to random values in their ranges."""
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor | None, low: float, high: float) -> None:
        if parameter is not None:
            parameter.data = low + (high - low) * torch.rand(parameter.shape, generator=generator)

    for part in module.modules():
        if isinstance(part, Thresholds) and part.alpha is not None:
            draw(part.alpha, *ALPHAS[part.kind])
            draw(part.shift, -0.2, 0.2)
        if isinstance(part, QuantLayer):
            draw(part.factor, *part._bounds)


def adjusted(layer: QuantLayer, steps: Tensor) -> Tensor:
    """Return the layer's adjusted weight in float32; ``steps`` broadcasts to the weight."""
    weight = layer.weight.numpy()
    if layer.factor is None:
        return layer.weight
    factor = layer.factor.detach().numpy()
    moved = {1: weight * factor, 2: weight + factor * steps.detach().numpy()}[int(layer.adjust)]
    assert moved.dtype == np.float32
    return torch.from_numpy(moved)


def is_power_of_two(values: Tensor) -> bool:
    return bool(np.all(np.frexp(values.detach().numpy())[0] == 0.5))


# Integer reference in numpy and int64, independent of the package.


def integers(values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> np.ndarray:
    """Return integers minus zero point, by float32 division as in QuantizeLinear."""
    ratio = values.detach().numpy() / scale.detach().numpy()
    assert ratio.dtype == np.float32
    z = zero_point.detach().numpy().astype(np.int64)
    return np.clip(np.rint(ratio).astype(np.int64) + z, grid.qmin, grid.qmax) - z


def bias_integers(bias: Tensor | None, scale: np.ndarray, filters: int) -> np.ndarray:
    if bias is None:
        return np.zeros(filters, dtype=np.int64)
    steps = np.rint(bias.detach().numpy().astype(np.float64) / scale.astype(np.float64))
    return np.clip(steps, -INT32_MAX, INT32_MAX).astype(np.int64) * np.ones(filters, dtype=np.int64)


def same_sides(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    out = -(-size // stride)
    total = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def integer_convolution(
    x: np.ndarray,
    weight: np.ndarray,
    sides: tuple[tuple[int, int], tuple[int, int]],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """Return Σ w·x in int64, per kernel position."""
    x = np.pad(x, ((0, 0), (0, 0), *sides))
    filters, per_group, *kernel = weight.shape
    out = [(x.shape[2 + a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2)]
    result = np.zeros((len(x), filters, *out), dtype=np.int64)
    for f, c in itertools.product(range(filters), range(per_group)):
        channel = f // (filters // groups) * per_group + c
        for i, j in np.ndindex(*kernel):
            rows = slice(i * dilation[0], i * dilation[0] + out[0] * stride[0], stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + out[1] * stride[1], stride[1])
            result[:, f] += weight[f, c, i, j] * x[:, channel, rows, columns]
    return result


def check_against_integers(
    out: Tensor, accumulators: np.ndarray, magnitudes: np.ndarray, scale: np.ndarray, terms: int
) -> None:
    """Assert that ``out`` is accumulators times step up to float32 rounding.

    Args:
        out: Output of the layer.
        accumulators: Expected integers.
        magnitudes: The same sum over absolute values, to which float32 rounding is relative.
        scale: s_w·s_x, broadcastable.
        terms: Number of added values.
    """
    assert magnitudes.max() < INT32_MAX
    found = out.detach().numpy().astype(np.float64) / scale.astype(np.float64)
    assert np.all(np.abs(found - accumulators) <= (terms + 6) * 2.0**-24 * magnitudes + 1e-9)
    np.testing.assert_array_equal(np.rint(found).astype(np.int64), accumulators)


def check_not_a_bit_differs(
    out: Tensor, sums: np.ndarray, magnitudes: np.ndarray, weight_scale: Tensor, input_scale: Tensor
) -> None:
    """Power-of-two steps make rescaling a shift, and float32 holds every sum."""
    assert is_power_of_two(weight_scale)
    assert is_power_of_two(input_scale)
    assert magnitudes.max() < 2**24
    step = (weight_scale * input_scale).detach().numpy()
    channels = step.reshape(-1, *[1] * (out.dim() - 2)) if step.ndim else step
    np.testing.assert_array_equal(out.detach().numpy(), (sums * channels).astype(np.float32))


BITS = st.integers(2, 8)
PAIR = st.tuples(st.integers(1, 2), st.integers(1, 2))
ACTIVATIONS = st.sampled_from(["symmetric", "symmetric_unsigned", "affine"])


@given(
    seed=st.integers(0, 2**31),
    weight_bits=BITS,
    activation_bits=BITS,
    kind=ACTIVATIONS,
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    thresholds=st.sampled_from([*TRAINED, "frozen"]),
    power_of_two=st.booleans(),
    weights=st.sampled_from(["frozen", "scale", "adaround"]),
    bias=st.sampled_from([None, "frozen", "trained"]),
    shape=st.sampled_from([(1, 3, 4), (2, 4, 6), (4, 4, 4), (4, 4, 8)]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=PAIR,
    dilation=PAIR,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.just("dynamic_same"),
    channels_last=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_convolution_equals_the_integer_reference(
    seed: int,
    weight_bits: int,
    activation_bits: int,
    kind: str,
    granularity: str,
    thresholds: str,
    power_of_two: bool,
    weights: str,
    bias: str | None,
    shape: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int] | str,
    channels_last: bool,
) -> None:
    groups, channels, filters = shape
    generator = torch.Generator().manual_seed(seed)
    spec = spec_of(
        granularity=granularity,
        weights=weights,
        bias=bias or "frozen",
        thresholds=thresholds,
        power_of_two=power_of_two,
    )
    grid = Grid(weight_bits, "symmetric")
    x = torch.randn(2, channels, 7, 6, generator=generator)
    x = x.relu() if kind == "symmetric_unsigned" else x + 0.5
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = QuantConv2d(
        "conv",
        torch.randn(filters, channels // groups, *kernel, generator=generator),
        None if bias is None else torch.randn(filters, generator=generator),
        spec,
        grid,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    source = watching(Grid(activation_bits, kind), x, spec)  # type: ignore[arg-type]
    layer.set_input_quantizer(source)
    assert layer.calibrate() == 0
    move_factors(layer, seed)
    move_factors(source, seed + 1)
    out = layer(source(x))

    input_scale, zero_point = source.thresholds()
    weight_scale = layer.weight_quantizer.scale()
    columns = weight_scale.reshape(-1, 1, 1, 1) if granularity == "per_channel" else weight_scale
    w = integers(adjusted(layer, columns), columns, torch.zeros(()), grid)
    q = integers(x, input_scale, zero_point, source.grid)
    step = (weight_scale * input_scale).detach().numpy()
    b = bias_integers(layer.bias, step, filters)
    if isinstance(padding, str):
        sides = tuple(
            same_sides(size, *rest)
            for size, *rest in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        )
    else:
        sides = tuple((p, p) for p in padding)
    geometry: Any = (sides, stride, dilation, groups)
    magnitudes = integer_convolution(np.abs(q), np.abs(w), *geometry) + np.abs(b)[:, None, None]
    sums = integer_convolution(q, w, *geometry) + b[:, None, None]
    step = step.reshape(-1, 1, 1) if step.ndim else step
    check_against_integers(out, sums, magnitudes, step, w[0].size)
    if power_of_two:
        check_not_a_bit_differs(out, sums, magnitudes, weight_scale, input_scale)


@given(
    seed=st.integers(0, 2**31),
    weight_bits=BITS,
    activation_bits=BITS,
    kind=ACTIVATIONS,
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    thresholds=st.sampled_from([*TRAINED, "frozen"]),
    power_of_two=st.booleans(),
    weights=st.sampled_from(["frozen", "scale", "adaround"]),
    bias=st.booleans(),
    lead=st.sampled_from([(5,), (2, 3), (1, 2, 2)]),
)
@settings(deadline=None, max_examples=100)
def test_linear_equals_the_integer_reference(
    seed: int,
    weight_bits: int,
    activation_bits: int,
    kind: str,
    granularity: str,
    thresholds: str,
    power_of_two: bool,
    weights: str,
    bias: bool,
    lead: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = spec_of(
        granularity=granularity, weights=weights, thresholds=thresholds, power_of_two=power_of_two
    )
    grid = Grid(weight_bits, "symmetric")
    x = torch.randn(*lead, 11, generator=generator)
    x = x.relu() if kind == "symmetric_unsigned" else x - 0.4
    layer = QuantLinear(
        "linear",
        torch.randn(7, 11, generator=generator),
        torch.randn(7, generator=generator) if bias else None,
        spec,
        grid,
    )
    source = watching(Grid(activation_bits, kind), x, spec)  # type: ignore[arg-type]
    layer.set_input_quantizer(source)
    layer.calibrate()
    move_factors(layer, seed)
    move_factors(source, seed + 1)
    input_scale, zero_point = source.thresholds()
    weight_scale = layer.weight_quantizer.scale()
    columns = weight_scale.reshape(-1, 1) if granularity == "per_channel" else weight_scale
    w = integers(adjusted(layer, columns), columns, torch.zeros(()), grid)
    q = integers(x, input_scale, zero_point, source.grid)
    step = (weight_scale * input_scale).detach().numpy()
    b = bias_integers(layer.bias, step, 7)
    sums, magnitudes = q @ w.T + b, np.abs(q) @ np.abs(w).T + np.abs(b)
    out = layer(source(x))
    check_against_integers(out, sums, magnitudes, step, 11)
    if power_of_two:
        flat = (a.reshape(-1, 7) for a in (sums, magnitudes))
        check_not_a_bit_differs(out.reshape(-1, 7), *flat, weight_scale, input_scale)


@given(
    seed=st.integers(0, 2**31), kind=ACTIVATIONS, exponents=st.tuples(*[st.integers(-9, -3)] * 2)
)
@settings(deadline=None, max_examples=30)
def test_power_of_two_steps_are_bit_exact(seed: int, kind: str, exponents: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = spec_of(granularity="per_tensor")
    grid = Grid(8, kind)  # type: ignore[arg-type]
    w_step, x_step = (2.0**e for e in exponents)
    source = ActivationQuantizer("input", spec, grid)
    zero_point = 77 if kind == "affine" else 0
    source.thresholds.set_range(
        torch.tensor((grid.qmin - zero_point) * x_step),
        torch.tensor((grid.qmax - zero_point) * x_step),
    )
    weight = torch.randn(4, 3, 3, 3, generator=generator) * 60 * w_step
    layer = QuantConv2d(
        "conv", weight, torch.randn(4, generator=generator), spec, WEIGHT_GRID, padding=(1, 1)
    )
    layer.set_input_quantizer(source)
    layer.weight_quantizer.thresholds.set_range(
        torch.tensor(-127 * w_step), torch.tensor(127 * w_step)
    )
    x = torch.randn(2, 3, 5, 5, generator=generator) * 100 * x_step
    assert [t.item() for t in source.thresholds()] == [x_step, zero_point]
    assert layer.weight_quantizer.scale().item() == w_step
    w = integers(weight, torch.tensor(w_step), torch.zeros(()), WEIGHT_GRID)
    q = integers(x, torch.tensor(x_step), torch.tensor(float(zero_point)), grid)
    b = bias_integers(layer.bias, np.float32(w_step * x_step), 4)
    sums = integer_convolution(q, w, ((1, 1), (1, 1)), (1, 1), (1, 1), 1) + b[:, None, None]
    assert np.abs(sums).max() < 2**24  # float32 holds them exactly
    np.testing.assert_array_equal(
        layer(source(x)).detach().numpy(), (sums * (w_step * x_step)).astype(np.float32)
    )


def vanishing(scale: float, granularity: str, bias: float = 0.5) -> tuple[QuantConv2d, Tensor]:
    """Return a layer whose middle one of three filters almost vanishes, and its input."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, generator=generator)
    weight[1] *= scale
    if granularity == "per_tensor":
        weight *= scale
    x = torch.rand(1, 2, 6, 6, generator=generator)
    spec = spec_of(granularity=granularity)
    layer = QuantConv2d("conv", weight, torch.tensor([-bias, bias, 0.0]), spec, WEIGHT_GRID)
    layer.set_input_quantizer(watching(Grid(8, "symmetric_unsigned"), x, spec))
    return layer, x


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-12])
@pytest.mark.parametrize("bias", [0.5, 0.123456, 300.0])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_vanishing_filter_keeps_its_bias(scale: float, bias: float, factor: float) -> None:
    layer, x = vanishing(scale, "per_channel", bias)
    before = layer.weight.abs().amax(dim=(1, 2, 3))
    assert layer.calibrate() == 1
    top = layer.weight_quantizer.thresholds.high
    torch.testing.assert_close(top[[0, 2]], before[[0, 2]], rtol=0, atol=0)
    assert top[1] > before[1]
    # Training may halve both steps; the bias still has to fit.
    layer.weight_quantizer.thresholds.get_parameter("alpha").data.fill_(factor)
    layer.input_quantizer.thresholds.get_parameter("alpha").data.fill_(factor)
    out = layer(layer.input_quantizer(x))[:, 1]
    torch.testing.assert_close(out, torch.full_like(out, bias), rtol=2e-6, atol=0)
    step = layer.weight_quantizer.scale() * layer.input_quantizer.thresholds()[0]
    assert abs(bias / step[1].item()) <= INT32_MAX


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_vanishing_tensor_with_one_threshold_keeps_its_biases(scale: float) -> None:
    layer, x = vanishing(scale, "per_tensor")
    assert layer.calibrate() == 1
    out = layer(layer.input_quantizer(x)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(out.detach(), torch.tensor([-0.5, 0.5, 0.0]), rtol=2e-6, atol=1e-9)


def test_without_widening_that_bias_would_be_lost() -> None:
    layer, x = vanishing(1e-30, "per_channel")
    layer.weight_quantizer.calibrate(layer.weight)
    assert layer(layer.input_quantizer(x))[:, 1].abs().max() < 0.1


@given(
    seed=st.integers(0, 2**31),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    bits=BITS,
)
@settings(deadline=None, max_examples=30)
def test_ordinary_filters_are_not_widened(seed: int, granularity: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The least bias whose filter is widened is 2^28 steps: above 80 for the smallest filter here.
    weight = (1.0 + torch.randn(5, 3, generator=generator).abs()) * 10.0 ** torch.randint(
        -2, 3, (5, 1), generator=generator
    )
    spec = spec_of(granularity=granularity, thresholds="frozen")
    layer = QuantLinear(
        "linear", weight, 6 * torch.rand(5, generator=generator) - 3, spec, Grid(bits, "symmetric")
    )
    layer.set_input_quantizer(watching(Grid(8, "symmetric_unsigned"), torch.ones(1), spec))
    assert layer.calibrate() == 0
    tops = np.abs(weight.numpy())
    wanted = tops.max(axis=1) if granularity == "per_channel" else tops.max()
    np.testing.assert_array_equal(layer.weight_quantizer.thresholds.high.numpy(), wanted)
    np.testing.assert_array_equal(layer.weight_quantizer.thresholds.low.numpy(), -wanted)


def test_biases_are_on_the_grid_of_the_accumulators() -> None:
    layer, _ = vanishing(1.0, "per_channel", 0.7)
    layer.calibrate()
    move_factors(layer, 3)
    _, bias = layer.quantized()
    assert bias is not None
    step = layer.weight_quantizer.scale() * layer.input_quantizer.thresholds()[0]
    ratio = bias.detach().double() / step.detach().double()
    np.testing.assert_allclose(ratio.numpy(), np.rint(ratio.numpy()), atol=1e-3)
    assert ((bias - layer.bias).abs() <= 0.5 * step + 1e-7).all()  # type: ignore[operator]


# --- gradients through a layer -------------------------------------------------------------------


def test_bias_gradient_is_straight_through() -> None:
    layer, x = vanishing(1.0, "per_channel")
    layer.calibrate()
    out = layer(layer.input_quantizer(x))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weights)
    assert isinstance(layer.bias, nn.Parameter)
    torch.testing.assert_close(layer.bias.grad, weights.sum(dim=(0, 2, 3)))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_gradient_of_weight_thresholds_through_the_layer(granularity: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 6, generator=generator)
    spec = spec_of(granularity=granularity, bias="frozen")
    layer = QuantLinear("linear", weight, None, spec, Grid(4, "symmetric"))
    x = torch.rand(9, 6, generator=generator)
    source = watching(Grid(8, "symmetric_unsigned"), x, spec)
    layer.set_input_quantizer(source)
    layer.calibrate()
    move_factors(layer, 2)
    grad = torch.randn(9, 4, generator=generator)
    on_grid = source(x).detach()
    layer(on_grid).backward(grad)
    alpha = layer.weight_quantizer.thresholds.get_parameter("alpha")

    by_weight = grad.double().numpy().T @ on_grid.double().numpy()
    top = layer.weight_quantizer.thresholds.high.double().numpy()
    step = alpha.detach().double().numpy() * top / 7
    rows = step[:, None] if granularity == "per_channel" else step
    ratio = weight.double().numpy() / rows
    clipped = np.clip(np.rint(ratio), -7, 7)
    terms = by_weight * np.where(clipped == np.rint(ratio), clipped - ratio, clipped)
    wanted = (terms.sum(axis=1) if granularity == "per_channel" else terms.sum()) * top / 7
    assert alpha.grad is not None
    np.testing.assert_allclose(alpha.grad.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_gradient_and_projection_of_weight_factors() -> None:
    weight = torch.tensor([[0.2, -0.5, 0.7, 1.0, 0.3, -0.4]])
    spec = QuantSpec(
        weights="scale",
        thresholds="frozen",
        granularity="per_tensor",
        weight_scale_range=(0.75, 1.25),
    )
    layer = QuantLinear("linear", weight, None, spec, Grid(8, "symmetric"))
    source = watching(Grid(8, "symmetric_unsigned"), torch.ones(1), spec)
    layer.set_input_quantizer(source)
    layer.calibrate()
    assert layer.factor is not None
    assert torch.equal(layer.factor.detach(), torch.ones_like(weight))
    before = layer(torch.eye(6)).detach()
    layer.factor.data = torch.tensor([[0.75, 1.25, 0.7, 1.1, 1.3, 0.9]])
    out = layer(torch.eye(6))
    scaled = weight[0].numpy() * np.clip(layer.factor.detach().numpy()[0], 0.75, 1.25)
    wanted = np.clip(np.rint(scaled * 127), -127, 127) / 127
    np.testing.assert_allclose(out.detach().numpy()[:, 0], wanted, atol=1e-6)
    out.backward(torch.arange(1.0, 7.0)[:, None])
    # Gradients pass at the ends but not outside; 1.0·1.1 exceeds the threshold and is clipped.
    inside = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(
        layer.factor.grad, (torch.arange(1.0, 7.0) * inside * weight[0])[None]
    )
    layer.project()
    np.testing.assert_array_equal(
        layer.factor.detach().numpy(), np.float32([[0.75, 1.25, 0.75, 1.1, 1.25, 0.9]])
    )
    layer.calibrate()
    torch.testing.assert_close(layer(torch.eye(6)).detach(), before, rtol=0, atol=0)


def rounding_layer(
    weight: Tensor, granularity: str, bits: int, reach: tuple[float, float]
) -> QuantLinear:
    spec = QuantSpec(
        weights="adaround",
        thresholds="frozen",
        granularity=granularity,
        adaround_range=reach,  # type: ignore[arg-type]
    )
    layer = QuantLinear("linear", weight, None, spec, Grid(bits, "symmetric"))
    layer.set_input_quantizer(watching(Grid(8, "symmetric_unsigned"), torch.ones(1), spec))
    layer.calibrate()
    return layer


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    reach=st.sampled_from([(-1.0, 1.0), (-0.5, 0.5), (-0.25, 0.0), (0.0, 2.0)]),
)
@settings(deadline=None, max_examples=60)
def test_adaround_stays_near_the_weight(
    seed: int, bits: int, granularity: str, reach: tuple[float, float]
) -> None:
    """No integer is further from weight/step than the range and a half, and some are not nearest.

    So with a range of one step every weight goes to one of the integers around it or the next.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = rounding_layer(torch.randn(5, 12, generator=generator), granularity, bits, reach)
    assert layer.factor is not None
    q = layer.weight_quantizer.grid.qmax
    scale = layer.weight_quantizer.scale()
    step = (scale.reshape(-1, 1) if scale.dim() else scale).numpy()
    ratio = layer.weight.numpy().astype(np.float64) / step
    found = layer.quantized()[0].detach().numpy() / step
    np.testing.assert_allclose(found, np.rint(ratio), atol=1e-4)  # training starts at the nearest
    # Also after an optimizer step left the range.
    layer.factor.data = 3 * torch.randn(layer.factor.shape, generator=generator)
    found = np.rint(layer.quantized()[0].detach().numpy() / step)
    assert np.all(np.abs(found) <= q)
    lowest, highest = ratio + reach[0] - 0.5, ratio + reach[1] + 0.5
    assert np.all(
        (found >= np.maximum(lowest - 1e-4, -q)) & (found <= np.minimum(highest + 1e-4, q))
    )
    assert np.all(np.abs(found - np.rint(ratio)) <= math.ceil(max(-reach[0], reach[1])))
    moved = ratio + np.clip(layer.factor.detach().numpy(), *reach)
    # Float32 may round halves differently; the largest weight of a filter is often at one.
    is_half = np.abs(np.abs(moved - np.rint(moved)) - 0.5) < 1e-4
    assert np.all((found == np.clip(np.rint(moved), -q, q)) | is_half)
    assert np.mean(is_half) < 0.5
    layer.project()
    assert float(layer.factor.detach().min()) >= reach[0]
    assert float(layer.factor.detach().max()) <= reach[1]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_gradient_of_adaround(granularity: str) -> None:
    """∂out/∂f = the step, inside the grid and inside the range, its ends included."""
    weight = torch.tensor([[0.2, -0.5, 0.7, 1.0, 0.3, -0.4], [0.1, 0.2, -0.3, 0.1, 0.0, 0.25]])
    layer = rounding_layer(weight, granularity, 4, (-1.0, 1.0))
    assert layer.factor is not None
    layer.factor.data = torch.tensor([[1.0, -1.0, 0.3, 0.9, 1.2, -1.1]]).repeat(2, 1)
    grad = torch.arange(1.0, 13.0).reshape(2, 6)
    layer.quantized()[0].backward(grad)
    step = np.array([[1.0], [0.3 if granularity == "per_channel" else 1.0]]) / 7
    moved = weight.double().numpy() / step + np.clip(layer.factor.detach().numpy(), -1, 1)
    inside = np.abs(np.rint(moved)) <= 7
    assert not inside.all()
    passes = np.array([[1, 1, 1, 1, 0, 0]])
    np.testing.assert_allclose(
        layer.factor.grad.numpy(),
        grad.numpy() * inside * passes * step,
        rtol=1e-6,  # type: ignore[union-attr]
    )


# --- LSQ's number of elements --------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "wanted"), [("per_channel", 18), ("per_tensor", 90)])
def test_number_of_weights_per_threshold(granularity: str, wanted: int) -> None:
    spec = spec_of(thresholds="lsq", granularity=granularity)
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[1] *= 1e-30
    layer = QuantConv2d("conv", weight, torch.ones(5), spec, WEIGHT_GRID)
    layer.set_input_quantizer(watching(Grid(8, "symmetric_unsigned"), torch.ones(1, 2, 3, 3), spec))
    assert layer.calibrate() == (
        1 if granularity == "per_channel" else 0
    )  # widening keeps the number
    assert layer.weight_quantizer.thresholds.elements.item() == wanted
    other = QuantConv2d("conv", torch.zeros(5, 2, 3, 3), torch.zeros(5), spec, WEIGHT_GRID)
    other.load_state_dict(layer.state_dict())
    assert other.weight_quantizer.thresholds.elements.item() == wanted


@pytest.mark.parametrize("batch", [1, 7])
def test_activations_count_the_elements_of_one_image(batch: int) -> None:
    quantizer = watching(
        Grid(8, "symmetric_unsigned"), torch.rand(batch, 3, 4, 5), spec_of(thresholds="lsq")
    )
    assert quantizer.thresholds.elements.item() == 60


# --- parameters and buffers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"thresholds": "frozen", "bias": "frozen"}, set()),
        ({"thresholds": "frozen", "bias": "trained"}, {"bias"}),
        ({"thresholds": "fat", "bias": "frozen"}, {"weight_quantizer.thresholds.alpha"}),
        (
            {"thresholds": "fat", "bias": "trained", "weights": "scale"},
            {"bias", "factor", "weight_quantizer.thresholds.alpha"},
        ),
        ({"thresholds": "frozen", "bias": "frozen", "weights": "adaround"}, {"factor"}),
        ({"thresholds": "lsq", "bias": "frozen"}, {"weight_quantizer.thresholds.alpha"}),
        ({"thresholds": "tqt", "bias": "frozen"}, {"weight_quantizer.thresholds.alpha"}),
    ],
)
def test_parameters_are_exactly_what_is_trained(options: dict[str, str], wanted: set[str]) -> None:
    layer = QuantLinear("x", torch.ones(3, 2), torch.ones(3), spec_of(**options), WEIGHT_GRID)
    layer.set_input_quantizer(
        ActivationQuantizer("input", spec_of(), Grid(8, "symmetric_unsigned"))
    )
    assert {name for name, _ in layer.named_parameters()} == wanted
    assert {"weight", "bias"} <= set(layer.state_dict())
    assert not any("input" in name for name in layer.state_dict())


def test_the_source_keeps_its_weights() -> None:
    source = nn.Linear(3, 2)
    layer = QuantLinear("x", source.weight, source.bias, spec_of(), WEIGHT_GRID)
    wanted = source.weight.detach().clone()
    with torch.no_grad():
        source.weight.zero_()
        source.bias.zero_()
    assert torch.equal(layer.weight, wanted)
    assert layer.bias is not None
    assert (layer.bias != 0).any()


@pytest.mark.parametrize("who", ["weight", "input", "both"])
def test_a_disabled_layer_equals_torchs(who: str) -> None:
    layer, x = vanishing(1.0, "per_channel")
    layer.calibrate()
    source = layer.input_quantizer
    layer.weight_quantizer.enabled = who == "input"
    source.enabled = who == "weight"
    weight = layer.quantized()[0]
    on_grid = source(x)
    if who != "input":
        assert torch.equal(weight, layer.weight)
    else:
        quantizer = layer.weight_quantizer
        wanted = fake_quantize_weight(layer.weight, quantizer.scale(), quantizer.grid.qmax)
        assert torch.equal(weight, wanted)
    if who != "weight":
        assert torch.equal(on_grid, x)
    # With either off there is no int32 grid, and the bias is the float one.
    torch.testing.assert_close(layer(on_grid), F.conv2d(on_grid, weight, layer.bias))


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["symmetric", "symmetric_unsigned", "affine"])
@pytest.mark.parametrize("init", [InitSpec("minmax"), InitSpec("percentile", 99.0)])
def test_observing_keeps_values_and_sets_thresholds(kind: str, init: InitSpec) -> None:
    x = torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(0)) + 0.3
    if kind == "symmetric_unsigned":
        x = x.relu()
    quantizer = ActivationQuantizer("act", spec_of(activation_init=init), Grid(8, kind))  # type: ignore[arg-type]
    quantizer.start_observing()
    for part in x.split(1):
        assert quantizer(part) is part
    quantizer.stop_observing(keep=True)
    share = 1.0 if init.name == "minmax" else 0.99
    values = x.double().numpy()
    low, high = {
        "symmetric": (-np.quantile(np.abs(values), share), np.quantile(np.abs(values), share)),
        "symmetric_unsigned": (0.0, np.quantile(values, share)),
        "affine": (np.quantile(values, (1 - share) / 2), np.quantile(values, (1 + share) / 2)),
    }[kind]
    assert quantizer.thresholds.low.item() == pytest.approx(low, rel=5e-3)
    assert quantizer.thresholds.high.item() == pytest.approx(high, rel=5e-3)
    inside = torch.from_numpy((values > low * 0.99) & (values < high * 0.99))
    out = quantizer(x)
    steps = quantizer.grid.qmax - quantizer.grid.qmin
    assert ((out - x).abs()[inside] <= 0.51 * 1.01 * (high - low) / steps).all()
    assert len(out.unique()) <= steps + 1


def test_observed_statistics_can_be_discarded() -> None:
    quantizer = watching(Grid(8, "symmetric"), torch.tensor([2.0]), spec_of())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.start_observing()
    quantizer(torch.tensor([50.0]))
    quantizer.stop_observing(keep=False)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
    assert quantizer(torch.tensor([50.0])).item() == pytest.approx(2.0)
    quantizer.stop_observing(keep=True)  # not observing: no effect
    assert quantizer.thresholds.high.item() == 2.0


def test_each_calibration_starts_over() -> None:
    quantizer = watching(Grid(8, "symmetric"), torch.tensor([2.0]), spec_of())
    quantizer.start_observing()
    quantizer(torch.tensor([0.5]))
    quantizer.stop_observing(keep=True)
    assert quantizer.thresholds.high.item() == 0.5


@pytest.mark.parametrize("init", ["minmax", "percentile"])
def test_calibration_without_images(init: str) -> None:
    spec = spec_of(activation_init=InitSpec(init))  # type: ignore[arg-type]
    quantizer = ActivationQuantizer("blocks.0.act1", spec, Grid(8, "symmetric_unsigned"))
    quantizer.start_observing()
    with pytest.raises(
        FatError, match=r"'blocks\.0\.act1' received no images.*the calibration set is empty"
    ):
        quantizer.stop_observing(keep=True)
    assert quantizer(torch.tensor([0.5])).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("init", ["minmax", "percentile"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("when", [0, 1])
def test_values_that_are_not_finite(init: str, bad: float, when: int) -> None:
    spec = spec_of(activation_init=InitSpec(init))  # type: ignore[arg-type]
    quantizer = ActivationQuantizer("blocks.0.act1", spec, Grid(8, "symmetric"))
    batches = [torch.tensor([1.0, 2.0])]
    batches.insert(when, torch.tensor([0.5, bad]))
    quantizer.start_observing()
    for batch in batches:
        quantizer(batch)
    wanted = rf"output of 'blocks\.0\.act1' ranges from .*{bad}.*check the weights and the images"
    with pytest.raises(FatError, match=wanted):
        quantizer.stop_observing(keep=True)
    assert quantizer.thresholds.high.item() == 1.0


@given(
    seed=st.integers(0, 2**31),
    bits=BITS,
    shape=st.sampled_from([(4, 3), (4, 3, 2, 2), (1, 5), (6, 1, 3, 3)]),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
)
@settings(deadline=None, max_examples=40)
def test_weights_are_on_their_grid(
    seed: int, bits: int, shape: tuple[int, ...], granularity: str
) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    quantizer = WeightQuantizer(spec_of(granularity=granularity), Grid(bits, "symmetric"), shape)
    quantizer.calibrate(weight)
    q = 2 ** (bits - 1) - 1
    values = weight.numpy()
    axes = tuple(range(1, len(shape))) if granularity == "per_channel" else None
    step = np.abs(values).max(axis=axes, keepdims=True) / np.float32(q)
    quantized = fake_quantize_weight(weight, quantizer.scale(), quantizer.grid.qmax)
    np.testing.assert_allclose(
        quantized.detach().numpy(), np.rint(values / step) * step, rtol=1e-5, atol=1e-7
    )
    assert quantizer.scale().shape == ((shape[0],) if granularity == "per_channel" else ())
    # The largest weight is on the last integer, so that nothing saturates.
    assert float((quantized.detach() - weight).abs().max()) <= 0.5001 * step.max()


def test_representations() -> None:
    layer = QuantConv2d("blocks.0.conv", torch.ones(2, 3, 1, 1), None, spec_of(), WEIGHT_GRID)
    assert isinstance(layer, QuantLayer)
    assert "blocks.0.conv, weight=[2, 3, 1, 1], bias=False" in repr(layer)
    assert "bits=8, thresholds=2" in repr(layer)
    assert "act, bits=4, grid=symmetric_unsigned" in repr(
        ActivationQuantizer("act", spec_of(), Grid(4, "symmetric_unsigned"))
    )


# --- fused activations ---------------------------------------------------------------------------


def calibrated_quantizer(
    activation: nn.Module | None, x: Tensor, **options: object
) -> ActivationQuantizer:
    spec = QuantSpec(**options)  # type: ignore[arg-type]
    quantizer = ActivationQuantizer("layer", spec, Grid(8, "symmetric_unsigned"), activation)
    quantizer.start_observing()
    quantizer(x)
    quantizer.stop_observing(keep=True)
    return quantizer


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 2.0)])
def test_the_unsigned_grid_clips_like_its_activation(activation: nn.Module) -> None:
    """Values and gradients equal those of activation followed by quantizer.

    Gradients differ by convention where a value lies outside the clip but rounds to its edge: the
    straight-through estimator counts it as inside the grid. No value here is that close.
    """
    torch.manual_seed(0)
    x = 5 * torch.randn(64, 8, 6, 6)
    x = torch.where((x.abs() < 0.1) | ((x - 2).abs() < 0.1) | ((x - 6).abs() < 0.1), 1.0, x)
    fused = calibrated_quantizer(activation, x)
    plain = calibrated_quantizer(None, activation(x))
    assert float(fused.thresholds.high) == float(plain.thresholds.high)
    grad = torch.randn_like(x)
    # At α = 1 the two differ on purpose: values clipped at T are then outside the fused grid, which
    # is the derivative for the only direction that α may take; before rounding they look inside.
    for alpha in (0.9, 0.7):
        results = []
        for quantizer, before in ((fused, nn.Identity()), (plain, activation)):
            quantizer.thresholds.alpha.data.fill_(alpha)
            quantizer.thresholds.alpha.grad = None
            leaf = x.clone().requires_grad_()
            out = quantizer(before(leaf))
            out.backward(grad)
            results.append((out.detach(), leaf.grad, quantizer.thresholds.alpha.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    fused.enabled = False
    assert torch.equal(fused(x), activation(x))


def test_a_clip_per_channel_precedes_and_limits_the_grid() -> None:
    bounds = (6.0, 1.5, 0.02)
    x = torch.linspace(-3, 9, 25).reshape(1, 1, 5, 5).repeat(1, 3, 1, 1)
    quantizer = calibrated_quantizer(ChannelClip(bounds), x, alpha_range=(0.5, 2.0))
    assert quantizer.thresholds.limit == 6.0
    quantizer.thresholds.alpha.data.fill_(1.9)
    quantizer.thresholds.project()
    assert float(quantizer.thresholds.range()[1].detach()) == pytest.approx(6.0)
    upper = torch.tensor(bounds).reshape(1, 3, 1, 1)
    clipped = x.clamp(min=0.0).minimum(upper)
    leaf = x.clone().requires_grad_()
    out = quantizer(leaf)
    assert torch.equal(out, calibrated_quantizer(None, clipped)(clipped))
    out.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad == 0, (x < 0) | (x > upper))
    quantizer.enabled = False
    assert torch.equal(quantizer(x), clipped)


def test_no_threshold_exceeds_the_bound_of_its_clip() -> None:
    x = torch.tensor([-3.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    quantizer = calibrated_quantizer(nn.ReLU6(), x, alpha_range=(0.5, 2.0))
    quantizer.thresholds.alpha.data.fill_(1.9)
    quantizer.thresholds.project()
    assert float(quantizer.thresholds.range()[1].detach()) == pytest.approx(6.0)
    huge = torch.full((1, 3, 1, 1), 7.0)
    assert float(quantizer(huge).max()) == pytest.approx(6.0)


@pytest.mark.parametrize("thresholds", [*TRAINED, "frozen"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("power_of_two", [False, True])
def test_nothing_above_6_comes_out_after_relu6(
    thresholds: str, bits: int, power_of_two: bool
) -> None:
    """Also if the upper end of a power-of-two grid exceeds 6."""
    x = torch.linspace(-9, 9, 2001).reshape(1, 1, 3, 667)
    spec = QuantSpec(thresholds=thresholds, power_of_two=power_of_two, alpha_range=(0.5, 1.3))  # type: ignore[arg-type]
    for top in (0.3, 3.1, 9.0):
        quantizer = ActivationQuantizer("layer", spec, Grid(bits, "symmetric_unsigned"), nn.ReLU6())
        quantizer.start_observing()
        quantizer(x.clamp(max=top))
        quantizer.stop_observing(keep=True)
        for alpha in (None, -1e4, 0.9, 1.2, 1e4):
            if alpha is not None and quantizer.thresholds.alpha is not None:
                quantizer.thresholds.alpha.data.fill_(alpha)
                quantizer.thresholds.project()
            out = quantizer(x).detach()
            assert float(out.min()) == 0.0
            assert float(out.max()) <= (6.0 if power_of_two else 6.0 * (1 + 1e-6))
            step = float(quantizer.thresholds()[0].detach())
            inside = (x >= 0) & (x <= min(6.0, step * quantizer.grid.qmax))
            assert float((out - x)[inside].abs().max()) <= 0.5001 * step
            assert power_of_two is False or math.frexp(step)[0] == 0.5


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6()])
def test_overwriting_the_input_changes_neither_values_nor_gradients(
    activation: nn.Module | None, power_of_two: bool
) -> None:
    x = 5 * torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(power_of_two=power_of_two)
    quantizer = ActivationQuantizer("layer", spec, Grid(4, "symmetric_unsigned"), activation)
    quantizer.start_observing()
    quantizer(x)
    quantizer.stop_observing(keep=True)
    results = []
    for quantizer.may_overwrite in (False, True):
        quantizer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf * 1.0)
        out.backward(grad)
        assert quantizer.thresholds.alpha is not None
        results.append((out.detach(), leaf.grad, quantizer.thresholds.alpha.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_clips_outside_the_grid_are_applied_before_rounding() -> None:
    spec = QuantSpec(scheme="symmetric")
    quantizer = ActivationQuantizer("layer", spec, Grid(8, "symmetric"), nn.Hardtanh(-1.0, 2.0))
    quantizer.start_observing()
    quantizer(torch.tensor([-4.0, 4.0]).reshape(1, 2, 1, 1))
    quantizer.stop_observing(keep=True)
    out = quantizer(torch.tensor([-4.0, 4.0]).reshape(1, 2, 1, 1)).flatten()
    step = 2.0 / 127
    assert out.tolist() == pytest.approx([round(-1.0 / step) * step, 2.0])
