"""Quantization error of each tensor by itself, and of equalization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fat.models.student import Student
from fat.quant.metrics import sqnr_db
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer
from fat.utils import distributed
from fat.utils.batches import Images, as_batches, to_device
from fat.utils.precision import full_precision

__all__ = ["LayerError", "disabled", "float_shift_db", "layer_errors", "switched"]


@dataclass(frozen=True)
class LayerError:
    """Error of one tensor when it alone is quantized.

    Attributes:
        layer: Name of the layer.
        kind: ``"weight"`` (measured at the layer's output) or ``"activation"``.
        sqnr_db: Signal to quantization noise, dB.
    """

    layer: str
    kind: str
    sqnr_db: float


@contextmanager
def switched(student: Student, *, on: bool) -> Iterator[None]:
    """Context manager that enables or disables all quantizers."""
    quantizers = [quantizer for _, _, quantizer in student.quantizers()]
    states = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = on
    try:
        yield
    finally:
        for quantizer, state in zip(quantizers, states, strict=True):
            quantizer.enabled = state


def disabled(student: Student) -> AbstractContextManager[None]:
    """Context manager that disables all quantizers: the student's own float function."""
    return switched(student, on=False)


@torch.no_grad()
def float_shift_db(student: Student, images: Images) -> float:
    """Return the SQNR of the student's float logits, as equalized, against the teacher's, dB."""
    device = student.device
    signal, noise = torch.zeros(2, dtype=torch.float64, device=device).unbind()
    with disabled(student), full_precision(device):
        for batch in as_batches(images):
            pixels = to_device(batch, device)[0]
            teacher = student.float_logits(pixels).double()
            moved = student.network(pixels.contiguous(memory_format=torch.channels_last))
            signal = signal + teacher.square().sum()
            noise = noise + (teacher - moved.double()).square().sum()
    sums = distributed.all_sum(torch.stack([signal, noise]).cpu())
    return sqnr_db(*sums.tolist())


@torch.no_grad()
def layer_errors(student: Student, images: Images) -> list[LayerError]:
    """Return the error of each weight and activation when it alone is quantized, worst first.

    The network runs in float. Each layer is computed again with its weight quantized, and each
    activation is quantized again.

    Args:
        student: Calibrated student.
        images: One or a few batches.
    """
    device = student.device
    sums: dict[tuple[str, str], Tensor] = {}  # signal and noise, on the device

    def add(layer: str, kind: str, exact: Tensor, quantized: Tensor) -> None:
        signal = exact.double().square().sum()
        noise = (exact.double() - quantized.double()).square().sum()
        both = torch.stack([signal, noise])
        key = (layer, kind)
        sums[key] = sums[key] + both if key in sums else both

    # The hooks call forward directly, which does not trigger them again.
    def watch_layer(layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.weight_quantizer.enabled = True
        add(layer.layer, "weight", output, layer.forward(inputs[0]))
        layer.weight_quantizer.enabled = False

    def watch_activation(
        quantizer: ActivationQuantizer, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        quantizer.enabled = True
        add(quantizer.layer, "activation", output, quantizer.forward(inputs[0]))
        quantizer.enabled = False

    handles = [layer.register_forward_hook(watch_layer) for layer in student.layers()]
    handles += [q.register_forward_hook(watch_activation) for q in student.activation_quantizers()]
    try:
        with disabled(student), full_precision(device):
            for batch in as_batches(images):
                pixels = to_device(batch, device)[0]
                student.network(pixels.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    errors = [LayerError(*key, sqnr_db(*entry.tolist())) for key, entry in sums.items()]
    return sorted(errors, key=lambda error: error.sqnr_db)
