"""Construction of timm networks, and the parameters of their classifiers."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import nn

from fat.utils.errors import FatError, unknown_name

__all__ = ["build_network", "check_name", "count_classes", "head_parameters", "head_prefixes"]

_timm: Any = timm  # partly typed


def check_name(name: str) -> None:
    """Raise a FatError if timm does not know the network or its tag."""
    if not timm.is_model(name):
        raise unknown_name(
            "network",
            name,
            timm.list_models(),
            "Any name of timm.list_models() is allowed: type model.name=NAME, or model=NAME for "
            "one of conf/model.",
        )
    arch, _, tag = name.partition(".")
    if tag:
        known = [n for n in timm.list_pretrained(f"{arch}*") if n.startswith(f"{arch}.")]
        if name not in known:
            raise unknown_name(f"weights tag of {arch}", name, known)


def build_network(
    name: str, num_classes: int | None, seed: int = 0, **options: object
) -> nn.Module:
    """Create the network without touching the global random state."""
    if num_classes is not None:
        if num_classes < 1:
            raise FatError(f"num_classes is {num_classes}; it must be at least 1, or null.")
        options["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(nn.Module, _timm.create_model(name, **options))


def count_classes(network: nn.Module) -> int:
    """Return the number of logits of a timm network."""
    return int(cast(Any, network).num_classes)


def head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of the classifier's tensors, such as ``("classifier.",)``."""
    head = cast(Any, network).pretrained_cfg.get("classifier") or ()
    heads = (head,) if isinstance(head, str) else tuple(head)
    return tuple(f"{prefix}." for prefix in heads)


def head_parameters(network: nn.Module) -> frozenset[str]:
    """Return the names of the classifier's parameters."""
    prefixes = head_prefixes(network)
    return frozenset(name for name, _ in network.named_parameters() if name.startswith(prefixes))
