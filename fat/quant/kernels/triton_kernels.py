"""Fake-quantization kernels in Triton for CUDA, compiled on first use.

Outputs, codes and gradients of the input equal those of :mod:`fat.quant.kernels.reference` and of
the C kernels bit for bit: true division (Triton's ``/`` is approximate), rounding half to even, no
fused multiply-add (``enable_fp_fusion=False``), and comparisons in the same order. Sums are float32
per program; the programs' sums are added outside, in a fixed order.

Steps and zero points are read by the kernels, so that the host never waits for the device. Tensors
are processed in the order of memory: any dense layout is fast.

Steps have any alignment, being elements of a vector of all quantizers: one kernel serves all.

Import this module on use only: importing Triton takes time, and is not possible everywhere.
``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.quant.kernels import reference
from fat.quant.kernels.reference import laid_out

__all__ = [
    "adjusted",
    "check",
    "clip",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_code",
    "fake_quantize_code_",
    "fake_quantize_weight",
    "fake_quantize_weight_backward",
    "launch",
    "round_half_even",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Constants inside of kernels are literals: Triton compares global constants at each launch, which
# takes a quarter of a launch's time. For the codes see the reference.
BLOCK = 1024
WARPS = 4  # 8 elements per thread: one access of 16 bytes in half precision
BLOCK_BACKWARD = 2048
WARPS_BACKWARD = 8  # as many threads as an H100 or H200 holds at once, in 1024 programs


@triton.jit
def round_half_even(v):
    """Round like C's rintf, which the interpreter lacks; values beyond ±2^22 are not rounded.

    Keeps NaN, infinity and the sign of zero.
    """
    sign = v.to(tl.int32, bitcast=True) & -2147483648
    # 1.5 · 2^23: float32 has no fractions from 2^23 to 2^24.
    rounded = ((v + 12582912.0) - 12582912.0).to(tl.int32, bitcast=True) | sign
    return tl.where(tl.abs(v) <= 4194304.0, rounded.to(tl.float32, bitcast=True), v)


@triton.jit
def clip(v, low, high):
    """Clip like the C kernels: NaN and the sign of zero stay."""
    return tl.where(v > high, high, tl.where(v < low, low, v))


@triton.jit(do_not_specialize_on_alignment=["scale", "zero_point"])
def _forward(
    x, out, code, scale, zero_point, n, qmin, qmax, CODE: tl.constexpr, BLOCK: tl.constexpr
):
    step, shift = tl.load(scale), tl.load(zero_point)
    low, high = qmin - shift, qmax - shift
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < n
    v = tl.div_rn(tl.load(x + places, mask=mask, other=0.0).to(tl.float32), step)
    rounded = round_half_even(v)
    tl.store(out + places, clip(rounded, low, high) * step, mask=mask)
    if CODE:
        error = (rounded - v) * 252.0
        error = tl.where(rounded < low, -127.0, error)
        error = tl.where(rounded > high, 127.0, error)
        error = tl.where(v != v, -128.0, error)
        # The last byte of error + 1.5 · 2^23 is the rounded error, in two's complement.
        byte = (error + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(code + places, byte, mask=mask)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["scale", "zero_point"])
def _backward(
    code,
    grad,
    grad_x,
    scale,
    zero_point,
    grad_scale,
    grad_zero_point,
    n,
    blocks,
    qmin,
    qmax,
    BLOCK: tl.constexpr,
):
    step, shift = tl.load(scale), tl.load(zero_point)
    low, high = qmin - shift, qmax - shift
    program = tl.program_id(0)
    by_scale = tl.zeros([BLOCK], tl.float32)
    outside = tl.zeros([BLOCK], tl.float32)
    for block in range(program, blocks, tl.num_programs(0)):
        places = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = places < n
        c = tl.load(code + places, mask=mask, other=0).to(tl.int32)
        g = tl.load(grad + places, mask=mask, other=0.0).to(tl.float32)
        inside = tl.where((c < 127) & (c > -127), g, 0.0)
        slope = c.to(tl.float32)  # in units of 1/252: one division of the sum is enough
        slope = tl.where(c >= 127, high * 252.0, tl.where(c <= -127, low * 252.0, slope))
        slope = tl.where(c == -128, float("nan"), slope)
        tl.store(grad_x + places, inside, mask=mask)
        by_scale += g * slope
        outside += g - inside
    tl.store(grad_scale + program, tl.div_rn(tl.sum(by_scale, axis=0), 252.0))
    tl.store(grad_zero_point + program, -step * tl.sum(outside, axis=0))


@triton.jit
def adjusted(w, f, step, low, high, ADJUST: tl.constexpr):
    """Return the weight adjusted by its factors, see the reference's fake_quantize_weight."""
    if ADJUST == 1:
        w = w * clip(f, low, high)
    if ADJUST == 2:
        w = w + clip(f, low, high) * step
    return w


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["scale"])
def _forward_rows(
    weight,
    factor,
    out,
    scale,
    stride,
    k,
    blocks,
    q,
    low,
    high,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    places = row.to(tl.int64) * k + column
    mask = column < k
    step = tl.load(scale + row.to(tl.int64) * stride)
    w = tl.load(weight + places, mask=mask, other=0.0)
    f = tl.load(factor + places, mask=mask, other=0.0) if ADJUST else w
    v = tl.div_rn(adjusted(w, f, step, low, high, ADJUST), step)
    tl.store(out + places, clip(round_half_even(v), -q, q) * step, mask=mask)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["scale"])
