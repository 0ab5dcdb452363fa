"""ExecuTorch programs (.pte) whose layers are XNNPACK's int8 kernels, and their runtime.

torch.export writes the graph, ExecuTorch's partitioner hands it to XNNPACK; what comes before
brings it into the form that the partitioner takes for one integer kernel: every reader has a
dequantize of its own, bounds belong to their layer, and means keep their dimensions.

Images are run one by one: the file takes a batch of 1, as phones do.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fat.export.base import Kernels, Program, Runtime, Tolerance
from fat.export.lowering import Style, in_order
from fat.utils.errors import FatError, first_line, missing_extra
from fat.utils.io import write_atomic

__all__ = ["ExecuTorch", "ExecuTorchRuntime"]

METHOD = "forward"
FLOAT32 = 6
"""Of ExecuTorch's ScalarType."""
XNNPACK = "XnnpackBackend"
LAYERS = frozenset({"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected"})
FLOAT_LAYERS = frozenset({"aten::convolution", "aten::linear", "aten::addmm", "aten::mm"})
"""Kernels of ExecuTorch itself, which all compute in float."""


_ATEN: Any = torch.ops.aten
_OPS: Any = torch.ops.quantized_decomposed
PAIRS = frozenset({_ATEN.add.Tensor, _ATEN.mul.Tensor})
MEANS = frozenset({_ATEN.mean.dim, _ATEN.adaptive_avg_pool2d.default})


class ExecuTorch:
    """The target ``executorch``.

    Activations and weights are int8, biases int32; the batch is 1, height and width are fixed.
    Weights of fewer than 8 bits are stored in 8.
    """

    name = "executorch"
    suffix = ".pte"
    style = Style(torch.int8, bias="float", clip="float")
    tolerance = Tolerance(off_by_one=0.001)

    def check(self) -> None:
        """Raise a FatError that says what to install if ExecuTorch is missing."""
        if importlib.util.find_spec("executorch") is None:
            raise missing_extra("executorch", "ExecuTorch")

    def write(self, program: Program, path: Path) -> None:
        """Write a file that gives logits, see :class:`fat.export.base.ExportBackend`."""
        self._write(program.logits_only(), program, path)

    def write_tapped(self, program: Program, shipped: Path, path: Path) -> None:
        """The same network once more, with the integers among its results."""
        self._write(program.network, program, path)

    def advice(self) -> str:
        """Nothing is known that makes integers differ."""
        return ""

    def open(self, path: Path, *, threads: int | None = None) -> Runtime:
        """Open a .pte file, ours or another's."""
        self.check()
        return ExecuTorchRuntime(path, threads=threads)

    def _write(self, network: fx.GraphModule, program: Program, path: Path) -> None:
        self.check()
        content = _converted(network, program.example[:1], program.metadata)
        write_atomic(path, lambda temporary: temporary.write_bytes(content))


