"""Weights files: accepted forms and errors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fat.models.float_model import load_float_network
from fat.utils.errors import FatError
from tests.models.conftest import SMALL, holds, save


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda s: s, id="timm"),
        pytest.param(lambda s: {f"module.{k}": v for k, v in s.items()}, id="module"),
        pytest.param(lambda s: {"state_dict": s, "epoch": 3}, id="state_dict"),
        pytest.param(lambda s: {"model": s}, id="model"),
        pytest.param(lambda s: {k: v.double() for k, v in s.items()}, id="float64"),
        pytest.param(lambda s: dict(reversed(s.items())), id="other order"),
        pytest.param(
            lambda s: {
                f"_net.l{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(s.items())
            },
            id="other names",
        ),
    ],
)
def test_file_forms(
    tmp_path: Path,
    state: dict[str, torch.Tensor],
    wrap: Callable[[dict[str, torch.Tensor]], object],
) -> None:
    loaded = load_float_network(SMALL, weights=save(tmp_path / "w.pth", wrap(state)))
    assert holds(loaded, state)
    assert loaded.weights == f"file {tmp_path / 'w.pth'}"
    assert not loaded.network.training
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_safetensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert holds(load_float_network(SMALL, weights=str(tmp_path / "w.safetensors")), state)


def test_the_weights_say_how_many_classes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    ten = {k: v[:10] if k.startswith("classifier") else v for k, v in state.items()}
    path = save(tmp_path / "w.pth", ten)
    loaded = load_float_network(SMALL, weights=path)
    assert loaded.num_classes == 10
    assert loaded.network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert load_float_network(SMALL, weights=path, num_classes=10).num_classes == 10
    with pytest.raises(FatError, match=r"10 classes, but num_classes is 12.*num_classes=10"):
        load_float_network(SMALL, weights=path, num_classes=12)


def test_file_missing(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"nope.pth does not exist. Type model.weights=PATH"):
        load_float_network(SMALL, weights=str(tmp_path / "nope.pth"))
    with pytest.raises(FatError, match="is a directory"):
        load_float_network(SMALL, weights=str(tmp_path))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_file_truncated(
    tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, kept: int
) -> None:
    whole = tmp_path / f"whole.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, whole)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(
        FatError, match=rf"cut.{suffix} \({kept} bytes\) cannot be read; it is trunc"
    ):
        load_float_network(SMALL, weights=str(path))


def test_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(FatError, match="cannot be read"):
        load_float_network(SMALL, weights=str(tmp_path / "w.pth"))


def test_pickled_code_is_not_run(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path / "w.pth", {"state_dict": state, "boom": Boom()})
    with pytest.raises(FatError, match=r"pickled Python code \(\w+.mkdir\).*never run"):
        load_float_network(SMALL, weights=path)
    assert not (tmp_path / "ran").exists()
    path = save(tmp_path / "v.pth", {"state_dict": state, "args": argparse.Namespace(lr=1)})
    with pytest.raises(FatError, match=r"argparse.Namespace"):
        load_float_network(SMALL, weights=path)


def test_no_state_dict(tmp_path: Path) -> None:
    for content in ([1, 2], {"epoch": 3}, {}):
        with pytest.raises(FatError, match="holds no state dict"):
            load_float_network(SMALL, weights=save(tmp_path / "w.pth", content))


def test_another_network(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    other = nn.Sequential(nn.Conv2d(3, 24, 5), nn.Conv2d(24, 99, 1)).state_dict()
    with pytest.raises(FatError) as raised:
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", other))
    text = str(raised.value)
    assert f"{len(state)} of {len(state)} tensors do not match (the file has 4)" in text
    assert f"expected conv_stem.weight {tuple(state['conv_stem.weight'].shape)}" in text
    assert "found 0.weight (24, 3, 5, 5)" in text

    wide = {**state, "conv_stem.weight": torch.zeros(24, 3, 5, 5)}
    with pytest.raises(
        FatError, match=r"1 of \d+ tensors do not .*found conv_stem.weight \(24, 3, 5"
    ):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", wide))


def test_swapped_roles_are_not_matched_by_order(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Mean and variance have the same shape, and differ only in their names."""
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    parts = [key.rpartition(".")[2] for key in state]
    renamed = {
        f"x{i}.{swap.get(part, part)}": value
        for i, (part, value) in enumerate(zip(parts, state.values(), strict=True))
    }
    with pytest.raises(FatError, match="another network"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", renamed))


def test_names_that_contradict_the_order_are_refused(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Two tensors of one shape and role are swapped, and one name is unknown."""
    role_and_shape: dict[tuple[str, torch.Size], str] = {}
    for key, value in state.items():
        kind = (key.rpartition(".")[2], value.shape)
        if kind in role_and_shape:
            one, two = role_and_shape[kind], key
            break
        role_and_shape[kind] = key
    new = {one: two, two: one, "classifier.bias": "fc.bias"}
    renamed = {new.get(key, key): value for key, value in state.items()}
    with pytest.raises(FatError, match="another network"):
        load_float_network(SMALL, weights=save(tmp_path / "w.pth", renamed))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.to("meta"), "without values"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_named(
    tmp_path: Path, state: dict[str, torch.Tensor], change: Callable[..., torch.Tensor], kind: str
) -> None:
    key = next(key for key, value in state.items() if value.is_floating_point() and value.ndim == 4)
    path = save(tmp_path / "w.pth", {**state, key: change(state[key])})
    with pytest.raises(FatError, match=rf"not plain floating-point: {key} \({kind}\)"):
        load_float_network(SMALL, weights=path)


def test_a_name_too_long_for_a_file_is_answered(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"cannot be opened \(File name too long\)"):
        load_float_network(SMALL, weights=str(tmp_path / ("a" * 5000)))