def _backward_rows(
    weight,
    factor,
    grad,
    grad_factor,
    grad_scale,
    scale,
    stride,
    k,
    blocks,
    q,
    low,
    high,
    ADJUST: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if PER_CHANNEL:  # one program computes one row
        row, first, distance = program.to(tl.int64), 0, 1
    else:  # the weight is one row
        row, first, distance = tl.cast(0, tl.int64), program, tl.num_programs(0)
    step = tl.load(scale + row * stride)
    by_scale = tl.zeros([BLOCK], tl.float32)
    for block in range(first, blocks, distance):
        column = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        places = row * k + column
        mask = column < k
        w = tl.load(weight + places, mask=mask, other=0.0)
        f = tl.load(factor + places, mask=mask, other=0.0) if ADJUST else w
        g = tl.load(grad + places, mask=mask, other=0.0).to(tl.float32)
        v = tl.div_rn(adjusted(w, f, step, low, high, ADJUST), step)
        rounded = round_half_even(v)
        inside = (rounded >= -q) & (rounded <= q)
        by_scale += g * tl.where(inside, rounded - v, clip(rounded, -q, q))
        if ADJUST:
            unit = w if ADJUST == 1 else step
            passes = (f >= low) & (f <= high)
            by_factor = tl.where(passes, tl.where(inside, g, 0.0) * unit, 0.0)
            tl.store(grad_factor + places, by_factor, mask=mask)
    tl.store(grad_scale + program, tl.sum(by_scale, axis=0))


def check(device: torch.device) -> None:
    """Compile and run a kernel.

    Raises:
        RuntimeError: If its results differ from those of torch operations.
        Exception: Whatever Triton raises if it does not work on ``device``.
    """
    x = torch.tensor([0.0, -0.0, 0.5, 1.5, -9.0, 0.3, torch.inf, 1e-45], device=device)
    step, zero = (torch.tensor([value], device=device) for value in (0.7, 2.0))
    found = fake_quantize_code(x, step, zero, 0, 15)
    wanted = reference.fake_quantize_code(x, step, zero, 0, 15)
    if found is None or not all(map(torch.equal, found, wanted)):
        raise RuntimeError("its results differ from those of torch operations")


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **options: Any) -> None:
    """Run ``programs`` programs of a kernel on the device of ``x``, without fused multiply-add."""
    if not programs:
        return
    other = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if other else contextlib.nullcontext():
        kernel[(programs,)](x, *arguments, enable_fp_fusion=False, **options)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize` in one kernel."""
    if not _supported(x, scale, zero_point):
        return None
    out = torch.empty_like(x)
    _launch_forward(laid_out(x, out), out, None, scale, zero_point, qmin, qmax)
    return out


def fake_quantize_code(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_code` in one kernel."""
    if not _supported(x, scale, zero_point):
        return None
    out, code = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    _launch_forward(laid_out(x, out), out, code, scale, zero_point, qmin, qmax)
    return out, code


def fake_quantize_code_(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_code_` in one kernel."""
    if not _supported(x, scale, zero_point):
        return None
    code = torch.empty_like(x, dtype=torch.int8)
    dense = laid_out(x, code)
    _launch_forward(dense, dense, code, scale, zero_point, qmin, qmax)
    if dense is not x:
        x.copy_(dense)
    return code


