"""Compiled kernels equal the torch operations, and are built in any environment."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fat.quant import kernels
from fat.quant.config import Grid
from fat.quant.functional import Adjust, fake_quantize, fake_quantize_weight
from fat.quant.kernels import compiled, legacy, operators

needs_kernels = pytest.mark.skipif(
    kernels.backend() == "torch",
    reason="no C compiler, or FAT_KERNELS=off: there are no compiled kernels to test",
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
}
GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "symmetric_unsigned", "affine"]),
)
# Small shapes, and odd sizes that span several blocks and threads.
SHAPES = st.lists(st.integers(0, 7), max_size=5).map(tuple) | st.sampled_from(
    [(1,), (4095,), (4097,), (3, 2731), (2, 3, 40, 41), (3, 5, 53, 61)]
)
STEPS = st.floats(-38.0, 30.0).map(lambda exponent: float(np.float32(10.0**exponent)))


@contextmanager
def torch_alone() -> Iterator[None]:
    """Disable the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_library", lambda: None)
        assert kernels.backend() == "torch"
        yield


def same_bits(own: Tensor, other: Tensor) -> None:
    """Assert equality of all bits; any NaN equals any NaN."""
    assert own.shape == other.shape
    assert own.dtype == other.dtype == torch.float32
    mine, theirs = own.detach().numpy(), other.detach().numpy()
    unknown = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(mine), unknown)
    mine, theirs = (np.ascontiguousarray(a)[~unknown].view(np.int32) for a in (mine, theirs))
    np.testing.assert_array_equal(mine, theirs)


