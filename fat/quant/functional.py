"""Quantization and fake quantization with their gradients, as pure functions.

Fake-quantized tensors hold real values that lie exactly on an integer grid, as needed in training;
:func:`quantize` returns the integers.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from fat.quant import kernels

__all__ = [
    "INT32_MAX",
    "Adjust",
    "adjust_weight",
    "clip_inclusive",
    "dequantize",
    "fake_quantize",
    "fake_quantize_bias",
    "fake_quantize_weight",
    "quantize",
    "quantize_bias",
    "round_ste",
]

INT32_MAX = 2**31 - 1


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the integers of ``x``: clip(round(x / scale) + zero_point, qmin, qmax).

    Rounding is half to even, as in ONNX's QuantizeLinear.

    Args:
        x: Real values, any shape.
        scale: Step d > 0, broadcastable to ``x``.
        zero_point: Integer that represents 0.0, as a float tensor, broadcastable to ``x``.
        qmin: Smallest integer of the grid.
        qmax: Largest integer of the grid.

    Returns:
        int32 tensor of the shape of ``x``.

    Examples:
        >>> one = torch.ones(())
        >>> quantize(torch.tensor([0.5, 1.5, 2.5, 300.0]), one, 0 * one, 0, 255).tolist()
        [0, 2, 2, 255]
    """
    return torch.div(x, scale).round_().add_(zero_point).clamp_(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the real values of integers: (q − zero_point) · scale, float32."""
    return (q.to(torch.float32) - zero_point) * scale


class _ClipInclusive(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (low, high)  # type: ignore[attr-defined]
        return x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        low, high = ctx.bounds  # type: ignore[attr-defined]
        return grad * ((x >= low) & (x <= high)), None, None


def clip_inclusive(x: Tensor, low: float, high: float) -> Tensor:
    """Clip to [low, high]; the gradient is 1 inside **and at both ends**, 0 outside.

    ``torch.clamp`` passes no gradient at its bounds, where α starts.

    Examples:
        >>> x = torch.tensor([0.4, 0.5, 1.0, 1.1], requires_grad=True)
        >>> clip_inclusive(x, 0.5, 1.0).sum().backward()
        >>> x.grad.tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    result: Tensor = _ClipInclusive.apply(x, low, high)
    return result


class _RoundSTE(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """Round half to even with the straight-through gradient 1."""
    result: Tensor = _RoundSTE.apply(x)
    return result


def _dot_like(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return Σ a·b over the dimensions in which ``like`` is 1 or missing, in the shape of ``like``.

    For a 0-dim ``like`` this is a dot product in memory order, which stores no intermediate.
    """
    if not like.dim():
        for layout in ((a, b), (a.movedim(1, -1), b.movedim(1, -1)) if a.dim() > 2 else (a, b)):
            if all(tensor.is_contiguous() for tensor in layout):
                return torch.dot(layout[0].flatten(), layout[1].flatten())
    return (a * b).sum_to_size(like.shape)


class _FakeQuantize(Function):
    """Fake quantization as one autograd node that saves only its input and output.

    The next convolution and the previous activation save these anyway. torch's learnable
    fake-quantize kernels compute the same but convert each element to int64 and back, which is ten
    times slower on a CPU.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        # Shift the bounds by the zero point instead of the data: one pass less, same integers.
        out = torch.div(x, scale).round_()
        if zero_point.dim():
            out = torch.clamp(out, qmin - zero_point, qmax - zero_point, out=out)
        else:
            shift = float(zero_point)
            out.clamp_(qmin - shift, qmax - shift)
        out.mul_(scale)
        ctx.save_for_backward(x, out, scale, zero_point)
        ctx.bounds = (qmin, qmax)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
        qmin, qmax = ctx.bounds  # type: ignore[attr-defined]
        needs_x, needs_scale, needs_zero_point = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        q = torch.div(x, scale).round_()
        if zero_point.dim():
            q.add_(zero_point)
            shift = 0.0
        else:
            shift = float(zero_point)
        # hardtanh's backward masks values outside two bounds in one pass. The rounded values are
        # integers, so bounds half a step outside the grid select exactly the grid.
        low, high = qmin - shift - 0.5, qmax - shift + 0.5
        inside = torch.ops.aten.hardtanh_backward
        grad_x = grad_scale = grad_zero_point = None
        if needs_x or needs_zero_point:
            grad_x = inside(grad, q, low, high)
        if needs_scale:
            # ∂out/∂d = q − x/d inside, the clipped integer outside: (out − x·inside) / d
            error = inside(x, q, low, high)
            grad_scale = _dot_like(torch.sub(out, error, out=error), grad, scale).div_(scale)
        if needs_zero_point:
            # ∂out/∂z = −d outside, 0 inside
            assert grad_x is not None
            outside = (grad - grad_x).sum_to_size(zero_point.shape)
            grad_zero_point = outside.mul_(-scale)
        return grad_x if needs_x else None, grad_scale, grad_zero_point, None, None


class _FusedFakeQuantize(Function):
    """Fake quantization with one threshold, in one pass each way (:mod:`fat.quant.kernels`).

    Saves one byte per element, the rounding error to 1/252 of a step, and may overwrite its input:
    a training step then needs 1.25 times the activation memory of a float step instead of 2. The
    error of the scale's gradient is at most Σ|grad|/504.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        inplace: bool,
    ) -> Tensor:
        step, shift = float(scale), float(zero_point)
        out = x if inplace else torch.empty_like(x)
        code = kernels.forward_code(x, out, step, qmin - shift, qmax - shift)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(code)
        ctx.numbers = (step, qmin - shift, qmax - shift)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors  # type: ignore[attr-defined]
        step, low, high = ctx.numbers  # type: ignore[attr-defined]
        grad_x, grad_scale, outside = kernels.backward_code(code, _laid_out(grad, code), low, high)
        return (
            grad_x,
            grad.new_tensor(grad_scale),
            grad.new_tensor(-step * outside),
            None,
            None,
            None,
        )


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` with the strides of ``like``."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *, inplace: bool = False
) -> Tensor:
    """Round ``x`` to its integer grid: scale · (clip(round(x/scale) + z, qmin, qmax) − z).

    Gradients use the straight-through estimator for rounding, and "inside" includes both ends of
    the grid:

    * ∂out/∂x = 1 inside, 0 outside;
    * ∂out/∂scale = round(x/scale) − x/scale inside, qmin − z below, qmax − z above;
    * ∂out/∂z = 0 inside, −scale outside.

    Args:
        x: Real values, any shape and memory format. Half precision is converted to float32.
        scale: Step, 0-dim or per output filter with the dimensions of ``x``, such as [C, 1, 1, 1].
        zero_point: Integer-valued float tensor of the shape of ``scale``.
        qmin: Smallest integer of the grid.
        qmax: Largest integer of the grid.
        inplace: Allow overwriting ``x`` where the implementation can; only valid if ``x`` requires
            a gradient and nothing else reads it.

    Source: Esser et al. 2019 (arXiv 1902.08153), eq. 3; Jain et al. 2019 (arXiv 1903.08066), eq. 6.

    Examples:
        >>> step, zero = torch.tensor(0.5), torch.tensor(0.0)
        >>> fake_quantize(torch.tensor([-9.0, 0.2, 0.3, 9.0]), step, zero, -7, 7).tolist()
        [-3.5, 0.0, 0.5, 3.5]
    """
    result: Tensor
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # half precision cannot resolve fractions of 255 steps
    if scale.dim() or not kernels.usable(x):
        result = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax)
    elif torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result = _FusedFakeQuantize.apply(
            x, scale, zero_point, qmin, qmax, inplace and x.requires_grad and not x.is_leaf
        )
    else:
        result, shift = torch.empty_like(x), float(zero_point)
        kernels.forward(x, result, float(scale), qmin - shift, qmax - shift)
    return result


class Adjust(IntEnum):
    """Effect of the trained factor f of each weight; the values are those of the C kernels."""

    NOTHING = 0
    MULTIPLY = 1
    """W · clip(f), the paper's factors (``quant.weights=scale``)."""
    MOVE = 2
    """W + clip(f)·d, learned rounding with f in steps (``quant.weights=adaround``)."""


class _FusedWeight(Function):
    """Fake quantization of weights in one pass each way, saving no new tensor but the steps."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        weight: Tensor,
        factor: Tensor,
        scale: Tensor,
        qmax: int,
        adjust: Adjust,
        bounds: tuple[float, float],
    ) -> Tensor:
        steps = scale.detach().expand(len(weight)).contiguous()
        ctx.save_for_backward(weight, factor, steps)
        ctx.options = (qmax, adjust, *bounds)  # type: ignore[attr-defined]
        ctx.shared = not scale.dim()  # type: ignore[attr-defined]
        return kernels.forward_rows(weight, factor, steps, qmax, adjust, *bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, steps = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_factor: Tensor | None
        grad_factor, grad_scale = kernels.backward_rows(
            weight,
            factor,
            _laid_out(grad, weight),
            steps,
            *ctx.options,  # type: ignore[attr-defined]
        )
        if ctx.shared:  # type: ignore[attr-defined]
            grad_scale = grad_scale.sum()
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_factor = None
        return None, grad_factor, grad_scale, None, None, None


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    qmax: int,
    factor: Tensor | None = None,
    adjust: Adjust = Adjust.NOTHING,
    bounds: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Round a frozen weight, adjusted by its trained factors, to the grid −qmax…qmax.

    out = d · clip(round(W'/d), ±qmax) with W' of :func:`adjust_weight`. Gradients as in
    :func:`fake_quantize`; ∂W'/∂f = W or d where f is within its bounds, ends included.

    Args:
        weight: float32 [C, ...]; gets no gradient.
        scale: Step d, [C] or 0-dim.
        qmax: Largest integer of the grid.
        factor: f, of the weight's shape, or ``None``.
        adjust: Effect of f.
        bounds: (low, high) of f.
    """
    if factor is None or adjust is Adjust.NOTHING:
        factor, adjust = None, Adjust.NOTHING
    factors = weight if factor is None else factor  # any tensor: NOTHING ignores it
    if kernels.usable(weight, factors):
        fused: Tensor = _FusedWeight.apply(weight, factors, scale, qmax, adjust, bounds)
        return fused
    step = _per_filter(scale, weight)
    adjusted = adjust_weight(weight, scale, factor, adjust, bounds)
    return fake_quantize(adjusted, step, torch.zeros_like(step), -qmax, qmax)


def adjust_weight(
    weight: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    adjust: Adjust,
    bounds: tuple[float, float],
) -> Tensor:
    """Return the adjusted weight before rounding: W' = W, W·clip(f) or W + clip(f)·d, d constant.

    Source: arXiv 1812.07872, section 3.4, for W·clip(f).
    """
    if factor is None or adjust is Adjust.NOTHING:
        return weight
    clipped = clip_inclusive(factor, *bounds)
    if adjust is Adjust.MULTIPLY:
        return weight * clipped
    return weight + clipped * _per_filter(scale.detach(), weight)


def _per_filter(scale: Tensor, weight: Tensor) -> Tensor:
    """Reshape steps [C] to broadcast over the filters of ``weight``; 0-dim stays 0-dim."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1)) if scale.dim() else scale


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


class _FakeQuantizeBias(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, bias: Tensor, scale: Tensor) -> Tensor:
        step = scale.double()
        return quantize_bias(bias, step).double().mul_(step).to(bias.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Round a bias to the int32 grid of step ``scale`` = s_w · s_x, see :func:`quantize_bias`.

    The bias gets a straight-through gradient. The step gets none: it is so small that its gradient
    is negligible.

    Args:
        bias: float32 [C].
        scale: float tensor [C] or 0-dim, positive.
    """
    result: Tensor = _FakeQuantizeBias.apply(bias, scale)
    return result
