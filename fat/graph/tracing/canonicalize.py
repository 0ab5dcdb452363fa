"""Layers as what they amount to at inference: plain convolutions, linear layers, batch norms.

Networks come with layers that standardize their weights before each use, concatenate their biases
from parts, pad as TensorFlow does, train in several branches or hold their statistics frozen. At
inference each is one of a few plain layers, the ones that the passes know.
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
    "forward_of",
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
"""timm's own modules, which take ``inplace``, and torch's that compute the same."""
PARAMETERS = ("weight", "bias")
MATRIX_PRODUCTS = frozenset({operator.matmul, torch.matmul, torch.mm, "matmul", "mm"})
GEOMETRY = ("stride", "padding", "dilation", "groups")
TOLERANCE = 1e-4
"""How far, relative to its largest value, a plain layer's result may be from the original's."""


def plain_layer(name: str, layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The same layer as one of the classes that the passes know.

    A layer of another class is asked: it is run on noise, and what it hands to torch's convolution
    or linear function, weight, bias and geometry, makes the plain layer. That one is then compared
    with the original.

    Args:
        name: What the layer is called in its network.
        layer: In eval mode.

    Raises:
        FatError: If that is not all that the layer does.
    """
    hooked = layer._forward_pre_hooks or layer._forward_hooks
    if type(layer) in (nn.Conv2d, nn.Linear, SameConv2d) and not hooked:
        return layer
    if type(layer) is _timm.Conv2dSame:
        return SameConv2d(layer)  # type: ignore[arg-type]
    noise = _noise(layer, 0)
    asked = _ask(layer, noise)
    plain = None if asked is None else _built(layer, noise, asked)
    if plain is not None and all(_alike(layer, plain, _noise(layer, more)) for more in (0, 1)):
        return plain
    raise FatError(
        f"'{name}' is a {type(layer).__name__}, whose arithmetic FAT does not know. Replace it by "
        f"the {'linear layer' if isinstance(layer, nn.Linear) else 'convolution'} it amounts to at "
        "inference."
    )


def plain_norm(norm: nn.Module) -> _BatchNorm:
    """Torch's batch norm of the same statistics, without the activation that may be part of it."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm3d)
    kind = next((kind for kind in kinds if isinstance(norm, kind)), nn.BatchNorm2d)
    frozen: Any = norm
    affine = frozen.weight is not None
    tracked = frozen.running_mean is not None
    features = len(frozen.weight if affine else frozen.running_mean)
    plain = kind(features, eps=frozen.eps, affine=affine, track_running_stats=tracked)
    state = {key: value for key, value in norm.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state, strict=not isinstance(norm, FROZEN_NORMS))
    return plain.to(frozen.weight if affine else frozen.running_mean).eval()


def plain_activation(activation: nn.Module) -> nn.Module:
    """An activation as torch's own module, not in place; one that torch has not stays as it is."""
    if type(activation) in _ACTIVATIONS:
        return _ACTIVATIONS[type(activation)]().eval()
    if hasattr(activation, "inplace"):
        activation.inplace = False  # type: ignore[assignment]  # the passes re-order, share
    return activation


def plain_call(module: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """The layer that a call of torch's convolution, linear or matrix product amounts to.

    Args:
        module: The graph's module.
        node: A call of ``conv2d``, ``linear``, or of one of ``MATRIX_PRODUCTS``.

    Returns:
        The layer; ``None`` if the weight is computed from images.
    """
    if node.target in MATRIX_PRODUCTS:
        matrix = constant_of(module, node.args[1] if len(node.args) > 1 else None)
        return None if matrix is None or matrix.dim() != 2 else _linear(matrix.T, None)
    given = _by_name(node.args, node.kwargs)
    tensors = {key: constant_of(module, given.get(key)) for key in PARAMETERS}
    geometry = {key: given[key] for key in GEOMETRY if key in given}
    weight, bias = tensors["weight"], tensors["bias"]
    if weight is None or (bias is None and given.get("bias") is not None):
        return None
    if any(isinstance(value, fx.Node) for value in geometry.values()):
        return None
    if node.target is F.linear:
        return _linear(weight, bias)
    return _convolution(weight, bias, **geometry)


def conv2d_of(layer: nn.Conv1d) -> nn.Conv2d:
    """The convolution of [N, C, 1, L] that a convolution of [N, C, L] amounts to."""
    return _convolution(
        layer.weight.unsqueeze(2),
        layer.bias,
        stride=(1, *layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else (0, *layer.padding),
        dilation=(1, *layer.dilation),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def forward_of(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution that a transposed one is of its input's pixels, spread ``stride`` apart.

    Without its padding. The kernel is turned by 180°, inputs and outputs of each group change
    places.
    """
    weight = layer.weight.detach()
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2)
    turned = grouped.reshape(layer.out_channels, -1, *weight.shape[2:]).flip(2, 3)
    return _convolution(turned, layer.bias, dilation=layer.dilation, groups=layer.groups)


def unpadded(layer: nn.Conv2d) -> nn.Conv2d:
    """The same convolution without its padding."""
    geometry = {key: getattr(layer, key) for key in GEOMETRY if key != "padding"}
    return _convolution(layer.weight, layer.bias, **geometry)


@torch.no_grad()
def reparameterized(network: nn.Module) -> nn.Module:
    """The network with its blocks of several branches (RepVGG, MobileOne, …) as one, in place."""
    return _utils.reparameterize_model(network, inplace=True).eval()  # type: ignore[no-any-return]


class _Asking(TorchFunctionMode):
    """Notes what a layer hands to torch's convolution and linear functions."""

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
def _ask(layer: nn.Module, x: Tensor) -> dict[str, Any] | None:
    """What a layer hands over in the one call that gives its result, by name."""
    with _Asking() as asking:
        result = layer(x)
    if len(asking.calls) != 1 or asking.calls[0][2] is not result:
        return None
    args, options, _ = asking.calls[0]
    return _by_name(args, options)


def _by_name(args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of torch's convolution or linear function."""
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
def _alike(layer: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    expected, found = layer(x), plain(x)
    if expected.shape != found.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _noise(layer: nn.Conv2d | nn.Linear, more: int) -> Tensor:
    """What fits into a layer; padding shows at images of an odd and an even side."""
    generator = torch.Generator().manual_seed(more)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, layer.in_features)
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (1, layer.in_channels, *(2 * side + 5 + more for side in reach))
    return torch.randn(shape, generator=generator).to(layer.weight)
