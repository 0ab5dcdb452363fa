"""A student as one safetensors file that holds data only: no code runs when it is loaded.

The graph is stored as JSON in the file's metadata: nodes with names of operations, modules with
their constructor's arguments. Both are looked up in the short lists of this file; anything else is
refused. The teacher's tensors are stored too, so that a student can be judged from the file alone;
those that equal the student's are stored once.
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

from fat.graph.passes.quantizer_insertion import QUANTIZERS, hold_constants, link_inputs
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
"""Version 2 has no constants."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module}.{function.__name__}": function
    for module, functions in (
        (
            "operator",
            (
                operator.add,
                operator.sub,
                operator.mul,
                operator.truediv,
                operator.mod,
                operator.floordiv,
                operator.getitem,
                operator.neg,
                operator.pow,
                operator.matmul,
                operator.eq,
                operator.ne,
                operator.lt,
                operator.le,
                operator.gt,
                operator.ge,
            ),
        ),
        (
            "torch",
            (
                torch.abs,
                torch.add,
                torch.addcmul,
                torch.amax,
                torch.amin,
                torch.arange,
                torch.baddbmm,
                torch.bmm,
                torch.cat,
                torch.chunk,
                torch.clamp,
                torch.cos,
                torch.div,
                torch.einsum,
                torch.exp,
                torch.flatten,
                torch.flip,
                torch.full,
                torch.gather,
                torch.layer_norm,
                torch.log,
                torch.matmul,
                torch.max,
                torch.maximum,
                torch.mean,
                torch.min,
                torch.minimum,
                torch.movedim,
                torch.mul,
                torch.narrow,
                torch.neg,
                torch.ones,
                torch.permute,
                torch.pow,
                torch.prelu,
                torch.repeat_interleave,
                torch.reshape,
                torch.roll,
                torch.rsqrt,
                torch.select,
                torch.sin,
                torch.softmax,
                torch.split,
                torch.sqrt,
                torch.square,
                torch.squeeze,
                torch.stack,
                torch.std,
                torch.sub,
                torch.sum,
                torch.swapaxes,
                torch.tanh,
                torch.topk,
                torch.transpose,
                torch.unbind,
                torch.unsqueeze,
                torch.var,
                torch.where,
                torch.zeros,
            ),
        ),
        (
            "functional",
            (
                F.adaptive_avg_pool2d,
                F.adaptive_max_pool2d,
                F.avg_pool2d,
                F.batch_norm,
                F.conv1d,
                F.conv2d,
                F.conv_transpose2d,
                F.elu,
                F.fold,
                F.gelu,
                F.glu,
                F.grid_sample,
                F.group_norm,
                F.interpolate,
                F.layer_norm,
                F.linear,
                F.log_softmax,
                F.max_pool2d,
                F.mish,
                F.normalize,
                F.pad,
                F.pixel_shuffle,
                F.pixel_unshuffle,
                F.prelu,
                F.rms_norm,
                F.scaled_dot_product_attention,
                F.softmax,
                F.softplus,
                F.unfold,
            ),
        ),
        ("builtins", (getattr,)),
    )
    for function in functions
}
METHODS = PRESERVING_METHODS | {
    "abs",
    "add",
    "addcmul",
    "amax",
    "amin",
    "bmm",
    "clamp",
    "cos",
    "dim",
    "div",
    "exp",
    "gather",
    "log",
    "long",
    "masked_fill",
    "matmul",
    "max",
    "mean",
    "min",
    "mul",
    "neg",
    "new_ones",
    "new_zeros",
    "norm",
    "numel",
    "pow",
    "rsqrt",
    "sin",
    "size",
    "softmax",
    "sqrt",
    "square",
    "std",
    "sub",
    "sum",
    "topk",
    "type_as",
    "var",
}
ATTRIBUTES = frozenset({"T", "device", "dtype", "mT", "ndim", "shape"})
"""What ``getattr`` may be asked for."""
MODULES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.SiLU,
        nn.Sigmoid,
        nn.Tanh,
        nn.GELU,
        nn.LeakyReLU,
        nn.ELU,
        nn.Mish,
        nn.Softplus,
        nn.Softmax,
        nn.Identity,
        nn.Flatten,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
        nn.ZeroPad2d,
        nn.MaxPool1d,
        nn.AvgPool1d,
        nn.AdaptiveAvgPool1d,
        nn.ConstantPad2d,
        nn.ReflectionPad2d,
        nn.ReplicationPad2d,
        nn.PixelShuffle,
        nn.PixelUnshuffle,
        nn.ChannelShuffle,
        nn.Upsample,
        nn.Unfold,
        nn.Fold,
        nn.Unflatten,
        nn.LogSigmoid,
        nn.Softsign,
        nn.CELU,
        nn.SELU,
        nn.GLU,
        nn.Conv2d,
        nn.Linear,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.PReLU,
        SameConv2d,
        ChannelClip,
    )
}
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
}
"""Types of tensors that a network uses by themselves."""
MODULE_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
GEOMETRY = ("stride", "padding", "dilation", "groups")
LAYERS: dict[str, type[QuantLayer]] = {"QuantConv2d": QuantConv2d, "QuantLinear": QuantLinear}


