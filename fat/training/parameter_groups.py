"""Parameter groups of the optimizer, with a learning rate for each kind of parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fat.quant.functional import Adjust
from fat.quant.quantized_layers import QuantLayer
from fat.quant.thresholds import Thresholds
from fat.training.config import TrainSpec

__all__ = ["parameter_groups"]


def parameter_groups(modules: Iterable[nn.Module], spec: TrainSpec) -> list[dict[str, Any]]:
    """Collect the trained parameters in groups.

    Args:
        modules: Quantized layers and activation quantizers.
        spec: The learning rates.

    Returns:
        Groups with the key ``share``: their learning rate as a multiple of ``spec.lr``. The name is
        part of checkpoints.
    """
    thresholds: list[nn.Parameter] = []
    factors: dict[Adjust, list[nn.Parameter]] = {kind: [] for kind in Adjust}
    biases: list[nn.Parameter] = []
    for module in modules:
        for part in module.modules():
            if isinstance(part, Thresholds):
                thresholds += part.parameters()
            elif isinstance(part, QuantLayer):
                factors[part.adjust] += [] if part.factor is None else [part.factor]
                biases += [part.bias] if isinstance(part.bias, nn.Parameter) else []
    rates = (
        (thresholds, spec.lr),
        (factors[Adjust.MULTIPLY], spec.weight_scale_lr),
        (factors[Adjust.MOVE], spec.adaround_lr),
        (biases, spec.bias_lr),
    )
    return [{"params": group, "share": rate / spec.lr} for group, rate in rates if group]
