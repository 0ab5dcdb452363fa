"""A sweep of which a job fails: the others are done, and trying again repeats what failed only."""

from __future__ import annotations

import csv
import json
import sqlite3
from pathlib import Path

import pytest

from tests.integration.test_commands import TINY
from tests.integration.warm import Trainings

SWEEP = [
    "-m",
    *TINY,
    "data.train_images=16",
    "optim.epochs=1",
    "logger=none",
    "trainer.progress=false",
    "quant.bits=8,11",
    "quant.granularity=per_channel,per_tensor",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("warm") / "output.txt")


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, server: Trainings
) -> tuple[Path, str, int | None]:
    folder = tmp_path_factory.mktemp("sweep") / "here"
    status, output = server.run(*SWEEP, f"hydra.sweep.dir={folder}")
    return folder, output, status


def jobs(folder: Path, name: str) -> list[int]:
    """Numbers of the jobs that left a file."""
    return sorted(int(path.parent.name.partition("-")[0]) for path in folder.glob(f"*/{name}"))


def test_one_bad_value_costs_its_jobs_alone(swept: tuple[Path, str, int | None]) -> None:
    folder, output, status = swept
    assert status == 1, output
    assert "Traceback" not in output
    assert jobs(folder, "failure.json") == [2, 3]
    assert jobs(folder, "student.safetensors") == [0, 1]
    for path in folder.glob("*/failure.json"):
        assert "allowed are whole numbers from 2 to 8" in json.loads(path.read_text())["message"]
    for path in folder.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        assert metrics["status"] == "finished"
        assert metrics["sweep"] == folder.as_posix()
    assert "Job 4 of 4" in output
    assert "2 jobs failed; the others are finished." in output
    table = list(csv.DictReader((folder / "sweep.csv").open()))
    assert len(table) == 4
    assert (folder / "report.html").is_file()


def test_the_float_networks_work_is_done_once(swept: tuple[Path, str, int | None]) -> None:
    folder, _, _ = swept
    with sqlite3.connect(folder / "shared" / "logits.sqlite") as database:
        (images,) = database.execute("SELECT sum(rows) FROM logits").fetchone()
    # Both jobs met the same test, validation and training images, and the same crops of them:
    # as many as one job alone.
    assert images == 24 + 16 + 16


def test_trying_again_repeats_what_failed_alone(
    swept: tuple[Path, str, int | None], server: Trainings
) -> None:
    folder, _, _ = swept
    students = {p: p.stat().st_mtime_ns for p in folder.glob("*/student.safetensors")}
    assert len(students) == 2
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/failure.json")}
    status, output = server.run(*SWEEP, "sweep.resume=true", f"hydra.sweep.dir={folder}")
    assert status == 1, output
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/student.safetensors")} == students
    assert output.count("is finished already") == 2
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*/failure.json")}
    assert after.keys() == before.keys()
    assert all(after[path] > before[path] for path in before)


def test_a_second_sweep_does_not_take_the_place_of_a_first(
    swept: tuple[Path, str, int | None], server: Trainings
) -> None:
    status, output = server.run(*SWEEP, f"hydra.sweep.dir={swept[0]}")
    assert status == 2
    assert "already holds a sweep" in output


def test_sweep_resume_is_for_sweeps(server: Trainings) -> None:
    status, output = server.run(*TINY, "sweep.resume=true")
    assert status == 2
    assert "type -m too" in output
