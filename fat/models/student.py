"""The quantized network (student) and the float network it is made from (teacher)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, fx, nn

from fat.graph.passes.batch_norm_folding import FoldReport
from fat.graph.passes.equalization import EqualizeReport
from fat.graph.passes.quantizer_insertion import QUANTIZERS, InsertReport
from fat.models.integer_inference import IntegerInterpreter
from fat.models.logits_cache import TeacherLogitsCache
from fat.quant.batched import QuantizerBatch
from fat.quant.config import QuantSpec
from fat.quant.quantized_layers import QuantLayer
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.quant.thresholds import Thresholds
from fat.utils.errors import FatError
from fat.utils.precision import full_precision

__all__ = ["PrepareReport", "Student", "freeze"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class PrepareReport:
    """Results of the passes, with the SQNR of the float logits before and after each, dB."""

    fold: FoldReport
    fold_sqnr_db: float
    equalize: EqualizeReport | None
    equalize_sqnr_db: float | None
    insert: InsertReport


class Student(nn.Module):
    """A quantized network together with its float teacher.

    All of its parameters are trainable. The teacher's tensors are not in ``state_dict``.

    Args:
        network: Graph with quantizers inserted.
        teacher: The folded float network; it is frozen.
        spec: Quantization options.
        report: Results of the passes; ``None`` for a student that was loaded.

    Attributes:
        origin: Origin of the float network (name, weights, preprocessing, …) in plain values.
        teacher_cache: Cache of the teacher's logits, if any.
    """

    is_calibrated: Tensor
    _known_calibrated = False
    _batch: tuple[nn.Module, QuantizerBatch] | None = None

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
        self.teacher_cache: TeacherLogitsCache | None = None
        self._keeps_integers = False
        self._kept_integers: IntegerInterpreter | None = None
        self.register_buffer("is_calibrated", torch.tensor(False))
        # Depthwise convolutions run several times faster in channels-last format.
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy; the copy makes its own batch of quantizers."""
        return {name: value for name, value in self.__dict__.items() if name != "_batch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or copy; the state may be that of version 0.1, whose cache is left out."""
        earlier = "memo" in state
        super().__setstate__(  # type: ignore[no-untyped-call]
            {name: value for name, value in state.items() if name != "memo"}
        )
        self._known_calibrated = False
        if earlier:
            self.teacher_cache = None
        self._keeps_integers, self._kept_integers = False, None

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [N, classes] of images [N, 3, H, W], float32 values on the output's grid.

        Without gradients the arithmetic is that of an integer runtime
        (:mod:`fat.models.integer_inference`). With gradients it is fake quantization, where a few
        integers round differently.

        Raises:
            FatError: If the student is not calibrated.
        """
        self.check_calibrated()
        images = images.contiguous(memory_format=torch.channels_last)
        if not torch.is_grad_enabled() and self.quantizer_batch.all_enabled():
            return self._integers().run(images)
        with self.quantizer_batch.computed():
            logits: Tensor = self.network(images)
        return logits

    @contextmanager
    def cached_integers(self) -> Iterator[None]:
        """Context manager for inference: compute integer weights, biases and grids only once.

        Without it they are computed for every batch. Parameters, buffers and the device must not
        change inside. The logits are the same. Entered again inside, it does nothing.
        """
        if self._keeps_integers:
            yield
            return
        self._keeps_integers = True
        try:
            yield
        finally:
            self._keeps_integers, self._kept_integers = False, None

    def _integers(self) -> IntegerInterpreter:
        if not self._keeps_integers:
            return IntegerInterpreter(self.network, self.quantizer_batch)
        kept = self._kept_integers
        if kept is None:
            kept = IntegerInterpreter(self.network, self.quantizer_batch, exact_bounds=True)
            self._kept_integers = kept
        return copy.copy(kept)  # it holds the values of one pass, and threads may run several

    def compiled(self, mode: str = "default") -> Callable[[Tensor], Tensor]:
        """Return :meth:`forward` compiled by :func:`torch.compile`, for training on a GPU.

        It has to be called again after the student has moved to another device.

        Args:
            mode: Argument of :func:`torch.compile`, such as ``reduce-overhead`` for CUDA graphs.
        """
        self.quantizer_batch.values()  # builds constants, which cannot be part of the graph
        forward: Callable[[Tensor], Tensor] = torch.compile(self.forward, mode=mode)
        return forward

    @property
    def device(self) -> torch.device:
        """Device of the student's tensors."""
        return self.is_calibrated.device

    @property
    def quantizer_batch(self) -> QuantizerBatch:
        """All quantizers, to compute their steps and to project their factors together."""
        if self._batch is None or self._batch[0] is not self.network:
            batch = QuantizerBatch(self.activation_quantizers(), self.layers())
            self._batch = self.network, batch
        return self._batch[1]

    def check_calibrated(self) -> None:
        """Raise a FatError if the student is not calibrated."""
        # The buffer is read once, because reading it waits for a GPU.
        self._known_calibrated = self._known_calibrated or bool(self.is_calibrated)
        if not self._known_calibrated:
            raise FatError("The student is not calibrated. Call fat.calibrate(student, images).")

    def mark_calibrated(self) -> None:
        """State that all thresholds are set."""
        self.is_calibrated.fill_(True)
        self._known_calibrated = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = fn(torch.zeros((), device=self.device)).dtype  # of to(), half(), double(), …
        if dtype != torch.float32:
            raise FatError(
                f"A student has to stay float32, because {dtype} would change its thresholds. To "
                "train in half precision on a GPU, type "
                "fat.fit(..., trainer_options={'precision': 'bf16-mixed'})."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_calibrated = False

    def float_logits(self, images: Tensor) -> Tensor:
        """Compute the teacher's logits [N, classes] of images [N, 3, H, W], without gradients."""
        cache = self.teacher_cache
        if cache is not None and cache.is_worthwhile(images):
            return cache(images, self._teacher_logits)
        return self._teacher_logits(images)

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor) -> Tensor:
        with full_precision(images.device):
            logits: Tensor = self.teacher(images.contiguous(memory_format=torch.channels_last))
        return logits

    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """Return all activation quantizers in the order of the graph."""
        return list(self.network.get_submodule(QUANTIZERS).children())  # type: ignore[arg-type]

    def layers(self) -> list[QuantLayer]:
        """Return all quantized convolution and linear layers in the order of the graph."""
        names = [str(node.target) for node in self.network.graph.nodes if node.op == "call_module"]
        modules = (self.network.get_submodule(name) for name in names)
        return [module for module in modules if isinstance(module, QuantLayer)]

    def quantizers(self) -> Iterator[tuple[str, str, ActivationQuantizer | WeightQuantizer]]:
        """Yield (layer, ``"weight"`` or ``"activation"``, quantizer) for every quantizer."""
        for quantizer in self.activation_quantizers():
            yield quantizer.layer, "activation", quantizer
        for layer in self.layers():
            yield layer.layer, "weight", layer.weight_quantizer

    def thresholds(self) -> Iterator[Thresholds]:
        """Yield the thresholds of every quantizer."""
        for _, _, quantizer in self.quantizers():
            yield quantizer.thresholds

    def project(self) -> None:
        """Clamp all trained factors to their ranges, after an optimizer step."""
        self.quantizer_batch.project()

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of all tensors that training or bias correction may change, by name."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        state.update({f"{x.layer}.bias": x.bias for x in self.layers() if x.bias is not None})
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Restore the result of :meth:`trained_state`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
        for layer in self.layers():
            if layer.bias is not None:
                layer.bias.copy_(state[f"{layer.layer}.bias"])


def freeze(network: M) -> M:
    """Turn all parameters and buffers into non-persistent buffers, in place; set eval mode."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(dict(module.named_buffers(recurse=False)))
    return network.eval()
