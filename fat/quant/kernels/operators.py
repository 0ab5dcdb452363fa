"""The operators ``torch.ops.fat.*`` and the implementation that each device uses.

* CPU: kernels in C (:mod:`fat.quant.kernels.compiled`), which are built on first use. Without a
  compiler, and for tensors that they do not support, torch operations.
* CUDA: Triton kernels (:mod:`fat.quant.kernels.triton_kernels`), or torch operations where Triton
  does not work.
* Other devices: torch operations (:mod:`fat.quant.kernels.reference`), which define each operator.

As operators of the dispatcher they can be traced by torch.compile and captured in CUDA graphs. They
have no derivative of their own: :mod:`fat.quant.functional` combines forward and backward
operators.

A step size or zero point of a whole tensor is passed as "lanes": a tensor [L] of L equal elements,
usually an expanded scalar. An operator reads element 0, and each of the at most L programs of a
backward kernel writes its part of the gradient to its own element. The backward pass of expand adds
them: deterministic, without atomics, and without reading a value on the host.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fat.quant.kernels import compiled, reference

__all__ = ["LANES", "backend", "define", "lanes", "ops"]

logger = logging.getLogger(__name__)

LANES = 1024
"""Largest number of programs of a CUDA kernel that reduces: about 8 per multiprocessor."""
library: Any = torch.library.Library("fat", "FRAGMENT")  # type: ignore[no-untyped-call]
ops = torch.ops.fat
TRITON = "fat.quant.kernels.triton_kernels"


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    compiled: Callable[..., Any] | None = None,
    triton: str | None = None,
) -> Callable[..., Any]:
    """Define the operator ``torch.ops.fat.NAME`` and return it.

    Args:
        schema: Name, arguments and results, as in ``torch.library.define``.
        reference: Implementation by torch operations, for every device.
        fake: Returns empty results of the right shape, dtype and strides, for torch.compile.
        compiled: Implementation for the CPU. It returns ``None`` for tensors that it does not
            support; ``reference`` then computes them.
        triton: Implementation for CUDA as ``"module:function"``, which may return ``None``, too.
            The module is imported on first use, since importing Triton takes time and is not
            possible everywhere.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    if compiled is not None:
        library.impl(name, _first(compiled, reference), "CPU")
    if triton is not None:
        library.impl(name, _first(_lazy(triton), reference), "CUDA")
    torch.library.register_fake(f"fat::{name}", fake, lib=library)
    operator: Callable[..., Any] = getattr(ops, name).default
    return operator


def _first(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return an implementation that uses ``kernel`` for the tensors that it supports."""

    def implementation(*arguments: Any) -> Any:
        result = kernel(*arguments)
        return reference(*arguments) if result is None else result

    return implementation


def _lazy(path: str) -> Callable[..., Any]:
    """Return a function that imports the Triton kernel ``path`` when it is first called."""

    def kernel(*arguments: Any) -> Any:
        function = _resolve(path)
        return None if function is None else function(*arguments)

    return kernel


@functools.cache
def _resolve(path: str) -> Callable[..., Any] | None:
    """Import a Triton kernel; ``None`` if Triton does not work here or is switched off."""
    if not _triton_works():
        return None
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@functools.cache
def _triton_works() -> bool:
    if compiled.switched_off() or not torch.cuda.is_available():
        return False
    try:
        importlib.import_module(TRITON).check(torch.device("cuda"))
    except Exception as error:  # Triton may lack a C compiler, a writable cache, a recent driver, …
        lines = str(error).strip().splitlines()
        logger.warning(
            "Triton does not work here (%s). Fake quantization on the GPU uses torch operations "
            "instead: same results, but a training step takes several times as long.",
            lines[0][:200] if lines else type(error).__name__,
        )
        return False
    return True


def backend(device: torch.device | str = "cpu") -> str:
    """Return the implementation that a device uses: ``compiled``, ``triton`` or ``torch``.

    The CPU uses ``torch`` without a compiler, and CUDA without a working Triton. The environment
    variable ``FAT_KERNELS=off`` selects ``torch`` everywhere.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "triton" if _triton_works() else "torch"
    return "compiled" if kind == "cpu" and compiled.available() else "torch"


def lanes(device: torch.device) -> int:
    """Return the number of elements to which a scalar is expanded for a kernel on ``device``."""
    return LANES if device.type == "cuda" else 1


def _fake_code(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)


def _fake_backward(
    code: Tensor, grad: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(code, dtype=grad.dtype)
    return grad_x, scale.new_empty(scale.numel()), scale.new_empty(scale.numel())


def _fake_weight_backward(
    weight: Tensor, factor: Tensor, grad: Tensor, scale: Tensor, qmax: int, adjust: int, *_: Any
) -> tuple[Tensor, Tensor]:
    grad_factor = torch.empty_like(weight) if adjust else weight.new_empty(0)
    return grad_factor, torch.empty_like(scale, memory_format=torch.contiguous_format)


fake_quantize = define(
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax) -> Tensor",
    reference=reference.fake_quantize,
    compiled=compiled.fake_quantize,
    triton=f"{TRITON}:fake_quantize",
    fake=lambda x, *_: torch.empty_like(x),
)
fake_quantize_code = define(
    "fake_quantize_code(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax)"
    " -> (Tensor, Tensor)",
    reference=reference.fake_quantize_code,
    compiled=compiled.fake_quantize_code,
    triton=f"{TRITON}:fake_quantize_code",
    fake=_fake_code,
)
fake_quantize_code_ = define(
    "fake_quantize_code_(Tensor(a!) x, Tensor scale, Tensor zero_point, int qmin, int qmax)"
    " -> Tensor",
    reference=reference.fake_quantize_code_,
    compiled=compiled.fake_quantize_code_,
    triton=f"{TRITON}:fake_quantize_code_",
    fake=lambda x, *_: torch.empty_like(x, dtype=torch.int8),
)
fake_quantize_backward = define(
    "fake_quantize_backward(Tensor code, Tensor grad, Tensor scale, Tensor zero_point, int qmin,"
    " int qmax) -> (Tensor, Tensor, Tensor)",
    reference=reference.fake_quantize_backward,
    compiled=compiled.fake_quantize_backward,
    triton=f"{TRITON}:fake_quantize_backward",
    fake=_fake_backward,
)
fake_quantize_weight = define(
    "fake_quantize_weight(Tensor weight, Tensor factor, Tensor scale, int qmax, int adjust,"
    " float low, float high, bool per_channel, ScalarType dtype) -> Tensor",
    reference=reference.fake_quantize_weight,
    compiled=compiled.fake_quantize_weight,
    triton=f"{TRITON}:fake_quantize_weight",
    fake=lambda weight, *arguments: torch.empty_like(weight, dtype=arguments[-1]),
)
fake_quantize_weight_backward = define(
    "fake_quantize_weight_backward(Tensor weight, Tensor factor, Tensor grad, Tensor scale,"
    " int qmax, int adjust, float low, float high, bool per_channel) -> (Tensor, Tensor)",
    reference=reference.fake_quantize_weight_backward,
    compiled=compiled.fake_quantize_weight_backward,
    triton=f"{TRITON}:fake_quantize_weight_backward",
    fake=_fake_weight_backward,
)
