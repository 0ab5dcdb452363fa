"""ONNX files with QuantizeLinear and DequantizeLinear, and ONNX Runtime, which fuses them.

torch's exporter writes the graph; what follows it brings it into the form that runtimes fuse:
padding belongs to its convolution, a mean over height and width is a global average pool, a
softmax stays real, and weights of 4 bits or fewer are stored in 4.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fat.export.base import Kernels, Program, Runtime, Tolerance
from fat.export.lowering import Style
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_atomic

__all__ = ["OPSETS", "Onnx", "OnnxRuntime"]

Array = np.ndarray[Any, Any]
OPSETS = range(18, 24)
"""Versions of ONNX' operators that can be asked for; torch's exporter starts at 18."""
INT4_OPSET = 21
"""The first that has 4-bit integers."""
INTEGER_LAYERS = {
    "QLinearConv": 3,
    "QGemm": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}
"""Integer kernels, and which of their inputs is the weight: attention multiplies activations."""
FLOAT_LAYERS = frozenset(
    {
        "Conv",
        "FusedConv",
        "NhwcConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
        "MatMulNBits",
    }
)


class Onnx:
    """The target ``onnx``.

    Activations are uint8, weights int8, or int4 where 4 bits or fewer are asked for, biases int32;
    the batch is dynamic, height and width are fixed.

    Args:
        opset: Version of ONNX' operators, 18 to 23.

    Raises:
        FatError: For another opset.
    """

    name = "onnx"
    suffix = ".onnx"
    style = Style(torch.uint8, channel_clip="sums")
    tolerance = Tolerance(off_by_one=0.001, ties=2**-14, sqnr_db=40.0, agreement=99.5)

    def __init__(self, opset: int = INT4_OPSET) -> None:
        if opset not in OPSETS:
            raise FatError(
                f"ONNX opset {opset} cannot be written; allowed are {OPSETS[0]} to {OPSETS[-1]}, "
                f"as in export.opset={INT4_OPSET}."
            )
        self.opset = opset

    def check(self) -> None:
        """Nothing is missing: ONNX and its runtime come with FAT."""

    def write(self, program: Program, path: Path) -> None:
        """Write a file that gives logits, see :class:`fat.export.base.ExportBackend`."""
        model = self.build(program)
        write_atomic(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))

    def write_tapped(self, program: Program, shipped: Path, path: Path) -> None:
        """The shipped file itself, with the integers among its outputs."""
        model = onnx.load(shipped)
        for number in range(len(program.tensors)):
            model.graph.output.append(
                helper.make_tensor_value_info(_tap(number), TensorProto.UINT8, None)
            )
        write_atomic(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))

    def advice(self) -> str:
        """Nothing is known that makes integers differ."""
        return ""

    def build(self, program: Program) -> onnx.ModelProto:
        """The model, checked by ONNX' own checker and shape inference.

        Raises:
            FatError: If an operator has no form in ONNX, or 4-bit weights meet an older opset.
        """
        model = self._exported(program)
        graph = model.graph
        del graph.output[1:]
        _merge_padding(graph)
        _global_pools(graph)
        _real_softmaxes(graph)
        bits = dict(program.weight_bits)
        copies = _own_weights(graph)
        bits |= {copy: bits[weight] for copy, weight in copies.items() if weight in bits}
        self._store_narrow_weights(graph, bits)
        _name_layers(graph)
        _strip(graph)
        model.producer_name, model.doc_string = "FAT", ""
        del model.metadata_props[:]
        helper.set_model_props(model, dict(program.metadata))
        try:
            onnx.checker.check_model(model, full_check=True)
        except onnx.checker.ValidationError as error:
            raise _unwritable(error) from error
        return model

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open an ONNX file, ours or another's, in ONNX Runtime."""
        return OnnxRuntime(path, threads=threads)

    def _exported(self, program: Program) -> onnx.ModelProto:
        outputs = ["logits", *(_tap(number) for number in range(len(program.tensors)))]
        try:
            with _quiet():
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
        except Exception as error:  # torch wraps whatever failed in errors of its own
            raise _unwritable(error) from error
        assert exported is not None
        model: onnx.ModelProto = exported.model_proto
        return model

    def _store_narrow_weights(self, graph: onnx.GraphProto, bits: Mapping[str, int]) -> None:
        """Weights of at most 4 bits as int4, cast to the int8 that integer kernels read.

        A runtime folds the cast when it opens the file. Dequantizing int4 itself would leave a
        float convolution: no runtime has kernels for it.
        """
        if self.opset < INT4_OPSET:  # stored as int8, which holds the same integers
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


