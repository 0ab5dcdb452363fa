"""A class-balanced sample that depends on names and contents alone: pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

__all__ = ["balanced_order", "digest", "distinct"]

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Digests = np.ndarray[tuple[int], np.dtype[np.uint64]]


def digest(seed: int, name: str) -> int:
    """Return 64 bits that seem random, the same for the same seed and name everywhere.

    Examples:
        >>> digest(0, "n01440764_10026") == digest(0, "n01440764_10026")
        True
        >>> digest(0, "n01440764_10026") == digest(1, "n01440764_10026")
        False
    """
    text = f"{seed}/{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def balanced_order(labels: Ints, digests: Digests, seed: int) -> Ints:
    """Order images so that any stretch of the order has its classes as equal as can be.

    Each round takes one image of every class that has any left: in each class the one with the
    smallest digest, the classes in an order that follows the seed.

    Args:
        labels: Class of each image [N].
        digests: Rank of each image within its class [N]; equal ones go by position.
        seed: What the order of the classes follows.

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
    """Take the first images of the balanced order, each content once.

    What is left out makes room for the next image of the same class, so the balance stays.

    Args:
        labels: Class of each image [N].
        digests: Rank of each image within its class [N].
        seed: What the order of the classes follows.
        count: How many to take; fewer if there are fewer.
        contents: Gives the content of each image asked for, None where it cannot be read.
        taken: Contents that must not be taken.

    Returns:
        The images in balanced order, and those left out because their content was taken already.
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
