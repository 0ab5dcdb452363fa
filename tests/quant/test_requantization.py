"""Operators of integer inference against closed forms in NumPy's integers and float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fat.quant import kernels
from fat.quant.kernels import requantization as operators
from fat.quant.kernels import requantization_reference as reference
from tests.quant.triton_driver import inexact_instructions, pretended_driver

ROOT = Path(__file__).parents[2]
SHAPES = [(2, 5, 4, 3), (3, 16, 7, 7), (1, 1, 1, 1), (4, 6), (2, 3, 5), (0, 4, 2, 2), (2, 40, 1, 1)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    ),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
Implementation = Callable[..., Tensor | None]


def implementations(name: str) -> list[Implementation]:
    """Return the operator on this machine and, with a C compiler, the one in C by itself."""
    found: list[Implementation] = [getattr(kernels, name)]
    compiled = {
        "requantize": operators._compiled,
        "requantize_real": operators._compiled_real,
        "requantize_sum": operators._compiled_sum,
        "requantize_product": operators._compiled_product,
    }
    if kernels.backend() == "compiled" and name in compiled:
        found.append(compiled[name])
    if os.environ.get("TRITON_INTERPRET") == "1":
        from fat.quant.kernels import triton_requantization

        found.append(getattr(triton_requantization, name))
    return found


def grid(kind: str, channels: int, scale: float = 0.37) -> tuple[Any, ...]:
    """Return the arguments of a grid."""
    qmin, qmax, zero = {"symmetric": (-127, 127, 0), "unsigned": (0, 255, 0), "affine": (0, 15, 6)}[
        kind.split()[0]
    ]
    floor, ceiling, ceilings = -np.inf, np.inf, None
    if "relu6" in kind:
        floor, ceiling = 0.0, 6.0
    if "channels" in kind:
        floor, ceilings = 0.0, torch.linspace(0.1, 9.0, channels)
    return torch.tensor(scale), torch.tensor(float(zero)), floor, ceiling, ceilings, qmin, qmax


KINDS = ["symmetric", "unsigned", "affine", "unsigned relu6", "affine relu6", "unsigned channels"]


def accumulators(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randint(-3000, 3000, shape, generator=generator).to(dtype)
    if dtype == torch.float64:
        values = values * 2.0**22 + torch.rand(shape, generator=generator) * 0.8 - 0.4
    return LAYOUTS[layout](values)


def bounded(values: np.ndarray, dims: int, numbers: tuple[Any, ...]) -> np.ndarray:
    """Clip integers minus the zero point, by the definition of the grid."""
    scale, zero, floor, ceiling, ceilings, qmin, qmax = numbers

    def integer(end: Any) -> Any:
        ratio = np.rint(np.float32(end) / scale.numpy())
        return np.clip(ratio + zero.numpy(), qmin, qmax) - zero.numpy()

    values = np.clip(values, integer(floor), integer(ceiling))
    if ceilings is not None:
        limit = integer(ceilings.numpy()).reshape(-1, *[1] * (dims - 2))
        values = np.minimum(values, limit)
    return np.asarray(values, dtype=np.float32)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", ["none", "tensor", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulators(
    shape: tuple[int, ...], layout: str, steps: str, bias: bool, wide: bool
) -> None:
    """The sum with the bias is exact and rounded to float32 once."""
    dim = -1 if len(shape) == 3 else 1
    channels = shape[dim]
    sums = accumulators(shape, layout, torch.float64 if wide else torch.float32)
    shifts = torch.arange(channels, dtype=torch.int32) * 52_000_003 - 2**31 + 1 if bias else None
    steps_of = {"none": None, "tensor": torch.tensor(0.01), "channel": torch.rand(channels) + 0.01}
    weight_scale, input_scale = steps_of[steps], torch.tensor(0.02)
    count = 49 if steps == "none" else 1
    for kind in KINDS:
        if "channels" in kind and dim != 1:
            continue
        numbers = grid(kind, channels, scale=2.0**20 if wide or bias else 0.9)
        tail = (1,) * (len(shape) - 1 - dim % len(shape))
        exact = np.rint(sums.double().numpy()).astype(np.int64)
        if shifts is not None:
            exact = exact + shifts.numpy().astype(np.int64).reshape(-1, *tail)
        multiplier = input_scale.numpy()
        if weight_scale is not None:
            own = weight_scale.numpy()
            multiplier = multiplier * (own.reshape(-1, *tail) if own.ndim else own)
        multiplier = multiplier / (numbers[0].numpy() * np.float32(count))
        wanted = bounded(np.rint(exact.astype(np.float32) * multiplier), len(shape), numbers)
        arguments = (sums, shifts, input_scale, weight_scale, count, dim, *numbers)
        for function in implementations("requantize"):
            found = function(*arguments)
            if found is None:
                assert layout == "strided" or sums.numel() == 0
                continue
            assert found.dtype == torch.float32
            assert np.array_equal(found.numpy(), wanted), kind
        assert torch.equal(reference.requantize(*arguments), torch.from_numpy(wanted))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_real_values(kind: str, shape: tuple[int, ...], layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 40.0
    x[torch.rand(shape, generator=generator) < 0.1] = torch.inf
    x = LAYOUTS[layout](x)
    numbers = grid(kind, shape[1])
    wanted = bounded(np.rint(x.numpy() / numbers[0].numpy()), len(shape), numbers)
    for function in implementations("requantize_real"):
        found = function(x, *numbers)
        assert found is None or np.array_equal(found.numpy(), wanted)
    assert torch.equal(reference.requantize_real(x, *numbers), torch.from_numpy(wanted))


def test_not_a_number_stays() -> None:
    x = torch.tensor([[float("nan"), 1.0]])
    for kind in KINDS[:4]:
        numbers = grid(kind, 2)
        for function in implementations("requantize_real"):
            found = function(x, *numbers)
            assert found is not None
            assert found.isnan().tolist() == [[True, False]]
        for function in implementations("requantize"):
            bias = torch.ones(2, dtype=torch.int32)
            found = function(x, bias, torch.tensor(1.0), None, 1, 1, *numbers)
            assert found is not None
            assert found.isnan().tolist() == [[True, False]]


def integers(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randint(-127, 256, shape, generator=generator).float())


@pytest.mark.parametrize("second", ["same", "per image", "row"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]])
def test_sums_and_products(shape: tuple[int, ...], kind: str, layout: str, second: str) -> None:
    other = shape
    if second == "per image":
        other = (*shape[:2], *[1] * (len(shape) - 2))
    if second == "row":
        other = (1, *shape[1:])
    a, b = integers(shape, layout, 0), integers(other, layout, 1)
    numbers = grid(kind, shape[1])
    scales = [torch.tensor(value) for value in (0.0213, 0.317)]
    zeros = [torch.tensor(value) for value in (3.0, 0.0)]
    offsets = (0, 128, 128 if kind == "symmetric" else 0)

    s, (sa, sb) = numbers[0].numpy(), (scale.numpy() for scale in scales)
    za, zb = (np.float64(float(z) + o) for z, o in zip(zeros, offsets, strict=False))
    zero = np.float32(float(numbers[1]) + offsets[2])
    by_a, by_b = np.float64(sa / s), np.float64(sb / s)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    shift = zero - np.float32(by_a * za + np.float64(np.float32(by_b * zb)))
    partial = np.float32((y + zb) * by_b + np.float64(shift))
    total = np.float32((x + za) * by_a + np.float64(partial))
    wanted = bounded(np.rint(total) - zero, len(shape), numbers)
    arguments = (a, scales[0], zeros[0], offsets[0], b, scales[1], zeros[1], *offsets[1:])
    for function in implementations("requantize_sum"):
        found = function(*arguments, *numbers)
        assert found is None or np.array_equal(found.numpy(), wanted)
    result = reference.requantize_sum(*arguments, *numbers)
    assert torch.equal(result, torch.from_numpy(wanted))

    product = a.numpy() * b.numpy() * (sa * sb / s) + zero
    wanted = bounded(np.rint(product) - zero, len(shape), numbers)
    for function in implementations("requantize_product"):
        found = function(a, scales[0], b, scales[1], offsets[2], *numbers)
        assert found is None or np.array_equal(found.numpy(), wanted)
    result = reference.requantize_product(a, scales[0], b, scales[1], offsets[2], *numbers)
    assert torch.equal(result, torch.from_numpy(wanted))


def test_the_kernels_take_common_layouts() -> None:
    """Convolutions return channels-last tensors; a gate has one value per image and channel."""
    x = integers((2, 3, 4, 5), "channels_last", 0)
    gate = integers((2, 3, 1, 1), "contiguous", 1)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    numbers = grid("unsigned channels", 3)
    calls: dict[str, tuple[Any, ...]] = {
        "requantize": (x, None, one, None, 1, 1),
        "requantize_real": (x,),
        "requantize_sum": (x, one, zero, 0, x.contiguous(), one, zero, 0, 0),
        "requantize_product": (x, one, gate, one, 0),
    }
    found = [
        function(*arguments, *numbers)
        for name, arguments in calls.items()
        for function in implementations(name)
    ]
    for result in found:
        assert result is not None
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_integer_weights(layout: str, per_channel: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = LAYOUTS[layout](torch.randn(5, 3, 3, 3, generator=generator))
    factor = LAYOUTS[layout](torch.rand(5, 3, 3, 3, generator=generator) * 2.4 - 1.2)
    scale = torch.rand(5, generator=generator) * 0.1 + 0.01 if per_channel else torch.tensor(0.03)
    step = scale.reshape(-1, 1, 1, 1) if per_channel else scale
    for adjust, bounds, moved in (
        (0, (0.0, 0.0), weight),
        (1, (0.75, 1.25), weight * factor.clamp(0.75, 1.25)),
        (2, (-1.0, 1.0), weight + factor.clamp(-1.0, 1.0) * step),
    ):
        arguments = (weight, factor, scale, 7, adjust, *bounds, per_channel, dtype)
        for function in implementations("integer_weight"):
            found = function(*arguments)
            assert found is not None
            assert found.dtype == dtype
            assert found.stride() == weight.stride()
            assert torch.equal(found, (moved / step).round().clamp(-7, 7).to(dtype))


def test_integer_biases_reach_int32() -> None:
    bias = torch.tensor([1.0, -2.5, 1e9, -1e9, 0.5])
    for function in implementations("integer_bias"):
        found = function(bias, torch.tensor(0.5), torch.tensor(2.0))
        assert found is not None
        assert found.tolist() == [1, -2, 1_000_000_000, -1_000_000_000, 0]
        tiny = function(bias, torch.full((5,), 1e-30), torch.tensor(1e-30))
        assert tiny is not None
        assert tiny.tolist() == [2**31 - 1, 1 - 2**31, 2**31 - 1, 1 - 2**31, 2**31 - 1]


def test_operators_can_be_traced() -> None:
    x, numbers = integers((2, 3, 4, 5), "channels_last", 0), grid("affine", 3)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    bias = torch.ones(3, dtype=torch.int32)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (kernels.requantize, (x, bias, one, torch.rand(3), 1, 1, *numbers)),
        (kernels.requantize_real, (x, *numbers)),
        (kernels.requantize_sum, (x, one, zero, 0, x, one, zero, 0, 0, *numbers)),
        (kernels.requantize_product, (x, one, x, one, 0, *numbers)),
        (kernels.integer_weight, (x, x, torch.rand(2), 7, 0, 0.0, 0.0, True, torch.float64)),
        (kernels.integer_bias, (torch.rand(3), torch.rand(3), one)),
    ]
    for operator, arguments in calls:
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)


# --- Triton without a GPU ------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs the tests above")
def test_triton_in_the_interpreter() -> None:
    """Some tests above, in a process in which Triton's kernels run on CPU tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    chosen = "(shape0 or shape3) and not strided or weights or biases or number"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-pno:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 100


