"""Triton's kernels on CPU tensors, in Triton's interpreter.

test_triton_kernels.py runs this file in a process of its own, because ``TRITON_INTERPRET=1`` must
be set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fat.quant.functional import Adjust
from fat.quant.kernels import compiled, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRIDS = {
    "symmetric": (-127, 127, 0.0),
    "unsigned": (0, 255, 0.0),
    "affine": (0, 255, 13.0),
    "two bits": (0, 3, 1.0),
}
SHAPES = [(), (0, 4), (1,), (1023,), (2, 3, 5, 7), (3, 4, 20, 21), (2049,), (5, 1, 1, 1)]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38, 2.0**22, 2.0**23 + 1]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
BOUNDS = {Adjust.NOTHING: (0.0, 0.0), Adjust.MULTIPLY: (0.75, 1.25), Adjust.MOVE: (-1.0, 1.0)}


@pytest.fixture(scope="module", autouse=True)
def triton_kernels() -> Iterator[ModuleType]:
    """Return the kernels, with the interpreter's conversions to and from bfloat16 mended.

    It truncates, where hardware rounds half to even.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from fat.quant.kernels import triton_kernels

    def convert(data: np.ndarray, source: object, target: object, _: object) -> np.ndarray:
        numbers = torch.from_numpy(np.ascontiguousarray(data).copy())
        if str(target) == "bf16":
            return numbers.to(torch.bfloat16).view(torch.uint16).numpy()
        assert (str(source), str(target)) == ("bf16", "fp32")
        return numbers.view(torch.bfloat16).to(torch.float32).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield triton_kernels


def same_bits(found: Tensor, wanted: Tensor) -> None:
    """Assert equal dtypes, shapes and bits; any NaN equals any NaN."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    known = ~wanted.isnan()
    assert torch.equal(~found.isnan(), known)
    bits = [t.contiguous().view(size) if t.dim() else t.reshape(1).view(size) for t in (found,)]
    others = [wanted.contiguous().view(size) if wanted.dim() else wanted.reshape(1).view(size)]
    mask = known.reshape(bits[0].shape)
    assert torch.equal(bits[0][mask], others[0][mask])


def draw(
    shape: tuple[int, ...], grid: tuple[int, int, float], dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with special values, the step as scalar and the incoming gradient."""
    generator = np.random.default_rng(sum(shape) + grid[1])
    step = 0.0213
    x = (generator.normal(size=shape) * grid[1] * step).astype(np.float32)
    with np.errstate(over="ignore"):
        halves = np.float32([0.5, -0.5, 1.5, 2.5]) * np.float32(step)
    special = np.concatenate([np.float32(SPECIAL), halves])
    x = np.where(generator.random(shape) < 0.2, generator.choice(special, shape), x)
    grad = torch.from_numpy(np.asarray(generator.normal(size=shape), dtype=np.float32))
    tensor = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return LAYOUTS[layout](tensor.to(dtype)), torch.tensor(step), grad.to(dtype)


# --- activations ---------------------------------------------------------------------------------


