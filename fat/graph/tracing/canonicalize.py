"""Replacement of special layers by the plain torch layers that the passes support.

Networks contain layers that standardize their weights, concatenate their biases, pad as TensorFlow
does, have several training branches or frozen statistics. At inference each is equivalent to a
plain convolution, linear layer or batch norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm.layers
import timm.utils.model
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fat.graph.patterns import constant_of
from fat.graph.tracing.tracer import FROZEN_NORMS
from fat.quant.layers import SameConv2d, pad_same
from fat.utils.errors import FatError

__all__ = [
    "MATRIX_PRODUCTS",
    "conv2d_of",
    "conv2d_of_transposed",
    "plain_activation",
    "plain_call",
    "plain_layer",
    "plain_norm",
    "reparameterized",
    "unpadded",
]

_timm: Any = timm.layers  # only partly typed
_utils: Any = timm.utils.model
_ACTIVATIONS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    timm.layers.activations.GELU: nn.GELU,
    timm.layers.activations.GELUTanh: partial(nn.GELU, "tanh"),
    timm.layers.activations.HardSigmoid: nn.Hardsigmoid,
    timm.layers.activations.HardSwish: nn.Hardswish,
    timm.layers.activations.Mish: nn.Mish,
    timm.layers.activations.Sigmoid: nn.Sigmoid,
    timm.layers.activations.Swish: nn.SiLU,
    timm.layers.activations.Tanh: nn.Tanh,
}
"""timm's activation modules and their equivalents in torch."""
PARAMETERS = ("weight", "bias")
MATRIX_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.mm, "matmul", "mm"})
GEOMETRY = ("stride", "padding", "dilation", "groups")
TOLERANCE = 1e-4
"""Largest deviation of a plain layer's result, relative to the original's largest value."""


