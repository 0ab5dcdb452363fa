"""Operators of integer inference against closed forms in NumPy's integers and float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fat.quant import kernels
from fat.quant.kernels import requantization as operators
from fat.quant.kernels import requantization_reference as reference

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


@pytest.mark.skipif(kernels.backend() != "compiled", reason="needs a C compiler")
def test_the_kernels_take_common_layouts() -> None:
    """Convolutions return channels-last tensors; a gate has one value per image and channel."""
    x = integers((2, 3, 4, 5), "channels_last", 0)
    gate = integers((2, 3, 1, 1), "contiguous", 1)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    numbers = grid("unsigned channels", 3)
    found = [
        operators._compiled(x, None, one, None, 1, 1, *numbers),
        operators._compiled_real(x, *numbers),
        operators._compiled_sum(x, one, zero, 0, x.contiguous(), one, zero, 0, 0, *numbers),
        operators._compiled_product(x, one, gate, one, 0, *numbers),
    ]
    for result in found:
        assert result is not None
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_channel", [True, False])
def test_integer_weights(per_channel: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    factor = torch.rand(5, 3, 3, 3, generator=generator) * 2.4 - 1.2
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


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fat.quant.kernels import triton_requantization as kernels

names = "sums a b input_scale weight_scale out scale zero_point ceilings a_scale a_zero b_scale"
types = dict.fromkeys((names + " b_zero weight factor").split(), "*fp32") | {"bias": "*i32"}
types |= dict.fromkeys("n channels inner image k stride".split(), "i32")
names = "count floor ceiling qmin qmax a_offset b_offset offset q low high"
types |= dict.fromkeys(names.split(), "fp32")
cases = []
for wide in (False, True):
    for steps in (0, 1, 2):
        options = {"WIDE": wide, "BIAS": steps > 0, "STEPS": steps, "CEILINGS": steps == 2}
        cases.append((kernels._accumulators, options, {"sums": "*fp64" if wide else "*fp32"}))
for kind in (0, 1, 2):
    options = {"KIND": kind, "PER_IMAGE": kind == 2, "CEILINGS": kind == 1}
    cases.append((kernels._operands, options, {}))
for adjust in (0, 1, 2):
    cases.append((kernels._weight, {"ADJUST": adjust}, {"out": "*fp64"}))
cases.append((kernels._bias, {}, {"bias": "*fp32", "out": "*i32"}))
for capability in (80, 90):
    for kernel, constants, own in cases:
        constants = constants | {"BLOCK": 1024}
        names, known = kernel.arg_names, types | own
        source = ASTSource(
            fn=kernel,
            signature={name: known.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        options = {"enable_fp_fusion": False, "num_warps": 4}
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        words = set(re.findall(r"\\b[a-z]+[.][a-z0-9.]*f(?:32|64)\\b", ptx))
        inexact = {word for word in words if re.search("fma|approx|full|ftz", word)}
        assert not inexact, (kernel, constants, inexact)
        assert {"div.rn.f32", "div.rn.f64"} & words, (kernel, constants, words)
        print("compiled")
"""


def test_triton_compiles_to_exact_arithmetic(tmp_path: Path) -> None:
    """For two generations of GPUs: true division, nothing fused, denormal numbers kept."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 2 * 13
