"""Random generators and global random states."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from fat.utils.errors import FatError

__all__ = ["generator", "random_states", "set_random_states"]

logger = logging.getLogger(__name__)


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
        "cuda": _cuda_states(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).copy()), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that :func:`random_states` returned.

    States of GPUs are restored if this process has as many GPUs. Otherwise these keep their own,
    which follow from the seed.
    """
    torch.set_rng_state(states["torch"])
    saved, here = states["cuda"], _cuda_states()
    if [len(state) for state in saved] != [len(state) for state in here]:
        _log_difference(len(saved), len(here))
    elif saved:
        torch.cuda.set_rng_state_all(saved)
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _cuda_states() -> list[torch.Tensor]:
    """Return the random states of all GPUs, if this process uses one."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if used else []


@cache  # once, not for every pass over the images
def _log_difference(saved: int, here: int) -> None:
    logger.info(
        "The saved state has the random states of %d GPU(s), and this process has %d: GPUs start "
        "from the seed.",
        saved,
        here,
    )
