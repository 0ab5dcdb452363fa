"""ExecuTorch programs (.pte) with XNNPACK's int8 kernels, and their runtime.

torch.export captures the graph and ExecuTorch's partitioner delegates it to XNNPACK. The passes
below bring the graph into the form that the partitioner fuses into integer kernels: every reader
has a separate dequantize, bounds are merged into their layer, and means keep their dimensions.

The batch size is 1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.resources
import json
import math
import os
import re
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fat.export.base import ExportBackend, Kernels, Program, Runtime, Tolerance, quiet
from fat.export.lowering import LoweringStyle, contiguous_copy
from fat.utils.errors import FatError, first_line

__all__ = ["ExecuTorch", "ExecuTorchRuntime"]

METHOD = "forward"
FLOAT32 = 6
"""Value of ExecuTorch's ScalarType."""
XNNPACK = "XnnpackBackend"
LAYERS = frozenset({"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected"})
FLOAT_LAYERS = frozenset({"aten::convolution", "aten::linear", "aten::addmm", "aten::mm"})
"""ExecuTorch's portable kernels, all in float."""

_ATEN: Any = torch.ops.aten
_OPS: Any = torch.ops.quantized_decomposed
PAIRS = frozenset({_ATEN.add.Tensor, _ATEN.mul.Tensor})
MEANS = frozenset({_ATEN.mean.dim, _ATEN.adaptive_avg_pool2d.default})


class ExecuTorchRuntime(Runtime):
    """A .pte file in ExecuTorch.

    ExecuTorch has one thread pool per process, which open files hold references to: the first file
    sets its size, and others use it as it is until all files are closed.
    """

    title = "ExecuTorch"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        with quiet():
            from executorch import runtime
        with _native_log([]):
            _set_threads(self.threads)
        log: list[str] = []
        try:
            with _native_log(log):
                self._program = runtime.Runtime.get().load_program(path)
                found = self._program.metadata(METHOD)
                self._method = self._program.load_method(METHOD)
        except Exception as error:  # pybind11 raises many types
            raise self.cannot_open(log[0] if log else first_line(error)) from error
        _OPEN.add(self)
        shape = _image_shape(found)
        if shape is None:
            raise self.unsupported_input(found)
        self.input_shape = shape

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"executorch {importlib.metadata.version('executorch')}"

    @functools.cached_property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        """Strings stored in the file, by name: its methods that only return a string."""
        texts = {plan.name: _text(plan) for plan in self._parsed().execution_plan}
        return {name: text for name, text in texts.items() if text is not None}

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Run one batch."""
        size = list(self.input_shape[1:])
        if list(images.shape[1:]) != size:
            raise FatError(
                f"{self.path} takes images {size}, these are {list(images.shape[1:])}: use images "
                "of the size that it was exported for."
            )
        results: Sequence[Tensor] = self._method.execute((images.contiguous(),))
        return results

    def kernels(self) -> Kernels:
        """Return XNNPACK's operators with the types of their tensors, as stored in the file."""
        parsed = self._parsed()
        try:
            nodes, others = _operators(parsed)
        except FatError:
            raise
        except Exception as error:
            raise FatError(
                f"Cannot read the kernels of {self.path}: {first_line(error)} It was written by "
                "another version of ExecuTorch."
            ) from error
        counts = Counter(f"{kind.removeprefix('XNN')} {precision}" for kind, precision in nodes)
        counts.update(others)
        layers = [(kind, precision) for kind, precision in nodes if kind in LAYERS]
        in_float = [kind.removeprefix("XNN") for kind, precision in layers if precision == "float"]
        in_float += [name for name in others if name in FLOAT_LAYERS]
        return Kernels(
            dict(counts.most_common()),
            sum(precision == "int8" for _, precision in layers),
            tuple(in_float),
            sum(precision == "int8" for _, precision in nodes),
        )

    def _parsed(self) -> Any:
        """Parse the program into ExecuTorch's Python classes."""
        with quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary
        try:
            return deserialize_pte_binary(self.path.read_bytes()).program
        except Exception as error:
            raise FatError(
                f"Cannot parse {self.path}: {first_line(error)} It was written by another version "
                "of ExecuTorch."
            ) from error


