"""Kernels of integer inference in Triton for CUDA, compiled on first use.

Their results equal those of :mod:`fat.quant.kernels.requantization_reference` bit for bit; see
:mod:`fat.quant.kernels.triton_kernels` for the means, and import this module on use only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat.quant.kernels.reference import laid_out
from fat.quant.kernels.requantization import layout, second_operand
from fat.quant.kernels.triton_kernels import adjusted, clip, launch, round_half_even

__all__ = [
    "integer_bias",
    "integer_weight",
    "requantize",
    "requantize_product",
    "requantize_real",
    "requantize_sum",
]

BLOCK = 1024
FAR = 2**31 - BLOCK
"""Tensors with more elements need 64-bit places, whose divisions are slow."""
REAL, SUM, PRODUCT = 0, 1, 2
# Elements of vectors of all quantizers: of any alignment.
CONSTANTS = ["bias", "input_scale", "weight_scale", "scale", "zero_point", "ceilings"]
OPERANDS = ["a_scale", "a_zero", "b_scale", "b_zero", "scale", "zero_point", "ceilings"]


@triton.jit
def _round(v):
    """Round float64 below 2^51 to the nearest integer, half to even; keeps NaN and infinity."""
    # 1.5 · 2^52: float64 has no fractions from 2^52 to 2^53.
    return (v + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _places(BLOCK: tl.constexpr, FAR: tl.constexpr):
    program = tl.program_id(0)
    if FAR:
        program = program.to(tl.int64)
    return program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _integer(end, step, zero, qmin, qmax):
    """Return the integer of a real value, minus the zero point."""
    return clip(round_half_even(tl.div_rn(end, step)) + zero, qmin, qmax) - zero


@triton.jit
def _on_grid(
    v, c, mask, scale, zero_point, ceilings, floor, ceiling, qmin, qmax, CEILINGS: tl.constexpr
):
    """Clip integers minus the zero point to the grid and the bounds of the activation."""
    step, zero = tl.load(scale), tl.load(zero_point)
    low = _integer(tl.cast(floor, tl.float32), step, zero, qmin, qmax)
    high = _integer(tl.cast(ceiling, tl.float32), step, zero, qmin, qmax)
    v = clip(v, low, high)
    if CEILINGS:
        own = _integer(tl.load(ceilings + c, mask=mask, other=0.0), step, zero, qmin, qmax)
        v = tl.where(v > own, own, v)
    return v


@triton.jit(do_not_specialize=["channels", "inner"], do_not_specialize_on_alignment=CONSTANTS)
def _accumulators(
    sums,
    bias,
    input_scale,
    weight_scale,
    out,
    scale,
    zero_point,
    ceilings,
    n,
    channels,
    inner,
    count,
    floor,
    ceiling,
    qmin,
    qmax,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    CEILINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    FAR: tl.constexpr,
):
    places = _places(BLOCK, FAR)
    mask = places < n
    c = (places // inner) % channels
    a = tl.load(sums + places, mask=mask, other=0.0)
    if WIDE:
        a = _round(a)
    if BIAS:
        a = a.to(tl.float64) + tl.load(bias + c, mask=mask, other=0).to(tl.float64)
    a = a.to(tl.float32)
    multiplier = tl.load(input_scale)
    if STEPS == 1:
        multiplier = multiplier * tl.load(weight_scale)
    if STEPS == 2:
        multiplier = multiplier * tl.load(weight_scale + c, mask=mask, other=1.0)
    multiplier = tl.div_rn(multiplier, tl.load(scale) * count)
    v = round_half_even(a * multiplier)
    grid = (scale, zero_point, ceilings, floor, ceiling, qmin, qmax)
    v = _on_grid(v, c, mask, *grid, CEILINGS)
    tl.store(out + places, v, mask=mask)


@triton.jit(
    do_not_specialize=["channels", "inner", "image"], do_not_specialize_on_alignment=OPERANDS
)
def _operands(
    a,
    a_scale,
    a_zero,
    b,
    b_scale,
    b_zero,
    out,
    scale,
    zero_point,
    ceilings,
    a_offset,
    b_offset,
    offset,
    n,
    channels,
    inner,
    image,
    floor,
    ceiling,
    qmin,
    qmax,
    KIND: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    CEILINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    FAR: tl.constexpr,
):
    places = _places(BLOCK, FAR)
    mask = places < n
    c = (places // inner) % channels
    step = tl.load(scale)
    zero = tl.load(zero_point) + offset
    first = tl.load(a + places, mask=mask, other=0.0)
    if KIND == 0:
        v = round_half_even(tl.div_rn(first, step))
    else:
        if PER_IMAGE:
            second = tl.load(b + places // image * channels + c, mask=mask, other=0.0)
        else:
            second = tl.load(b + places, mask=mask, other=0.0)
        if KIND == 1:
            by_a = tl.div_rn(tl.load(a_scale), step).to(tl.float64)
            by_b = tl.div_rn(tl.load(b_scale), step).to(tl.float64)
            za = (tl.load(a_zero) + a_offset).to(tl.float64)
            zb = (tl.load(b_zero) + b_offset).to(tl.float64)
            zeros = (by_a * za + (by_b * zb).to(tl.float32).to(tl.float64)).to(tl.float32)
            rest = (zero - zeros).to(tl.float64)
            partial = ((second.to(tl.float64) + zb) * by_b + rest).to(tl.float32)
            v = ((first.to(tl.float64) + za) * by_a + partial.to(tl.float64)).to(tl.float32)
        else:
            multiplier = tl.div_rn(tl.load(a_scale) * tl.load(b_scale), step)
            v = first * second * multiplier + zero
        v = round_half_even(v) - zero
    grid = (scale, zero_point, ceilings, floor, ceiling, qmin, qmax)
    v = _on_grid(v, c, mask, *grid, CEILINGS)
    tl.store(out + places, v, mask=mask)


@triton.jit(do_not_specialize=["k"], do_not_specialize_on_alignment=["scale"])
def _weight(
    weight,
    factor,
    out,
    scale,
    stride,
    n,
    k,
    q,
    low,
    high,
    ADJUST: tl.constexpr,
    BLOCK: tl.constexpr,
    FAR: tl.constexpr,
):
    places = _places(BLOCK, FAR)
    mask = places < n
    step = tl.load(scale + places // k * stride, mask=mask, other=1.0)
    w = tl.load(weight + places, mask=mask, other=0.0)
    f = tl.load(factor + places, mask=mask, other=0.0) if ADJUST else w
    v = tl.div_rn(adjusted(w, f, step, low, high, ADJUST), step)
    v = clip(round_half_even(v), -q, q)
    tl.store(out + places, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["n"], do_not_specialize_on_alignment=["bias", "weight_scale", "input_scale"]
)
def _bias(bias, weight_scale, input_scale, out, stride, n, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < n
    step = tl.load(weight_scale + places * stride, mask=mask, other=1.0).to(tl.float64)
    step = step * tl.load(input_scale).to(tl.float64)
    v = tl.load(bias + places, mask=mask, other=0.0).to(tl.float64) / step
    v = tl.where(tl.abs(v) < 2147483647.0, _round(v), v)
    v = clip(v, -2147483647.0, 2147483647.0)
    tl.store(out + places, v.to(tl.int32), mask=mask)


def requantize(
    sums: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor | None,
    count: int,
    dim: int,
    *grid: Any,
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.requantization_reference.requantize` in one kernel."""
    size = layout(sums, dim, grid[4])
    if size is None or sums.dtype not in (torch.float32, torch.float64):
        return None
    out = torch.empty_like(sums, dtype=torch.float32)
    scale, zero_point, floor, ceiling, ceilings, qmin, qmax = grid
    n, channels, inner, _ = size
    steps = 0 if weight_scale is None else 1 + (weight_scale.dim() > 0)
    unused = sums  # any pointer
    launch(
        _accumulators,
        triton.cdiv(n, BLOCK),
        *(sums, unused if bias is None else bias, input_scale),
        *(unused if weight_scale is None else weight_scale, out, scale, zero_point),
        *(unused if ceilings is None else ceilings, n, channels, inner, float(count)),
        *(floor, ceiling, float(qmin), float(qmax)),
        WIDE=sums.dtype == torch.float64,
        BIAS=bias is not None,
        STEPS=steps,
        CEILINGS=ceilings is not None,
        BLOCK=BLOCK,
        FAR=n > FAR,
    )
    return out


