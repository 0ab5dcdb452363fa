"""A small timm network and its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from fat.models.float_model import FloatNetwork

SMALL = "test_efficientnet"  # timm's network for tests, under a megabyte


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A state dict in which every tensor differs from a new network's."""
    generator = torch.Generator().manual_seed(7)
    fresh = timm.create_model(SMALL).state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5
        for key, value in fresh.items()
        if not key.endswith("num_batches_tracked")
    }


def holds(loaded: FloatNetwork, state: dict[str, torch.Tensor]) -> bool:
    mine = loaded.network.state_dict()
    return all(torch.equal(mine[key], value) for key, value in state.items())


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)
