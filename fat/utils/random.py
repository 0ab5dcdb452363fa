"""Random generators and global random states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fat.utils.errors import FatError

__all__ = ["generator", "random_states", "set_random_states"]


def generator(*key: int) -> np.random.Generator:
    """Return the random generator of a key such as (seed, epoch, index).

    Equal keys give equal draws in every process, independent of earlier draws.

    Raises:
        FatError: If a number is negative.

    Examples:
        >>> generator(0, 1, 2).random() == generator(0, 1, 2).random()
        True
    """
    if min(key) < 0:
        raise FatError(f"Seeds, epochs and indices must not be negative, but are {key}.")
    return np.random.default_rng(key)


def random_states() -> dict[str, Any]:
    """Return all global random states, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).copy()), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
