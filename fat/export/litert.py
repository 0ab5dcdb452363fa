"""TensorFlow Lite files for phones and microcontrollers, and LiteRT, which runs them.

litert_torch writes the graph. The passes below give the file its usual mobile form: images
[1, H, W, 3], no transposes between layouts, and tensors named as in the network.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fat.export.base import ExportBackend, Kernels, Program, Runtime, Tolerance, quiet
from fat.export.lowering import LoweringStyle, contiguous_copy
from fat.utils.errors import FatError, first_line

__all__ = ["LiteRT", "LiteRTRuntime"]

IDENTIFIER = b"TFL3"
"""Bytes 4 to 7 of every file."""
LAYERS = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL"}
)
ELEMENTWISE = frozenset({"PAD", "PADV2", "MAXIMUM", "MINIMUM", "QUANTIZE", "DEQUANTIZE"})
"""Operators that commute with a transpose."""
INEXACT = frozenset({"HARD_SWISH", "LEAKY_RELU", "AVERAGE_POOL_2D", "QUANTIZE", "SOFTMAX"})
"""Operators whose integer kernels are off by one step in up to 15 % of the integers.

Hard swish computes with 16-bit intermediate results and has no XNNPACK kernel, which makes
MobileNet-v3 slower than in float. XNNPACK's leaky ReLU and int8 → int8 requantization multiply with
8 fractional bits. Pools keep the grid of their input, so the converter quantizes the input to the
grid of the result. Softmax always has a step of 1/256.
"""
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
Array = np.ndarray[Any, Any]

_OPS: Any = torch.ops.quantized_decomposed


class LiteRTRuntime(Runtime):
    """A .tflite file in LiteRT.

    Files of other tools may take [N, 3, H, W] or [N, H, W, 3], float32, int8 or uint8.
    """

    title = "LiteRT"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        content = path.read_bytes()
        try:
            self._file = _File(content)  # LiteRT would crash on a truncated file
        except (ValueError, IndexError, struct.error, TypeError, AttributeError) as error:
            raise self.cannot_open(first_line(error)) from error
        from ai_edge_litert import interpreter

        try:
            with quiet(native=True):
                self._interpreter = interpreter.Interpreter(
                    model_content=content, num_threads=self.threads
                )
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self.cannot_open(first_line(error)) from error
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
            raise self.unsupported_input(
                found or "no input", "float32, int8 or uint8 tensor [N, H, W, 3] or"
            )
        self._input = inputs[0]
        self._outputs = self._interpreter.get_output_details()
        self._channels_last = shape[3] == 3
        if self._channels_last:
            shape = tuple(shape[axis] for axis in TO_NCHW)
        self.input_shape = tuple(size if size > 0 else None for size in shape)
        self.metadata = self._file.metadata()

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"litert {importlib.metadata.version('ai-edge-litert')}"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Run one batch."""
        pixels = images.numpy()
        if self._channels_last:
            pixels = pixels.transpose(TO_NHWC)
        pixels = np.ascontiguousarray(_quantized(self._input, pixels))
        if None in self.input_shape:
            self._interpreter.resize_tensor_input(self._input["index"], pixels.shape)
            self._interpreter.allocate_tensors()
        self._interpreter.set_tensor(self._input["index"], pixels)
        self._interpreter.invoke()
        logits, *others = (self._interpreter.get_tensor(x["index"]) for x in self._outputs)
        return [torch.from_numpy(x) for x in (_dequantized(self._outputs[0], logits), *others)]

    def kernels(self) -> Kernels:
        """Return the operators of the file with the types of their tensors."""
        return self._file.kernels()