def _launch_forward(
    x: Tensor,
    out: Tensor,
    code: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> None:
    n = x.numel()
    codes = out if code is None else code  # any pointer: unused without codes
    arguments = (x, out, codes, scale, zero_point, n, float(qmin), float(qmax))
    launch(
        _forward, _blocks(n, BLOCK), *arguments, CODE=code is not None, BLOCK=BLOCK, num_warps=WARPS
    )


def fake_quantize_backward(
    code: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_backward` in one kernel."""
    if not _supported(grad, scale, zero_point, code):
        return None
    code = laid_out(code, torch.empty_like(code))
    grad = laid_out(grad, code)
    grad_x = torch.empty_like(grad)
    by_scale, by_zero_point = (scale.new_empty(scale.numel()) for _ in range(2))
    n = grad.numel()
    launch(
        _backward,
        scale.numel(),
        *(code, grad, grad_x, scale, zero_point, by_scale, by_zero_point),
        *(n, _blocks(n, BLOCK_BACKWARD), float(qmin), float(qmax)),
        BLOCK=BLOCK_BACKWARD,
        num_warps=WARPS_BACKWARD,
    )
    return grad_x, by_scale, by_zero_point


def fake_quantize_weight(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
    per_channel: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_weight` in one kernel."""
    if not _supported_weight(weight, factor, scale, per_channel) or dtype not in FLOATS:
        return None
    out = torch.empty_like(weight, dtype=dtype)
    rows, k, block = _rows(weight, per_channel)
    blocks = _blocks(k, block)
    launch(
        _forward_rows,
        rows * blocks,
        *(weight, laid_out(factor, weight), out, scale),
        *(scale.stride(0) if per_channel else 0, k, blocks, float(qmax), low, high),
        ADJUST=adjust,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out


def fake_quantize_weight_backward(
    weight: Tensor,
    factor: Tensor,
    grad: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
    per_channel: bool,
) -> tuple[Tensor, Tensor] | None:
    """Compute :func:`fat.quant.kernels.reference.fake_quantize_weight_backward` in one kernel."""
    supported = _supported_weight(weight, factor, scale, per_channel, grad)
    if not supported or grad.dtype not in FLOATS:
        return None
    grad_factor = torch.empty_like(weight) if adjust else weight.new_empty(0)
    grad_scale = scale.new_empty(scale.numel())
    _, k, block = _rows(weight, per_channel)
    launch(
        _backward_rows,
        scale.numel(),
        *(weight, laid_out(factor, weight), laid_out(grad, weight)),
        *(grad_factor if adjust else weight, grad_scale, scale),
        *(scale.stride(0) if per_channel else 0, k, _blocks(k, block)),
        *(float(qmax), low, high),
        ADJUST=adjust,
        PER_CHANNEL=per_channel,
        BLOCK=block,
        num_warps=WARPS,
    )
    return grad_factor, grad_scale


def _rows(weight: Tensor, per_channel: bool) -> tuple[int, int, int]:
    """Return the number of rows with a step of their own, their length, and the block size."""
    rows = len(weight) if per_channel else 1
    k = weight.numel() // max(rows, 1)
    return rows, k, min(BLOCK, 1 << max(k - 1, 31).bit_length())


def _blocks(count: int, block: int) -> int:
    """Return the number of blocks; unlike triton.cdiv without 2 µs on the host."""
    return -(-count // block)


def _supported(x: Tensor, scale: Tensor, zero_point: Tensor, *others: Tensor) -> bool:
    _same_device(x, scale, zero_point, *others)
    floats = x.dtype in FLOATS and scale.dtype == zero_point.dtype == torch.float32
    return floats and scale.numel() > 0 and zero_point.numel() > 0


def _supported_weight(
    weight: Tensor, factor: Tensor, scale: Tensor, per_channel: bool, *others: Tensor
) -> bool:
    """Return True if the kernels support the tensors: float32, and rows that are contiguous."""
    _same_device(weight, factor, scale, *others)
    if per_channel and scale.shape != weight.shape[:1]:  # the kernel would read beyond the end
        raise ValueError(f"{len(weight)} filters need as many steps, got {list(scale.shape)}")
    rows = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    floats = weight.dtype == factor.dtype == scale.dtype == torch.float32
    return rows and floats and scale.numel() > 0


def _same_device(*tensors: Tensor) -> None:
    """Raise an error instead of reading a pointer of another device."""
    if any(tensor.device != tensors[0].device for tensor in tensors):
        devices = sorted({str(tensor.device) for tensor in tensors})
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {' and '.join(devices)}"
        )
