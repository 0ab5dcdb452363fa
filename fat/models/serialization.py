"""Students as safetensors files. They hold data only: loading one runs no code from it.

The file's metadata describes the graph as JSON: nodes with the names of their operations, modules
with the arguments of their constructors. Both are looked up in the tables below, and anything else
is rejected. The teacher's tensors are stored too, so that a student can be evaluated from the file
alone; those that equal the student's are stored once.
"""

from __future__ import annotations

import inspect
import json
import keyword
import operator
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fat.graph.passes.quantizer_insertion import QUANTIZERS, constants_to_buffers, link_inputs
from fat.graph.patterns import PRESERVING_METHODS, constant_of
from fat.models.student import Student, freeze
from fat.quant.config import MOST_PIXELS, Grid, QuantSpec
from fat.quant.layers import ChannelClip, SameConv2d
from fat.quant.quantized_layers import QuantConv2d, QuantLayer, QuantLinear
from fat.quant.quantizers import ActivationQuantizer
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_atomic

__all__ = ["check_finite", "check_saveable", "load", "save"]

FORMAT = "fat-student"
VERSION = 3
READABLE = (2, 3)
"""Files of version 2 have no ``constants``."""

FUNCTIONS: dict[str, Callable[..., Any]] = {"builtins.getattr": getattr} | {
    f"{library}.{name}": getattr(module, name)
    for library, module, names in (
        (
            "operator",
            operator,
            "add sub mul truediv mod floordiv getitem neg pow matmul eq ne lt le gt ge",
        ),
        (
            "torch",
            torch,
            """
            abs add addcmul amax amin arange baddbmm bmm cat chunk clamp cos div einsum exp
            flatten flip full gather layer_norm log matmul max maximum mean min minimum
            movedim mul narrow neg ones permute pow prelu repeat_interleave reshape roll
            rsqrt select sin softmax split sqrt square squeeze stack std sub sum swapaxes
            tanh topk transpose unbind unsqueeze var where zeros
            """,
        ),
        (
            "functional",
            F,
            """
            adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d batch_norm conv1d conv2d
            conv_transpose2d elu fold gelu glu grid_sample group_norm interpolate layer_norm
            linear log_softmax max_pool2d mish normalize pad pixel_shuffle pixel_unshuffle
            prelu rms_norm scaled_dot_product_attention softmax softplus unfold
            """,
        ),
    )
    for name in names.split()
}
"""The functions that a graph may call, by the name that files store."""
_METHODS = """
    abs add addcmul amax amin bmm clamp cos dim div exp gather log long masked_fill matmul max
    mean min mul neg new_ones new_zeros norm numel pow rsqrt sin size softmax sqrt square std
    sub sum topk type_as var
"""
METHODS = PRESERVING_METHODS | set(_METHODS.split())
"""The tensor methods that a graph may call."""
ATTRIBUTES = frozenset({"T", "device", "dtype", "mT", "ndim", "shape"})
"""The attributes that a graph may read with ``getattr``."""
_MODULES = """
    ReLU ReLU6 Hardtanh Hardswish Hardsigmoid SiLU Sigmoid Tanh GELU LeakyReLU ELU Mish
    Softplus Softmax Identity Flatten MaxPool2d AvgPool2d AdaptiveAvgPool2d AdaptiveMaxPool2d
    ZeroPad2d MaxPool1d AvgPool1d AdaptiveAvgPool1d ConstantPad2d ReflectionPad2d
    ReplicationPad2d PixelShuffle PixelUnshuffle ChannelShuffle Upsample Unfold Fold Unflatten
    LogSigmoid Softsign CELU SELU GLU Conv2d Linear LayerNorm GroupNorm PReLU
"""
MODULES: dict[str, type[nn.Module]] = {
    **{name: getattr(nn, name) for name in _MODULES.split()},
    "SameConv2d": SameConv2d,
    "ChannelClip": ChannelClip,
}
"""The float layers that a graph may use."""
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}
"""The types that constants of a graph may have."""
MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
GEOMETRY = ("stride", "padding", "dilation", "groups")
LAYERS: dict[str, type[QuantLayer]] = {"QuantConv2d": QuantConv2d, "QuantLinear": QuantLinear}