class OnnxRuntime:
    """An ONNX file in ONNX Runtime, on the CPU.

    Processors with AVX2 but without VNNI saturate sums of two int8 products at 16 bits
    (``vpmaddubsw``); there ONNX Runtime is told to compute exactly
    (``session.x64quantprecision``), and so must be whoever runs the file there.

    Args:
        path: The file, ours or another's.
        threads: Threads that it may use; ``None`` for torch's number.

    Raises:
        FatError: If it is missing, damaged, or wants other inputs than images.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if not path.is_file():
            raise FatError(f"There is no file {path}.")
        self.path = path
        self.threads = threads or torch.get_num_threads()
        self._session = self._open()
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise FatError(
                f"{path} takes {found}; FAT feeds one float32 tensor of normalised images "
                "[N, 3, H, W]."
            )
        self._input = inputs[0]

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"onnxruntime {onnxruntime.__version__}"

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts kept in the file, by name."""
        found: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """[N, 3, H, W], ``None`` where any size will do."""
        return tuple(size if isinstance(size, int) else None for size in self._input.shape)

    def run(self, images: Tensor) -> list[Tensor]:
        """All outputs for images [N, 3, H, W], see :class:`fat.export.base.Runtime`."""
        given = np.ascontiguousarray(images.numpy())
        fixed = self.input_shape[0]
        if fixed is None or fixed == len(given):
            parts = [self._session.run(None, {self._input.name: given})]
        elif fixed == 1:
            parts = [self._session.run(None, {self._input.name: row[None]}) for row in given]
        else:
            raise FatError(
                f"{self.path} takes batches of {fixed} images; type data.batch_size={fixed}."
            )
        return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]

    def kernels(self) -> Kernels:
        """Operators of the graph that ONNX Runtime has made of the file."""
        with tempfile.TemporaryDirectory(prefix="fat-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._open(optimized)
            graph = onnx.load(optimized).graph
        fixed = _fixed(graph)
        counts = Counter(node.op_type for node in graph.node)
        in_float = [
            node.name or node.op_type
            for node in graph.node
            if node.op_type in FLOAT_LAYERS and fixed & set(node.input)
        ]
        return Kernels(
            dict(counts.most_common()),
            sum(
                node.input[INTEGER_LAYERS[node.op_type]] in fixed
                for node in graph.node
                if node.op_type in INTEGER_LAYERS
            ),
            tuple(in_float),
            sum(n for kind, n in counts.items() if kind in INTEGER_LAYERS or "QLinear" in kind),
        )

    def _open(self, optimized: Path | None = None) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors; a file of our own writing gives no reason to warn
        if saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            return onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base class
            raise FatError(
                f"ONNX Runtime cannot open {self.path}: {first_line(error)} It is damaged, or "
                "another kind of file."
            ) from error


def saturates() -> bool:
    """Whether int8 products saturate on this processor, so that runtimes must be told to be exact.

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


def _tap(number: int) -> str:
    return f"integers.{number}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its notes on its own workings."""
    chatty = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in chatty}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _unwritable(error: BaseException) -> FatError:
    """The exporter's error in one line, with the operator that it does not know."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(link) for link in chain)
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    what = (
        f"the operator {unknown[1]} has no form in ONNX"
        if unknown
        else f"torch's exporter says: {first_line(chain[-1])}"
    )
    return FatError(
        f"The network cannot be written as ONNX: {what}. Please report it with the network's name."
    )


# ------------------------------------------------------------------------------- what is rewritten


def _layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


def _producer(graph: onnx.GraphProto, value: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if value in node.output), None)


def _initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    return next((tensor for tensor in graph.initializer if tensor.name == name), None)


def _fixed(graph: onnx.GraphProto) -> set[str]:
    """Values that no image changes: weights, and what is computed of them alone."""
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in the order of computation
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    return fixed


def _packed(values: Array) -> bytes:
    """Integers of 4 bits, two in a byte, the first in the lower half, as ONNX has them."""
    halves = np.pad(values.astype(np.uint8).ravel() & 15, (0, values.size % 2))
    packed: bytes = (halves[0::2] | halves[1::2] << 4).tobytes()
    return packed


def _merge_padding(graph: onnx.GraphProto) -> None:
    """Zeros before a convolution become its own padding, which may be uneven in ONNX."""
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        pad = _producer(graph, node.input[0])
        if pad is None or pad.op_type != "Pad" or _mode(pad) != "constant":
            continue
        amounts = _initializer(graph, pad.input[1])
        assert amounts is not None
        before, after = numpy_helper.to_array(amounts).reshape(2, 4)
        if before.min() < 0 or after.min() < 0:  # cuts rows off
            continue
        assert not before[:2].any()  # only height and width are ever padded
        assert not after[:2].any()
        sides = [int(n) for n in (*before[2:], *after[2:])]
        attribute = next(a for a in node.attribute if a.name == "pads")
        attribute.ints[:] = [a + b for a, b in zip(attribute.ints, sides, strict=True)]
        node.input[0] = pad.input[0]
        if not any(pad.output[0] in other.input for other in graph.node):
            graph.node.remove(pad)


def _mode(pad: onnx.NodeProto) -> str:
    """With what a Pad pads: ``constant`` where it does not say."""
    return next((a.s.decode() for a in pad.attribute if a.name == "mode"), "constant")


def _global_pools(graph: onnx.GraphProto) -> None:
    """Means over height and width as GlobalAveragePool, which has an integer kernel."""
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


def _real_softmaxes(graph: onnx.GraphProto) -> None:
    """Softmaxes onto a grid as Exp of LogSoftmax, which ONNX Runtime leaves in real values.

    Its integer softmax computes with the whole number below 1 / scale: on a grid of scale 1/255.9,
    or of float32's 1/255, its results are up to one step too small.
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
    """Give each layer that reads a dequantized weight or bias its own DequantizeLinear."""
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


