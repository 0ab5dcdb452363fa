"""Quantization as operators, ``torch.ops.fat.*``, with one kernel for each on CPU and CUDA."""

from fat.quant.kernels.compiled import usable
from fat.quant.kernels.operators import (
    backend,
    define,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_code,
    fake_quantize_code_,
    fake_quantize_weight,
    fake_quantize_weight_backward,
    lanes,
)
from fat.quant.kernels.requantization import (
    integer_bias,
    integer_weight,
    requantize,
    requantize_product,
    requantize_real,
    requantize_sum,
)

__all__ = [
    "backend",
    "define",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_code",
    "fake_quantize_code_",
    "fake_quantize_weight",
    "fake_quantize_weight_backward",
    "integer_bias",
    "integer_weight",
    "lanes",
    "requantize",
    "requantize_product",
    "requantize_real",
    "requantize_sum",
    "usable",
]
