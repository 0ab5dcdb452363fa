"""Arithmetic in full float32, whatever autocast and TF32 allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "use_full_precision"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 operations in IEEE float32: without autocast, and on CUDA without TF32.

    cuDNN's convolutions use TF32 by default, which rounds their inputs to ten fraction bits. The
    logits of the float network, calibration and all evaluation have to be those of float32.

    Args:
        device: Device of the operations.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        backends = _backends()
        before = [backend.fp32_precision for backend in backends]
        try:
            use_full_precision()
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision


def use_full_precision() -> None:
    """Turn TF32 off on CUDA in this process."""
    for backend in _backends():
        backend.fp32_precision = "ieee"


def _backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv
