"""Files of a training: they belong to one training and hold plain data only."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fat
from fat import FatError, QuantSpec, Student, TrainSpec
from fat.training.resume import START, TrainingState
from fat.utils.random import random_states, set_random_states


@pytest.fixture
def student(tiny: nn.Module, images: Tensor) -> Student:
    return fat.prepare(tiny, images, QuantSpec())


def draws() -> list[float]:
    return [float(torch.rand(())), float(np.random.standard_normal()), random.gauss(0, 1)]


def test_random_states_are_restored_from_a_file(tmp_path: Path) -> None:
    draws()  # so that both normal generators hold half of a pair
    torch.save(random_states(), tmp_path / "states.pt")
    wanted = [draws() for _ in range(3)]
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draws() for _ in range(3)] == wanted


def test_saved_content_is_loaded_by_the_same_training(student: Student, tmp_path: Path) -> None:
    state = student.trained_state()
    TrainingState(tmp_path / "new", student, TrainSpec()).save(START, {"student": state, "n": 3})
    found = TrainingState(tmp_path / "new", student, TrainSpec()).load(START)
    assert found is not None
    assert found["n"] == 3
    assert all(torch.equal(found["student"][name], value) for name, value in state.items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == [START]


def test_the_error_for_another_training_names_the_difference(
    student: Student, tiny: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    TrainingState(tmp_path, student, TrainSpec()).save(START, {})
    with pytest.raises(FatError, match=r"start\.pt belongs to a training with another recipe"):
        TrainingState(tmp_path, student, TrainSpec(epochs=7)).load(START)
    other = fat.prepare(tiny, images, QuantSpec(bits=4))
    with pytest.raises(FatError, match="with another quantization"):
        TrainingState(tmp_path, other, TrainSpec()).load(START)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_file_is_named(student: Student, tmp_path: Path, content: bytes | None) -> None:
    kept = TrainingState(tmp_path, student, TrainSpec())
    kept.save(START, {"n": torch.arange(1000)})
    whole = (tmp_path / START).read_bytes()
    (tmp_path / START).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(FatError, match=r"Cannot read .*start\.pt.*Delete .* to restart training"):
        kept.load(START)


def test_code_in_a_file_is_not_run(student: Student, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "harm").touch, ())

    torch.save({"whose": Attack(), "content": {}}, tmp_path / START)
    with pytest.raises(FatError, match="Cannot read"):
        TrainingState(tmp_path, student, TrainSpec()).load(START)
    assert not (tmp_path / "harm").exists()


def test_clearing_leaves_what_is_no_state(student: Student, tmp_path: Path) -> None:
    for name in ("last.ckpt", "step=4.ckpt", START, "notes.txt"):
        (tmp_path / name).touch()
    TrainingState(tmp_path, student, TrainSpec()).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_a_folder_nothing_is_saved_or_found(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = TrainingState(None, student, TrainSpec())
    kept.save(START, {"n": 1})
    kept.clear()
    assert kept.load(START) is None
    assert kept.path(START) is None
    assert list(tmp_path.iterdir()) == []