def plain_layer(name: str, layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Return an equivalent layer of a class that the passes support.

    A layer of another class is run on noise; the weight, bias and geometry that it passes to
    torch's convolution or linear function make the plain layer, which is then compared with the
    original.

    Args:
        name: Name of the layer in its network.
        layer: Layer in eval mode.

    Raises:
        FatError: If the layer computes anything else.
    """
    hooked = layer._forward_pre_hooks or layer._forward_hooks
    if type(layer) in (nn.Conv2d, nn.Linear, SameConv2d) and not hooked:
        return layer
    if type(layer) is _timm.Conv2dSame:
        return SameConv2d(layer)  # type: ignore[arg-type]
    noise = _noise(layer, 0)
    arguments = _recorded_call(layer, noise)
    plain = None if arguments is None else _built(layer, noise, arguments)
    if plain is not None and all(_equivalent(layer, plain, _noise(layer, more)) for more in (0, 1)):
        return plain
    raise FatError(
        f"'{name}' is a {type(layer).__name__}, which FAT does not support. Replace it by an "
        f"equivalent {'linear layer' if isinstance(layer, nn.Linear) else 'convolution'}."
    )


def plain_norm(norm: nn.Module) -> _BatchNorm:
    """Return torch's batch norm with the same statistics, without a built-in activation."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm3d)
    kind = next((kind for kind in kinds if isinstance(norm, kind)), nn.BatchNorm2d)
    frozen: Any = norm
    affine = frozen.weight is not None
    tracked = frozen.running_mean is not None
    like: Tensor = frozen.weight if affine else frozen.running_mean
    plain = kind(
        len(like), eps=frozen.eps, affine=affine, track_running_stats=tracked, device=like.device
    )
    state = {key: value for key, value in norm.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state, strict=not isinstance(norm, FROZEN_NORMS))
    return plain.to(like).eval()


def plain_activation(activation: nn.Module) -> nn.Module:
    """Return torch's equivalent of an activation, or the activation itself, not in place."""
    if type(activation) in _ACTIVATIONS:
        return _ACTIVATIONS[type(activation)]().eval()
    if hasattr(activation, "inplace"):
        activation.inplace = False  # type: ignore[assignment]  # the passes reorder operations
    return activation


def plain_call(module: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """Return the layer equivalent to a call of torch's convolution, linear or matrix product.

    Args:
        module: Module of the graph.
        node: Call of ``conv2d``, ``linear``, or one of ``MATRIX_PRODUCTS``.

    Returns:
        The layer; ``None`` if the weight depends on the images.
    """
    if node.target in MATRIX_PRODUCTS:
        matrix = constant_of(module, node.args[1] if len(node.args) > 1 else None)
        return None if matrix is None or matrix.dim() != 2 else _linear(matrix.T, None)
    arguments = _by_name(node.args, node.kwargs)
    tensors = {key: constant_of(module, arguments.get(key)) for key in PARAMETERS}
    geometry = {key: arguments[key] for key in GEOMETRY if key in arguments}
    weight, bias = tensors["weight"], tensors["bias"]
    if weight is None or (bias is None and arguments.get("bias") is not None):
        return None
    if any(isinstance(value, fx.Node) for value in geometry.values()):
        return None
    if node.target is F.linear:
        return _linear(weight, bias)
    return _convolution(weight, bias, **geometry)


def conv2d_of(layer: nn.Conv1d) -> nn.Conv2d:
    """Return the convolution of [N, C, 1, L] equivalent to one of [N, C, L]."""
    return _convolution(
        layer.weight.unsqueeze(2),
        layer.bias,
        stride=(1, *layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else (0, *layer.padding),
        dilation=(1, *layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def conv2d_of_transposed(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """Return the convolution, without padding, equivalent to a transposed one.

    It applies to the input with its pixels spread ``stride`` apart. The kernel is rotated by 180°;
    inputs and outputs of each group swap places.
    """
    weight = layer.weight.detach()
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
    rotated = grouped.reshape(layer.out_channels, -1, *weight.shape[2:]).flip(2, 3)
    return _convolution(rotated, layer.bias, dilation=layer.dilation, groups=layer.groups)


def unpadded(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the same convolution without padding."""
    geometry = {key: getattr(layer, key) for key in GEOMETRY if key != "padding"}
    return _convolution(layer.weight, layer.bias, **geometry)


@torch.no_grad()
def reparameterized(network: nn.Module) -> nn.Module:
    """Merge the branches of reparameterizable blocks (RepVGG, MobileOne, …), in place."""
    return _utils.reparameterize_model(network, inplace=True).eval()  # type: ignore[no-any-return]


class _CallRecorder(TorchFunctionMode):
    """Records calls of torch's convolution and linear functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            self.calls.append((args, kwargs or {}, result))
        return result


@torch.no_grad()
def _recorded_call(layer: nn.Module, x: Tensor) -> dict[str, Any] | None:
    """Return the arguments of the only recorded call, if the layer returns its result."""
    with _CallRecorder() as recorder:
        result = layer(x)
    if len(recorder.calls) != 1 or recorder.calls[0][2] is not result:
        return None
    args, options, _ = recorder.calls[0]
    return _by_name(args, options)


def _by_name(args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of torch's convolution or linear function by name."""
    return {**dict(zip(("input", *PARAMETERS, *GEOMETRY), args, strict=False)), **options}


def _built(
    layer: nn.Conv2d | nn.Linear, x: Tensor, options: dict[str, Any]
) -> nn.Conv2d | nn.Linear | None:
    weight, bias = options["weight"], options.get("bias")
    if isinstance(layer, nn.Linear):
        return _linear(weight, bias)
    geometry = {key: options.get(key, getattr(layer, key)) for key in GEOMETRY}
    padded = options["input"].shape
    if padded == x.shape:
        return _convolution(weight, bias, **geometry)
    plain = SameConv2d(_convolution(weight, bias, **{**geometry, "padding": 0}))
    kernel, stride, dilation = (
        (pair[0], pair[1]) for pair in (plain.kernel_size, plain.stride, plain.dilation)
    )
    return plain if padded == pad_same(x, kernel, stride, dilation).shape else None


def _convolution(weight: Tensor, bias: Tensor | None, **geometry: Any) -> nn.Conv2d:
    channels = weight.shape[1] * geometry.get("groups", 1)
    kernel = (weight.shape[2], weight.shape[3])
    layer = nn.Conv2d(channels, len(weight), kernel, bias=bias is not None, **geometry)
    _fill(layer, weight, bias)
    return layer


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    _fill(layer, weight, bias)
    return layer


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    layer.to(weight).eval().requires_grad_(False)


@torch.no_grad()
def _equivalent(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    expected, found = layer(x), plain(x)
    if expected.shape != found.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _noise(layer: nn.Conv2d | nn.Linear, more: int) -> Tensor:
    """Return input for a layer; odd and even sides (``more``) reveal its padding."""
    generator = torch.Generator().manual_seed(more)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, layer.in_features)
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (1, layer.in_channels, *(2 * side + 5 + more for side in reach))
    return torch.randn(shape, generator=generator).to(layer.weight)
