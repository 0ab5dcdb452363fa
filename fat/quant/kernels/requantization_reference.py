"""The operators of integer inference in torch operations, which define them.

A grid q = clip(round(x / scale) + zero_point, qmin, qmax), with a fused activation that clips x to
[floor, ceiling], is given by the arguments ``scale`` and ``zero_point`` (float32 0-dim), ``floor``,
``ceiling`` (may be infinite), ``ceilings`` (float32 [C], upper bounds per channel, or ``None``),
``qmin`` and ``qmax``, in this order. Rounding is monotonic, so clip(x, a, b) becomes
clip(q, q(a), q(b)).

Integers are stored as float32 minus their zero point. Runtimes store them in uint8, where
symmetric grids are offset by 128; sums and products are rounded with the stored zero point
zero_point + offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fat.quant.kernels import operators
from fat.quant.kernels.reference import quantize_bias

__all__ = [
    "accumulate",
    "along",
    "integer_bias",
    "integer_weight",
    "requantize",
    "requantize_product",
    "requantize_real",
    "requantize_sum",
]


def integer_weight(weight: Tensor, factor: Tensor, scale: Tensor, *options: Any) -> Tensor:
    """Return the integers of :func:`fat.quant.kernels.reference.fake_quantize_weight`."""
    *numbers, per_channel, dtype = options
    fake = operators.fake_quantize_weight
    rounded = fake(weight, factor, scale, *numbers, per_channel, torch.float32)
    step = along(scale, weight, 0) if per_channel else scale.reshape(-1)[0]
    integers: Tensor = torch.div(rounded, step).round_().to(dtype)
    return integers


def integer_bias(bias: Tensor, weight_scale: Tensor, input_scale: Tensor) -> Tensor:
    """Return clip(round(bias / (weight_scale · input_scale)), ±(2^31−1)), int32, from float64."""
    return quantize_bias(bias, weight_scale.double() * input_scale.double())


def requantize(
    sums: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor | None,
    count: int,
    dim: int,
    *grid: Any,
) -> Tensor:
    """Return clip(round((sums + bias) · M)), with M = input_scale · weight_scale / (scale · count).

    The sum with the bias is exact and rounded to float32 once.

    Args:
        sums: Accumulators, float32 or float64; float64 is rounded to the nearest integer first.
        bias: int32 [C] or ``None``.
        input_scale: Step of the input, float32 0-dim.
        weight_scale: Steps of the weight, float32 [C] or 0-dim, or ``None`` for 1.
        count: Number of pixels that an average divides by.
        dim: Dimension of ``sums`` that has the C channels.
        grid: Grid of the result, see the module's docstring.
    """
    multiplier = input_scale
    if weight_scale is not None:
        multiplier = multiplier * along(weight_scale, sums, dim)
    multiplier = multiplier / (grid[0] * count)
    values = accumulate(sums, bias, dim) * multiplier
    return _clip(values.round_(), *grid)


def requantize_real(x: Tensor, *grid: Any) -> Tensor:
    """Return clip(round(x / scale)) of real values."""
    values = torch.div(x, grid[0]).round_()
    return _clip(values, *grid)


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
) -> Tensor:
    """Return clip(round(A·(s_a/s) + (B·(s_b/s) + c)) − z) with stored integers A and B.

    The two fused multiply-adds round to float32; c = z − (s_a/s·z_a + s_b/s·z_b).
    """
    scale, zero_point = grid[:2]
    by_a, by_b = (a_scale / scale).double(), (b_scale / scale).double()
    zero, a_zero, b_zero = zero_point + offset, a_zero + a_offset, b_zero + b_offset
    zeros = (by_a * a_zero + (by_b * b_zero).float().double()).float()
    partial = ((b.double() + b_zero) * by_b + (zero - zeros).double()).float()
    values = ((a.double() + a_zero) * by_a + partial.double()).float().round_().sub_(zero)
    return _clip(values, *grid)


def requantize_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offset: int, *grid: Any
) -> Tensor:
    """Return clip(round(a·b · (s_a·s_b/s) + z) − z) with the stored zero point z."""
    scale, zero_point = grid[:2]
    zero = zero_point + offset
    values = ((a * b) * (a_scale * b_scale / scale)).add_(zero).round_().sub_(zero)
    return _clip(values, *grid)


def accumulate(sums: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """Return accumulators with their bias, exact and then rounded to float32 once."""
    if bias is not None:
        return (sums.double().round_() + along(bias, sums, dim)).float()
    return sums.round().float() if sums.dtype == torch.float64 else sums


def along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Reshape [C] to broadcast along a dimension of ``like``; 0-dim stays 0-dim."""
    after = like.dim() - 1 - dim % like.dim()
    return values.reshape(-1, *[1] * after) if values.dim() else values


def _clip(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    floor: float,
    ceiling: float,
    ceilings: Tensor | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    def integer(end: Tensor) -> Tensor:
        q = torch.div(end, scale).round_().add_(zero_point)
        return q.clamp_(qmin, qmax).sub_(zero_point)

    values.clamp_(integer(torch.full_like(scale, floor)), integer(torch.full_like(scale, ceiling)))
    if ceilings is not None:
        values = torch.minimum(values, along(integer(ceilings), values, 1))
    return values