class ExecuTorch(ExportBackend):
    """Export target ``executorch``.

    Activations and weights are int8, biases int32; the batch size is 1, height and width are
    fixed. Weights of fewer than 8 bits are stored as int8.
    """

    name = "executorch"
    title = "ExecuTorch"
    suffix = ".pte"
    opens = (".pte",)
    modules = ("executorch",)
    runtime = ExecuTorchRuntime
    style = LoweringStyle(torch.int8, bias="float", clip="float")
    tolerance = Tolerance(off_by_one=0.001)

    def convert(self, program: Program) -> bytes:
        """Convert a network, see :class:`fat.export.base.ExportBackend`."""
        return self._convert(program.logits_only(), program)

    def convert_with_integers(self, program: Program, shipped: Path) -> bytes:
        """Convert the network again, with the integers among its results."""
        return self._convert(program.network, program)

    def _convert(self, network: fx.GraphModule, program: Program) -> bytes:
        try:
            with quiet(), torch.no_grad():
                from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                    XnnpackPartitioner,
                )
                from executorch.exir import to_edge_transform_and_lower

                example = program.example[:1].contiguous()
                exported = torch.export.export(contiguous_copy(network), (example,))
                _prepare_for_partitioner(exported.graph_module)
                edge = to_edge_transform_and_lower(
                    exported,
                    partitioner=[XnnpackPartitioner()],
                    constant_methods=dict(program.metadata) or None,
                )
                content: bytes = edge.to_executorch().buffer
                return content
        except (
            Exception
        ) as error:  # torch and ExecuTorch wrap the original error in their own types
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            unknown = re.search(
                r"Missing out variants: \{'([^']+)'"
                r"|Operator torch\._ops\.(\S+) is not in Core ATen",
                str(cause),
            )
            operator = unknown and (unknown[1] or unknown[2])
            raise self.cannot_write(operator, first_line(cause)) from error


# ------------------------------------------------------------------------------------ graph passes