def save(student: Student, path: str | os.PathLike[str]) -> None:
    """Write the student, its thresholds and its float teacher to one safetensors file, atomically.

    Args:
        student: The student, calibrated or not, on any device.
        path: The file, usually ``student.safetensors``.

    Raises:
        FatError: If the network has an operation that cannot be stored as data (the message names
            it), or the file cannot be written.
    """
    tensors, aliases = _tensors(student)
    content = {
        "version": VERSION,
        "spec": student.spec.to_dict(),
        "origin": student.origin,
        "student": _describe(student.network, student.spec),
        "teacher": _describe(student.teacher, student.spec),
        "aliases": aliases,
    }
    # A single entry, because safetensors writes several in random order: equal students must give
    # equal files.
    metadata = {FORMAT: json.dumps(content)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def check_saveable(student: Student) -> None:
    """Raise the FatError that :func:`save` would raise for an operation that cannot be stored."""
    _describe(student.network, student.spec)
    _describe(student.teacher, student.spec)


def load(path: str | os.PathLike[str]) -> Student:
    """Read a student that can be run, evaluated and trained further.

    It is on the CPU; ``fat.load(path).to("cuda")`` moves it.

    Args:
        path: A file that :func:`save` wrote.

    Raises:
        FatError: If the file is missing, truncated, of another kind or version, or inconsistent.
    """
    content, tensors = _read(path)
    try:
        check_finite(tensors)
        spec = QuantSpec.from_dict(content["spec"])
        for name, stored in content["aliases"].items():
            tensors[name] = tensors[stored]
        network = _rebuild(content["student"], spec)
        teacher = _rebuild(content["teacher"], spec)
        link_inputs(network)
        _fill_teacher(teacher, _part(tensors, "teacher."))
        student = Student(network, teacher, spec)
        student.load_state_dict(_part(tensors, "student."))
        student.origin = dict(content["origin"])
        _check_runs(student)
    except FatError:
        raise
    except Exception as error:  # a damaged or manipulated file can cause nearly any error
        raise _inconsistent(path, error) from error
    return student


def _inconsistent(path: str | os.PathLike[str], error: Exception) -> FatError:
    return FatError(f"{path} is inconsistent: {first_line(error)}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor with complex, NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds values that are not finite real numbers")


@torch.no_grad()
def _check_runs(student: Student) -> None:
    """Run a black image through both networks, so that inconsistent files fail when loaded."""
    size = student.origin.get("preprocessing", {}).get("size")
    if size is None or not student.is_calibrated:
        return
    height, width = size
    if not (0 < height <= MOST_PIXELS and 0 < width <= MOST_PIXELS):
        raise ValueError(f"its images are {height} by {width} pixels")
    image = torch.zeros(1, 3, height, width)
    logits, wanted = student(image), student.float_logits(image)
    if logits.dim() != 2 or logits.shape != wanted.shape:
        raise ValueError(
            f"its logits are {list(logits.shape)}, the float network's {list(wanted.shape)}"
        )
    count = student.origin.get("num_classes", logits.shape[1])
    if count != logits.shape[1]:
        raise ValueError(f"it has {logits.shape[1]} logits for {count} classes")


def _tensors(student: Student) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name, and the names that refer to a tensor stored under another."""
    state = student.state_dict()
    tensors = {f"student.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    aliases: dict[str, str] = {}
    for name, on_device in student.teacher.named_buffers():
        value = on_device.cpu()
        twin = f"student.network.{name}"
        if twin in tensors and torch.equal(tensors[twin], value):
            aliases[f"teacher.{name}"] = twin
        else:
            tensors[f"teacher.{name}"] = value.contiguous()
    return tensors, aliases


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not os.path.isfile(path):
        raise FatError(f"There is no student file {path}. Give a file that fat.save wrote.")
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FatError(
            f"{path} cannot be read as safetensors: {first_line(error)} It is truncated, damaged, "
            "or another kind of file."
        ) from error
    if FORMAT not in metadata:
        raise FatError(
            f"{path} is a safetensors file, but not a student. Give a file that fat.save wrote; "
            "for weights of a float network type model.weights=PATH."
        )
    try:
        content = json.loads(metadata[FORMAT])
        version = content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _inconsistent(path, error) from error
    if version not in READABLE:
        raise FatError(
            f"{path} has version {version} of the format; this version of FAT reads "
            f"{' and '.join(map(str, READABLE))}."
        )
    return content, tensors


def _describe(network: nn.Module, spec: QuantSpec) -> dict[str, Any]:
    assert isinstance(network, fx.GraphModule)
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "target": _describe_target(node),
            "args": _encode(node.args),
            "kwargs": _encode(node.kwargs),
        }
        for node in network.graph.nodes
    ]
    used = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    modules = {name: _describe_module(name, network.get_submodule(name)) for name in sorted(used)}
    constants = {
        str(node.target): {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        for node in network.graph.nodes
        if (value := constant_of(network, node)) is not None
    }
    return {"nodes": nodes, "modules": modules, "constants": constants}


def _describe_target(node: fx.Node) -> str:
    if node.op == "call_function":
        for name, function in FUNCTIONS.items():
            if function is node.target and (function is not getattr or node.args[1] in ATTRIBUTES):
                return name
        raise _unsaveable(
            f"the function {getattr(node.target, '__name__', node.target)}", node.name
        )
    if node.op == "call_method" and node.target not in METHODS:
        raise _unsaveable(f"the tensor method {node.target}", node.name)
    return str(node.target)


def _describe_module(name: str, module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    if isinstance(module, ActivationQuantizer):
        activation = module.activation
        return {
            "type": kind,
            "layer": module.layer,
            "bits": module.grid.bits,
            "grid": module.grid.kind,
            "activation": None if activation is None else _describe_module(name, activation),
        }
    if isinstance(module, QuantLayer):
        description = {
            "type": kind,
            "layer": module.layer,
            "bits": module.weight_quantizer.grid.bits,
            "weight": list(module.weight.shape),
            "bias": module.bias is not None,
        }
        if isinstance(module, QuantConv2d):
            description["options"] = _encode({key: getattr(module, key) for key in GEOMETRY})
        return description
    if MODULES.get(kind) is not type(module):
        raise _unsaveable(f"a {kind}", name)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        keys = GEOMETRY if isinstance(module, nn.Conv2d) else ()
        return {
            "type": kind,
            "weight": list(module.weight.shape),
            "bias": module.bias is not None,
            "options": _encode({key: getattr(module, key) for key in keys}),
        }
    names = inspect.signature(type(module).__init__).parameters
    arguments = {key: getattr(module, key) for key in names if hasattr(module, key)}
    if "bias" in names:  # a flag in the constructor, a tensor in the module
        arguments["bias"] = module.bias is not None
    return {"type": kind, "options": _encode(arguments)}


def _rebuild(description: Mapping[str, Any], spec: QuantSpec) -> fx.GraphModule:
    # fx writes the names of modules, inputs and keywords into the source code that it generates,
    # so they are checked to be identifiers.
    root = nn.Module()
    for name, stored in description["modules"].items():
        parent, last = _owner(root, name)
        parent.add_module(last, _rebuild_module(stored, spec))
    for name, stored in description.get("constants", {}).items():
        parent, last = _owner(root, name)
        parent.register_buffer(last, torch.zeros(stored["shape"], dtype=DTYPES[stored["dtype"]]))
    if not hasattr(root, QUANTIZERS):
        root.add_module(QUANTIZERS, nn.Module())
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for stored in description["nodes"]:
        op, target = stored["op"], stored["target"]
        args, kwargs = _decode(stored["args"], nodes), _decode(stored["kwargs"], nodes)
        for name in (stored["name"], *kwargs, *([target] if op == "placeholder" else [])):
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"{name!r} is not a valid name")
        if op == "call_function":
            target = FUNCTIONS[target]
            if target is getattr and args[1] not in ATTRIBUTES:
                raise ValueError(f"getattr must not read {args[1]!r}")
        elif op == "call_method" and target not in METHODS:
            raise ValueError(f"unknown tensor method {target!r}")
        elif op == "get_attr" and target not in description.get("constants", {}):
            raise ValueError(f"there is no constant {target!r}")
        elif op not in ("placeholder", "get_attr", "call_module", "call_method", "output"):
            raise ValueError(f"unknown kind of node {op!r}")
        nodes[stored["name"]] = graph.create_node(op, target, args, kwargs, stored["name"])
    graph.lint()
    constants_to_buffers(root)
    return fx.GraphModule(root, graph, "Network")


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent of a dotted name, created if necessary, and the name's last part."""
    if not MODULE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid module name")
    parent: nn.Module = root
    *path, last = name.split(".")
    for part in path:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    return parent, last


def _rebuild_module(stored: Mapping[str, Any], spec: QuantSpec) -> nn.Module:
    kind = stored["type"]
    if kind == "ActivationQuantizer":
        clip = stored["activation"]
        activation = None if clip is None else _rebuild_module(clip, spec)
        grid = Grid(stored["bits"], stored["grid"])
        return ActivationQuantizer(stored["layer"], spec, grid, activation)
    options = _decode(stored.get("options", {"map": {}}), {})
    if kind in LAYERS:
        weight = torch.zeros(stored["weight"])
        bias = torch.zeros(stored["weight"][0]) if stored["bias"] else None
        grid = Grid(stored["bits"], "symmetric")
        return LAYERS[kind](stored["layer"], weight, bias, spec, grid, **options)
    if kind == "Linear":
        outputs, inputs = stored["weight"]
        return nn.Linear(inputs, outputs, bias=stored["bias"])
    if kind in ("Conv2d", "SameConv2d"):
        outputs, inputs, *kernel = stored["weight"]
        channels = (inputs * options["groups"], outputs, tuple(kernel))
        layer = nn.Conv2d(*channels, bias=stored["bias"], **options)
        return layer if kind == "Conv2d" else SameConv2d(layer)
    return MODULES[kind](**options)


def _fill_teacher(teacher: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
    freeze(teacher)
    buffers = dict(teacher.named_buffers())
    if buffers.keys() != tensors.keys():
        differing = sorted(buffers.keys() ^ tensors.keys())[:3]
        raise ValueError(f"the teacher's tensors do not match: {differing}")
    for name, buffer in buffers.items():
        if buffer.shape != tensors[name].shape:
            raise ValueError(f"the teacher's {name} has shape {list(tensors[name].shape)}")
        buffer.copy_(tensors[name])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _encode(value: Any) -> Any:
    """Convert arguments of nodes and modules to JSON that tells tuples and nodes from lists."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.Size, tuple)):
        return {"tuple": [_encode(part) for part in value]}
    if isinstance(value, list):
        return [_encode(part) for part in value]
    if isinstance(value, Mapping):
        return {"map": {key: _encode(part) for key, part in value.items()}}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FatError(f"An operation has a {type(value).__name__} argument, which cannot be stored.")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "map":
        return {key: _decode(part, nodes) for key, part in content.items()}
    if kind == "ellipsis":
        return Ellipsis
    if kind == "dtype":
        return DTYPES[content]
    if kind == "device":
        return torch.device(content)
    if kind not in ("slice", "tuple"):
        raise ValueError(f"unknown kind of value {kind!r}")
    parts = [_decode(part, nodes) for part in content]
    return slice(*parts) if kind == "slice" else tuple(parts)


def _unsaveable(operation: str, name: str) -> FatError:
    return FatError(
        f"'{name}' is {operation}, which a student file cannot store. Use a network without it, or "
        "report it with the network's name."
    )