def save(student: Student, path: str | os.PathLike[str]) -> None:
    """Write the student, its thresholds and its float teacher to one safetensors file, atomically.

    Args:
        student: Calibrated or not.
        path: The file; by custom ``student.safetensors``.

    Raises:
        FatError: If the network holds an operation that cannot be stored as data (it is named), or
            the place cannot be written.
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
    # One entry: safetensors writes several in random order, and equal students are equal files.
    metadata = {FORMAT: json.dumps(content)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def check_saveable(student: Student) -> None:
    """Raise the FatError that :func:`save` would, before time is spent on training."""
    _describe(student.network, student.spec)
    _describe(student.teacher, student.spec)


def load(path: str | os.PathLike[str]) -> Student:
    """Read a student back, ready to run, to be judged, and to be trained on.

    Args:
        path: A file that :func:`save` wrote.

    Raises:
        FatError: If the file is missing, truncated, of another kind or version, or does not fit
            together; the text says which.
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
    except Exception as error:  # whatever a file holds that was damaged or tampered with
        raise FatError(f"{path} does not fit together: {first_line(error)}") from error
    return student


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor that is no real, finite numbers."""
    for name, tensor in tensors.items():
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds what are no finite numbers")


@torch.no_grad()
def _check_runs(student: Student) -> None:
    """Run a black image through both networks: what does not fit together fails now, not later."""
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
    """Tensors by name, and names that stand for a tensor stored under another name."""
    tensors = {f"student.{k}": v.detach().contiguous() for k, v in student.state_dict().items()}
    aliases: dict[str, str] = {}
    for name, value in student.teacher.named_buffers():
        twin = f"student.network.{name}"
        if twin in tensors and torch.equal(tensors[twin], value):
            aliases[f"teacher.{name}"] = twin
        else:
            tensors[f"teacher.{name}"] = value.contiguous()
    return tensors, aliases


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not os.path.isfile(path):
        raise FatError(f"There is no student at {path}; give a file that fat.save wrote.")
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
            f"{path} is a safetensors file, but not a student; give a file that fat.save wrote. "
            "Weights of a float network go to model.weights=PATH."
        )
    try:
        content = json.loads(metadata[FORMAT])
        version = content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FatError(f"{path} does not fit together: {first_line(error)}") from error
    if version not in READABLE:
        raise FatError(
            f"{path} has version {version} of the format; this FAT reads "
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
        # The float teacher's layers; the same arithmetic as the student's with quantizers off.
        return {
            "type": kind,
            "weight": list(module.weight.shape),
            "bias": module.bias is not None,
            "options": _encode(
                {key: getattr(module, key) for key in GEOMETRY}
                if isinstance(module, nn.Conv2d)
                else {}
            ),
        }
    names = inspect.signature(type(module).__init__).parameters
    arguments = {key: getattr(module, key) for key in names if hasattr(module, key)}
    if "bias" in names:  # whether there is one, or the one there is
        arguments["bias"] = module.bias is not None
    return {"type": kind, "options": _encode(arguments)}


def _rebuild(description: Mapping[str, Any], spec: QuantSpec) -> fx.GraphModule:
    root = nn.Module()
    # fx writes names of modules, inputs and keywords into the source code that it generates, so
    # nothing but a name may pass.
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
                raise ValueError(f"{name!r} is no name")
        if op == "call_function":
            target = FUNCTIONS[target]
            if target is getattr and args[1] not in ATTRIBUTES:
                raise ValueError(f"getattr asks for {args[1]!r}")
        elif op == "call_method" and target not in METHODS:
            raise ValueError(f"unknown tensor method {target!r}")
        elif op == "get_attr" and target not in description.get("constants", {}):
            raise ValueError(f"there is no constant {target!r}")
        elif op not in ("placeholder", "get_attr", "call_module", "call_method", "output"):
            raise ValueError(f"unknown kind of node {op!r}")
        nodes[stored["name"]] = graph.create_node(op, target, args, kwargs, stored["name"])
    graph.lint()
    hold_constants(root)
    return fx.GraphModule(root, graph, "Network")


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has a name with dots, and the name's last part."""
    if not MODULE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a module")
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
        raise ValueError(f"the teacher lacks {sorted(buffers.keys() ^ tensors.keys())[:3]}")
    for name, buffer in buffers.items():
        if buffer.shape != tensors[name].shape:
            raise ValueError(f"the teacher's {name} has shape {list(tensors[name].shape)}")
        buffer.copy_(tensors[name])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _encode(value: Any) -> Any:
    """Arguments of nodes and modules as JSON, tuples and references kept apart from lists."""
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
    raise FatError(f"A {type(value).__name__} among an operation's arguments cannot be stored.")


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


def _unsaveable(what: str, where: str) -> FatError:
    return FatError(
        f"'{where}' is {what}, which a student file cannot hold as data. Choose a network "
        "without it, or report it with the network's name."
    )