def calls(channels: int, last: bool, offset: int = 0) -> list[Callable[[], Any]]:
    """Return one call of each Triton kernel, with constants ``offset`` behind aligned addresses."""
    from fat.quant.kernels import triton_requantization as triton

    x = torch.zeros(4, channels, 2, 8)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    numbers = torch.ones(3 * channels + 8)[offset:]
    one, own = numbers[0], numbers[:channels]
    bias = torch.zeros(channels + 8, dtype=torch.int32)[offset : offset + channels]
    found: list[Callable[[], Any]] = []
    for sums in (x, x.double()):
        for shift, steps, ceilings in ((None, None, None), (bias, one, None), (bias, own, own)):
            grid = (one, one, 0.0, 6.0, ceilings, 0, 255)
            found.append(partial(triton.requantize, sums, shift, one, steps, 1, 1, *grid))
    grid = (one, one, 0.0, 6.0, None, 0, 255)
    found += [
        partial(triton.requantize_real, x, *grid),
        partial(triton.requantize_sum, x, one, one, 0, x, one, one, 128, 0, *grid),
        partial(triton.requantize_product, x, one, x, one, 0, *grid),
        partial(triton.requantize_product, x, one, x[:, :, :1, :1], one, 0, *grid),
    ]
    weight = torch.zeros(channels, 64)
    for adjust in (0, 1, 2):
        for dtype in (torch.float32, torch.float64):
            options = (7, adjust, -1.0, 1.0, True, dtype)
            found.append(partial(triton.integer_weight, weight, weight, own, *options))
    found.append(partial(triton.integer_bias, own, own, one))
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_to_exact_arithmetic(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True division, nothing fused, denormal numbers kept; one kernel serves all shapes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pretended_driver(capability) as driver:
        from fat.quant.kernels import triton_requantization as triton

        for call in calls(64, last=True):
            assert call() is not None
        functions = (triton._accumulators, triton._operands, triton._weight, triton._bias)
        assembly = driver.assembly(*functions)
        assert len(assembly) == len(driver.launches) == 6 + 4 + 6 + 1
        for ptx in assembly:
            assert inexact_instructions(ptx) == set()
            assert "div.rn.f32" in ptx or "div.rn.f64" in ptx
        for channels, last, offset in ((64, False, 1), (24, True, 2), (40, False, 4)):
            for call in calls(channels, last, offset):
                assert call() is not None
        assert driver.assembly(*functions) == assembly
        assert len(driver.launches) == 4 * 17
