"""ONNX files in QDQ format, and ONNX Runtime.

torch's exporter writes the graph. The passes below bring it into the form that runtimes fuse:
padding is merged into convolutions, means over height and width become global average pools,
softmaxes stay in float, and weights of at most 4 bits are stored as int4.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fat.export.base import ExportBackend, Kernels, Program, Runtime, Tolerance, quiet
from fat.export.lowering import LoweringStyle
from fat.utils.errors import FatError, first_line

__all__ = ["OPSETS", "Onnx", "OnnxRuntime"]

Array = np.ndarray[Any, Any]
OPSETS = range(18, 24)
"""Supported ONNX opsets; torch's exporter starts at 18."""
INT4_OPSET = 21
"""First opset with 4-bit integers."""
INTEGER_LAYERS = {
    "QLinearConv": 3,
    "QGemm": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
"""Integer kernels and the index of their weight input: attention multiplies two activations."""
FLOAT_LAYERS = frozenset({"Conv", "FusedConv", "NhwcConv", "ConvTranspose"}) | frozenset(
    {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"}
)


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime.

    On processors with AVX2 but without VNNI, sums of two int8 products saturate at 16 bits
    (``vpmaddubsw``). There the session option ``session.x64quantprecision`` makes ONNX Runtime
    exact; deployments on such processors need the same option.
    """

    title = "ONNX Runtime"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        self._session = self._open()
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            raise self.unsupported_input(", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs))
        self._input = inputs[0].name
        self.input_shape = tuple(n if isinstance(n, int) else None for n in inputs[0].shape)
        self.metadata = self._session.get_modelmeta().custom_metadata_map

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run one batch."""
        results = self._session.run(None, {self._input: np.ascontiguousarray(images.numpy())})
        return [torch.from_numpy(result) for result in results]

    def kernels(self) -> Kernels:
        """Return the operators of the graph that ONNX Runtime optimized."""
        with tempfile.TemporaryDirectory(prefix="fat-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._open(optimized)
            graph = onnx.load(optimized).graph
        constants = _constants(graph)
        counts = Counter(node.op_type for node in graph.node)
        in_float = [
            node.name or node.op_type
            for node in graph.node
            if node.op_type in FLOAT_LAYERS and constants & set(node.input)
        ]
        return Kernels(
            dict(counts.most_common()),
            sum(
                node.input[INTEGER_LAYERS[node.op_type]] in constants
                for node in graph.node
                if node.op_type in INTEGER_LAYERS
            ),
            tuple(in_float),
            sum(n for kind, n in counts.items() if kind in INTEGER_LAYERS or "QLinear" in kind),
        )

    def _open(self, optimized: Path | None = None) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors
        if saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            return onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class
            raise self.cannot_open(first_line(error)) from error


class Onnx(ExportBackend):
    """Export target ``onnx``.

    Activations are uint8, weights int8 (int4 at 4 bits or fewer), biases int32. The batch size is
    dynamic, height and width are fixed.

    Args:
        opset: ONNX opset, 18 to 23.

    Raises:
        FatError: For another opset.
    """

    name = "onnx"
    title = "ONNX Runtime"
    suffix = ".onnx"
    opens: ClassVar[tuple[str, ...]] = (".onnx",)
    runtime: ClassVar[type[Runtime]] = OnnxRuntime
    style = LoweringStyle(torch.uint8, channel_clip="sums")
    tolerance = Tolerance(off_by_one=0.001, ties=2**-14, sqnr_db=40.0, agreement=99.5)

    def __init__(self, opset: int = INT4_OPSET) -> None:
        if opset not in OPSETS:
            raise FatError(
                f"ONNX opset {opset} is not supported; allowed are {OPSETS[0]} to {OPSETS[-1]}, "
                f"as in export.opset={INT4_OPSET}."
            )
        self.opset = opset

    def convert(self, program: Program) -> bytes:
        """Convert a network, see :class:`fat.export.base.ExportBackend`."""
        return bytes(self.build(program).SerializeToString())

    def convert_with_integers(self, program: Program, shipped: Path) -> bytes:
        """Add the integers to the outputs of the shipped file."""
        model = onnx.load(shipped)
        for number in range(len(program.tensors)):
            model.graph.output.append(
                helper.make_tensor_value_info(_output_name(number), TensorProto.UINT8, None)
            )
        return bytes(model.SerializeToString())

    def build(self, program: Program) -> onnx.ModelProto:
        """Build the model and validate it with ONNX's checker and shape inference.

        Raises:
            FatError: If ONNX lacks an operator.
        """
        model = self._exported(program)
        graph = model.graph
        del graph.output[1:]
        _merge_padding(graph)
        _use_global_pools(graph)
        _keep_softmaxes_in_float(graph)
        bits = dict(program.weight_bits)
        copies = _unshare_weights(graph)
        bits |= {copy: bits[weight] for copy, weight in copies.items() if weight in bits}
        self._store_as_int4(graph, bits)
        _name_layers(graph)
        _strip(graph)
        model.producer_name, model.doc_string = "FAT", ""
        del model.metadata_props[:]
        helper.set_model_props(model, dict(program.metadata))
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.checker.ValidationError as error:
            raise self._failed(error) from error
        return model

    def _exported(self, program: Program) -> onnx.ModelProto:
        outputs = ["logits", *(_output_name(number) for number in range(len(program.tensors)))]
        try:
            with quiet():
                exported = torch.onnx.export(
                    program.network,
                    (program.example,),
                    dynamo=True,
                    opset_version=self.opset,
                    input_names=["input"],
                    output_names=outputs,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    verbose=False,
                )
        except Exception as error:  # torch wraps the original error in its own types
            raise self._failed(error) from error
        assert exported is not None
        model: onnx.ModelProto = exported.model_proto
        return model

    def _failed(self, error: BaseException) -> FatError:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        unknown = re.search(
            r"No ONNX function found for <OpOverload\(op='([^']+)'", "\n".join(map(str, chain))
        )
        return self.cannot_write(unknown and unknown[1], first_line(chain[-1]))

    def _store_as_int4(self, graph: onnx.GraphProto, bits: Mapping[str, int]) -> None:
        """Store weights of at most 4 bits as int4, cast to the int8 that integer kernels read.

        Runtimes fold the cast when they open the file. Dequantizing int4 directly would leave a
        float convolution, as no runtime has int4 kernels for it.
        """
        if self.opset < INT4_OPSET:
            return
        for node in _layers(graph):
            dequantize = _producer(graph, node.input[1])
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            stored = _initializer(graph, dequantize.input[0])
            if stored is None or bits.get(stored.name, 8) > 4:
                continue
            values = numpy_helper.to_array(stored)
            narrow = helper.make_tensor(
                f"{stored.name}.int4", TensorProto.INT4, values.shape, _packed(values), raw=True
            )
            cast = helper.make_node(
                "Cast", [narrow.name], [f"{stored.name}.int8"], to=TensorProto.INT8
            )
            graph.node.insert(0, cast)
            dequantize.input[0] = cast.output[0]
            graph.initializer.remove(stored)
            graph.initializer.append(narrow)


def saturates() -> bool:
    """Return whether sums of int8 products saturate on this processor by default.

    Source: ONNX Runtime's documentation on quantization, "When and why do I need to try U8U8?".
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and not _vnni()


def _vnni() -> bool:
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    if probe is not None and probe():
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _output_name(number: int) -> str:
    return f"integers.{number}"


# ------------------------------------------------------------------------------------ graph passes


def _layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


def _producer(graph: onnx.GraphProto, value: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if value in node.output), None)


def _initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    return next((tensor for tensor in graph.initializer if tensor.name == name), None)


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Return the names of weights and of values computed from weights alone."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in topological order
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
    return constants


def _packed(values: Array) -> bytes:
    """Pack 4-bit integers in ONNX's layout: two per byte, the first in the lower half."""
    halves = np.pad(values.astype(np.uint8).ravel() & 15, (0, values.size % 2))
    packed: bytes = (halves[0::2] | halves[1::2] << 4).tobytes()
    return packed


def _merge_padding(graph: onnx.GraphProto) -> None:
    """Merge zero padding into the convolution after it, which may be asymmetric in ONNX."""
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        pad = _producer(graph, node.input[0])
        if pad is None or pad.op_type != "Pad" or _mode(pad) != "constant":
            continue
        amounts = _initializer(graph, pad.input[1])
        assert amounts is not None
        before, after = numpy_helper.to_array(amounts).reshape(2, 4)
        if before.min() < 0 or after.min() < 0:  # negative padding crops
            continue
        assert not before[:2].any()  # only height and width are padded
        assert not after[:2].any()
        sides = [int(n) for n in (*before[2:], *after[2:])]
        attribute = next(a for a in node.attribute if a.name == "pads")
        attribute.ints[:] = [a + b for a, b in zip(attribute.ints, sides, strict=True)]
        node.input[0] = pad.input[0]
        if not any(pad.output[0] in other.input for other in graph.node):
            graph.node.remove(pad)


def _mode(pad: onnx.NodeProto) -> str:
    """Return the mode of a Pad node, ``constant`` by default."""
    return next((a.s.decode() for a in pad.attribute if a.name == "mode"), "constant")


def _use_global_pools(graph: onnx.GraphProto) -> None:
    """Replace means over height and width by GlobalAveragePool, which has an integer kernel."""
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes = _initializer(graph, node.input[1])
        if axes is None or ranks.get(node.input[0]) != 4:
            continue
        if sorted(int(axis) % 4 for axis in numpy_helper.to_array(axes)) != [2, 3]:
            continue
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        pooled = node.output[0] if keep else f"{node.output[0]}.pooled"
        pool = helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name)
        following = []
        if not keep:
            following = [helper.make_node("Flatten", [pooled], [node.output[0]], axis=1)]
        graph.node.remove(node)
        for offset, new in enumerate([pool, *following]):
            graph.node.insert(position + offset, new)


def _keep_softmaxes_in_float(graph: onnx.GraphProto) -> None:
    """Replace quantized softmaxes by Exp(LogSoftmax), which ONNX Runtime computes in float.

    Its integer softmax uses floor(1 / scale): on a grid of scale 1/255.9, or of float32's 1/255,
    its results are up to one step too small.
    """
    for place in range(len(graph.node) - 1, -1, -1):
        node = graph.node[place]
        onto = [n for n in graph.node if node.output[0] in n.input]
        if node.op_type != "Softmax" or not any(n.op_type == "QuantizeLinear" for n in onto):
            continue
        result, node.op_type = node.output[0], "LogSoftmax"
        node.output[0] = f"{result}.log"
        graph.node.insert(
            place + 1, helper.make_node("Exp", [node.output[0]], [result], f"{node.name}.exp")
        )


def _split_dequantized(graph: onnx.GraphProto) -> None:
    """Give each reader of a dequantized weight or bias a separate DequantizeLinear."""
    for place in range(len(graph.node) - 1, -1, -1):
        node = graph.node[place]
        if node.op_type != "DequantizeLinear" or _initializer(graph, node.input[0]) is None:
            continue
        value = node.output[0]
        reads = [
            (i, other) for other in graph.node for i, n in enumerate(other.input) if n == value
        ]
        for number, (index, reader) in enumerate(reads[1:], 1):
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            twin.name, twin.output[0] = f"{node.name}.{number}", f"{value}.{number}"
            reader.input[index] = twin.output[0]
            graph.node.insert(place, twin)


def _unshare_weights(graph: onnx.GraphProto) -> dict[str, str]:
    """Give each layer a separate weight and zero point.

    The exporter stores equal tensors once. ONNX Runtime converts int8 weights to uint8 one by one
    on x64 without VNNI, and fails where layers share them.

    Returns:
        Names of the copies, and of the weights that they were copied from.
    """
    copies: dict[str, str] = {}
    seen: set[str] = set()
    _split_dequantized(graph)
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3:
            continue
        weight, zero = (_initializer(graph, name) for name in (node.input[0], node.input[2]))
        if weight is None or zero is None:
            continue
        if zero.data_type == TensorProto.INT32:  # biases need none: it is 0 by definition
            del node.input[2:]
            continue
        if weight.name in seen:
            stem = weight.name.removesuffix(".weight")
            taken = {tensor.name for tensor in graph.initializer}
            node.input[0] = _copy(graph, weight, _free(stem, weight.name[len(stem) :], taken))
            copies[node.input[0]] = weight.name
        seen.add(node.input[0])
        node.input[2] = _copy(graph, zero, f"{node.input[0]}_zero")
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return copies


def _copy(graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str) -> str:
    copied = graph.initializer.add()
    copied.CopyFrom(tensor)
    copied.name = name
    return name


def _free(stem: str, suffix: str, taken: Set[str]) -> str:
    """Return the first of stem_1.suffix, stem_2.suffix, … that is not taken."""
    numbered = (f"{stem}_{number}{suffix}" for number in itertools.count(1))
    return next(name for name in numbered if name not in taken)


def _strip(graph: onnx.GraphProto) -> None:
    """Remove the exporter's provenance notes: half a megabyte of paths."""
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")


def _name_layers(graph: onnx.GraphProto) -> None:
    """Name layers as in the network."""
    taken: set[str] = set()
    for node in _layers(graph):
        dequantize = _producer(graph, node.input[1])
        stored = node.input[1] if dequantize is None else dequantize.input[0]
        name = re.sub(r"\.weight(\.int8)?$", "", stored)
        if name != stored:  # layers of a float file may share a weight
            node.name = name if name not in taken else _free(name, "", taken)
            taken.add(node.name)
