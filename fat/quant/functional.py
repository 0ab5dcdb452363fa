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
from fat.quant.kernels.reference import INT32_MAX, quantize_bias

__all__ = [
    "INT32_MAX",
    "Adjust",
    "adjust_weight",
    "clip_inclusive",
    "dequantize",
    "fake_quantize",
    "fake_quantize_bias",
    "fake_quantize_lanes",
    "fake_quantize_weight",
    "quantize",
    "quantize_bias",
    "round_ste",
]


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
    def forward(ctx: FunctionCtx, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
        clipped = x.clamp(low, high)  # type: ignore[arg-type]
        ctx.save_for_backward(x, clipped)
        return clipped

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, clipped = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * (x == clipped), None, None


def clip_inclusive(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
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


class _TorchFakeQuantize(Function):
    """Fake quantization with any broadcastable scale, in torch operations that run in any dtype.

    For scales per channel, for float64, and for CPUs without a C compiler, on which computing the
    code of one byte takes longer than a float step. Saves only its input and output: the next
    convolution and the previous activation save these anyway. torch's learnable fake-quantize
    kernels compute the same but convert each element to int64 and back, which is ten times slower
    on a CPU.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        # Shift the bounds by the zero point instead of the data: one pass less, same integers.
        out = torch.div(x, scale).round_()
        out = torch.clamp(out, qmin - zero_point, qmax - zero_point, out=out).mul_(scale)
        ctx.save_for_backward(x, out, scale, zero_point)
        ctx.bounds = (qmin, qmax)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
        qmin, qmax = ctx.bounds  # type: ignore[attr-defined]
        needs_x, needs_scale, needs_zero_point = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        q = torch.div(x, scale).round_().add_(zero_point)
        # hardtanh's backward masks values outside two bounds in one pass. The rounded values are
        # integers, so bounds half a step outside the grid select exactly the grid.
        low, high = qmin - 0.5, qmax + 0.5
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


class _FakeQuantize(Function):
    """Fake quantization with one threshold, in one kernel each way (:mod:`fat.quant.kernels`).

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
        if inplace:
            code = kernels.fake_quantize_code_(x, scale, zero_point, qmin, qmax)
            ctx.mark_dirty(x)
            out = x
        else:
            out, code = kernels.fake_quantize_code(x, scale, zero_point, qmin, qmax)
        ctx.save_for_backward(code, scale, zero_point)
        ctx.bounds = (qmin, qmax)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        code, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
        bounds = ctx.bounds  # type: ignore[attr-defined]
        gradients = kernels.fake_quantize_backward(code, grad, scale, zero_point, *bounds)
        return (*gradients, None, None, None)


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
        x: Real values, any shape and memory format. Half precision is computed in float32, and the
            result is rounded to the dtype of ``x``.
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
    if not scale.dim() and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        count = kernels.lanes(x.device)
        scale, zero_point = (t.float().expand(count) for t in (scale, zero_point))
        return fake_quantize_lanes(x, scale, zero_point, qmin, qmax, inplace=inplace)
    return _in_torch_operations(x, scale, zero_point, qmin, qmax)


def fake_quantize_lanes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *, inplace: bool = False
) -> Tensor:
    """Compute :func:`fake_quantize` with a scale and zero point that were expanded to lanes.

    A kernel writes its partial sums of a gradient to different lanes; the backward pass of expand
    adds them. :func:`fake_quantize` expands each scalar itself. A caller with many quantizers can
    expand all of them at once.

    Args:
        x: float32, bfloat16 or float16.
        scale: float32 [L] with L equal elements, with L of :func:`fat.quant.kernels.lanes`.
        zero_point: Like ``scale``.
        qmin: As in :func:`fake_quantize`, like ``qmax`` and ``inplace``.
        qmax: See ``qmin``.
        inplace: See ``qmin``.
    """
    result: Tensor
    if torch.is_grad_enabled() and (
        x.requires_grad or scale.requires_grad or zero_point.requires_grad
    ):
        plain_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if plain_cpu and kernels.backend() == "torch":
            return _in_torch_operations(x, scale[0], zero_point[0], qmin, qmax)
        inplace = inplace and x.requires_grad and not x.is_leaf
        result = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, inplace)
    else:
        result = kernels.fake_quantize(x, scale, zero_point, qmin, qmax)
    return result


def _in_torch_operations(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    half = x.dtype in (torch.bfloat16, torch.float16)
    wide = x.float() if half else x  # half precision cannot resolve 255 steps
    result: Tensor = _TorchFakeQuantize.apply(wide, scale, zero_point, qmin, qmax)
    return result.to(x.dtype)


class Adjust(IntEnum):
    """Effect of the trained factor f of each weight; the values are those of the C kernels."""

    NOTHING = 0
    MULTIPLY = 1
    """W · clip(f), the paper's factors (``quant.weights=scale``)."""
    MOVE = 2
    """W + clip(f)·d, learned rounding with f in steps (``quant.weights=adaround``)."""


class _FakeQuantizeWeight(Function):
    """Fake quantization of weights in one kernel each way, which saves no new tensor."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        weight: Tensor,
        factor: Tensor | None,
        scale: Tensor,
        options: tuple[int, int, float, float, bool],
        dtype: torch.dtype,
    ) -> Tensor:
        factors = weight if factor is None else factor  # any tensor: unused without a factor
        ctx.save_for_backward(weight, factors, scale)
        ctx.options = options  # type: ignore[attr-defined]
        out: Tensor = kernels.fake_quantize_weight(weight, factors, scale, *options, dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        options = ctx.options  # type: ignore[attr-defined]
        grad_factor, grad_scale = kernels.fake_quantize_weight_backward(
            weight, factor, grad, scale, *options
        )
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_factor = None
        return None, grad_factor, grad_scale, None, None


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    qmax: int,
    factor: Tensor | None = None,
    adjust: Adjust = Adjust.NOTHING,
    bounds: tuple[float, float] = (0.0, 0.0),
    *,
    per_channel: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Round a frozen weight, adjusted by its trained factors, to the grid −qmax…qmax.

    out = d · clip(round(W'/d), ±qmax) with W' of :func:`adjust_weight`. Gradients as in
    :func:`fake_quantize`; ∂W'/∂f = W or d where f is within its bounds, ends included.

    Args:
        weight: float [C, ...]; gets no gradient.
        scale: Step d of the dtype of ``weight``: [C], 0-dim, or lanes as in
            :func:`fake_quantize_lanes`.
        qmax: Largest integer of the grid.
        factor: f, of the weight's shape, or ``None``.
        adjust: Effect of f.
        bounds: (low, high) of f.
        per_channel: ``True`` if ``scale`` is [C], ``False`` if it is 0-dim or lanes. By default a
            scale with a dimension is [C].
        dtype: Dtype of the result. By default the dtype of autocast if that is on, otherwise the
            dtype of ``weight``.
    """
    if factor is None or adjust is Adjust.NOTHING:
        factor, adjust = None, Adjust.NOTHING
    if per_channel is None:
        per_channel = scale.dim() > 0
    if per_channel and scale.shape != weight.shape[:1]:
        raise ValueError(
            f"scale must have one element for each of the {len(weight)} output filters of weight, "
            f"got shape {list(scale.shape)}"
        )
    if not scale.dim():
        scale = scale.expand(kernels.lanes(weight.device))
    if dtype is None:
        kind = weight.device.type
        cast = weight.dtype == torch.float32 and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else weight.dtype
    options = (qmax, int(adjust), *bounds, per_channel)
    result: Tensor = _FakeQuantizeWeight.apply(weight, factor, scale, options, dtype)
    return result


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
