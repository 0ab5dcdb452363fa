"""The ONNX file in OpenVINO."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fat.export.base import Kernels, Runtime, Tolerance
from fat.export.onnx import Onnx, saturates

__all__ = ["OpenVino", "OpenVinoRuntime"]

INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
COMPUTING = LAYERS | {"Eltwise", "Pooling", "Reduce", "Concatenation", "Subgraph", "FakeQuantize"}


@functools.cache
def _core() -> Any:
    """OpenVINO's core. One per process: further ones crash on some processors."""
    import openvino

    return openvino.Core()


class OpenVinoRuntime(Runtime):
    """An ONNX or OpenVINO (.xml) file in OpenVINO."""

    title = "OpenVINO"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",  # no bfloat16 for float operations
        }
        try:
            model = _core().read_model(path)
            self._compiled = _core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = (str(error).strip() or "unknown error").splitlines()[-1][:300]
            raise self.cannot_open(reason) from error
        inputs = self._compiled.inputs
        shape = inputs[0].get_partial_shape() if len(inputs) == 1 else None
        if shape is None or len(shape) != 4 or inputs[0].element_type.get_type_name() != "f32":
            raise self.unsupported_input(
                ", ".join(f"{i.element_type} {i.get_partial_shape()}" for i in inputs)
            )
        self.input_shape = tuple(int(str(d)) if d.is_static else None for d in shape)
        self.metadata = _metadata(path, model)

    @property
    def name(self) -> str:
        """The runtime and its version."""
        import openvino

        return f"openvino {str(openvino.__version__).split('-')[0]}"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run one batch."""
        results = self._compiled(np.ascontiguousarray(images.numpy()))
        return [torch.from_numpy(np.array(value)) for value in results.values()]

    def kernels(self) -> Kernels:
        """Return the operators that OpenVINO executes, with the precision of each."""
        counts: Counter[str] = Counter()
        layers = integers = 0
        in_float = []
        for operator in self._compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(value.value) for key, value in operator.get_rt_info().items()}
            kind, precision = info["layerType"], info["runtimePrecision"]
            if kind not in COMPUTING:
                continue
            counts[f"{kind} {precision}"] += 1
            integers += precision in INTEGERS
            if kind not in LAYERS:
                continue
            if precision in INTEGERS:
                layers += 1
            else:
                in_float.append(info.get("originalLayersNames") or kind)
        return Kernels(dict(counts.most_common()), layers, tuple(in_float), integers)


def _metadata(path: Path, model: Any) -> Mapping[str, str]:
    if path.suffix != ".onnx":
        return {str(key): str(value) for key, value in model.get_rt_info().items()}
    import onnx

    stored = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key: entry.value for entry in stored}


class OpenVino(Onnx):
    """Export target ``openvino``: the file of :class:`fat.export.onnx.Onnx`, run by OpenVINO.

    OpenVINO rounds real values with another formula, so pixels in the middle between two integers
    may be rounded to either.
    """

    name = "openvino"
    title = "OpenVINO"
    opens = (".onnx", ".xml")
    modules = ("openvino",)
    runtime: ClassVar[type[Runtime]] = OpenVinoRuntime
    tolerance = Tolerance(off_by_one=0.001, ties=2**-10)
    alternative = "or export=onnx, which writes the same file"

    def mismatch_hint(self) -> str:
        """Return advice for integers that differ on this machine."""
        if not saturates():
            return ""
        return (
            "This processor has AVX2 without VNNI, on which OpenVINO's sums of int8 products "
            "saturate at 16 bits: export on a processor with VNNI, or type quant.weight.bits=7, "
            "which leaves headroom for the sums."
        )
