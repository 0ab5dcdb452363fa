"""The quantized network with the float network it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fat.graph.passes.batch_norm_folding import FoldReport
from fat.graph.passes.equalization import EqualizeReport
from fat.graph.passes.quantizer_insertion import QUANTIZERS, InsertReport
from fat.models.integer_inference import in_integers, run_integers
from fat.models.logits_cache import TeacherLogitsCache
from fat.quant.config import QuantSpec
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.quant.thresholds import Thresholds
from fat.utils.errors import FatError

__all__ = ["PrepareReport", "Student", "freeze"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class PrepareReport:
    """What the passes did, and how far each moved the float function (logits' SQNR in dB)."""

    fold: FoldReport
    fold_sqnr_db: float
    equalize: EqualizeReport | None
    equalize_sqnr_db: float | None
    insert: InsertReport


class Student(nn.Module):
    """A network that computes on integer grids, beside its float teacher.

    Its parameters are exactly what may be trained. The teacher's tensors are not in ``state_dict``.

    Args:
        network: Graph with quantizers inserted.
        teacher: The folded float network, frozen.
        spec: What was asked for.
        report: What the passes did; ``None`` for a student that was loaded.

    Attributes:
        origin: Plain values about where the float network came from (name, weights, preprocessing).
        memo: What remembers the teacher's logits of batches that come again; ``None``: nothing.
    """

    is_calibrated: Tensor

    def __init__(
        self,
        network: fx.GraphModule,
        teacher: fx.GraphModule,
        spec: QuantSpec,
        report: PrepareReport | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher = freeze(teacher)
        self.spec = spec
        self.report = report
        self.origin: dict[str, Any] = {}
        self.memo: TeacherLogitsCache | None = None
        self.register_buffer("is_calibrated", torch.tensor(False))
        # Depthwise convolutions run several times faster with channels last, on CPUs as on GPUs.
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W], float32 values on the output's grid.

        Without gradients this is the arithmetic of an integer runtime
        (:mod:`fat.models.integer_inference`);
        with them the same grids in real values, which a few integers round differently in.

        Raises:
            FatError: If the thresholds were never calibrated.
        """
        self.check_calibrated()
        images = images.contiguous(memory_format=torch.channels_last)
        if not torch.is_grad_enabled() and in_integers(self.activation_quantizers(), self.layers()):
            with exactly(images):
                return run_integers(self.network, images)
        logits: Tensor = self.network(images)
        return logits

    @property
    def device(self) -> torch.device:
        """Where the student's tensors are."""
        return self.is_calibrated.device

    def check_calibrated(self) -> None:
        """Raise a FatError if the thresholds were never calibrated."""
        if not self.is_calibrated:
            raise FatError(
                "The student is not calibrated yet; call fat.calibrate(student, images)."
            )

    def float_logits(self, images: Tensor) -> Tensor:
        """The teacher's logits [N, classes] of images [N, 3, H, W], without a graph."""
        if self.memo is not None and self.memo.wants(images):
            return self.memo(images, self._teacher_logits)
        return self._teacher_logits(images)

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor) -> Tensor:
        with exactly(images):  # what the student is measured by is not rounded to 8 bits itself
            logits: Tensor = self.teacher(images.contiguous(memory_format=torch.channels_last))
        return logits

    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """All activation quantizers in the order of the graph."""
        return list(self.network.get_submodule(QUANTIZERS).children())  # type: ignore[arg-type]

    def layers(self) -> list[QuantLayer]:
        """All quantized convolution and linear layers in the order of the graph."""
        names = [str(node.target) for node in self.network.graph.nodes if node.op == "call_module"]
        modules = (self.network.get_submodule(name) for name in names)
        return [module for module in modules if isinstance(module, QuantLayer)]

    def quantizers(self) -> Iterator[tuple[str, str, ActivationQuantizer | WeightQuantizer]]:
        """(layer, ``"weight"`` or ``"activation"``, quantizer) of every quantizer."""
        for quantizer in self.activation_quantizers():
            yield quantizer.layer, "activation", quantizer
        for layer in self.layers():
            yield layer.layer, "weight", layer.weight_quantizer

    def thresholds(self) -> Iterator[Thresholds]:
        """The thresholds of every quantizer."""
        for _, _, quantizer in self.quantizers():
            yield quantizer.thresholds

    def project(self) -> None:
        """Bring every trained factor back into its range, after an optimizer's step."""
        for quantizer in self.activation_quantizers():
            quantizer.project()
        for layer in self.layers():
            layer.project()

    def trained_state(self) -> dict[str, Tensor]:
        """Copies of everything that training or bias correction may change, by name."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        state.update({f"{x.layer}.bias": x.bias for x in self.layers() if x.bias is not None})
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`trained_state` gave."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
        for layer in self.layers():
            if layer.bias is not None:
                layer.bias.copy_(state[f"{layer.layer}.bias"])


def exactly(images: Tensor) -> torch.autocast:
    """No reduced precision inside, whatever the training around it runs in."""
    return torch.autocast(images.device.type, enabled=False)


def freeze(network: M) -> M:
    """Turn every parameter and buffer into a buffer that ``state_dict`` leaves out, in place."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(dict(module.named_buffers(recurse=False)))
    return network.eval()