def requantize_real(x: Tensor, *grid: Any) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.requantization_reference.requantize_real` in one kernel."""
    return _launch(REAL, (x, grid[0], grid[1], 0), (x, grid[0], grid[1], 0), 0, grid)


def requantize_sum(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    a_offset: int,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    b_offset: int,
    offset: int,
    *grid: Any,
) -> Tensor | None:
    """Compute :func:`fat.quant.kernels.requantization_reference.requantize_sum` in one kernel."""
    first, second = (a, a_scale, a_zero, a_offset), (b, b_scale, b_zero, b_offset)
    return _launch(SUM, first, second, offset, grid)


def requantize_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offset: int, *grid: Any
) -> Tensor | None:
    """Compute the product of :mod:`fat.quant.kernels.requantization_reference` in one kernel."""
    # The zero points of the operands do not matter.
    return _launch(PRODUCT, (a, a_scale, grid[1], 0), (b, b_scale, grid[1], 0), offset, grid)


def _launch(
    kind: int,
    first: tuple[Tensor, Tensor, Tensor, int],
    second: tuple[Tensor, Tensor, Tensor, int],
    offset: int,
    grid: Any,
) -> Tensor | None:
    a, a_scale, a_zero, a_offset = first
    b, b_scale, b_zero, b_offset = second
    scale, zero_point, floor, ceiling, ceilings, qmin, qmax = grid
    size, found = layout(a, 1 if a.dim() > 1 else 0, ceilings), second_operand(a, b)
    if size is None or found is None or not a.dtype == b.dtype == torch.float32:
        return None
    b, per_image = found
    out = torch.empty_like(a)
    n, channels, inner, image = size
    launch(
        _operands,
        triton.cdiv(n, BLOCK),
        *(a, a_scale, a_zero, b, b_scale, b_zero, out, scale, zero_point),
        *(a if ceilings is None else ceilings, float(a_offset), float(b_offset), float(offset)),
        *(n, channels, inner, image, floor, ceiling, float(qmin), float(qmax)),
        KIND=kind,
        PER_IMAGE=per_image,
        CEILINGS=ceilings is not None,
        BLOCK=BLOCK,
        FAR=n > FAR,
    )
    return out


def integer_weight(
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
    """Compute :func:`fat.quant.kernels.requantization_reference.integer_weight` in one kernel."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense or weight.dtype != torch.float32:
        return None
    out = torch.empty_like(weight, dtype=dtype)
    n, stride = weight.numel(), scale.stride(0) if per_channel else 0
    launch(
        _weight,
        triton.cdiv(n, BLOCK),
        *(weight, laid_out(factor, weight), out, scale, stride),
        *(n, max(n // max(len(weight), 1), 1), float(qmax), low, high),
        ADJUST=adjust,
        BLOCK=BLOCK,
        FAR=n > FAR,
    )
    return out


def integer_bias(bias: Tensor, weight_scale: Tensor, input_scale: Tensor) -> Tensor:
    """Compute :func:`fat.quant.kernels.requantization_reference.integer_bias` in one kernel."""
    bias = bias.contiguous()
    out = torch.empty_like(bias, dtype=torch.int32)
    stride = weight_scale.stride(0) if weight_scale.dim() else 0
    launch(
        _bias,
        triton.cdiv(bias.numel(), BLOCK),
        *(bias, weight_scale, input_scale, out, stride, bias.numel()),
        BLOCK=BLOCK,
    )
    return out
