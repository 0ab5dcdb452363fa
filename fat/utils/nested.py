"""Nested mappings, such as configs and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["leaves"]


def leaves(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted path.

    Examples:
        >>> leaves({"quant": {"bits": 4, "weight": {"bits": None}}})
        {'quant.bits': 4, 'quant.weight.bits': None}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        flat |= leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
