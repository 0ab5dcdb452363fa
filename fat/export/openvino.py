"""The ONNX file in OpenVINO, whose own graph tells whether it computes in integers."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fat.export.base import Kernels, Runtime, Tolerance
from fat.export.onnx import Onnx, saturates
from fat.utils.errors import FatError, missing_extra

__all__ = ["OpenVino", "OpenVinoRuntime"]

INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
COMPUTING = LAYERS | {"Eltwise", "Pooling", "Reduce", "Concatenation", "Subgraph", "FakeQuantize"}


class OpenVino(Onnx):
    """The target ``openvino``: the file of :class:`fat.export.onnx.Onnx`, run by OpenVINO.

    OpenVINO rounds real values onto a grid by another formula, so pixels that lie in the middle
    between two integers may go to either.
    """

    name = "openvino"
    tolerance = Tolerance(off_by_one=0.001, ties=2**-10)

    def check(self) -> None:
        """Raise a FatError that says what to install if OpenVINO is missing."""
        if importlib.util.find_spec("openvino") is None:
            raise missing_extra(
                "openvino", "OpenVINO", "or export=onnx, which writes the same file"
            )

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open an ONNX or OpenVINO (.xml) file, ours or another's."""
        self.check()
        return OpenVinoRuntime(path, threads=threads)

    def advice(self) -> str:
        """What to do if integers differ on this machine."""
        if not saturates():
            return ""
        return (
            "This processor has AVX2 without VNNI, on which OpenVINO's sums of int8 products "
            "saturate at 16 bits: export on one with VNNI, or type quant.weight.bits=7, which "
            "leaves room for the sums."
        )


class OpenVinoRuntime:
    """A file in OpenVINO, on the CPU.

    Args:
        path: An .onnx or .xml file.
        threads: Threads that it may use; ``None`` for torch's number.

    Raises:
        FatError: If it is missing, damaged, or wants other inputs than images.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import openvino

        if not path.is_file():
            raise FatError(f"There is no file {path}.")
        options = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # what is not int8 is not to be bfloat16
        }
        self._version = str(openvino.__version__).split("-")[0]
        try:
            model = openvino.Core().read_model(path)
            self._compiled = openvino.Core().compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = (str(error).strip() or "it says nothing").splitlines()[-1][:300]
            raise FatError(
                f"OpenVINO cannot open {path}: {reason} It is damaged, or another kind of file."
            ) from error
        inputs = self._compiled.inputs
        shape = inputs[0].get_partial_shape() if len(inputs) == 1 else None
        if shape is None or len(shape) != 4 or inputs[0].element_type.get_type_name() != "f32":
            found = ", ".join(f"{i.element_type} {i.get_partial_shape()}" for i in inputs)
            raise FatError(
                f"{path} takes {found}; FAT feeds one float32 tensor of normalised images "
                "[N, 3, H, W]."
            )
        self.input_shape = tuple(int(str(d)) if d.is_static else None for d in shape)
        properties: Mapping[str, Any] = model.get_rt_info() if path.suffix != ".onnx" else {}
        self.metadata = {str(key): str(value) for key, value in properties.items()}
        if path.suffix == ".onnx":
            import onnx

            stored = onnx.load(path, load_external_data=False).metadata_props
            self.metadata = {entry.key: entry.value for entry in stored}

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"openvino {self._version}"

    def run(self, images: Tensor) -> list[Tensor]:
        """All outputs for images [N, 3, H, W], see :class:`fat.export.base.Runtime`."""
        given = np.ascontiguousarray(images.numpy())
        rows = [given] if self.input_shape[0] != 1 else [row[None] for row in given]
        parts = [[np.array(value) for value in self._compiled(row).values()] for row in rows]
        return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]

    def kernels(self) -> Kernels:
        """Operators of the graph that OpenVINO executes, with the precision it tells for each."""
        counts: Counter[str] = Counter()
        layers = integers = 0
        in_float = []
        for operator in self._compiled.get_runtime_model().get_ordered_ops():
            told = {key: str(value.value) for key, value in operator.get_rt_info().items()}
            kind, precision = told["layerType"], told["runtimePrecision"]
            if kind not in COMPUTING:
                continue
            counts[f"{kind} {precision}"] += 1
            integers += precision in INTEGERS
            if kind not in LAYERS:
                continue
            if precision in INTEGERS:
                layers += 1
            else:
                in_float.append(told.get("originalLayersNames") or kind)
        return Kernels(dict(counts.most_common()), layers, tuple(in_float), integers)