def draw(
    seed: int, shape: tuple[int, ...], grid: Grid, step: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, step, zero point and the incoming gradient; x has special values but no NaN."""
    generator = np.random.default_rng(seed)
    zero_point = generator.integers(0, grid.qmax + 1) if grid.kind == "affine" else 0
    with np.errstate(over="ignore"):
        x = (generator.normal(size=shape) * grid.qmax * step).astype(np.float32)
        special = np.float32([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, 0.5, -1.5, 2.5])
        special[-3:] *= np.float32(step)  # halves
    places = generator.random(shape) < 0.1
    x = np.where(places, generator.choice(special, shape), x)
    grad = generator.normal(size=shape).astype(np.float32)
    return (
        torch.from_numpy(np.asarray(x, dtype=np.float32)),
        torch.tensor(step),
        torch.tensor(float(zero_point)),
        torch.from_numpy(np.asarray(grad)),
    )


def run(
    x: Tensor, step: Tensor, zero_point: Tensor, grad: Tensor, grid: Grid, inplace: bool = False
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of x, step and zero point."""
    leaves = [t.clone(memory_format=torch.preserve_format) for t in (x, step, zero_point)]
    leaves = [t.requires_grad_() for t in leaves]
    x = leaves[0].view_as(leaves[0]) if not inplace else leaves[0] * 1.0
    out = fake_quantize(x, leaves[1], leaves[2], grid.qmin, grid.qmax, inplace=inplace)
    result = out.detach().clone()
    out.backward(grad)
    return (result, *(t.grad for t in leaves))  # type: ignore[arg-type]


# --- activations ---------------------------------------------------------------------------------


@needs_kernels
@given(
    seed=st.integers(0, 2**31),
    shape=SHAPES,
    grid=GRIDS,
    step=STEPS,
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from(list(LAYOUTS)),
)
@settings(deadline=None, max_examples=120)
def test_activations_equal_torch_operations(
    seed: int, shape: tuple[int, ...], grid: Grid, step: float, layout: str, grad_layout: str
) -> None:
    x, scale, zero_point, grad = draw(seed, shape, grid, step)
    x, grad = LAYOUTS[layout](x), LAYOUTS[grad_layout](grad)
    assert kernels.usable(x)
    with torch_alone():
        wanted = run(x, scale, zero_point, grad, grid)
    found = run(x, scale, zero_point, grad, grid)
    same_bits(found[0], wanted[0])
    same_bits(found[1], wanted[1])
    assert kernels.usable(x, found[0])  # same layout as x

    # Without autograd, and in place.
    same_bits(fake_quantize(x, scale, zero_point, grid.qmin, grid.qmax), wanted[0])
    for own, other in zip(run(x, scale, zero_point, grad, grid, inplace=True), found, strict=True):
        same_bits(own, other)

    # Sums in float64; float32 division determines the integers.
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = x.numpy() / np.float32(step)
        assert ratio.dtype == np.float32
        rounded = np.rint(ratio.astype(np.float64))
        low, high = (bound - float(zero_point) for bound in (grid.qmin, grid.qmax))
        below, above = rounded < low, rounded > high
        error = rounded - ratio
    g = grad.numpy().astype(np.float64)
    terms = g * np.select([below, above], [low, high], error)
    code = np.abs(g[~below & ~above]).sum() / 504  # one byte holds the error to 1/252
    rounding = 1e-5 * np.abs(terms).sum()
    assert abs(float(found[2]) - terms.sum()) <= code + rounding + 1e-30
    outside = g[below | above]
    with np.errstate(over="ignore"):
        wanted_zero = np.float32(-step * outside.sum())
        room = np.float32(1e-5 * step * np.abs(outside).sum())
    np.testing.assert_allclose(float(found[3]), wanted_zero, rtol=1e-5, atol=room)


@needs_kernels
@pytest.mark.parametrize("count", [1, 5, 8, 16, 5000])
def test_nan_reaches_the_output_and_the_gradient_of_the_step(count: int) -> None:
    x = torch.zeros(count)
    x[count // 2] = torch.nan
    out, by_x, by_step, _ = run(
        x, torch.tensor(0.1), torch.tensor(3.0), torch.ones(count), Grid(4, "affine")
    )
    assert out.isnan().nonzero().flatten().tolist() == [count // 2]
    assert by_step.isnan()
    others = torch.arange(count) != count // 2
    assert torch.equal(by_x[others], torch.ones(count - 1))
    with torch_alone():
        reference = run(
            x, torch.tensor(0.1), torch.tensor(3.0), torch.ones(count), Grid(4, "affine")
        )
    same_bits(out, reference[0])
    assert reference[2].isnan()


@needs_kernels
def test_gradient_of_the_step_has_the_error_of_one_byte() -> None:
    """The error is not always 0: the cost of one byte instead of a float."""
    x, step, zero_point, _ = draw(0, (1000,), Grid(8, "symmetric"), 0.1)
    x = x.clamp(-12, 12)
    grad = torch.ones(1000)
    fused = run(x, step, zero_point, grad, Grid(8, "symmetric"))[2]
    exact = run(x.double(), step.double(), zero_point, grad.double(), Grid(8, "symmetric"))[2]
    assert 0.0 < abs(float(fused - exact)) <= 1000 / 504


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    grid = Grid(8, "affine")
    x, step, zero_point, grad = draw(1, (7, 3, 113, 127), grid, 0.03)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, step, zero_point, grad, grid))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            same_bits(one, two)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(4, 6).t(),
        torch.zeros(1).expand(5),
        torch.zeros(2, 3, device="meta"),
    ],
)
def test_unsupported_tensors_use_torch_operations(x: Tensor) -> None:
    assert not kernels.usable(x)
    if x.device.type == "cpu":
        out = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -7, 7)
        assert torch.equal(out, x.to(out.dtype))
        assert out.dtype == x.dtype


@needs_kernels
def test_all_tensors_need_the_same_layout() -> None:
    plain = torch.zeros(2, 3, 4, 5)
    last = plain.contiguous(memory_format=torch.channels_last)
    assert kernels.usable(plain)
    assert kernels.usable(last, last)
    assert not kernels.usable(plain, last)
    assert not kernels.usable(plain, plain.double())


# --- in-place operation --------------------------------------------------------------------------

STEP, ZERO = torch.tensor(0.5), torch.tensor(0.0)


def overwritten(x: Tensor, step: Tensor = STEP) -> bool:
    """Return True if the result is stored in x; otherwise x must be unchanged."""
    before = x.detach().clone()
    zero = torch.zeros_like(step)
    out = fake_quantize(x, step.clone().requires_grad_(), zero, -3, 3, inplace=True)
    assert not torch.equal(out.detach(), before)
    if out.data_ptr() == x.data_ptr():
        return True
    assert torch.equal(x.detach(), before)
    return False


@needs_kernels
def test_input_is_overwritten_where_allowed() -> None:
    for x in (
        torch.linspace(-3, 3, 11),
        torch.linspace(-3, 3, 12).reshape(3, 4).t(),
        torch.linspace(-3, 3, 11).bfloat16(),
    ):
        result = x.requires_grad_() * 1.01
        assert overwritten(result)
        assert result._version > 0


