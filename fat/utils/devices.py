"""Devices of modules."""

from __future__ import annotations

import itertools

import torch
from torch import nn

__all__ = ["module_device"]


def module_device(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none.

    Examples:
        >>> module_device(nn.Linear(2, 3))
        device(type='cpu')
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