CASES = [
    *((shape, grid, "float32", "contiguous") for shape in SHAPES for grid in GRIDS),
    *((shape, "affine", "bfloat16", "contiguous") for shape in SHAPES),
    *(((2, 3, 5, 7), "affine", dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
]


@pytest.mark.parametrize(("shape", "grid", "dtype", "layout"), CASES, ids=str)
def test_activations_equal_torch_and_c(
    triton_kernels: ModuleType, shape: tuple[int, ...], grid: str, dtype: str, layout: str
) -> None:
    qmin, qmax, zero = GRIDS[grid]
    x, step, grad = draw(shape, GRIDS[grid], DTYPES[dtype], layout)
    before = x.clone()
    lanes = 5
    scale, zero_point = step.expand(lanes), torch.tensor(zero).expand(lanes)
    numbers = (scale, zero_point, qmin, qmax)
    out, code = triton_kernels.fake_quantize_code(x, *numbers)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    same_bits(triton_kernels.fake_quantize(x, *numbers), out)
    overwritten = x.clone(memory_format=torch.preserve_format) if layout != "strided" else x
    same_bits(triton_kernels.fake_quantize_code_(overwritten, *numbers), code)
    same_bits(overwritten, out)
    x.copy_(before)
    by_x, by_scale, by_zero_point = triton_kernels.fake_quantize_backward(code, grad, *numbers)
    assert out.stride() == code.stride() == by_x.stride() == torch.empty_like(x).stride()
    assert by_scale.shape == by_zero_point.shape == (lanes,)
    assert by_scale.dtype == by_zero_point.dtype == torch.float32

    others = [reference]
    if compiled.usable(x) and x.numel():
        others.append(compiled)
    for other in others:
        for found, wanted in zip((out, code), other.fake_quantize_code(x, *numbers), strict=True):
            same_bits(found, wanted)
        gradients = other.fake_quantize_backward(code, grad, *numbers)
        same_bits(by_x, gradients[0])

    # Sums against float64, from the codes.
    c, g = code.double().numpy(), grad.double().numpy()
    below, above = c <= -127, c >= 127
    terms = g * np.select([c == -128, below, above], [np.nan, qmin - zero, qmax - zero], c / 252)
    total = terms.sum()
    assert np.isnan(float(by_scale.sum())) == np.isnan(total)
    if not np.isnan(total):
        room = 1e-5 * np.abs(terms).sum() + 1e-30
        assert abs(float(by_scale.double().sum()) - total) <= room
    outside = -float(step) * g * (below | above)
    room = 1e-5 * np.abs(outside).sum() + 1e-30
    assert abs(float(by_zero_point.double().sum()) - outside.sum()) <= room


@pytest.mark.parametrize("lanes", [1, 2, 3, 40])
def test_the_number_of_lanes_changes_no_gradient(triton_kernels: ModuleType, lanes: int) -> None:
    """More programs than blocks, and fewer; a scalar counts as one lane."""
    x, step, grad = draw((9, 8, 31, 5), GRIDS["affine"], torch.float32, "contiguous")
    x = x.nan_to_num(0.0)
    zero_point = torch.tensor(13.0)
    code = reference.fake_quantize_code(x, step, zero_point, 0, 255)[1]
    wanted = triton_kernels.fake_quantize_backward(code, grad, step, zero_point, 0, 255)
    found = triton_kernels.fake_quantize_backward(
        code, grad, step.expand(lanes), zero_point.expand(lanes), 0, 255
    )
    same_bits(found[0], wanted[0])
    for own, other in zip(found[1:], wanted[1:], strict=True):
        assert own.shape == (lanes,)
        assert other.shape == (1,)
        torch.testing.assert_close(own.sum(), other.sum(), rtol=1e-5, atol=1e-4)
    blocks = -(-x.numel() // triton_kernels.BLOCK_BACKWARD)
    assert not found[1][blocks:].any()
    assert found[1][: min(blocks, lanes)].all()


# --- weights -------------------------------------------------------------------------------------


WEIGHTS = [(0, 3), (3, 0), (1, 1), (5, 7), (2, 4099), (4, 3, 3, 3), (6, 1, 5, 5)]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("adjust", list(Adjust))
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        *((shape, "float32", "contiguous") for shape in WEIGHTS),
        *(((4, 3, 3, 3), dtype, "channels_last") for dtype in DTYPES),
    ],
    ids=str,
)
def test_weights_equal_torch_and_c(
    triton_kernels: ModuleType,
    shape: tuple[int, ...],
    adjust: Adjust,
    per_channel: bool,
    dtype: str,
    layout: str,
) -> None:
    if per_channel and not shape[0]:
        return  # no step
    generator = torch.Generator().manual_seed(0)
    low, high = BOUNDS[adjust]
    weight = torch.randn(shape, generator=generator)
    factor = torch.rand(shape, generator=generator) * (high - low + 0.4) + low - 0.2
    factor = factor.where(torch.rand(shape, generator=generator) > 0.2, low)
    factor = factor.where(torch.rand(shape, generator=generator) > 0.2, high)
    weight, factor = LAYOUTS[layout](weight), LAYOUTS[layout](factor)
    grad = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    steps = torch.rand(shape[0], generator=generator) * 0.2 + 0.05
    scale = steps if per_channel else torch.tensor(0.1).expand(6)
    options = (7, int(adjust), low, high, per_channel)
    out = triton_kernels.fake_quantize_weight(weight, factor, scale, *options, DTYPES[dtype])
    by_factor, by_scale = triton_kernels.fake_quantize_weight_backward(
        weight, factor, grad, scale, *options
    )
    assert out.stride() == torch.empty_like(weight).stride()
    assert by_scale.shape == scale.shape
    assert by_factor.shape == (weight.shape if adjust else (0,))
    for other in [reference, compiled] if compiled.available() else [reference]:
        same_bits(out, other.fake_quantize_weight(weight, factor, scale, *options, DTYPES[dtype]))
        gradients = other.fake_quantize_weight_backward(weight, factor, grad, scale, *options)
        same_bits(by_factor, gradients[0])
        own, theirs = (t if per_channel else t.sum() for t in (by_scale, gradients[1]))
        room = 1e-6 * float(grad.abs().sum()) * 7 + 1e-30
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=room)