class LiteRT(ExportBackend):
    """Export target ``litert``.

    Activations and weights are int8, biases int32; the file takes one image [1, H, W, 3]. Weights
    of fewer than 8 bits are stored as int8.

    Args:
        integer_io: Take and return int8, on the grids stored in the file, instead of float32.
            Ignored for a float network.
    """

    name = "litert"
    title = "LiteRT"
    suffix = ".tflite"
    opens = (".tflite",)
    modules = ("ai_edge_litert", "litert_torch")
    runtime = LiteRTRuntime
    style = LoweringStyle(torch.int8, bias="float", padding="quantized")
    tolerance = Tolerance(off_by_one=0.001)

    def __init__(self, integer_io: bool = False) -> None:
        self.integer_io = integer_io

    def convert(self, program: Program) -> bytes:
        """Convert a network, see :class:`fat.export.base.ExportBackend`."""
        network = _prepare_for_converter(program)
        images = program.example[:1].permute(TO_NHWC).contiguous()
        try:
            with quiet(native=True), _converter_settings():
                import litert_torch
                from litert_torch.quantize import pt2e_quantizer
                from litert_torch.quantize.quant_config import QuantConfig

                # No quantizer runs: this makes the converter fuse the quantizers in the graph.
                scheme = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
                config = QuantConfig(pt2e_quantizer.PT2EQuantizer().set_global(scheme))
                converted = litert_torch.convert(
                    network, (images,), quant_config=config if program.tensors else None
                )
                content = converted.model_content()
        except Exception as error:  # the converter raises many types
            unknown = re.search(r"[Ll]owering not found: (\S+)", str(error))
            raise self.cannot_write(unknown and unknown[1], first_line(error)) from error
        file = _File(content)
        file.name_integers(program)
        file.remove_transposes()
        file.round_once()
        file.remove_unused()
        if program.tensors and not self.integer_io:
            file.use_float_io()
        file.describe(program.metadata)
        return file.packed()

    def convert_with_integers(self, program: Program, shipped: Path) -> bytes:
        """Add the integers to the outputs of the shipped file, as [N, C, H, W]."""
        file = _File(shipped.read_bytes())
        with torch.no_grad():
            integers = program.network(program.example[:1])[1:]
        file.output_integers(program, [tuple(tensor.shape) for tensor in integers])
        return file.packed()


def _quantized(details: Mapping[str, Any], images: Array) -> Array:
    """Convert images to the input type of a file."""
    if details["dtype"] == np.float32:
        return images
    scale, zero_point = details["quantization"]
    info = np.iinfo(details["dtype"])
    if scale == 0.0:
        raise FatError(
            f"The file takes {np.dtype(details['dtype'])} images but stores no scale and zero "
            "point for them, so FAT cannot quantize its images."
        )
    integers = np.rint(images / np.float32(scale)) + zero_point
    clipped: Array = integers.clip(info.min, info.max).astype(details["dtype"])
    return clipped


