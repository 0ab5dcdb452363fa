"""Arithmetic in full float32, whatever autocast and TF32 allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["full_precision", "use_full_precision"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 operations in IEEE float32: without autocast, TF32 or bf16.

    cuDNN's convolutions use TF32 by default, which rounds their inputs to ten fraction bits, and
    ``torch.set_float32_matmul_precision`` allows it or bf16 in matrix products, on CPUs too. The
    logits of the float network, calibration and all evaluation have to be those of float32.

    Args:
        device: Device of the operations.
    """
    with torch.autocast(device.type, enabled=False):
        settings = _settings()
        before = [setting.fp32_precision for setting in settings]
        matmul, cudnn = _earlier_settings()
        try:
            use_full_precision()
            yield
        finally:
            if matmul is not None:
                torch.set_float32_matmul_precision(matmul)
            if cudnn is not None:
                torch.backends.cudnn.allow_tf32 = cudnn
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


def use_full_precision() -> None:
    """Turn TF32 and bf16 off for float32 operations in this process."""
    # By the earlier options too: PyTorch raises where one of them is read and contradicts these.
    # They are options of all devices together, and so are all of these set and restored.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for setting in _settings():
        setting.fp32_precision = "ieee"


def _settings() -> tuple[Any, ...]:
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    return cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn


def _earlier_settings() -> tuple[str | None, bool | None]:
    """Return PyTorch's earlier options of TF32; ``None`` where they contradict today's."""
    matmul: str | None = None
    cudnn: bool | None = None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    return matmul, cudnn