def test_a_factor_of_another_layout(triton_kernels: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, factor, grad = (torch.rand(4, 3, 2, 2, generator=generator) for _ in range(3))
    last = factor.contiguous(memory_format=torch.channels_last)
    options = (torch.full((4,), 0.1), 7, int(Adjust.MOVE), -1.0, 1.0, True)
    forward, backward = (
        triton_kernels.fake_quantize_weight,
        triton_kernels.fake_quantize_weight_backward,
    )
    same_bits(
        forward(weight, last, *options, torch.float32),
        forward(weight, factor, *options, torch.float32),
    )
    one, two = (backward(weight, f, grad, *options) for f in (last, factor))
    for own, other in zip(one, two, strict=True):
        same_bits(own, other)


# --- what the kernels do not support -------------------------------------------------------------


def test_other_dtypes_are_left_to_torch(triton_kernels: ModuleType) -> None:
    x, step, zero = torch.ones(3, 3), torch.ones(1), torch.zeros(1)
    code = torch.zeros(3, 3, dtype=torch.int8)
    assert triton_kernels.fake_quantize(x.double(), step, zero, 0, 3) is None
    assert triton_kernels.fake_quantize(x, step.double(), zero, 0, 3) is None
    assert triton_kernels.fake_quantize_code(x.double(), step, zero, 0, 3) is None
    assert triton_kernels.fake_quantize_code_(x.double(), step, zero, 0, 3) is None
    assert triton_kernels.fake_quantize_backward(code, x.double(), step, zero, 0, 3) is None
    options = (3, 0, 0.0, 0.0, False)
    for weight, dtype in (
        (x.double(), torch.float32),
        (x, torch.float64),
        (x[:, ::2], torch.float32),
        (x.reshape(3, 3).t()[:2], torch.float32),
    ):
        assert triton_kernels.fake_quantize_weight(weight, weight, step, *options, dtype) is None
        backward = triton_kernels.fake_quantize_weight_backward
        assert backward(weight, weight, weight.to(dtype), step, *options) is None


def test_pointers_of_other_devices_are_not_read(triton_kernels: ModuleType) -> None:
    x, meta = torch.ones(3), torch.ones(1, device="meta")
    with pytest.raises(RuntimeError, match="same device, but found cpu and meta"):
        triton_kernels.fake_quantize(x, meta, torch.zeros(1), 0, 3)
    with pytest.raises(RuntimeError, match="same device, but found cpu and meta"):
        triton_kernels.fake_quantize_weight(x, x, meta, 3, 0, 0.0, 0.0, False, torch.float32)


def test_each_filter_needs_a_step(triton_kernels: ModuleType) -> None:
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"3 filters need as many steps, got \[1\]"):
        triton_kernels.fake_quantize_weight(
            x, x, torch.ones(1), 3, 0, 0.0, 0.0, True, torch.float32
        )


def test_check_finds_wrong_results(
    triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_kernels.check(torch.device("cpu"))
    wrong = (torch.zeros(8), torch.zeros(8, dtype=torch.int8))
    monkeypatch.setattr(triton_kernels, "fake_quantize_code", lambda *_: wrong)
    with pytest.raises(RuntimeError, match="differ from those of torch operations"):
        triton_kernels.check(torch.device("cpu"))