def _dequantized(details: Mapping[str, Any], values: Array) -> Array:
    """Convert logits to float32."""
    scale, zero_point = details["quantization"]
    if values.dtype == np.float32 or scale == 0.0:
        return values.astype(np.float32)
    real: Array = (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
    return real


# ------------------------------------------------------------------------------------ graph passes


def _prepare_for_converter(program: Program) -> fx.GraphModule:
    """Return the network in the form that litert_torch converts.

    It takes images [N, H, W, 3]; constants are float values that pass quantize and dequantize;
    bounds are operations on float values; every reader of a tensor has a separate dequantize; the
    results after the logits are dequantized. Tensors are contiguous: litert_torch copies others and
    identifies the copies by address, although freed memory is reused.
    """
    network = contiguous_copy(program.network)
    graph = network.graph
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        channels_first = graph.call_function(torch.permute, (images, TO_NCHW))
    images.replace_all_uses_with(channels_first, lambda user: user is not channels_first)
    for node in list(graph.nodes):
        if _is_dequantize(node) and node.args[0].op == "get_attr":
            _requantize_constant(network, node, program.weight_bits)
        elif node.target is torch.clamp and node.args[0].target is _OPS.quantize_per_tensor.default:
            _dequantize_bounds(graph, node)
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
                copied = graph.node_copy(node)
            user.replace_input_with(node, copied)
    graph.eliminate_dead_code()
    network.recompile()
    return network


def _is_dequantize(node: fx.Node) -> bool:
    return node.target in (_OPS.dequantize_per_tensor.default, _OPS.dequantize_per_channel.default)


def _requantize_constant(network: fx.GraphModule, node: fx.Node, bits: Mapping[str, int]) -> None:
    """Replace a constant by float values → quantize → dequantize, which the converter folds."""
    constants = dict(network.named_buffers()) | vars(network)
    per_channel = node.target is _OPS.dequantize_per_channel.default
    name = str(node.args[0].target)  # type: ignore[union-attr]
    values = node.target(
        *(  # type: ignore[operator]
            constants[arg.target] if isinstance(arg, fx.Node) else arg for arg in node.args
        )
    )
    attribute = f"{name.replace('.', '_')}_real"
    network.register_buffer(attribute, values)
    if name in bits:  # all weights are int8; fewer bits use a part of its range
        node.args = (*node.args[:-3], -127, 127, torch.int8)
    quantize = _OPS.quantize_per_channel if per_channel else _OPS.quantize_per_tensor
    graph = network.graph
    with graph.inserting_before(node):
        real = graph.get_attr(attribute)
        node.args = (graph.call_function(quantize.default, (real, *node.args[1:])), *node.args[1:])


def _dequantize_bounds(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a clamp by dequantize → bounds narrower than the type → quantize."""
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
def _converter_settings() -> Iterator[None]:
    """Set the converter's environment variables: no progress; greedy, as optimal takes minutes."""
    settings = {"LITERT_TORCH_SHOW_PROGRESS": "n", "LAYOUT_OPTIMIZE_PARTITIONER": "GREEDY"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# -------------------------------------------------------------------------------- the file's graph


class _File:
    """A .tflite file as objects.

    Args:
        content: Bytes of the file.

    Raises:
        ValueError: If they are not a .tflite file; other errors if it is truncated.
    """

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        if content[4:8] != IDENTIFIER:
            raise ValueError("It lacks the identifier of TensorFlow Lite files.")
        self.schema = schema
        self.model = schema.ModelT.InitFromPackedBuf(content, 0)
        self.graph = self.model.subgraphs[0]
        self.kinds = _names(schema.BuiltinOperator)
        self.types = _names(schema.TensorType)

    def kind(self, operator: Any) -> str:
        """Return the kind of an operator, such as ``CONV_2D``."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        # Files from before 2020 have the second field only.
        return self.kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def packed(self) -> bytes:
        """Serialize the file."""
        import flatbuffers

        class Sharing(flatbuffers.Builder):  # type: ignore[misc]
            """Store equal arrays once: zero points take 16 bytes per filter otherwise."""

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
        """Return the metadata entries that are UTF-8 strings."""
        found = {}
        for entry in self.model.metadata or []:
            data = self.model.buffers[entry.buffer].data
            with contextlib.suppress(UnicodeDecodeError):
                found[_text(entry.name)] = bytes([] if data is None else data).decode()
        return found

    def kernels(self) -> Kernels:
        """Return all operators; those with integer inputs and outputs are integer kernels."""
        counts = Counter(map(self.kind, self.graph.operators))
        layers = integers = 0
        in_float = []
        for operator in self.graph.operators:
            tensors = (*(i for i in operator.inputs if i >= 0), *operator.outputs)
            integer = all(self.type(i).startswith(("INT", "UINT")) for i in tensors)
            integers += integer
            if self.kind(operator) not in LAYERS or not self.has_weights(operator):
                continue
            if integer:
                layers += 1
            else:
                in_float.append(_text(self.graph.tensors[operator.outputs[0]].name))
        return Kernels(dict(counts.most_common()), layers, tuple(in_float), integers)

    def type(self, tensor: int) -> str:
        """Return the type of a tensor, such as ``INT8``."""
        return self.types[self.graph.tensors[tensor].type]

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Return the shape of a tensor, () for a scalar."""
        found = self.graph.tensors[tensor].shape
        return () if found is None else tuple(int(size) for size in found)

    def has_weights(self, operator: Any) -> bool:
        """Return whether an operator multiplies with a constant, possibly a dequantized one."""
        producers = self.producers()
        tensor = int(operator.inputs[1])
        while tensor in producers and self.kind(producers[tensor]) == "DEQUANTIZE":
            tensor = int(producers[tensor].inputs[0])
        return tensor not in producers

    def producers(self) -> dict[int, Any]:
        """Return the operator that writes each tensor."""
        return {int(out): operator for operator in self.graph.operators for out in operator.outputs}

    def constant(self, tensor: int) -> Array:
        """Return the value of an int32 constant."""
        data = self.model.buffers[self.graph.tensors[tensor].buffer].data
        return np.frombuffer(bytes(data), np.int32).reshape(self.shape(tensor))

    # ------------------------------------------------------------------------------- modifications

    def add_buffer(self, content: bytes) -> int:
        """Add a buffer and return its index."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def add_constant(self, name: str, values: Array | Sequence[int]) -> int:
        """Add an int32 constant and return its index."""
        array = np.asarray(values, np.int32)
        buffer = self.add_buffer(array.tobytes())
        return self.add_tensor(name, array.shape, "INT32", buffer=buffer)

    def add_tensor(
        self, name: str, shape: Sequence[int], kind: str, grid: Any = None, buffer: int = 0
    ) -> int:
        """Add a tensor and return its index."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.type = getattr(self.schema.TensorType, kind)
        tensor.quantization, tensor.hasRank = grid, True
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add_operator(
        self, kind: str, inputs: list[int], output: int, position: int | None = None
    ) -> None:
        """Add an operator, by default at the end."""
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
        code.deprecatedBuiltinCode = min(number, 127)  # required by the schema
        code.version = 2 if kind in ("QUANTIZE", "DEQUANTIZE", "TRANSPOSE") else 1  # int8
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def name_integers(self, program: Program) -> None:
        """Name the tensors that hold the integers, and keep the logits as the only output."""
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
        """Return the outputs in the network's order; the signature sorts them by name."""
        (signature,) = self.model.signatureDefs
        by_number = {
            int(_text(out.name).rpartition("_")[2]): int(out.tensorIndex)
            for out in signature.outputs
        }
        return [by_number[number] for number in sorted(by_number)]

    def set_ends(self, images: int, outputs: Sequence[int]) -> None:
        """Set the input and the outputs of the graph and its signature."""
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

    def remove_transposes(self) -> None:
        """Compute in [N, H, W, C]: move transposes towards the end until they cancel out."""
        position = 0
        while position < len(self.graph.operators):
            operator = self.graph.operators[position]
            before = self.producers().get(int(operator.inputs[0]))
            if before is not None and self.kind(before) == "TRANSPOSE":
                if self.kind(operator) in ELEMENTWISE and self._is_layout_free(operator):
                    self._swap(before, operator, position)
                elif self.kind(operator) == "TRANSPOSE":
                    self._cancel(before, operator)
            position += 1

    def _is_layout_free(self, operator: Any) -> bool:
        """Return whether the inputs after the first are padding amounts or scalars."""
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

    def remove_unused(self) -> None:
        """Remove unused operators, tensors and buffers."""
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
        """Compute inexact operators in float, between dequantize and quantize."""
        producers = self.producers()
        for position, operator in reversed(list(enumerate(self.graph.operators))):
            kind, before, after = self.kind(operator), int(operator.inputs[0]), operator.outputs[0]
            if kind not in INEXACT or {self.type(before), self.type(int(after))} != {"INT8"}:
                continue
            maker = producers.get(before)
            if kind == "AVERAGE_POOL_2D" and maker is not None and self.kind(maker) == "QUANTIZE":
                before = int(maker.inputs[0])  # skip rounding to the grid of the result
            name = _text(self.graph.tensors[int(after)].name)
            x = self.add_tensor(f"{name}/x", self.shape(before), "FLOAT32")
            if kind != "QUANTIZE":
                y = self.add_tensor(f"{name}/y", self.shape(int(after)), "FLOAT32")
                operator.outputs = [y]
                self.add_operator("QUANTIZE", [y], int(after), position + 1)
            operator.inputs = [x, *map(int, operator.inputs[1:])]
            self.add_operator("DEQUANTIZE", [before], x, position)

    def use_float_io(self) -> None:
        """Take and return float32: add QUANTIZE at the start and DEQUANTIZE at the end."""
        (images,), (logits,) = self.graph.inputs, self.graph.outputs
        ends = []
        for name, tensor in (("images", images), ("logits", logits)):
            ends.append(self.add_tensor(name, self.shape(int(tensor)), "FLOAT32"))
        self.add_operator("QUANTIZE", [ends[0]], int(images), 0)
        self.add_operator("DEQUANTIZE", [int(logits)], ends[1])
        self.set_ends(ends[0], ends[1:])

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Store strings in the file."""
        self.model.description = "FAT"
        self.model.metadata = []
        for name, text in metadata.items():
            entry = self.schema.MetadataT()
            entry.name, entry.buffer = name, self.add_buffer(text.encode())
            self.model.metadata.append(entry)

    def output_integers(self, program: Program, shapes: Sequence[tuple[int, ...]]) -> None:
        """Add the integers to the outputs, in the shapes that they have in the network."""
        places = {
            key: index
            for index, tensor in enumerate(self.graph.tensors)
            for key in _text(tensor.name).split(";")
        }
        outputs = [int(self.graph.outputs[0])]
        for grid, shape in zip(program.tensors, shapes, strict=True):
            place = places[grid.key]
            found, steps = self.shape(place), self.graph.tensors[place].quantization
            output = self.add_tensor(f"{grid.key}.output", shape, "INT8", steps)
            if len(found) == 4 and tuple(found[axis] for axis in TO_NCHW) == shape:
                order = self.add_constant("to_nchw", TO_NCHW)
                self.add_operator("TRANSPOSE", [place, order], output)
            else:
                self.add_operator("RESHAPE", [place, self.add_constant("shape", shape)], output)
            outputs.append(output)
        self.set_ends(int(self.graph.inputs[0]), outputs)


def _names(enumeration: type) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _text(name: bytes | str | None) -> str:
    return name.decode() if isinstance(name, bytes) else name or ""
