"""Folding of batch norms and per-channel factors into neighboring layers.

Each batch norm is folded

1. into the convolution or linear layer whose result it alone reads; else
2. into the layer that alone reads its result, if that does not pad with zeros; else
3. it becomes a 1×1 depthwise convolution, which integer runtimes support (a norm at the start of a
   block, after a concatenation, or after padding).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fat.graph.patterns import constant_of, module_of, only_user, source
from fat.graph.tracing.constant_folding import drop_unused
from fat.utils.errors import FatError

__all__ = ["FoldReport", "find_foldable", "fold_batch_norms", "folded", "folded_into_next"]

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class FoldReport:
    """Result of batch-norm folding.

    Attributes:
        pairs: Names of folded batch norms and the layers they were folded into.
        convolutions: Batch norms that became a 1×1 depthwise convolution.
        factors: Layers into which a factor per channel (LayerScale) was folded.
    """

    pairs: tuple[tuple[str, str], ...]
    convolutions: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()


def find_foldable(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Return pairs (layer, batch norm) where the batch norm alone reads the layer's result."""
    pairs = ((_layer_before(module, node), node) for node in _norms(module))
    return [(layer, norm) for layer, norm in pairs if layer is not None]


def folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer with the batch norm after it folded in.

    W·γ/√(σ²+ε) and (b − μ)·γ/√(σ²+ε) + β, computed in float64.

    Args:
        weight: [C, ...].
        bias: [C] or ``None``.
        norm: Batch norm over C channels, with running statistics.
    """
    factor, shift = _affine(norm)
    start = torch.zeros_like(factor) if bias is None else bias.detach().double()
    new_weight = weight.detach().double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return new_weight.to(weight.dtype), (start * factor + shift).to(weight.dtype)


def folded_into_next(
    weight: Tensor, bias: Tensor | None, norm: _BatchNorm, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer with the batch norm before it folded in.

    W·f and b + Σ W·c with f = γ/√(σ²+ε) and c = β − μ·f of the channel that each weight reads.

    Args:
        weight: [O, C/groups, ...].
        bias: [O] or ``None``.
        norm: Batch norm over C channels, with running statistics.
        groups: Groups of the convolution.
    """
    factor, shift = _affine(norm)
    wide = weight.detach().double()

    def of_filters(values: Tensor) -> Tensor:
        each = values.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        return each.reshape(*wide.shape[:2], *[1] * (wide.dim() - 2))

    start = wide.new_zeros(len(weight)) if bias is None else bias.detach().double()
    new_bias = start + (wide * of_filters(shift)).flatten(1).sum(1)
    return (wide * of_filters(factor)).to(weight.dtype), new_bias.to(weight.dtype)


@torch.random.fork_rng(devices=[])  # constructing layers draws random weights
def fold_batch_norms(module: fx.GraphModule) -> FoldReport:
    """Fold all batch norms and per-channel factors in place.

    Args:
        module: Canonical graph, in which no layer is called twice.

    Raises:
        FatError: If a batch norm has no running statistics, or can neither be folded nor become a
            convolution; the message names it.
    """
    pairs: list[tuple[str, str]] = []
    convolutions: list[str] = []
    for node in _norms(module):
        name = str(node.target)
        norm = module.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None:
            raise FatError(f"'{name}' has no running statistics and cannot be folded.")
        before, after = _layer_before(module, node), _layer_after(module, node)
        if before is not None:
            layer = _layer(module, before)
            _set(layer, *folded(layer.weight, layer.bias, norm))
            pairs.append((name, str(before.target)))
        elif after is not None:
            layer = _layer(module, after)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            _set(layer, *folded_into_next(layer.weight, layer.bias, norm, groups))
            pairs.append((name, str(after.target)))
        elif isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.set_submodule(name, _convolution(norm))
            convolutions.append(name)
            continue
        else:
            raise FatError(
                f"'{name}' is a {type(norm).__name__} that cannot be folded into a neighboring "
                "layer; only BatchNorm2d can be quantized by itself. Put a linear layer before or "
                "after it."
            )
        reads = source(node)
        assert reads is not None
        node.replace_all_uses_with(reads)
        module.graph.erase_node(node)
    factors = _fold_factors(module)
    module.graph.eliminate_dead_code()
    drop_unused(module)
    module.recompile()
    return FoldReport(tuple(pairs), tuple(convolutions), factors)


def _norms(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if isinstance(module_of(module, node), _BatchNorm)]


