"""Names of the classes of a network's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import timm.data

__all__ = ["class_names", "readable_classes"]

_data: Any = timm.data  # partly typed


def class_names(num_classes: int) -> list[str] | None:
    """Return the WordNet ids (``"n01440764"``, …) of ImageNet's classes in the order of the logits.

    Args:
        num_classes: Number of logits of the network.

    Returns:
        The 1000 ids, or ``None`` for any other number of classes.

    Examples:
        >>> class_names(1000)[:2]
        ['n01440764', 'n01443537']
        >>> class_names(10) is None
        True
    """
    if num_classes != 1000:
        return None
    return list(_data.ImageNetInfo().label_names())


def readable_classes(num_classes: int, classes: Sequence[str] | None = None) -> list[str]:
    """Return human-readable names of the classes, in the order of the logits.

    A WordNet id becomes WordNet's first word for it, or all of its words where the first one is
    ambiguous. Other names do not change; classes without names are called by their index.

    Args:
        num_classes: Number of logits of the network.
        classes: Names of the classes; ``None`` for ImageNet's.

    Examples:
        >>> readable_classes(1000)[:3]
        ['tench', 'goldfish', 'great white shark']
        >>> readable_classes(2, ["n01440764", "my cat"])
        ['tench', 'my cat']
        >>> readable_classes(2)
        ['0', '1']
    """
    info = _data.ImageNetInfo()
    subset = _data.infer_imagenet_subset({"num_classes": num_classes})
    if classes is None and subset is not None:
        info = _data.ImageNetInfo(subset)
        classes = info.label_names()
    if classes is None:
        return [str(index) for index in range(num_classes)]
    words = [_described(info, name) for name in classes]
    short = [text.partition(",")[0] for text in words]
    counts = Counter(short)
    return [first if counts[first] == 1 else text for first, text in zip(short, words, strict=True)]


def _described(info: Any, name: str) -> str:
    """Return WordNet's words for an id, and any other name unchanged."""
    try:
        return str(info.label_name_to_description(name))
    except KeyError:
        return name
