"""Where a student loses: each layer's own error, apart from what it inherits."""

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
from fat.utils.batches import Images, as_batches, split

__all__ = ["LayerError", "disabled", "float_shift_db", "layer_errors", "switched"]


@dataclass(frozen=True)
class LayerError:
    """What quantizing one tensor alone costs.

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
    """Turn every quantizer on, or off, for a while."""
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
    """Let the student compute in float for a while: its weights as equalized, no quantizer on."""
    return switched(student, on=False)


@torch.no_grad()
def float_shift_db(student: Student, images: Images) -> float:
    """How far equalization moved the float function: logits' SQNR against the teacher, dB."""
    signal = noise = 0.0
    with disabled(student):
        for batch in as_batches(images):
            pixels = split(batch)[0]
            teacher = student.float_logits(pixels).double()
            moved = student.network(pixels.contiguous(memory_format=torch.channels_last))
            signal += float(teacher.square().sum())
            noise += float((teacher - moved.double()).square().sum())
    sums = distributed.all_sum(torch.tensor([signal, noise], dtype=torch.float64))
    return sqnr_db(*sums.tolist())


@torch.no_grad()
def layer_errors(student: Student, images: Images) -> list[LayerError]:
    """Error of each weight and each activation when it alone is quantized, worst first.

    The network runs in float; every layer is also computed with its weight on the grid, and every
    activation is also put on its own.

    Args:
        student: Calibrated student.
        images: A batch or a few.
    """
    sums: dict[tuple[str, str], list[float]] = {}

    def note(layer: str, kind: str, exact: Tensor, quantized: Tensor) -> None:
        entry = sums.setdefault((layer, kind), [0.0, 0.0])
        entry[0] += float(exact.double().square().sum())
        entry[1] += float((exact.double() - quantized.double()).square().sum())

    # The hooks call forward itself, which does not come back to them.
    def watch_layer(layer: QuantLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.weight_quantizer.enabled = True
        note(layer.layer, "weight", output, layer.forward(inputs[0]))
        layer.weight_quantizer.enabled = False

    def watch_activation(
        quantizer: ActivationQuantizer, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        quantizer.enabled = True
        note(quantizer.layer, "activation", output, quantizer.forward(inputs[0]))
        quantizer.enabled = False

    handles = [layer.register_forward_hook(watch_layer) for layer in student.layers()]
    handles += [q.register_forward_hook(watch_activation) for q in student.activation_quantizers()]
    try:
        with disabled(student):
            for batch in as_batches(images):
                pixels = split(batch)[0]
                student.network(pixels.contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    errors = [LayerError(*key, sqnr_db(*entry)) for key, entry in sums.items()]
    return sorted(errors, key=lambda error: error.sqnr_db)