def test_input_is_not_overwritten_elsewhere() -> None:
    values = 1.01 * torch.linspace(-3, 3, 12)
    assert not overwritten(values.clone())  # the caller's own data, such as images
    assert not overwritten(values.clone().requires_grad_())  # a parameter
    steps = torch.full((3, 1), 0.5)
    assert not overwritten((values.clone().requires_grad_() * 1.0).reshape(3, 4), steps)
    with torch.no_grad():
        assert not overwritten(values.clone().requires_grad_() * 1.0)
    with torch_alone():
        assert not overwritten(values.clone().requires_grad_() * 1.0)


@needs_kernels
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.exp, lambda x, y: y),  # exp's backward needs its result
        (lambda x: x * 1.0, lambda x, y: y),
        (lambda x: x * 1.0, lambda x, y: y + x.detach()),
    ],
    ids=["saved by what gave it", "saved by another reader", "changed for another reader"],
)
def test_overwriting_a_needed_tensor_is_an_error(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x = before(torch.linspace(-1, 1, 9).requires_grad_())
    other = x.square() if before is not torch.exp else None  # saves x for its backward pass
    y = fake_quantize(x, STEP.clone().requires_grad_(), ZERO, -3, 3, inplace=True)
    total = after(x, y).sum() + (0.0 if other is None else other.sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@needs_kernels
def test_overwriting_one_of_several_views_is_an_error() -> None:
    x = (torch.linspace(-1, 1, 8).requires_grad_() * 1.0).chunk(2)[0]
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        fake_quantize(x, STEP.clone().requires_grad_(), ZERO, -3, 3, inplace=True)


# --- weights -------------------------------------------------------------------------------------

BOUNDS = {Adjust.NOTHING: (0.0, 0.0), Adjust.MULTIPLY: (0.75, 1.25), Adjust.MOVE: (-1.0, 1.0)}
WEIGHTS = st.sampled_from(
    [(0, 3), (3, 0), (1, 1), (5, 7), (2, 4099), (4, 3, 3, 3), (6, 1, 5, 5), (3, 8, 1, 1), (9, 2, 3)]
)


@needs_kernels
@given(
    seed=st.integers(0, 2**31),
    shape=WEIGHTS,
    bits=st.integers(2, 8),
    step=STEPS,
    adjust=st.sampled_from(list(Adjust)),
    per_filter=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    grad_layout=st.sampled_from(list(LAYOUTS)),
)
@settings(deadline=None, max_examples=150)
def test_weights_equal_torch_operations(
    seed: int,
    shape: tuple[int, ...],
    bits: int,
    step: float,
    adjust: Adjust,
    per_filter: bool,
    layout: str,
    grad_layout: str,
) -> None:
    generator = np.random.default_rng(seed)
    qmax = 2 ** (bits - 1) - 1
    low, high = BOUNDS[adjust]
    with np.errstate(over="ignore", under="ignore"):
        steps = generator.uniform(0.5, 2.0, shape[0] if per_filter else ()) * step
        steps = np.asarray(steps, dtype=np.float32)
        rows = steps.reshape(-1, *[1] * (len(shape) - 1)) if per_filter else steps
        weight = (generator.normal(size=shape) * qmax * rows).astype(np.float32)
    # Inside the bounds, outside, and exactly at both ends.
    factor = generator.uniform(low - 0.2, high + 0.2, shape).astype(np.float32)
    factor = np.where(generator.random(shape) < 0.3, np.float32(low), factor)
    factor = np.where(generator.random(shape) < 0.3, np.float32(high), factor)
    grad = generator.normal(size=shape).astype(np.float32)

    def weights(compiled: bool) -> tuple[Tensor, ...]:
        w = LAYOUTS[layout](torch.from_numpy(weight))
        f = LAYOUTS[layout](torch.from_numpy(factor)).clone().requires_grad_()
        d = torch.from_numpy(steps).clone().requires_grad_()
        assert kernels.usable(w, f) is compiled
        given_factor = None if adjust is Adjust.NOTHING else f
        out = fake_quantize_weight(w, d, qmax, given_factor, adjust, (low, high))
        out.backward(LAYOUTS[grad_layout](torch.from_numpy(grad)))
        assert torch.equal(w, torch.from_numpy(weight))
        assert (f.grad is None) is (adjust is Adjust.NOTHING)
        assert d.grad is not None
        return out, d.grad, *([] if f.grad is None else [f.grad])

    with torch_alone():
        wanted = weights(compiled=False)
    found = weights(compiled=True)
    same_bits(found[0], wanted[0])

    # Closed form: W' and integers in float32 as in the definition, sums in float64.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        clipped = np.clip(factor, np.float32(low), np.float32(high))
        moved = {
            Adjust.NOTHING: weight,
            Adjust.MULTIPLY: weight * clipped,
            Adjust.MOVE: weight + clipped * rows,
        }[adjust]
        ratio = (moved / rows).astype(np.float64)
        integers = np.clip(np.rint(ratio), -qmax, qmax)
        inside = np.rint(ratio) == integers
        by_factor = grad * inside * (weight if adjust is Adjust.MULTIPLY else rows)
    np.testing.assert_array_equal(
        found[0].detach().numpy(), (integers.astype(np.float32) * rows).astype(np.float32)
    )
    terms = grad * np.where(inside, integers - ratio, integers)
    axes = tuple(range(1, len(shape))) if per_filter else None
    total, room = terms.sum(axis=axes), 1e-5 * np.abs(terms).sum() + 1e-30
    np.testing.assert_allclose(found[1].numpy(), total, rtol=1e-5, atol=room)
    # The torch operations subtract out and W', each accurate to 2^-24, so up to 2^-24 of q steps.
    room += 1e-6 * qmax * np.abs(grad).sum()
    if step > 1e-30:  # below, the difference has no significant digits
        np.testing.assert_allclose(wanted[1].numpy(), total, rtol=1e-5, atol=room)
    if adjust is Adjust.NOTHING:
        return
    assert torch.equal(found[2], wanted[2])
    passes = (factor >= np.float32(low)) & (factor <= np.float32(high))
    np.testing.assert_allclose(found[2].numpy(), by_factor * passes, rtol=1e-6)


@needs_kernels
def test_a_factor_of_another_layout_uses_torch_operations() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, factor = (torch.rand(4, 3, 2, 2, generator=generator) for _ in range(2))
    last = factor.contiguous(memory_format=torch.channels_last)
    step = torch.full((4,), 0.1)
    one, two = (
        fake_quantize_weight(weight, step, 7, f, Adjust.MOVE, (-1.0, 1.0)) for f in (factor, last)
    )
    same_bits(one, two)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_unused_factor_has_no_effect(compiled: bool) -> None:
    weight = torch.tensor([[0.3, -0.7]])
    if compiled:
        out = fake_quantize_weight(weight, torch.tensor(0.1), 7, 5 * weight)
    else:
        with torch_alone():
            out = fake_quantize_weight(weight, torch.tensor(0.1), 7, 5 * weight)
    torch.testing.assert_close(out, weight)


# --- operators -----------------------------------------------------------------------------------


ALL_LAYOUTS = {
    **LAYOUTS,
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


def arguments(layout: str, dtype: torch.dtype, lanes: int) -> dict[str, tuple[Any, ...]]:
    """Return arguments of each operator."""
    x, step, zero_point, grad = draw(3, (2, 3, 5, 7), Grid(4, "affine"), 0.1)
    x, grad = ALL_LAYOUTS[layout](x.to(dtype)), ALL_LAYOUTS[layout](grad.to(dtype))
    scale, zero = (t.expand(lanes) for t in (step, zero_point))
    code = kernels.fake_quantize_code(x, scale, zero, 0, 15)[1]
    weight = ALL_LAYOUTS[layout](torch.linspace(-1, 1, 36).reshape(4, 1, 3, 3))
    factor, by_weight = weight * 0.9, (weight + 0.1).to(dtype)
    steps = torch.linspace(0.1, 0.2, 4)
    options = (7, int(Adjust.MOVE), -0.8, 0.8)
    return {
        "fake_quantize": (x, scale, zero, 0, 15),
        "fake_quantize_code": (x, scale, zero, 0, 15),
        "fake_quantize_code_": (x, scale, zero, 0, 15),
        "fake_quantize_backward": (code, grad, scale, zero, 0, 15),
        "fake_quantize_weight": (weight, factor, scale, *options, False, dtype),
        "fake_quantize_weight_backward": (weight, factor, by_weight, steps, *options, True),
    }


OPERATORS = list(arguments("contiguous", torch.float32, 1))


@pytest.mark.parametrize("alone", [False, True], ids=["kernels", "torch"])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_their_schemas_and_fakes_declare(
    name: str, layout: str, dtype: torch.dtype, lanes: int, alone: bool
) -> None:
    """Modified arguments, and shapes, dtypes and strides of the results."""
    operator = getattr(torch.ops.fat, name).default
    assert operator is getattr(kernels, name)
    with torch_alone() if alone else nullcontext():
        torch.library.opcheck(
            operator,
            arguments(layout, dtype, lanes)[name],
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_kernels
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_torch_operations(
    name: str, layout: str, dtype: torch.dtype, lanes: int
) -> None:
    """Outputs and codes bit for bit, sums but for rounding: all of it in lane 0."""
    operator = getattr(kernels, name)
    results = []
    for alone in (False, True):
        given = tuple(
            a.clone(memory_format=torch.preserve_format)
            if isinstance(a, Tensor) and a.dim() > 1
            else a
            for a in arguments(layout, dtype, lanes)[name]
        )
        with torch_alone() if alone else nullcontext():
            result = operator(*given)
        results.append((*(result if isinstance(result, tuple) else (result,)), given[0]))
    for found, wanted in zip(*results, strict=True):
        if found.dtype == torch.int8:
            assert torch.equal(found, wanted)
        elif found.dim() > 1:
            assert found.dtype == wanted.dtype
            assert found.stride() == wanted.stride()
            same_bits(found.float(), wanted.float())
        else:
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
            if "weight" not in name:
                assert not found[1:].any()


@pytest.mark.parametrize("alone", [False, True], ids=["kernels", "torch"])
def test_steps_are_counted_before_they_are_read(alone: bool) -> None:
    weight = torch.ones(3, 2)
    with torch_alone() if alone else nullcontext(), pytest.raises((ValueError, RuntimeError)):
        kernels.fake_quantize_weight(
            weight, weight, torch.ones(2), 7, 0, 0.0, 0.0, True, torch.float32
        )


def test_an_implementation_may_leave_tensors_to_the_reference() -> None:
    calls = []

    def compiled_only_for_vectors(x: Tensor) -> Tensor | None:
        calls.append(x.dim())
        return x + 1 if x.dim() == 1 else None

    name = "test_an_implementation_may_leave_tensors_to_the_reference"
    operator = kernels.define(
        f"{name}(Tensor x) -> Tensor",
        reference=lambda x: x - 1,
        compiled=compiled_only_for_vectors,
        fake=torch.empty_like,
    )
    assert operator is getattr(torch.ops.fat, name).default
    assert operator(torch.ones(2)).tolist() == [2.0, 2.0]
    assert operator(torch.ones(())).item() == 0.0
    assert calls == [1, 0]
    assert operator(torch.ones(3, device="meta")).shape == (3,)
    assert calls == [1, 0]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A computer whose GPU Triton cannot use."""
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for function in (operators._triton_works, operators._resolve):
        function.cache_clear()
    yield
    for function in (operators._triton_works, operators._resolve):
        function.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("No module named 'triton'"), "No module named 'triton'"),
        (RuntimeError("Failed to find C compiler.\nPlease"), "Failed to find C compiler."),
        (AssertionError(), "AssertionError"),
    ],
)
def test_where_triton_does_not_work_torch_is_used_with_one_message(
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(operators.importlib, "import_module", fail)
    kernel = operators._lazy(f"{operators.TRITON}:fake_quantize")
    with caplog.at_level(logging.WARNING, logger="fat.quant.kernels"):
        for _ in range(2):
            assert kernels.backend("cuda") == "torch"
            assert kernel(torch.ones(1), STEP, ZERO, 0, 3) is None
    (record,) = caplog.records
    assert f"Triton does not work here ({reason})" in record.getMessage()


def test_a_working_triton_is_used(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    class Kernels:
        check = staticmethod(devices.append)
        double = staticmethod(lambda x: 2 * x)

    monkeypatch.setattr(operators.importlib, "import_module", lambda _: Kernels)
    kernel = operators._lazy(f"{operators.TRITON}:double")
    assert kernel(3) == kernel(1) * 3 == 6
    assert kernels.backend(torch.device("cuda", 1)) == "triton"
    assert devices == [torch.device("cuda")]


def test_the_switch_is_for_triton_too(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "off")
    assert kernels.backend("cuda") == kernels.backend("mps") == "torch"
    assert operators._lazy(f"{operators.TRITON}:fake_quantize")(torch.ones(1)) is None


def test_lanes_depend_on_the_device() -> None:
    assert kernels.lanes(torch.device("cpu")) == kernels.lanes(torch.device("mps")) == 1
    assert kernels.lanes(torch.device("cuda", 3)) == 1024


def test_functions_of_the_first_version() -> None:
    x, step, _, grad = draw(4, (3, 40), Grid(4, "symmetric"), 0.5)
    (wanted, *gradients) = run(x, step, ZERO, grad, Grid(4, "symmetric"))
    out = x.clone()
    legacy.forward(x, out, 0.5, -7.0, 7.0)
    same_bits(out, wanted)
    code = legacy.forward_code(out.copy_(x), out, 0.5, -7.0, 7.0)
    same_bits(out, wanted)
    by_x, by_step, outside = legacy.backward_code(code, grad, -7.0, 7.0)
    same_bits(by_x, gradients[0])
    assert by_step == float(gradients[1])
    assert -0.5 * outside == pytest.approx(float(gradients[2]), rel=1e-6)

    factor, steps = (
        torch.linspace(-1.2, 1.2, 120).reshape(3, 40),
        torch.full((3,), 0.5, requires_grad=True),
    )
    factor.requires_grad_()
    wanted = fake_quantize_weight(grad, steps, 7, factor, Adjust.MOVE, (-1.0, 1.0))
    wanted.backward(x.nan_to_num(0.0, 0.0, 0.0))
    options = (7, int(Adjust.MOVE), -1.0, 1.0)
    same_bits(legacy.forward_rows(grad, factor, steps, *options), wanted)
    found = legacy.backward_rows(grad, factor, x.nan_to_num(0.0, 0.0, 0.0), steps, *options)
    for own, leaf in zip(found, (factor, steps), strict=True):
        assert leaf.grad is not None
        same_bits(own, leaf.grad)


# --- building and finding the library ------------------------------------------------------------


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library, compiled once for all tests."""
    if kernels.backend() == "torch":
        pytest.skip("no C compiler, or FAT_KERNELS=off: there is no library to build")
    return compiled._build(compiled._compiler(), tmp_path_factory.mktemp("built") / "kernels.so")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Simulate a new process with separate folders ``cache`` and ``tmp``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    compiled._library.cache_clear()
    yield tmp_path
    compiled._library.cache_clear()


@pytest.fixture
def compiler(built: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Set ``CC`` to a script that copies the compiled library; return a counter of its calls."""
    script, uses = fresh / "cc", fresh / "uses"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo stand-in 1.0; exit; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'echo >>"{uses}"; sleep 0.2; head -c -32 "{built}" >"$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return lambda: len(uses.read_text().splitlines()) if uses.exists() else 0


def works() -> bool:
    """Return True if fake quantization, by kernels or torch, gives correct results."""
    x = torch.tensor([-9.0, 0.2, 0.3, 9.0])
    return fake_quantize(x, STEP, ZERO, -7, 7).tolist() == [-3.5, 0.0, 0.5, 3.5]


def libraries(folder: Path) -> list[Path]:
    """Return all files in the folder, including hidden ones."""
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_compiled_library_is_intact(built: Path) -> None:
    assert compiled._intact(built)
    assert built.read_bytes().startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe"))


def test_the_library_is_built_once_and_cached(fresh: Path, compiler: Callable[[], int]) -> None:
    assert kernels.backend() == "compiled"
    assert works()
    assert compiler() == 1
    (library,) = libraries(fresh / "cache")
    assert library.parent.name == "fat"
    compiled._library.cache_clear()
    assert kernels.backend() == "compiled"
    assert compiler() == 1
    assert libraries(fresh / "tmp") == []


def test_the_key_depends_on_source_compiler_flags_and_processor(
    fresh: Path, compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compiled._compiler()
    keys = [compiled._key(command), compiled._key(["env", *command])]
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-g"))
    keys.append(compiled._key(command))
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    keys.append(compiled._key(command))
    other = fresh / "other.c"
    other.write_text("int x;")
    monkeypatch.setattr(compiled, "SOURCES", (other,))
    keys.append(compiled._key(command))
    assert len(set(keys)) == 5


def test_damaged_libraries_are_rebuilt(fresh: Path, compiler: Callable[[], int]) -> None:
    """Loading a truncated library would crash the process."""
    assert kernels.backend() == "compiled"
    (library,) = libraries(fresh / "cache")
    content = library.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damages = [b"", content[:64], content[: len(content) // 2], content[:-1], bytes(flipped)]
    for count, damage in enumerate(damages, start=2):
        # A new file, because the old one is still mapped into this process.
        library.unlink()
        library.write_bytes(damage)
        assert not compiled._intact(library)
        compiled._library.cache_clear()
        assert kernels.backend() == "compiled"
        assert works()
        assert compiler() == count
        assert compiled._intact(library)
        assert library.read_bytes() == content


def test_several_processes_may_build_at_once(fresh: Path, compiler: Callable[[], int]) -> None:
    start = threading.Barrier(3)

    def load(_: int) -> bool:
        start.wait()
        library = compiled._load()
        return hasattr(library, "fat_forward")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(load, range(3))) == [True] * 3
    assert compiler() == 3  # without waiting for each other
    (library,) = libraries(fresh / "cache")
    assert compiled._intact(library)


def test_a_cache_that_cannot_be_written(
    fresh: Path, compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "cache").write_text("a file where the folder should be")
    assert kernels.backend() == "compiled"
    assert works()
    assert libraries(fresh / "tmp") == []  # loaded, then removed
    compiled._library.cache_clear()
    assert kernels.backend() == "compiled"
    assert compiler() == 2


def test_a_read_only_cache_is_used(
    fresh: Path, compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.backend() == "compiled"
    compiled._library.cache_clear()

    def refuse(*_: object) -> Path:
        raise AssertionError("nothing may be written")

    monkeypatch.setattr(compiled, "write_atomic", refuse)
    assert kernels.backend() == "compiled"
    assert compiler() == 1


def test_a_user_without_a_home_directory(
    fresh: Path, compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert kernels.backend() == "compiled"
    assert compiler() == 1
    assert libraries(fresh / "tmp") == []


def test_cc_may_contain_arguments(
    fresh: Path, built: Path, compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", f"env FAT_TEST=1 '{os.environ['CC']}'")
    assert kernels.backend() == "compiled"
    assert compiler() == 1


SILENT = '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\n'


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "No such file or directory"),
        ("#!/bin/sh\nexit 3\n", "exit status 3"),
        (SILENT + "echo 'x.c:1: error: no' >&2; exit 1\n", "error: no"),
        (SILENT + "exit 1\n", "SubprocessError"),
        (SILENT + "exit 0\n", "too short"),
    ],
    ids=["missing", "broken", "does not compile", "says nothing", "writes nothing"],
)
def test_without_a_working_compiler_torch_is_used_with_one_message(
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str | None,
    reason: str,
) -> None:
    compiler = fresh / "cc"
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level(logging.INFO, logger="fat.quant.kernels"):
        for _ in range(3):
            assert kernels.backend() == "torch"
            assert works()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "No compiled kernels (" in record.getMessage()
    assert reason in record.getMessage()


def test_no_compiler_on_the_path(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with caplog.at_level(logging.INFO, logger="fat.quant.kernels"):
        assert kernels.backend() == "torch"
        assert works()
    (record,) = caplog.records
    assert "no C compiler found" in record.getMessage()


@pytest.mark.parametrize("value", ["off", "OFF", "0", "false"])
def test_switched_off(
    fresh: Path,
    compiler: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    value: str,
) -> None:
    monkeypatch.setenv("FAT_KERNELS", value)
    with caplog.at_level(logging.INFO, logger="fat.quant.kernels"):
        assert kernels.backend() == "torch"
        assert works()
    assert compiler() == 0
    assert caplog.records == []
    assert not (fresh / "cache").exists()


def test_a_real_process_without_a_compiler(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from fat.quant import kernels\n"
        "from fat.quant.functional import fake_quantize\n"
        "x = torch.tensor([-9.0, 0.2, 0.3, 9.0], requires_grad=True)\n"
        "y = fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -7, 7)\n"
        "y.sum().backward()\n"
        "print(kernels.backend(), y.tolist(), x.grad.tolist())\n"
    )
    root = Path(__file__).parents[2]
    environment = {
        **{k: v for k, v in os.environ.items() if k != compiled.SWITCH},
        "CC": "/nonexistent",
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "torch [-3.5, 0.0, 0.5, 3.5] [0.0, 1.0, 1.0, 0.0]\n"
    assert not (tmp_path / "fat").exists()
