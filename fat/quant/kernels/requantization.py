"""Operators of integer inference, ``torch.ops.fat.*``: from accumulators to integers of a grid.

One kernel for each on CPU and CUDA, as in :mod:`fat.quant.kernels.operators`. Their arguments are
those of :mod:`fat.quant.kernels.requantization_reference`, whose results they equal bit for bit.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fat.quant.kernels import compiled
from fat.quant.kernels import requantization_reference as reference
from fat.quant.kernels.compiled import FLOAT, INT, LONG, POINTER
from fat.quant.kernels.operators import define
from fat.quant.kernels.reference import laid_out

__all__ = [
    "integer_bias",
    "integer_weight",
    "requantize",
    "requantize_product",
    "requantize_real",
    "requantize_sum",
]

TRITON = "fat.quant.kernels.triton_requantization"
GRID = (
    "Tensor scale, Tensor zero_point, float floor, float ceiling, Tensor? ceilings, int qmin,"
    " int qmax"
)

_SIZE = (LONG, LONG, LONG, LONG, INT)
_GRID = (POINTER, POINTER, FLOAT, FLOAT, POINTER, INT, INT)
_OPERAND = (POINTER, POINTER, POINTER, INT)  # values, step, zero point, offset
compiled.SIGNATURES.update(
    {
        "fat_requantize": (
            *(POINTER, INT, POINTER, POINTER, POINTER, INT, LONG, POINTER, POINTER),
            *_SIZE,
            *_GRID,
        ),
        "fat_requantize_real": (POINTER, POINTER, POINTER, *_SIZE, *_GRID),
        "fat_requantize_sum": (*(*_OPERAND, *_OPERAND, INT, INT, POINTER, POINTER), *_SIZE, *_GRID),
        "fat_requantize_product": (
            *(POINTER, POINTER, POINTER, POINTER, INT, INT, POINTER, POINTER),
            *_SIZE,
            *_GRID,
        ),
    }
)


def layout(x: Tensor, dim: int, ceilings: Tensor | None) -> tuple[int, int, int, int] | None:
    """Return where the channels of a dense tensor are in memory.

    Args:
        x: Values.
        dim: Dimension of the channels.
        ceilings: Bounds per channel of dimension 1, if any.

    Returns:
        Number of elements, of channels, of elements in a row of one channel, and of elements of one
        image; ``None`` if the tensor is not dense or has channels in two dimensions.
    """
    if not x.dim():
        return None
    dim %= x.dim()
    if ceilings is not None and dim != 1:
        return None
    if dim == 1 and x.is_contiguous(memory_format=torch.channels_last):
        inner = 1
    elif x.is_contiguous():
        inner = prod(x.shape[dim + 1 :])
    else:
        return None
    channels = x.shape[dim]
    n = x.numel()
    image = n // max(x.shape[0], 1)
    return n, max(channels, 1), max(inner, 1), max(image, 1)


def second_operand(a: Tensor, b: Tensor) -> tuple[Tensor, int] | None:
    """Return the second operand in the order of the first, and if it has one element per channel.

    Returns:
        b and 0; b [N, C, 1, 1] and 1 for a [N, C, H, W]; ``None`` for other shapes.
    """
    if a.shape == b.shape:
        return laid_out(b, a), 0
    if a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1):
        return b.contiguous(), 1
    return None


def _call(name: str, like: Tensor, size: tuple[int, ...], grid: Any, *arguments: Any) -> Tensor:
    """Run a kernel in C on ``arguments``; return its result in the layout of ``like``."""
    out = torch.empty_like(like, dtype=torch.float32)
    bounds = out.new_empty(2 * size[1])  # the kernel's constants of each channel
    compiled.call(name, *arguments, out, bounds, *size, torch.get_num_threads(), *grid)
    return out


def _usable(*tensors: Tensor | None) -> bool:
    """Return True if the kernels in C can read the tensors."""
    return compiled.available() and all(
        tensor is None
        or (
            tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.int32)
            and (tensor.dim() != 1 or tensor.is_contiguous())  # constants of each channel
        )
        for tensor in tensors
    )


def _compiled(
    sums: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor | None,
    count: int,
    dim: int,
    *grid: Any,
) -> Tensor | None:
    size = layout(sums, dim, grid[4])
    wide = sums.dtype == torch.float64
    read = (bias, input_scale, weight_scale, grid[0], grid[1], grid[4])
    if size is None or not _usable(*read) or not (wide or sums.dtype == torch.float32):
        return None
    per_channel = weight_scale is not None and weight_scale.dim() > 0
    arguments = (sums, wide, bias, input_scale, weight_scale, per_channel, count)
    return _call("fat_requantize", sums, size, grid, *arguments)


def _compiled_real(x: Tensor, *grid: Any) -> Tensor | None:
    size = layout(x, 1 if x.dim() > 1 else 0, grid[4])
    if size is None or not _usable(x, grid[0], grid[1], grid[4]):
        return None
    return _call("fat_requantize_real", x, size, grid, x)


def _compiled_sum(
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
    size = layout(a, 1 if a.dim() > 1 else 0, grid[4])
    second = second_operand(a, b)
    read = (a, a_scale, a_zero, b, b_scale, b_zero, grid[0], grid[1], grid[4])
    if size is None or second is None or not _usable(*read):
        return None
    b, per_image = second
    arguments = (a, a_scale, a_zero, a_offset, b, b_scale, b_zero, b_offset, offset, per_image)
    return _call("fat_requantize_sum", a, size, grid, *arguments)


def _compiled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offset: int, *grid: Any
) -> Tensor | None:
    size = layout(a, 1 if a.dim() > 1 else 0, grid[4])
    second = second_operand(a, b)
    read = (a, a_scale, b, b_scale, grid[0], grid[1], grid[4])
    if size is None or second is None or not _usable(*read):
        return None
    b, per_image = second
    arguments = (a, a_scale, b, b_scale, offset, per_image)
    return _call("fat_requantize_product", a, size, grid, *arguments)


requantize = define(
    "requantize(Tensor sums, Tensor? bias, Tensor input_scale, Tensor? weight_scale, int count,"
    f" int dim, {GRID}) -> Tensor",
    reference=reference.requantize,
    compiled=_compiled,
    triton=f"{TRITON}:requantize",
    fake=lambda sums, *_: torch.empty_like(sums, dtype=torch.float32),
)
requantize_real = define(
    f"requantize_real(Tensor x, {GRID}) -> Tensor",
    reference=reference.requantize_real,
    compiled=_compiled_real,
    triton=f"{TRITON}:requantize_real",
    fake=lambda x, *_: torch.empty_like(x),
)
requantize_sum = define(
    "requantize_sum(Tensor a, Tensor a_scale, Tensor a_zero, int a_offset, Tensor b,"
    f" Tensor b_scale, Tensor b_zero, int b_offset, int offset, {GRID}) -> Tensor",
    reference=reference.requantize_sum,
    compiled=_compiled_sum,
    triton=f"{TRITON}:requantize_sum",
    fake=lambda a, a_scale, a_zero, a_offset, b, *_: torch.empty_like(a + b),
)
requantize_product = define(
    "requantize_product(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, int offset,"
    f" {GRID}) -> Tensor",
    reference=reference.requantize_product,
    compiled=_compiled_product,
    triton=f"{TRITON}:requantize_product",
    fake=lambda a, a_scale, b, *_: torch.empty_like(a * b),
)
integer_weight = define(
    "integer_weight(Tensor weight, Tensor factor, Tensor scale, int qmax, int adjust, float low,"
    " float high, bool per_channel, ScalarType dtype) -> Tensor",
    reference=reference.integer_weight,
    compiled=compiled.integer_weight,
    triton=f"{TRITON}:integer_weight",
    fake=lambda weight, *arguments: torch.empty_like(weight, dtype=arguments[-1]),
)
integer_bias = define(
    "integer_bias(Tensor bias, Tensor weight_scale, Tensor input_scale) -> Tensor",
    reference=reference.integer_bias,
    triton=f"{TRITON}:integer_bias",
    fake=lambda bias, *_: torch.empty_like(bias, dtype=torch.int32),
)
