"""Block-wise reconstruction in several processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fat import FatError
from fat.utils import distributed
from tests.conftest import TinyNet, realistic
from tests.integration.processes import realistic_images, reconstruct_together, reconstructed

Found = dict[str, Any]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return realistic(TinyNet(), torch.cat(realistic_images()))


@pytest.fixture(scope="module")
def alone(network: nn.Module) -> Found:
    batches = realistic_images()
    return reconstructed(network, batches, batches)


def run(
    folder: Path, network: nn.Module, count: int, done: dict[str, Any] | None = None
) -> list[Found]:
    """Run all processes, of which the last fails in the end, and return what each found."""
    with pytest.raises(FatError, match=r"^This file is gone\.$"):  # and the others do not wait
        distributed.launch(reconstruct_together, (folder, network, done), count, "cpu")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def assert_same(found: list[Found], name: str, alone: Found) -> None:
    first = found[0][name]
    for other in found[1:]:
        assert other[name]["results"] == first["results"]
        for key, value in first["state"].items():
            assert torch.equal(other[name]["state"][key], value), key
    assert [x.block for x in first["results"]] == [x.block for x in alone["results"]]
    assert [x.kept for x in first["results"]] == [x.kept for x in alone["results"]]
    for got, wanted in zip(first["results"], alone["results"], strict=True):
        assert got.before == pytest.approx(wanted.before, rel=1e-5)
        assert got.after == pytest.approx(wanted.after, rel=1e-5)
    for key, value in alone["state"].items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_one_process_trains_something(alone: Found) -> None:
    assert sum(result.kept for result in alone["results"]) >= 2


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_what_one_gives(
    tmp_path: Path, network: nn.Module, alone: Found, count: int
) -> None:
    found = run(tmp_path, network, count)
    assert_same(found, "divided", alone)
    assert_same(found, "one without", alone)


def test_several_processes_resume_what_one_has_begun(
    tmp_path: Path, network: nn.Module, alone: Found
) -> None:
    found = run(tmp_path, network, 2, alone["saved"][0])
    assert len(found[0]["resumed"]["saved"]) == len(alone["saved"]) - 1
    assert_same(found, "resumed", alone)
