"""The functions of ``fat.kernels`` in FAT 0.1, on top of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fat.quant.kernels import operators

__all__ = ["backward_code", "backward_rows", "forward", "forward_code", "forward_rows"]


def forward(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> None:
    """Compute out = scale · clip(round(x / scale), low, high); ``out`` may be ``x``."""
    out.copy_(operators.fake_quantize(x, *_grid(x, scale, low, high)))


def forward_code(x: Tensor, out: Tensor, scale: float, low: float, high: float) -> Tensor:
    """Compute :func:`forward` and return what the backward pass needs, int8 in ``x``'s layout."""
    result, code = operators.fake_quantize_code(x, *_grid(x, scale, low, high))
    out.copy_(result)
    found: Tensor = code
    return found


def backward_code(
    code: Tensor, grad: Tensor, low: float, high: float
) -> tuple[Tensor, float, float]:
    """Return ∂/∂x, ∂/∂scale, and the sum of the gradient of values outside the grid."""
    grad_x, by_scale, outside = operators.fake_quantize_backward(
        code, grad, *_grid(grad, 1.0, low, high)
    )
    return grad_x, float(by_scale), -float(outside)


def forward_rows(
    weight: Tensor, factor: Tensor, scale: Tensor, qmax: int, adjust: int, low: float, high: float
) -> Tensor:
    """Return weights [C, ...] on −qmax…qmax with steps [C]; ``adjust`` as in the operator."""
    options = (qmax, adjust, low, high, True)
    out: Tensor = operators.fake_quantize_weight(weight, factor, scale, *options, weight.dtype)
    return out


def backward_rows(
    weight: Tensor,
    factor: Tensor,
    grad: Tensor,
    scale: Tensor,
    qmax: int,
    adjust: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Return ∂/∂factor in the weight's shape (empty for ``adjust`` 0) and ∂/∂scale [C]."""
    grad_factor, grad_scale = operators.fake_quantize_weight_backward(
        weight, factor, grad, scale, qmax, adjust, low, high, True
    )
    return grad_factor, grad_scale


def _grid(like: Tensor, scale: float, low: float, high: float) -> tuple[Tensor, Tensor, int, int]:
    step = torch.tensor([scale], dtype=torch.float32, device=like.device)
    return step, torch.zeros_like(step), int(low), int(high)