class ExecuTorchRuntime:
    """A .pte file in ExecuTorch, on the CPU.

    ExecuTorch has one pool of threads per process, which open files hold on to. So the first file
    sets its size, and the others take it as it is until all are closed.

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
        with _quiet():
            from executorch import runtime
        with _native_log([]):
            _set_threads(threads or torch.get_num_threads())
        log: list[str] = []
        try:
            with _native_log(log):
                self._program = runtime.Runtime.get().load_program(path)
                found = self._program.metadata(METHOD)
                self._forward = self._program.load_method(METHOD)
        except Exception as error:  # pybind11 raises whatever it was given
            reason = (log[0] if log else first_line(error)).rstrip(".")
            raise FatError(
                f"ExecuTorch cannot open {path}: {reason}. It is damaged, or another kind of file."
            ) from error
        _OPEN.add(self)
        self._metadata: dict[str, str] | None = None
        self._shape = _image_shape(found)
        if self._shape is None:
            raise FatError(
                f"{path} takes {found}; FAT feeds one float32 tensor of normalised images "
                "[N, 3, H, W]."
            )

    @property
    def name(self) -> str:
        """The runtime and its version."""
        return f"executorch {importlib.metadata.version('executorch')}"

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts kept in the file, by name: its methods that only give a text."""
        if self._metadata is None:
            texts = {plan.name: _text(plan) for plan in self._parsed().execution_plan}
            self._metadata = {name: text for name, text in texts.items() if text is not None}
        return self._metadata

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """[N, 3, H, W] as the file says."""
        assert self._shape is not None
        return self._shape

    def run(self, images: Tensor) -> list[Tensor]:
        """All outputs for images [N, 3, H, W], see :class:`fat.export.base.Runtime`."""
        count, *size = self.input_shape
        assert count is not None
        if list(images.shape[1:]) != size:
            raise FatError(
                f"{self.path} takes images of {size}, and what came is {list(images.shape[1:])}: "
                "give it images of the size that it was exported for."
            )
        if len(images) % count:
            raise FatError(
                f"{self.path} takes batches of {count} images; type data.batch_size={count}."
            )
        parts = [self._forward.execute((rows.contiguous(),)) for rows in torch.split(images, count)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def kernels(self) -> Kernels:
        """XNNPACK's operators with the types of their tensors, as the file holds them."""
        parsed = self._parsed()
        try:
            nodes, others = _operators(parsed)
        except FatError:
            raise
        except Exception as error:
            raise FatError(
                f"The kernels of {self.path} cannot be told: {first_line(error)} It was written "
                "by another version of ExecuTorch."
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
        """The program as ExecuTorch's own Python classes."""
        with _quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary
        try:
            return deserialize_pte_binary(self.path.read_bytes()).program
        except Exception as error:
            raise FatError(
                f"{self.path} cannot be parsed: {first_line(error)} It was written by another "
                "version of ExecuTorch."
            ) from error


# ----------------------------------------------------------------------------------------- writing


def _converted(network: fx.GraphModule, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """The file's content.

    Raises:
        FatError: If an operator has no form in ExecuTorch.
    """
    try:
        with _quiet(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            exported = torch.export.export(in_order(network), (example.contiguous(),))
            _respell(exported.graph_module)
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=[XnnpackPartitioner()],
                constant_methods=dict(metadata) or None,
            )
            content: bytes = edge.to_executorch().buffer
            return content
    except Exception as error:  # torch and ExecuTorch wrap whatever failed in errors of their own
        raise _unwritable(error) from error


def _respell(network: fx.GraphModule) -> None:
    """Bring an exported graph into the form that XNNPACK's partitioner knows, in place."""
    graph = network.graph
    for node in list(graph.nodes):
        if node.target is _ATEN.clamp.default:
            _fuse_bounds(node)
        elif node.target is _ATEN.mean.dim:
            _keep_dimensions(graph, node)
        elif node.target is _ATEN.cat.default:
            _join_on_one_grid(graph, node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target in PAIRS | MEANS:
            _round_to_even(graph, node)
    for node in list(graph.nodes):
        if node.target is _OPS.dequantize_per_tensor.default:
            _dequantize_per_reader(graph, node)
    network.recompile()


def _fuse_bounds(clamp: fx.Node) -> None:
    """Of layer → quantize → dequantize → clamp → quantize, leave out the first two roundings.

    Rounding is monotonic and the bounds lie on the grid, so the integers are the same. Only layers
    take bounds; after a sum or a product the partitioner wants the quantize at once.
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
    """A mean as one that keeps its dimensions, and a reshape of its integers."""
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


def _join_on_one_grid(graph: fx.Graph, join: fx.Node) -> None:
    """Bring what is joined onto the result's grid first: XNNPACK joins tensors of one grid."""
    quantize = _quantize_after(join)
    if quantize is not None:
        parts: Any = join.args[0]
        grid = quantize.args[1:]
        join.args = ([_on_grid(graph, part, grid, join) for part in parts], *join.args[1:])


def _round_to_even(graph: fx.Graph, node: fx.Node) -> None:
    """Spell the rounding of a sum, product or mean onto a grid whose step is a power of two.

    There many results lie in the middle between two integers. XNNPACK rounds sums up; the student
    rounds to even, sums and products with the zero point added, means without. So does float32 when
    1.5·2^23 steps are added, since one step is its last bit then.
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
    """The quantize that is the only reader of a node, if it is one."""
    reader = next(iter(node.users))
    alone = len(node.users) == 1 and reader.target is _OPS.quantize_per_tensor.default
    return reader if alone else None


def _on_grid(graph: fx.Graph, x: fx.Node, grid: tuple[Any, ...], before: fx.Node) -> fx.Node:
    """A real tensor, rounded onto a grid if it does not lie there yet."""
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
    """The partitioner puts operators that share a dequantize into one part, cycles or not."""
    for reader in list(dequantize.users)[1:]:
        if reader.op == "output":
            continue
        with graph.inserting_before(reader):
            own = graph.node_copy(dequantize)
        reader.replace_input_with(dequantize, own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, progress, and the log handlers that importing ExecuTorch sets up."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def _unwritable(error: BaseException) -> FatError:
    """The error in one line, with the operator that is not known."""
    while error.__cause__ is not None:
        error = error.__cause__
    unknown = re.search(
        r"Missing out variants: \{'([^']+)'|Operator torch\._ops\.(\S+) is not in Core ATen",
        str(error),
    )
    what = (
        f"the operator {unknown[1] or unknown[2]} has no form in ExecuTorch"
        if unknown
        else f"its exporter says: {first_line(error)}"
    )
    return FatError(
        f"The network cannot be written for ExecuTorch: {what}. Please report it with the "
        "network's name."
    )


# ----------------------------------------------------------------------------------------- running

_OPEN: weakref.WeakSet[ExecuTorchRuntime] = weakref.WeakSet()


def _set_threads(count: int) -> None:
    """Size the pool of threads, unless an open file holds on to it."""
    from executorch.extension.pybindings import portable_lib

    if not _OPEN and portable_lib._threadpool_get_thread_count() != count:
        portable_lib._unsafe_reset_threadpool(count)


@contextlib.contextmanager
def _native_log(lines: list[str]) -> Iterator[None]:
    """Collect what C++ writes to stderr: its reasons, and notes on the processor."""
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
    """[N, 3, H, W] of a method's only input; ``None`` if it takes anything else."""
    if method.num_inputs() != 1:
        return None
    try:
        tensor = method.input_tensor_meta(0)
    except IndexError:  # a number or a text
        return None
    shape = tuple(tensor.sizes())
    return shape if len(shape) == 4 and tensor.dtype() == FLOAT32 else None


def _text(plan: Any) -> str | None:
    """The text that a method gives without computing anything."""
    if plan.inputs or len(plan.outputs) != 1 or any(chain.instructions for chain in plan.chains):
        return None
    text = getattr(plan.values[plan.outputs[0]].val, "string_val", None)
    return text if isinstance(text, str) else None


def _operators(program: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """XNNPACK's operators with ``int8`` or ``float``, and ExecuTorch's own by name."""
    plan = next(plan for plan in program.execution_plan if plan.name == METHOD)
    nodes: list[tuple[str, str]] = []
    others: list[str] = []
    for instruction in (step.instr_args for chain in plan.chains for step in chain.instructions):
        if hasattr(instruction, "delegate_index"):
            delegate = plan.delegates[instruction.delegate_index]
            if delegate.id != XNNPACK:
                raise FatError(f"The file runs in {delegate.id}, which does not tell its kernels.")
            data = program.backend_delegate_data[delegate.processed.index].data
            nodes += _xnnpack_operators(bytes(data))
        elif hasattr(instruction, "op_index"):
            others.append(plan.operators[instruction.op_index].name)
    return nodes, others


def _xnnpack_operators(payload: bytes) -> list[tuple[str, str]]:
    """Operators of one XNNPACK graph with ``int8`` or ``float``.

    A layer computes in integers if what it reads is integers; any other operator if all its tensors
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
    """XNNPACK's graph as JSON, by the compiler and the schema that come with ExecuTorch."""
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
    return json.loads(re.sub(r": -?(inf|nan)\b", ": null", text))  # bounds; JSON has none of them
