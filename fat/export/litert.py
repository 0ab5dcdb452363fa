"""TensorFlow Lite files for phones and microcontrollers, run by LiteRT.

litert_torch writes the graph; what follows it makes the file what mobile engineers expect: images
[1, H, W, 3], no transposes between two layouts, tensors that carry the network's names.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fat.export.base import Kernels, Program, Runtime, Tolerance
from fat.export.lowering import Style, in_order
from fat.utils.errors import FatError, first_line, missing_extra
from fat.utils.io import write_atomic

__all__ = ["LiteRT", "LiteRTRuntime"]

IDENTIFIER = b"TFL3"
"""Bytes 4 to 7 of every file."""
LAYERS = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
)
SAME_PLACE = frozenset({"PAD", "PADV2", "MAXIMUM", "MINIMUM", "QUANTIZE", "DEQUANTIZE"})
"""Operators that can be done before a transpose instead of after it."""
INEXACT = frozenset({"HARD_SWISH", "LEAKY_RELU", "AVERAGE_POOL_2D", "QUANTIZE", "SOFTMAX"})
"""Operators whose integer kernels put up to 15 % of the integers a step off.

Hard swish has 16 bits for intermediate results, and XNNPACK lacks it, which makes MobileNet-v3
slower than in float; XNNPACK's leaky ReLU and int8 → int8 multiply with 8 fractional bits; pools
keep their input's grid, so that the converter brings their input onto the result's; softmax has no
other step than 1/256.
"""
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
Array = np.ndarray[Any, Any]

_OPS: Any = torch.ops.quantized_decomposed


class LiteRT:
    """The target ``litert``.

    Activations and weights are int8, biases int32; the file takes one image [1, H, W, 3]. Integers
    of weights that have fewer bits are stored in 8.

    Args:
        integer_io: Whether the file takes and gives int8, on the grids that its tensors tell,
            instead of float32. A float network has no grids, and keeps its floats.
    """

    name = "litert"
    suffix = ".tflite"
    style = Style(torch.int8, bias="float", padding="quantized")
    tolerance = Tolerance(off_by_one=0.001)

    def __init__(self, integer_io: bool = False) -> None:
        self.integer_io = integer_io

    def check(self) -> None:
        """Raise a FatError that says what to install if LiteRT or its converter is missing."""
        for module in ("ai_edge_litert", "litert_torch"):
            if importlib.util.find_spec(module) is None:
                raise missing_extra("litert", "LiteRT")

    def write(self, program: Program, path: Path) -> None:
        """Write a file that gives logits, see :class:`fat.export.base.ExportBackend`."""
        self.check()
        file = _File(_converted(program))
        file.name_integers(program)
        file.tidy()
        file.round_once()
        file.remove_unread()
        if program.tensors and not self.integer_io:
            file.float_ends()
        file.describe(program.metadata)
        content = file.packed()
        write_atomic(path, lambda temporary: temporary.write_bytes(content))

    def write_tapped(self, program: Program, shipped: Path, path: Path) -> None:
        """The shipped file itself, with the integers among its outputs, as [N, C, H, W]."""
        file = _File(shipped.read_bytes())
        with torch.no_grad():
            integers = program.network(program.example[:1])[1:]
        file.tell(program, [tuple(tensor.shape) for tensor in integers])
        content = file.packed()
        write_atomic(path, lambda temporary: temporary.write_bytes(content))

    def advice(self) -> str:
        """Nothing is known that makes integers differ."""
        return ""

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open a .tflite file, ours or another's."""
        self.check()
        return LiteRTRuntime(path, threads=threads)


