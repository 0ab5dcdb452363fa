"""Fold every batch norm into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fat.errors import FatError
from fat.graph.patterns import module_of, source

__all__ = ["FoldReport", "find_foldable", "fold_batch_norms", "folded"]


@dataclass(frozen=True)
class FoldReport:
    """Which batch norm went into which layer, by name."""

    pairs: tuple[tuple[str, str], ...]


def find_foldable(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (layer, batch norm) where the batch norm alone reads the layer's result."""
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for node in module.graph.nodes:
        if not isinstance(module_of(module, node), _BatchNorm):
            continue
        before = source(node)
        if before is None or len(before.users) > 1:
            continue
        if isinstance(module_of(module, before), (nn.Conv2d, nn.Linear)):
            pairs.append((before, node))
    return pairs


def folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias that do the work of the layer and of the batch norm after it.

    W·γ/√(σ²+ε) and (b − μ)·γ/√(σ²+ε) + β, computed in float64.

    Args:
        weight: [C, ...].
        bias: [C] or ``None``.
        norm: Batch norm over C channels, with running statistics.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    start = torch.zeros_like(factor) if bias is None else bias.detach().double()
    new_bias = (start - norm.running_mean.double()) * factor
    if norm.bias is not None:
        new_bias = new_bias + norm.bias.detach().double()
    new_weight = weight.detach().double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def fold_batch_norms(module: fx.GraphModule) -> FoldReport:
    """Fold in place and return what was done.

    Raises:
        FatError: If a batch norm is left that has no layer to go into; it is named.
    """
    pairs = find_foldable(module)
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for layer_node, norm_node in pairs:
        name = str(layer_node.target)
        if calls[name] > 1:
            raise FatError(
                f"'{name}' is used {calls[name]} times in the network, so '{norm_node.target}' "
                "cannot be folded into it: give each use a layer of its own."
            )
        layer, norm = module.get_submodule(name), module.get_submodule(str(norm_node.target))
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None:
            raise FatError(
                f"'{norm_node.target}' keeps no running statistics and cannot be folded."
            )
        weight, bias = folded(layer.weight, layer.bias, norm)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        norm_node.replace_all_uses_with(layer_node)
        module.graph.erase_node(norm_node)
    module.delete_all_unused_submodules()
    module.recompile()
    left = [name for name, child in module.named_modules() if isinstance(child, _BatchNorm)]
    if left:
        raise FatError(
            f"{len(left)} batch norm(s) have no convolution or linear layer of their own before "
            f"them and cannot be folded: {', '.join(left[:5])}. Such networks are not supported."
        )
    return FoldReport(tuple((str(norm.target), str(layer.target)) for layer, norm in pairs))