def _layer(module: fx.GraphModule, node: fx.Node) -> Layer:
    layer = module.get_submodule(str(node.target))
    assert isinstance(layer, Layer)
    return layer


def _layer_before(module: fx.GraphModule, norm: fx.Node) -> fx.Node | None:
    before = source(norm)
    if before is not None and before.target == "flatten" and before.args[1:] == (0, 1):
        # [N, L, C] → [N·L, C]: a norm of a linear layer's channels, the last dimension.
        layer = source(before)
        linear = layer is not None and isinstance(module_of(module, layer), nn.Linear)
        before = layer if linear and only_user(before) is norm else None
    if before is None or len(before.users) > 1:
        return None
    return before if isinstance(module_of(module, before), Layer) else None


def _layer_after(module: fx.GraphModule, norm: fx.Node) -> fx.Node | None:
    """Return the layer that alone reads a norm, if it does not pad with zeros."""
    after = only_user(norm)
    layer = None if after is None else module_of(module, after)
    if isinstance(layer, nn.Conv2d):
        pointwise = all(side == 1 for side in layer.kernel_size)
        unpadded = layer.padding in ((0, 0), "valid") or (pointwise and layer.padding == "same")
        return after if unpadded and type(layer) is nn.Conv2d else None
    return after if isinstance(layer, nn.Linear) else None


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of a batch norm, float64 [C] on its device.

    They are computed on the CPU, because the last bit of a root depends on the device.
    """
    mean, variance, weight, bias = (
        None if values is None else values.detach().cpu().double()
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance + norm.eps)
    if weight is not None:
        factor = factor * weight
    shift = -mean * factor
    if bias is not None:
        shift = shift + bias
    device = norm.running_var.device  # type: ignore[union-attr]
    return factor.to(device), shift.to(device)


def _convolution(norm: _BatchNorm) -> nn.Conv2d:
    factor, shift = _affine(norm)
    channels = len(factor)
    layer = nn.Conv2d(channels, channels, 1, groups=channels)
    like = norm.running_var
    assert like is not None
    _set(layer, factor.reshape(-1, 1, 1, 1).to(like), shift.to(like))
    return layer.eval()


def _set(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)


def _fold_factors(module: fx.GraphModule) -> tuple[str, ...]:
    """Fold per-channel factors of layers' results into the layers."""
    done = []
    for node in list(module.graph.nodes):
        if node.target is not operator.mul:
            continue
        for result, factor in (node.args, node.args[::-1]):
            found = _factor(module, result, factor)
            if found is None:
                continue
            layer_node, values = found
            layer = _layer(module, layer_node)
            weight = layer.weight.detach()
            new = weight.double() * values.double().reshape(-1, *[1] * (weight.dim() - 1))
            layer.weight = nn.Parameter(new.to(weight), requires_grad=False)
            if layer.bias is not None:
                bias = layer.bias.detach().double() * values.double()
                layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            done.append(str(layer_node.target))
            break
    return tuple(done)


def _factor(
    module: fx.GraphModule, result: object, factor: object
) -> tuple[fx.Node, Tensor] | None:
    """Return the layer whose result is multiplied, and one factor per filter, or ``None``."""
    values = constant_of(module, factor)
    if values is None or not isinstance(result, fx.Node) or only_user(result) is None:
        return None
    node: fx.Node | None = result
    order = _permutation(result)
    if order is not None:
        values = values.reshape(*[1] * (len(order) - values.dim()), *values.shape)
        values = values.permute([order.index(axis) for axis in range(len(order))])
        node = source(result)
    if node is None or only_user(node) is None:
        return None
    layer = module_of(module, node)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return None
    filters = layer.weight.shape[0]
    channels = values.dim() - (3 if isinstance(layer, nn.Conv2d) else 1)  # its dimension
    shape = [filters if axis == channels else 1 for axis in range(values.dim())]
    if values.numel() == 1:
        return node, values.reshape(1).expand(filters)
    return (node, values.reshape(-1)) if channels >= 0 and list(values.shape) == shape else None


def _permutation(node: fx.Node) -> list[int] | None:
    """Return the non-negative dimensions of a permutation node, or ``None``."""
    if node.target not in ("permute", torch.permute):
        return None
    dims = node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not all(isinstance(dim, int) for dim in dims):
        return None
    return [dim % len(dims) for dim in dims]  # type: ignore[operator,misc]