def _own_weights(graph: onnx.GraphProto) -> dict[str, str]:
    """Give each layer a weight and a zero point of its own.

    The exporter stores equal tensors once. ONNX Runtime turns int8 weights into uint8 for x64
    without VNNI one by one, and fails where layers share them.

    Returns:
        The names of the weights that became copies, and of what they are copies of.
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
        if zero.data_type == TensorProto.INT32:  # a bias has none: it is 0 by definition
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
    """stem_1.suffix, or the first number that is not taken."""
    numbered = (f"{stem}_{number}{suffix}" for number in itertools.count(1))
    return next(name for name in numbered if name not in taken)


def _strip(graph: onnx.GraphProto) -> None:
    """Leave out the exporter's notes on where each node came from: half a megabyte of paths."""
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")


def _name_layers(graph: onnx.GraphProto) -> None:
    """Layers carry the names that they have in the network."""
    taken: set[str] = set()
    for node in _layers(graph):
        dequantize = _producer(graph, node.input[1])
        stored = node.input[1] if dequantize is None else dequantize.input[0]
        name = re.sub(r"\.weight(\.int8)?$", "", stored)
        if name != stored:  # in a float file, layers may share a weight
            node.name = name if name not in taken else _free(name, "", taken)
            taken.add(node.name)
