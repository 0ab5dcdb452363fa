"""The fake-quantization operators as torch operations: the definition of each operator.

They run on every device and accept any floating dtype and memory layout. The C and Triton kernels
give the same outputs, codes and gradients of the input bit for bit; sums may differ in the last
bits, because their order does.

Half precision is computed in float32 and rounded once, to the dtype of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "INT32_MAX",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_code",
    "fake_quantize_code_",
    "fake_quantize_weight",
    "fake_quantize_weight_backward",
    "first_lane",
    "laid_out",
    "quantize_bias",
]

INT32_MAX = 2**31 - 1
FINE = 252.0
"""Units of the code per step: a rounding error of half a step has the code ±126."""
OUTSIDE = 127
"""Code, with sign, of values outside the grid."""
UNKNOWN = -128
"""Code of NaN."""


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Compute scale · clip(round(x / scale), qmin − z, qmax − z) in the dtype of ``x``.

    Only element 0 of ``scale`` and ``zero_point`` is read.
    """
    step, low, high = _grid(scale, zero_point, qmin, qmax)
    return torch.div(_wide(x), step).round_().clamp_(low, high).mul_(step).to(x.dtype)


def fake_quantize_code(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fake_quantize` and the code that its backward pass needs, int8.

    The code is the rounding error in units of 1/252 step; ±127 marks values outside the grid, and
    −128 marks NaN.
    """
    step, low, high = _grid(scale, zero_point, qmin, qmax)
    ratio = torch.div(_wide(x), step)
    rounded = ratio.round()
    error = torch.sub(rounded, ratio).mul_(FINE)
    error.masked_fill_(rounded < low, -OUTSIDE).masked_fill_(rounded > high, OUTSIDE)
    code = error.masked_fill_(ratio.isnan(), UNKNOWN).round_().to(torch.int8)
    return rounded.clamp_(low, high).mul_(step).to(x.dtype), code


def fake_quantize_code_(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """Overwrite ``x`` with the output of :func:`fake_quantize_code` and return the code."""
    out, code = fake_quantize_code(x, scale, zero_point, qmin, qmax)
    x.copy_(out)
    return code


def fake_quantize_backward(
    code: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂/∂x in the dtype of ``grad``, and ∂/∂scale and ∂/∂zero_point.

    The latter two are float32 [L] with L = ``scale.numel()``. Their sums over L are the gradients:
    the gradient of a scalar that was expanded to L elements.
    """
    step, low, high = _grid(scale, zero_point, qmin, qmax)
    grad = laid_out(grad, code)
    below, above = code <= -OUTSIDE, code >= OUTSIDE
    grad_x = torch.where(below | above, 0.0, grad)
    # Divided by a tensor: CUDA multiplies by the reciprocal of a Python number.
    slope = torch.div(code.to(torch.float32), torch.full_like(step, FINE))
    slope = torch.where(below, low, torch.where(above, high, slope))
    slope.masked_fill_(code == UNKNOWN, torch.nan)
    by_scale = torch.mul(slope, grad).sum(dtype=torch.float64)
    outside = torch.sub(grad, grad_x).sum(dtype=torch.float64)
    lanes = scale.numel()
    return grad_x, first_lane(by_scale, lanes), first_lane(outside.mul_(-step.double()), lanes)


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
) -> Tensor:
    """Return d · clip(round(W'/d), ±qmax) in ``dtype``, for weights [C, ...].

    ``adjust`` is 0 for W' = W, 1 for W' = W · clip(f, low, high) and 2 for W' = W + clip(f, low,
    high) · d. ``scale`` has one step per output filter, [C], or any number of equal elements, of
    which only element 0 is read.
    """
    step = _steps(weight, scale, per_channel)
    ratio = torch.div(_adjusted(weight, factor, step, adjust, low, high), step)
    return ratio.round_().clamp_(-qmax, qmax).mul_(step).to(dtype)


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
) -> tuple[Tensor, Tensor]:
    """Return ∂/∂factor (empty if ``adjust`` is 0) and ∂/∂scale in the shape of ``scale``.

    Without ``per_channel``, the sum of ∂/∂scale over its elements is the gradient.
    """
    step = _steps(weight, scale, per_channel)
    grad = laid_out(grad, weight).to(weight.dtype)
    ratio = torch.div(_adjusted(weight, factor, step, adjust, low, high), step)
    rounded = ratio.round()
    clipped = rounded.clamp(-qmax, qmax)
    inside = rounded == clipped
    by_scale = torch.where(inside, rounded - ratio, clipped).mul_(grad)
    if per_channel:
        grad_scale = by_scale.flatten(1).sum(1, dtype=torch.float64).to(scale.dtype)
    else:
        grad_scale = first_lane(by_scale.sum(dtype=torch.float64), scale.numel(), scale.dtype)
    if not adjust:
        return weight.new_empty(0), grad_scale
    passes = (factor >= low) & (factor <= high)
    by_factor = torch.where(inside, grad, 0.0).mul_(weight if adjust == 1 else step)
    return by_factor.masked_fill_(~passes, 0.0), grad_scale


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the int32 integers of a bias: clip(round(b / (s_w·s_x)), ±(2^31−1)).

    Computed in float64, since float32 cannot hold 31 bits.

    Args:
        bias: float32 [C].
        scale: s_w·s_x, float64 [C] or 0-dim, positive.

    Examples:
        >>> quantize_bias(torch.tensor([0.5, -2.5]), torch.tensor(1.0)).tolist()
        [0, -2]
    """
    q = torch.div(bias.double(), scale.double()).round_().clamp_(-INT32_MAX, INT32_MAX)
    return q.to(torch.int32)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` with the strides of ``like``."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def first_lane(total: Tensor, lanes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the gradient of ``lanes`` lanes of which the first has it all: [total, 0, 0, …]."""
    total = total.to(dtype).reshape(1)
    return total if lanes == 1 else F.pad(total, (0, lanes - 1))


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of the computation: half precision cannot hold 255 steps."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _grid(scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step and the bounds of the integers before adding the zero point, all 0-dim.

    Shifting the bounds instead of the integers saves one pass.
    """
    shift = zero_point.reshape(-1)[0]
    return scale.reshape(-1)[0], qmin - shift, qmax - shift


def _steps(weight: Tensor, scale: Tensor, per_channel: bool) -> Tensor:
    """Return the step as 0-dim tensor, or as [C, 1, ...] with the dimensions of ``weight``."""
    if not per_channel:
        return scale.reshape(-1)[0]
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _adjusted(
    weight: Tensor, factor: Tensor, step: Tensor, adjust: int, low: float, high: float
) -> Tensor:
    if not adjust:
        return weight
    clipped = factor.clamp(low, high)
    return clipped.mul_(weight) if adjust == 1 else clipped.mul_(step).add_(weight)
