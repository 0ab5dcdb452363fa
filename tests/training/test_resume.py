"""A training that was interrupted at any moment resumes to the same result."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fat
from fat import FatError, QuantSpec, Student
from fat.training.callbacks import CSVHistory, PeriodicCheckpoint
from fat.training.config import ReconstructSpec
from fat.training.fitting import FitResult
from fat.training.resume import LAST, RECONSTRUCTION, START, TrainingState

NEVER = 1e9
RECIPE: dict[str, Any] = {
    "epochs": 2,
    "lr": 1e-3,
    "schedule": "constant",
    "period": 3,
    "reset_optimizer": True,
    "bias_correction": False,
    "progress": False,
}


@pytest.fixture
def calibrated(tiny: nn.Module, images: Tensor) -> Student:
    student = fat.prepare(tiny, images, QuantSpec(bits=4))
    fat.calibrate(student, images)
    return student


class Disturbing:
    """Batches with noise from every global random state, as a user's own data may have."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            drawn = float(torch.rand(())) + np.random.rand() + random.random()
            yield batch * (0.9 + 0.05 * drawn)


def train(
    student: Student, batches: list[Tensor], folder: Path, *watchers: pl.Callback, **options: Any
) -> tuple[Student, FitResult]:
    student = copy.deepcopy(student)
    images: Any = Disturbing(batches)
    if options.pop("shuffle", False):
        images = DataLoader(torch.cat(batches), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    result = fat.fit(
        student,
        images,
        validation=batches[:2],
        checkpoints=folder / "checkpoints",
        callbacks=[CSVHistory(folder / "history.csv"), *watchers],
        trainer_options={"default_root_dir": folder},
        **{**RECIPE, **options},
    )
    return student, result


class Crashes(pl.Callback):
    """Copies the folder of a training at every moment, as a crash would leave it."""

    def __init__(self, folder: Path, to: Path) -> None:
        self.folder, self.to, self.found = folder, to, list[Path]()

    def crash(self, moment: str) -> None:
        place = self.to / f"{len(self.found):02}-{moment}"
        shutil.copytree(self.folder, place)
        self.found.append(place)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.crash(f"before step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.crash(f"after step {trainer.global_step}")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.crash(f"validated at {trainer.global_step}")


def checkpoints(place: Path) -> str:
    """Return a hash of the files to resume from."""
    digest = hashlib.sha256()
    for path in sorted((place / "checkpoints").glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def assert_same(
    one: tuple[Student, FitResult], other: tuple[Student, FitResult], where: object
) -> None:
    assert one[1] == other[1], where
    state = other[0].state_dict()
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, state[name]), (where, name)


@pytest.mark.parametrize(
    ("every", "validations", "reconstruction"),
    [(0.0, 1, 0), (0.0, 2, 0), (NEVER, 2, 2)],
    ids=["each-step", "each-step-two-validations", "validations-alone"],
)
def test_a_training_interrupted_anywhere_ends_the_same(
    calibrated: Student,
    batches: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: float,
    validations: int,
    reconstruction: int,
) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    crashes = Crashes(folder, tmp_path)
    options: dict[str, Any] = {
        "checkpoint_every": every,
        "validations": validations,
        "bias_correction": bool(reconstruction),
        "shuffle": validations == 1,
        "reconstruction": ReconstructSpec(steps=reconstruction, batch_size=4),
    }
    save = TrainingState.save

    def noted(kept: Any, name: str, content: Any) -> None:
        save(kept, name, content)
        crashes.crash(name)

    monkeypatch.setattr(TrainingState, "save", noted)
    whole = train(calibrated, batches, folder, crashes, **options)
    monkeypatch.undo()
    assert whole[1].steps == 8
    assert whole[1].best_step > 0 or reconstruction
    kept = {(place / "checkpoints" / LAST).is_file() for place in crashes.found}
    assert kept == {False, True}
    blocks = [place for place in crashes.found if place.name.endswith(RECONSTRUCTION)]
    assert len(blocks) == (3 if reconstruction else 0)  # two blocks, and what follows
    history = (folder / "history.csv").read_text()
    # Of moments with the same checkpoints, the last has the most to drop.
    last = {checkpoints(place): place for place in crashes.found}
    assert len(last) > (8 if every == 0.0 else 4)
    for place in last.values():
        shutil.rmtree(folder)
        shutil.copytree(place, folder)
        resumed = train(calibrated, batches, folder, resume=True, **options)
        assert_same(resumed, whole, place.name)
        assert (folder / "history.csv").read_text() == history, place.name


def test_without_resume_a_training_restarts(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    train(calibrated, batches, tmp_path / "a", lr=5e-3)
    again = train(calibrated, batches, tmp_path / "a", epochs=1)
    assert_same(again, train(calibrated, batches, tmp_path / "b", epochs=1), "anew")
    names = {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()}
    assert names == {LAST, START, f"step={again[1].best_step}.ckpt"}


def test_resuming_a_finished_training_changes_nothing(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    whole = train(calibrated, batches, tmp_path)
    history = (tmp_path / "history.csv").read_text()
    assert_same(train(calibrated, batches, tmp_path, resume=True), whole, "finished")
    assert (tmp_path / "history.csv").read_text() == history


def test_resuming_without_checkpoints_is_a_whole_training(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    new = train(calibrated, batches, tmp_path / "new", resume=True)
    assert_same(new, train(calibrated, batches, tmp_path / "other"), "new")


@pytest.mark.parametrize("what", ["recipe", "quantization"])
def test_a_training_with_other_options_is_not_resumed(
    calibrated: Student, tiny: nn.Module, batches: list[Tensor], tmp_path: Path, what: str
) -> None:
    train(calibrated, batches, tmp_path)
    student, options = calibrated, {"lr": 3e-3}
    if what == "quantization":
        student, options = fat.prepare(tiny, batches, QuantSpec(bits=5)), {}
        fat.calibrate(student, batches)
    with pytest.raises(FatError, match=f"start.pt belongs to a training with another {what}"):
        train(student, batches, tmp_path, resume=True, **options)


def test_an_interrupted_training_resumes(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    class CtrlC(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    whole = train(calibrated, batches, tmp_path / "whole")
    _, stopped = train(calibrated, batches, tmp_path / "cut", CtrlC())
    assert stopped.interrupted
    assert stopped.steps == 6
    assert_same(train(calibrated, batches, tmp_path / "cut", resume=True), whole, "Ctrl-C")


@pytest.mark.parametrize("step", [5, 6, 7, 8])
def test_a_sigterm_after_the_batch_end_saves_that_step(
    calibrated: Student,
    batches: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    end, late = PeriodicCheckpoint.on_train_batch_end, []

    def ended(snapshots: PeriodicCheckpoint, trainer: pl.Trainer, *arguments: Any) -> None:
        end(snapshots, trainer, *arguments)
        if trainer.global_step == step:  # later than the look at it just before
            os.kill(os.getpid(), signal.SIGTERM)
            late.append(trainer.received_sigterm)

    options: dict[str, Any] = {"checkpoint_every": NEVER, "validations": 2}
    whole = train(calibrated, batches, tmp_path / "whole", **options)
    monkeypatch.setattr(PeriodicCheckpoint, "on_train_batch_end", ended)
    cut = tmp_path / "cut"
    assert train(calibrated, batches, cut, **options)[1].interrupted
    assert late == [True]
    monkeypatch.undo()
    kept = torch.load(cut / "checkpoints" / LAST, weights_only=True)
    # Every other step is validated; before its validation the previous state is kept.
    assert kept["global_step"] == (step if step % 2 else step - 2)
    assert_same(train(calibrated, batches, cut, resume=True, **options), whole, step)
    history = [(place / "history.csv").read_text() for place in (tmp_path / "whole", cut)]
    assert history[0] == history[1]


def test_checkpoints_are_plain_data(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    train(calibrated, batches, tmp_path, reconstruction=ReconstructSpec(steps=1))
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert {LAST, START, RECONSTRUCTION} < {path.name for path in files}
    for path in files:
        content = torch.load(path, weights_only=True)  # raises on anything but plain containers
        if path.suffix == ".ckpt":
            assert QuantSpec.from_dict(content["fat"]["spec"]) == QuantSpec(bits=4)


def flip_a_bit(path: Path) -> None:
    """Flip a bit of the longest tensor; bytes between the parts of a file are not read."""
    with zipfile.ZipFile(path) as archive:
        longest = max(archive.infolist(), key=lambda part: part.file_size)
        content = archive.read(longest)
    changed = bytearray(path.read_bytes())
    changed[changed.index(content) + len(content) // 2] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (LAST, b""),
        (LAST, b"no archive"),
        (LAST, {"state_dict": {}}),
        (LAST, "a bit"),
        (START, "a bit"),
        (START, {"whose": None, "content": {}}),
    ],
)
def test_the_error_names_a_damaged_file_and_nothing_is_lost(
    calibrated: Student, batches: list[Tensor], tmp_path: Path, name: str, content: Any
) -> None:
    train(calibrated, batches, tmp_path, epochs=1)
    path = tmp_path / "checkpoints" / name
    if content == "a bit":
        flip_a_bit(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if "whose" in content:
            content["whose"] = torch.load(path, weights_only=True)["whose"]
        torch.save(content, path)
    before = checkpoints(tmp_path)
    with pytest.raises(FatError, match=f"Cannot (resume from|read) .*{name}"):
        train(calibrated, batches, tmp_path, epochs=1, resume=True)
    assert checkpoints(tmp_path) == before


def test_damaged_lines_of_the_history_are_skipped(
    calibrated: Student, batches: list[Tensor], tmp_path: Path
) -> None:
    train(calibrated, batches, tmp_path, epochs=1)
    path = tmp_path / "history.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\xff\xfe\nx,y,z\nstep,name,value\n3,cut off")
    train(calibrated, batches, tmp_path, epochs=1, resume=True)
    assert path.read_bytes() == whole
