"""Class-balanced sampling that depends only on names and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

__all__ = ["balanced_order", "digest", "distinct"]

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Digests = np.ndarray[tuple[int], np.dtype[np.uint64]]


def digest(seed: int, name: str) -> int:
    """Return a 64-bit hash of the seed and the name, the same on all machines.

    Examples:
        >>> digest(0, "n01440764_10026") == digest(0, "n01440764_10026")
        True
        >>> digest(0, "n01440764_10026") == digest(1, "n01440764_10026")
        False
    """
    text = f"{seed}/{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def balanced_order(labels: Ints, digests: Digests, seed: int) -> Ints:
    """Order images so that the classes are balanced in every prefix.

    Each round takes one image of every class that has any left: the one with the smallest digest
    of each class, with the classes in a random order that depends on the seed.

    Args:
        labels: Class of each image [N].
        digests: Rank of each image within its class [N]; ties keep their order.
        seed: Seed of the order of the classes.

    Returns:
        Positions of the images [N].

    Examples:
        >>> order = balanced_order(np.array([0, 0, 0, 1]), np.array([3, 1, 2, 9], np.uint64), 0)
        >>> sorted(order[:2].tolist()), order[2:].tolist()
        ([1, 3], [2, 0])
    """
    by_class = np.lexsort((digests, labels))
    classes, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rounds = np.arange(len(labels)) - np.repeat(starts, counts)
    turns = np.array([digest(seed, f"class {label}") for label in classes], dtype=np.uint64)
    turn_in_round = np.repeat(turns, counts)
    return by_class[np.lexsort((turn_in_round, rounds))]


def distinct(
    labels: Ints,
    digests: Digests,
    seed: int,
    count: int,
    contents: Callable[[Sequence[int]], Mapping[int, str | None]],
    taken: Collection[str],
) -> tuple[list[int], list[int]]:
    """Take the first images of the balanced order, without duplicates.

    A duplicate or unreadable image is replaced by the next one of its class, which keeps the
    balance.

    Args:
        labels: Class of each image [N].
        digests: Rank of each image within its class [N].
        seed: Seed of the order of the classes.
        count: Maximum number of images.
        contents: Function that returns the content of images, ``None`` for unreadable ones.
        taken: Contents to exclude.

    Returns:
        The images in balanced order, and the duplicates that were left out.
    """
    alive = np.ones(len(labels), dtype=bool)
    repeated: list[int] = []
    while True:
        left = np.flatnonzero(alive)
        chosen = left[balanced_order(labels[left], digests[left], seed)[:count]].tolist()
        known, seen = contents(chosen), set(taken)
        drop = []
        for image in chosen:
            content = known[image]
            if content is None:
                drop.append(image)
            elif content in seen:
                drop.append(image)
                repeated.append(image)
            else:
                seen.add(content)
        if not drop:
            return chosen, repeated
        alive[drop] = False