class LiteRTRuntime:
    """A .tflite file in LiteRT, on the CPU.

    Files of others may take [N, 3, H, W] or [N, H, W, 3], float32, int8 or uint8.

    Args:
        path: The file.
        threads: Threads that it may use; ``None`` for torch's number.

    Raises:
        FatError: If it is missing, damaged, or wants other inputs than images.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        if not path.is_file():
            raise FatError(f"There is no file {path}.")
        self.path = path
        content = path.read_bytes()
        try:
            self._file = _File(content)  # LiteRT itself would crash on half a file
        except (ValueError, IndexError, struct.error, TypeError, AttributeError) as error:
            raise _unreadable(path, error) from error
        from ai_edge_litert import interpreter

        try:
            with _quiet():
                self._interpreter = interpreter.Interpreter(
                    model_content=content, num_threads=threads or torch.get_num_threads()
                )
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise _unreadable(path, error) from error
        inputs = self._interpreter.get_input_details()
        shape = tuple(int(size) for size in inputs[0]["shape_signature"]) if inputs else ()
        types = (np.float32, np.int8, np.uint8)
        if (
            len(inputs) != 1
            or len(shape) != 4
            or 3 not in (shape[1], shape[3])
            or inputs[0]["dtype"] not in types
        ):
            found = ", ".join(
                f"{i['name']} {np.dtype(i['dtype'])} {i['shape_signature'].tolist()}"
                for i in inputs
            )
            raise FatError(
                f"{path} takes {found or 'nothing'}; FAT feeds one float32, int8 or uint8 tensor "
                "of normalised images, [N, H, W, 3] or [N, 3, H, W]."
            )
        self._input = inputs[0]
        self._outputs = self._interpreter.get_output_details()
        self._channels_last = shape[3] == 3
        if self._channels_last:
            shape = tuple(shape[axis] for axis in TO_NCHW)
        self.input_shape = tuple(size if size > 0 else None for size in shape)

    @property
    def name(self) -> str:
        """The runtime and its version."""
        from importlib.metadata import version

        return f"litert {version('ai-edge-litert')}"

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts kept in the file, by name."""
        return self._file.metadata()

    def run(self, images: Tensor) -> list[Tensor]:
        """All outputs for images [N, 3, H, W], see :class:`fat.export.base.Runtime`."""
        given = images.numpy()
        if self._channels_last:
            given = given.transpose(TO_NHWC)
        given = np.ascontiguousarray(_onto(self._input, given))
        fixed = self.input_shape[0]
        if None in self.input_shape:
            self._interpreter.resize_tensor_input(self._input["index"], given.shape)
            self._interpreter.allocate_tensors()
            fixed = len(given)
        if len(given) % (fixed or 1):
            raise FatError(
                f"{self.path} takes batches of {fixed} images; type data.batch_size={fixed}."
            )
        parts = [self._invoke(part) for part in np.split(given, len(given) // (fixed or 1))]
        logits, *others = (np.concatenate(column) for column in zip(*parts, strict=True))
        return [torch.from_numpy(x) for x in (_real(self._outputs[0], logits), *others)]

    def kernels(self) -> Kernels:
        """Operators of the file with the types that they read and write."""
        return self._file.kernels()

    def _invoke(self, batch: Array) -> list[Array]:
        self._interpreter.set_tensor(self._input["index"], batch)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(output["index"]) for output in self._outputs]


def _onto(details: Mapping[str, Any], images: Array) -> Array:
    """Images in the type that a file takes."""
    if details["dtype"] == np.float32:
        return images
    scale, zero_point = details["quantization"]
    info = np.iinfo(details["dtype"])
    if scale == 0.0:
        raise FatError(
            f"The file takes {np.dtype(details['dtype'])} and does not tell its step and zero "
            "point, so FAT cannot bring images onto its grid."
        )
    integers = np.rint(images / np.float32(scale)) + zero_point
    clipped: Array = integers.clip(info.min, info.max).astype(details["dtype"])
    return clipped


def _real(details: Mapping[str, Any], values: Array) -> Array:
    """Logits of any type as float32."""
    scale, zero_point = details["quantization"]
    if values.dtype == np.float32 or scale == 0.0:
        return values.astype(np.float32)
    real: Array = (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
    return real


# ---------------------------------------------------------------------------------- what is written


def _converted(program: Program) -> bytes:
    """The file that litert_torch makes; its outputs are the logits, then every activation."""
    network = _spelled(program)
    images = program.example[:1].permute(TO_NHWC).contiguous()
    try:
        with _quiet():
            import litert_torch
            from litert_torch.quantize import pt2e_quantizer
            from litert_torch.quantize.quant_config import QuantConfig

            # No quantizer runs: this tells the converter to fuse what stands in the graph.
            scheme = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
            config = QuantConfig(pt2e_quantizer.PT2EQuantizer().set_global(scheme))
            converted = litert_torch.convert(
                network, (images,), quant_config=config if program.tensors else None
            )
            content: bytes = converted.model_content()
            return content
    except Exception as error:  # the converter's passes raise whatever they meet
        raise _unwritable(error) from error


def _spelled(program: Program) -> fx.GraphModule:
    """The network in the words that litert_torch knows.

    It takes images [N, H, W, 3]; constants are real values that pass quantize and dequantize;
    bounds are operations on real values; every reader of a tensor has a dequantize of its own; the
    results after the logits are real values. Tensors are contiguous: of others litert_torch makes
    copies, which it tells apart by their addresses alone, though freed memory is used again.
    """
    network = in_order(program.network)
    graph = network.graph
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        channels_first = graph.call_function(torch.permute, (images, TO_NCHW))
    images.replace_all_uses_with(channels_first, lambda user: user is not channels_first)
    for node in list(graph.nodes):
        if _is_dequantize(node) and node.args[0].op == "get_attr":
            _real_constant(network, node, program.weight_bits)
        elif node.target is torch.clamp and node.args[0].target is _OPS.quantize_per_tensor.default:
            _real_bounds(graph, node)
    output = graph.output_node()
    if program.tensors:
        logits, *integers = output.args[0]  # type: ignore[misc, str-unpack]
        with graph.inserting_before(output):
            values = [
                graph.call_function(
                    _OPS.dequantize_per_tensor.default,
                    (node, t.scale, t.zero_point, t.type_low, t.type_high, torch.int8),
                )
                for node, t in zip(integers, program.tensors, strict=True)
            ]
        output.args = ((logits, *values),)
    for node in [node for node in graph.nodes if _is_dequantize(node)]:
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                own = graph.node_copy(node)
            user.replace_input_with(node, own)
    graph.eliminate_dead_code()
    network.recompile()
    return network


def _is_dequantize(node: fx.Node) -> bool:
    return node.target in (_OPS.dequantize_per_tensor.default, _OPS.dequantize_per_channel.default)


def _real_constant(network: fx.GraphModule, node: fx.Node, bits: Mapping[str, int]) -> None:
    """Spell a constant as real values → quantize → dequantize, which the converter folds."""
    held = dict(network.named_buffers()) | vars(network)
    per_channel = node.target is _OPS.dequantize_per_channel.default
    name = str(node.args[0].target)  # type: ignore[union-attr]
    values = node.target(
        *(  # type: ignore[operator]
            held[arg.target] if isinstance(arg, fx.Node) else arg for arg in node.args
        )
    )
    attribute = f"{name.replace('.', '_')}_real"
    network.register_buffer(attribute, values)
    if name in bits:  # any weight is int8; fewer bits use fewer of its integers
        node.args = (*node.args[:-3], -127, 127, torch.int8)
    quantize = _OPS.quantize_per_channel if per_channel else _OPS.quantize_per_tensor
    graph = network.graph
    with graph.inserting_before(node):
        real = graph.get_attr(attribute)
        node.args = (graph.call_function(quantize.default, (real, *node.args[1:])), *node.args[1:])


def _real_bounds(graph: fx.Graph, node: fx.Node) -> None:
    """Spell a clamp as dequantize → the bounds that the type lacks → quantize."""
    quantize, low, high = node.args
    grid = quantize.args[1:]  # type: ignore[union-attr]
    scale, zero_point, type_low, type_high, _ = grid
    with graph.inserting_before(node):
        x = graph.call_function(_OPS.dequantize_per_tensor.default, (quantize, *grid))
        bounds = {
            key: (bound - zero_point) * scale  # type: ignore[operator]
            for key, bound, of_type in (("min", low, type_low), ("max", high, type_high))
            if bound != of_type
        }
        x = graph.call_function(torch.clamp, (x,), bounds)
        clipped = graph.call_function(_OPS.quantize_per_tensor.default, (x, *grid))
    node.replace_all_uses_with(clipped)
    graph.erase_node(node)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter and the runtime tell about themselves, from C++ too.

    The converter is told to decide on layouts node by node: its other way takes minutes.
    """
    settings = {"LITERT_TORCH_SHOW_PROGRESS": "n", "LAYOUT_OPTIMIZE_PARTITIONER": "GREEDY"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    streams = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _unwritable(error: BaseException) -> FatError:
    """The converter's error in one line, with the operator that it does not know."""
    unknown = re.search(r"[Ll]owering not found: (\S+)", str(error))
    what = (
        f"the operator {unknown[1]} has no form in TensorFlow Lite"
        if unknown
        else f"litert_torch says: {first_line(error)}"
    )
    return FatError(
        f"The network cannot be written for LiteRT: {what}. Please report it with the network's "
        "name, or type export=onnx."
    )


def _unreadable(path: Path, error: BaseException) -> FatError:
    return FatError(
        f"LiteRT cannot open {path}: {first_line(error)} It is damaged, or another kind of file."
    )


# --------------------------------------------------------------------------------- the file's graph


class _File:
    """A .tflite file as objects.

    Args:
        content: Its bytes.

    Raises:
        ValueError: If they are no such file; other errors if they are half of one.
    """

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        if content[4:8] != IDENTIFIER:
            raise ValueError("It does not begin as TensorFlow Lite files do.")
        self.schema = schema
        self.model = schema.ModelT.InitFromPackedBuf(content, 0)
        self.graph = self.model.subgraphs[0]
        self.kinds = _names(schema.BuiltinOperator)
        self.types = _names(schema.TensorType)

    def kind(self, operator: Any) -> str:
        """Such as ``CONV_2D``."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        # Files of before 2020 have the second field alone.
        return self.kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def packed(self) -> bytes:
        """The bytes."""
        import flatbuffers

        class Sharing(flatbuffers.Builder):  # type: ignore[misc]
            """Stores equal arrays once: zero points take 16 bytes of each filter otherwise."""

            def CreateNumpyVector(self, x: Array) -> int:  # noqa: N802
                key = (x.dtype.str, x.tobytes())
                if key not in known:
                    known[key] = super().CreateNumpyVector(x)
                return known[key]

        known: dict[tuple[str, bytes], int] = {}
        builder = Sharing(1 << 20)
        builder.Finish(self.model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def metadata(self) -> dict[str, str]:
        """Entries that are texts."""
        found = {}
        for entry in self.model.metadata or []:
            data = self.model.buffers[entry.buffer].data
            with contextlib.suppress(UnicodeDecodeError):
                found[_text(entry.name)] = bytes([] if data is None else data).decode()
        return found

    def kernels(self) -> Kernels:
        """See :class:`fat.export.base.Kernels`."""
        counts = Counter(map(self.kind, self.graph.operators))
        layers = integers = 0
        in_float = []
        for operator in self.graph.operators:
            read = [self.type(i) for i in operator.inputs if i >= 0]
            written = [self.type(i) for i in operator.outputs]
            whole = all(name.startswith(("INT", "UINT")) for name in read + written)
            integers += whole
            if self.kind(operator) not in LAYERS or not self.has_weights(operator):
                continue
            if whole:
                layers += 1
            else:
                in_float.append(_text(self.graph.tensors[operator.outputs[0]].name))
        return Kernels(dict(counts.most_common()), layers, tuple(in_float), integers)

    def type(self, tensor: int) -> str:
        """Such as ``INT8``."""
        return self.types[self.graph.tensors[tensor].type]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Sizes, none for a single value."""
        found = self.graph.tensors[tensor].shape
        return () if found is None else tuple(int(size) for size in found)

    def has_weights(self, operator: Any) -> bool:
        """Whether an operator multiplies with a constant, be it dequantized first."""
        producers = self.producers()
        tensor = int(operator.inputs[1])
        while tensor in producers and self.kind(producers[tensor]) == "DEQUANTIZE":
            tensor = int(producers[tensor].inputs[0])
        return tensor not in producers

    def producers(self) -> dict[int, Any]:
        """The operator that writes each tensor."""
        return {int(out): operator for operator in self.graph.operators for out in operator.outputs}

    def constant(self, tensor: int) -> Array:
        """An int32 constant."""
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return np.frombuffer(bytes(data), np.int32).reshape(self.shape(tensor))

    # --------------------------------------------------------------------------- what is changed

    def add_constant(self, name: str, values: Array | Sequence[int]) -> int:
        """A new int32 constant."""
        array = np.asarray(values, np.int32)
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        return self.add_tensor(name, array.shape, "INT32", buffer=len(self.model.buffers) - 1)

    def add_tensor(
        self, name: str, shape: Sequence[int], kind: str, grid: Any = None, buffer: int = 0
    ) -> int:
        """A new tensor."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.type = getattr(self.schema.TensorType, kind)
        tensor.quantization, tensor.hasRank = grid, True
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add_operator(
        self, kind: str, inputs: list[int], output: int, position: int | None = None
    ) -> None:
        """A new operator, at the end unless told."""
        operator = self.schema.OperatorT()
        operator.inputs, operator.outputs = inputs, [output]
        operator.opcodeIndex = self._code(kind)
        at = len(self.graph.operators) if position is None else position
        self.graph.operators.insert(at, operator)

    def _code(self, kind: str) -> int:
        number = getattr(self.schema.BuiltinOperator, kind)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode = number
        code.deprecatedBuiltinCode = min(number, 127)  # as the schema wants it
        code.version = 2 if kind in ("QUANTIZE", "DEQUANTIZE", "TRANSPOSE") else 1  # int8
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def name_integers(self, program: Program) -> None:
        """Name the tensors that hold the integers, then give the logits alone."""
        outputs = self.signature_outputs()
        producers = self.producers()
        named: dict[int, list[str]] = {}
        for tensor, grid in zip(outputs[1:], program.tensors, strict=True):
            place = tensor
            while place in producers and self.kind(producers[place]) in (
                "DEQUANTIZE",
                "TRANSPOSE",
                "RESHAPE",
            ):
                place = int(producers[place].inputs[0])
            named.setdefault(place, []).append(grid.key)
        for place, keys in named.items():
            self.graph.tensors[place].name = ";".join(keys)
        logits = outputs[0]
        if program.tensors and self.type(logits) == "FLOAT32":
            logits = int(producers[logits].inputs[0])
        self.set_ends(int(self.graph.inputs[0]), [logits])

    def signature_outputs(self) -> list[int]:
        """Outputs in the order in which the network gives them: the signature sorts by name."""
        (signature,) = self.model.signatureDefs
        by_number = {
            int(_text(out.name).rpartition("_")[2]): int(out.tensorIndex)
            for out in signature.outputs
        }
        return [by_number[number] for number in sorted(by_number)]

    def set_ends(self, images: int, outputs: Sequence[int]) -> None:
        """Set input and outputs, of the graph and of its signature."""
        self.graph.inputs, self.graph.outputs = [images], list(outputs)
        (signature,) = self.model.signatureDefs
        names = ["logits", *(f"integers_{number}" for number in range(len(outputs) - 1))]
        signature.inputs = [self._tensor_map("images", images)]
        signature.outputs = [
            self._tensor_map(name, tensor) for name, tensor in zip(names, outputs, strict=True)
        ]

    def _tensor_map(self, name: str, tensor: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry

    def tidy(self) -> None:
        """Do everything in [N, H, W, C]: transposes move towards the end until they cancel out."""
        position = 0
        while position < len(self.graph.operators):
            operator = self.graph.operators[position]
            before = self.producers().get(int(operator.inputs[0]))
            if before is not None and self.kind(before) == "TRANSPOSE":
                if self.kind(operator) in SAME_PLACE and self._is_layout_free(operator):
                    self._swap(before, operator, position)
                elif self.kind(operator) == "TRANSPOSE":
                    self._cancel(before, operator)
            position += 1

    def _is_layout_free(self, operator: Any) -> bool:
        """Whether nothing but padding, or a single value, joins the first input."""
        return self.kind(operator) in ("PAD", "PADV2") or all(
            np.prod(self.shape(int(i))) == 1 for i in operator.inputs[1:]
        )

    def _swap(self, transpose: Any, operator: Any, position: int) -> None:
        order = self.constant(int(transpose.inputs[1])).tolist()
        old = int(operator.outputs[0])
        tensor = self.graph.tensors[old]
        back = np.argsort(order)
        new = copy.copy(tensor)
        new.shape = [self.shape(old)[axis] for axis in back]
        self.graph.tensors.append(new)
        moved = len(self.graph.tensors) - 1
        tensor.name = f"{_text(tensor.name)}/transposed"
        operator.inputs = [int(transpose.inputs[0]), *map(int, operator.inputs[1:])]
        if self.kind(operator) in ("PAD", "PADV2"):
            amounts = self.constant(int(operator.inputs[1]))[back]
            operator.inputs[1] = self.add_constant("padding", amounts)
        operator.outputs = [moved]
        self.add_operator("TRANSPOSE", [moved, int(transpose.inputs[1])], old, position + 1)

    def _cancel(self, first: Any, second: Any) -> None:
        one, two = (self.constant(int(x.inputs[1])) for x in (first, second))
        if one[two].tolist() != sorted(one):
            return
        source, result = int(first.inputs[0]), int(second.outputs[0])
        for operator in self.graph.operators:
            operator.inputs = [source if i == result else int(i) for i in operator.inputs]

    def remove_unread(self) -> None:
        """Drop operators, tensors, buffers and kinds that nothing needs."""
        graph, model = self.graph, self.model
        needed, kept = {int(i) for i in (*graph.inputs, *graph.outputs)}, []
        for operator in reversed(graph.operators):
            if needed & {int(i) for i in operator.outputs}:
                needed |= {int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0}
                kept.append(operator)
        graph.operators = kept[::-1]
        order = sorted(needed)
        new = {old: index for index, old in enumerate(order)} | {-1: -1}
        graph.tensors = [graph.tensors[i] for i in order]
        for operator in graph.operators:
            operator.inputs = [new[int(i)] for i in operator.inputs]
            operator.outputs = [new[int(i)] for i in operator.outputs]
        self.set_ends(new[int(graph.inputs[0])], [new[int(i)] for i in graph.outputs])
        model.buffers, buffers = model.buffers[:1], model.buffers
        for tensor in graph.tensors:
            if tensor.buffer and buffers[tensor.buffer].data is not None:
                model.buffers.append(buffers[tensor.buffer])
                tensor.buffer = len(model.buffers) - 1
            else:
                tensor.buffer = 0
        model.metadata = []

    def round_once(self) -> None:
        """Compute in float, between two grids, what integer kernels round twice."""
        producers = self.producers()
        for position, operator in reversed(list(enumerate(self.graph.operators))):
            kind, before, after = self.kind(operator), int(operator.inputs[0]), operator.outputs[0]
            if kind not in INEXACT or {self.type(before), self.type(int(after))} != {"INT8"}:
                continue
            maker = producers.get(before)
            if kind == "AVERAGE_POOL_2D" and maker is not None and self.kind(maker) == "QUANTIZE":
                before = int(maker.inputs[0])  # not rounded onto the result's grid beforehand
            name = _text(self.graph.tensors[int(after)].name)
            x = self.add_tensor(f"{name}/x", self.shape(before), "FLOAT32")
            if kind != "QUANTIZE":
                y = self.add_tensor(f"{name}/y", self.shape(int(after)), "FLOAT32")
                operator.outputs = [y]
                self.add_operator("QUANTIZE", [y], int(after), position + 1)
            operator.inputs = [x, *map(int, operator.inputs[1:])]
            self.add_operator("DEQUANTIZE", [before], x, position)

    def float_ends(self) -> None:
        """Take and give float32: QUANTIZE first, DEQUANTIZE last."""
        (images,), (logits,) = self.graph.inputs, self.graph.outputs
        ends = []
        for name, tensor in (("images", images), ("logits", logits)):
            ends.append(self.add_tensor(name, self.shape(int(tensor)), "FLOAT32"))
        self.add_operator("QUANTIZE", [ends[0]], int(images), 0)
        self.add_operator("DEQUANTIZE", [int(logits)], ends[1])
        self.set_ends(ends[0], ends[1:])

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Keep texts in the file."""
        self.model.description = "FAT"
        self.model.metadata = []
        for name, text in metadata.items():
            buffer, entry = self.schema.BufferT(), self.schema.MetadataT()
            buffer.data = np.frombuffer(text.encode(), np.uint8)
            self.model.buffers.append(buffer)
            entry.name, entry.buffer = name, len(self.model.buffers) - 1
            self.model.metadata.append(entry)

    def tell(self, program: Program, shapes: Sequence[tuple[int, ...]]) -> None:
        """Give the integers too, in the shapes that they have in the network."""
        places = {
            key: index
            for index, tensor in enumerate(self.graph.tensors)
            for key in _text(tensor.name).split(";")
        }
        outputs = [int(self.graph.outputs[0])]
        for grid, shape in zip(program.tensors, shapes, strict=True):
            place = places[grid.key]
            found, steps = self.shape(place), self.graph.tensors[place].quantization
            told = self.add_tensor(f"{grid.key}.told", shape, "INT8", steps)
            if len(found) == 4 and tuple(found[axis] for axis in TO_NCHW) == shape:
                self.add_operator("TRANSPOSE", [place, self.add_constant("to_nchw", TO_NCHW)], told)
            else:
                self.add_operator("RESHAPE", [place, self.add_constant("shape", shape)], told)
            outputs.append(told)
        self.set_ends(int(self.graph.inputs[0]), outputs)


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