def _prepare_for_partitioner(network: fx.GraphModule) -> None:
    """Bring an exported graph into the form that XNNPACK's partitioner recognizes, in place."""
    graph = network.graph
    for node in list(graph.nodes):
        if node.target is _ATEN.clamp.default:
            _fuse_bounds(node)
        elif node.target is _ATEN.mean.dim:
            _keep_dimensions(graph, node)
        elif node.target is _ATEN.cat.default:
            _unify_grids(graph, node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target in PAIRS | MEANS:
            _round_to_even(graph, node)
    for node in list(graph.nodes):
        if node.target is _OPS.dequantize_per_tensor.default:
            _dequantize_per_reader(graph, node)
    network.recompile()


def _fuse_bounds(clamp: fx.Node) -> None:
    """Replace layer → quantize → dequantize → clamp → quantize by layer → hardtanh → quantize.

    Rounding is monotonic and the bounds lie on the grid, so the integers are the same. Only layers
    can have bounds; sums and products must be followed by quantize.
    """
    before: list[Any] = [clamp]
    for target in (_OPS.dequantize_per_tensor.default, _OPS.quantize_per_tensor.default, None):
        node = before[-1].args[0]
        if len(node.users) > 1 or target not in (None, node.target):
            return
        before.append(node)
    if before[-1].target in (_ATEN.conv2d.default, _ATEN.linear.default):
        clamp.target = _ATEN.hardtanh.default
        clamp.args = (before[-1], *clamp.args[1:])


def _keep_dimensions(graph: fx.Graph, mean: fx.Node) -> None:
    """Replace a mean by one that keeps its dimensions, and a reshape of its integers."""
    x, dims, *keep = mean.args
    if keep and keep[0]:
        return
    shape, quantize = mean.meta["val"].shape, _quantize_after(mean)
    with graph.inserting_before(mean):
        kept = graph.call_function(_ATEN.mean.dim, (x, dims, True))
    kept.meta = dict(mean.meta, val=x.meta["val"].mean(dims, keepdim=True))  # type: ignore[union-attr]
    if quantize is not None:
        kept = _on_grid(graph, kept, quantize.args[1:], mean)
    mean.target, mean.args, mean.kwargs = _ATEN.view.default, (kept, list(shape)), {}


def _unify_grids(graph: fx.Graph, cat: fx.Node) -> None:
    """Quantize the inputs of a concatenation to the grid of its result, as XNNPACK requires."""
    quantize = _quantize_after(cat)
    if quantize is not None:
        parts: Any = cat.args[0]
        grid = quantize.args[1:]
        cat.args = ([_on_grid(graph, part, grid, cat) for part in parts], *cat.args[1:])


def _round_to_even(graph: fx.Graph, node: fx.Node) -> None:
    """Round sums, products and means half to even where the step is a power of two.

    On such grids many results lie in the middle between two integers. XNNPACK rounds sums up; the
    student rounds to even, sums and products after adding the zero point, means before. float32
    rounds the same way when 1.5·2^23 steps are added, since its last bit is then one step.
    """
    quantize = _quantize_after(node)
    inputs = {x.target for x in node.all_input_nodes}
    if quantize is None or inputs != {_OPS.dequantize_per_tensor.default}:
        return
    step, zero_point, *_ = quantize.args[1:]
    if math.frexp(step)[0] != 0.5:  # type: ignore[arg-type]
        return
    x = node
    zero: Any = zero_point * step if node.target in PAIRS else 0.0  # type: ignore[operator]
    large: Any = 1.5 * 2**23 * step  # type: ignore[operator]
    with graph.inserting_before(quantize):
        for amount in filter(None, (zero, large, -zero - large)):
            x = graph.call_function(_ATEN.add.Tensor, (x, amount))
            x.meta = dict(node.meta)
    quantize.args = (x, *quantize.args[1:])


def _quantize_after(node: fx.Node) -> fx.Node | None:
    """Return the only reader of a node if it is a quantize."""
    reader = next(iter(node.users))
    only = len(node.users) == 1 and reader.target is _OPS.quantize_per_tensor.default
    return reader if only else None


def _on_grid(graph: fx.Graph, x: fx.Node, grid: tuple[Any, ...], before: fx.Node) -> fx.Node:
    """Quantize and dequantize a tensor unless it is on the grid already."""
    if x.target is _OPS.dequantize_per_tensor.default and x.args[1:] == grid:
        return x
    value = x.meta["val"]
    with graph.inserting_before(before):
        integers = graph.call_function(_OPS.quantize_per_tensor.default, (x, *grid))
        integers.meta = dict(x.meta, val=value.to(torch.int8))
        real = graph.call_function(_OPS.dequantize_per_tensor.default, (integers, *grid))
        real.meta = dict(x.meta, val=value)
    return real


def _dequantize_per_reader(graph: fx.Graph, dequantize: fx.Node) -> None:
    """Give each reader a separate copy: the partitioner merges operators that share one."""
    for reader in list(dequantize.users)[1:]:
        if reader.op == "output":
            continue
        with graph.inserting_before(reader):
            copied = graph.node_copy(dequantize)
        reader.replace_input_with(dequantize, copied)


# -------------------------------------------------------------------------------- reading programs

_OPEN: weakref.WeakSet[ExecuTorchRuntime] = weakref.WeakSet()


def _set_threads(count: int) -> None:
    """Resize the thread pool unless an open file uses it."""
    from executorch.extension.pybindings import portable_lib

    if not _OPEN and portable_lib._threadpool_get_thread_count() != count:
        portable_lib._unsafe_reset_threadpool(count)


@contextlib.contextmanager
def _native_log(lines: list[str]) -> Iterator[None]:
    """Collect what C++ code writes to stderr: error messages and notes on the processor."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            text = log.read().decode(errors="replace")
            lines += re.findall(r"^\[(?!cpuinfo)[\w.]+:\d+\] (.+)$", text, re.MULTILINE)


def _image_shape(method: Any) -> tuple[int, ...] | None:
    """Return [N, 3, H, W] of a method's only input; ``None`` for other inputs."""
    if method.num_inputs() != 1:
        return None
    try:
        tensor = method.input_tensor_meta(0)
    except IndexError:  # not a tensor
        return None
    shape = tuple(tensor.sizes())
    return shape if len(shape) == 4 and tensor.dtype() == FLOAT32 else None


def _text(plan: Any) -> str | None:
    """Return the string that a method without instructions returns."""
    if plan.inputs or len(plan.outputs) != 1 or any(chain.instructions for chain in plan.chains):
        return None
    text = getattr(plan.values[plan.outputs[0]].val, "string_val", None)
    return text if isinstance(text, str) else None


def _operators(program: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Return XNNPACK's operators with ``int8`` or ``float``, and the names of portable ones."""
    plan = next(plan for plan in program.execution_plan if plan.name == METHOD)
    nodes: list[tuple[str, str]] = []
    others: list[str] = []
    for instruction in (step.instr_args for chain in plan.chains for step in chain.instructions):
        if hasattr(instruction, "delegate_index"):
            delegate = plan.delegates[instruction.delegate_index]
            if delegate.id != XNNPACK:
                raise FatError(
                    f"The file is delegated to {delegate.id}, which does not expose its kernels."
                )
            data = program.backend_delegate_data[delegate.processed.index].data
            nodes += _xnnpack_operators(bytes(data))
        elif hasattr(instruction, "op_index"):
            others.append(plan.operators[instruction.op_index].name)
    return nodes, others


def _xnnpack_operators(payload: bytes) -> list[tuple[str, str]]:
    """Return the operators of one XNNPACK graph with ``int8`` or ``float``.

    A layer computes in integers if its inputs are integers, any other operator if all its tensors
    are.
    """
    graph = _xnnpack_graph(payload)
    types: dict[int, str] = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        value = value.get("tensor_value", value)
        types[value["id_out"]] = value["datatype"]
    found = []
    for entry in graph["xnodes"]:
        kind, node = entry["xnode_union_type"], entry["xnode_union"]
        read = ("input1_id", "filter_id") if kind in LAYERS else node.keys()
        used = {types[node[key]] for key in read if key.endswith("_id") and node[key] in types}
        quantized = all(name.startswith("xnn_datatype_q") for name in used)
        found.append((kind, "int8" if quantized else "float"))
    return found


def _xnnpack_graph(payload: bytes) -> Any:
    """Decode XNNPACK's graph with the compiler and schema that ExecuTorch ships."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start, end = header.flatbuffer_offset, header.flatbuffer_offset + header.flatbuffer_size
    schema = importlib.resources.files(serialization).joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory(prefix="fat-") as folder:
        Path(folder, "schema.fbs").write_bytes(schema)
        Path(folder, "graph.bin").write_bytes(payload[start:end])
        _flatc_decompile(folder, f"{folder}/schema.fbs", f"{folder}/graph.bin")
        text = Path(folder, "graph.json").read_text(encoding="utf-8")
    return json.loads(re.sub(r": -?(inf|nan)\b", ": null", text))  # infinite bounds are not JSON
