"""Jobs of a sweep: one that fails is noted, the others are done."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fat.experiment import sweep as sweeps
from fat.experiment.config import RunConfig
from fat.experiment.sweep import SHARED, SWEEP, Sweep, end_sweep, failures, run_job, start_sweep
from fat.utils.errors import FatError
from tests.conf.test_compose import composed
from tests.report.fake_runs import metrics

Outcome = Callable[..., float]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return composed("model=mobilenet_v2")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``run`` is called with; its outcome is in ``calls.outcome``."""
    seen: list[dict[str, Any]] = []

    def run(config: RunConfig, directory: Path, **options: Any) -> float:
        directory.mkdir(parents=True, exist_ok=True)
        seen.append({"directory": directory, **options})
        outcome = OUTCOMES.get(directory.name)
        if outcome is not None:
            raise outcome
        return 1.5

    OUTCOMES.clear()
    monkeypatch.setattr(sweeps, "run", run)
    return seen


OUTCOMES: dict[str, BaseException] = {}


def job(folder: Path, number: int, *, resume: bool = False) -> Sweep:
    return Sweep("multirun/x", folder, resume, number)


def failure(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "failure.json").read_text())
    return found


def test_a_job_that_fails_is_noted_and_the_sweep_goes_on(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    OUTCOMES["0-a"] = FatError("Type a smaller number.")
    OUTCOMES["1-a"] = ValueError("a mistake of the program")
    values = [
        run_job(config, tmp_path / f"{n}-a", command=f"train {n}", sweep=job(tmp_path, n))
        for n in range(3)
    ]
    assert [math.isnan(value) for value in values] == [True, True, False]
    assert values[2] == 1.5
    assert failure(tmp_path / "0-a") == {
        "error": "FatError",
        "message": "Type a smaller number.",
        "traceback": None,
        "command": "train 0",
    }
    noted = failure(tmp_path / "1-a")
    assert (noted["error"], noted["message"]) == ("ValueError", "a mistake of the program")
    assert noted["traceback"].startswith("Traceback")
    assert "ValueError: a mistake of the program" in noted["traceback"]
    assert list(failures(tmp_path)) == [tmp_path / "0-a", tmp_path / "1-a"]


def test_jobs_share_a_folder_and_know_their_sweep(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    run_job(config, tmp_path / "0-a", command="c", sweep=job(tmp_path, 0, resume=True))
    run_job(config, tmp_path / "alone", command="c")
    assert [call["shared"] for call in calls] == [tmp_path / SHARED, None]
    assert [call["sweep"] for call in calls] == ["multirun/x", None]
    assert [call["resume"] for call in calls] == [True, False]


@pytest.mark.parametrize("in_sweep", [True, False])
def test_ctrl_c_ends_the_sweep_and_is_no_failure(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path, in_sweep: bool
) -> None:
    OUTCOMES["0-a"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_job(config, tmp_path / "0-a", sweep=job(tmp_path, 0) if in_sweep else None)
    assert not (tmp_path / "0-a" / "failure.json").exists()


def test_a_run_by_itself_raises_and_is_noted_too(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    OUTCOMES["run"] = FatError("Type something else.")
    with pytest.raises(FatError, match="Type something else"):
        run_job(config, tmp_path / "run", command="c")
    assert failure(tmp_path / "run")["message"] == "Type something else."


def test_trying_again_forgets_the_failure(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    OUTCOMES["0-a"] = FatError("no")
    run_job(config, tmp_path / "0-a", sweep=job(tmp_path, 0))
    assert (tmp_path / "0-a" / "failure.json").is_file()
    OUTCOMES.clear()
    assert run_job(config, tmp_path / "0-a", sweep=job(tmp_path, 0, resume=True)) == 1.5
    assert not (tmp_path / "0-a" / "failure.json").exists()
    # Also of a run that had been calibrated when it failed.
    (tmp_path / "0-a" / "metrics.json").write_text('{"status": "calibrated"}')
    OUTCOMES["0-a"] = FatError("again")
    run_job(config, tmp_path / "0-a", sweep=job(tmp_path, 0, resume=True))
    assert failure(tmp_path / "0-a")["message"] == "again"


@pytest.mark.parametrize("resume", [True, False])
def test_what_fails_before_a_run_began_does_not_mark_a_finished_one(
    config: RunConfig, calls: list[dict[str, Any]], tmp_path: Path, resume: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps(metrics()))
    OUTCOMES["run"] = FatError("holds a run of other options")
    with pytest.raises(FatError):
        run_job(config, run, resume=resume)
    assert [path.name for path in run.iterdir()] == ["metrics.json"]


def test_a_failure_that_cannot_be_noted_is_still_told(
    config: RunConfig,
    calls: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unwritable(*_: Any) -> None:
        raise FatError("Cannot write: disk full.")

    monkeypatch.setattr(sweeps, "write_json", unwritable)
    OUTCOMES["run"] = FatError("the first error")
    with pytest.raises(FatError, match="the first error"):
        run_job(config, tmp_path / "run")
    assert "disk full" in caplog.text


def test_progress_says_which_job_and_how_long(
    config: RunConfig,
    calls: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    now = 1_000_000.0
    monkeypatch.setattr("fat.experiment.sweep.time.time", lambda: now)
    start_sweep(tmp_path, "x", "python train.py -m seed=1,2", 6)
    noted = json.loads((tmp_path / SWEEP).read_text())
    assert noted == {
        "id": "x",
        "command": "python train.py -m seed=1,2",
        "total": 6,
        "started": now,
    }
    # Two ended since, one well and one badly; one is of an earlier start.
    for name, end in (
        ("0-a/metrics.json", 300),
        ("1-a/failure.json", 600),
        ("9-a/metrics.json", -9),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(json.dumps(metrics()))
        os.utime(path, (now + end, now + end))
    now += 600.0
    run_job(config, tmp_path / "2-a", sweep=job(tmp_path, 2))
    assert "Job 3 of 6, about 15 minutes left." in caplog.text  # three jobs of five minutes
    caplog.clear()
    start_sweep(tmp_path, "x", "python train.py -m seed=1,2", 6)
    run_job(config, tmp_path / "0-b", sweep=job(tmp_path, 0))
    assert "Job 1 of 6." in caplog.text  # nothing of this start tells how long a job takes


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_sweep(
    config: RunConfig,
    calls: list[dict[str, Any]],
    tmp_path: Path,
    fails: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    start_sweep(tmp_path, "x", "python train.py -m seed=1,2", 2)
    if fails:
        OUTCOMES["1-a"] = FatError("Type a smaller number.\nAnd more lines.")
    for number in range(2):
        run_job(config, tmp_path / f"{number}-a", sweep=job(tmp_path, number))
        (tmp_path / f"{number}-a" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / SHARED).mkdir()
    failed = end_sweep(tmp_path)
    assert (tmp_path / "sweep.csv").is_file()
    assert (tmp_path / "report.html").is_file()
    assert failed == ([tmp_path / "1-a"] if fails else [])
    assert (tmp_path / SHARED).is_dir() is fails  # whoever tries again has use for it
    told = f"Failed: {tmp_path / '1-a'}: Type a smaller number."
    assert (told in caplog.text) is fails
    assert ("To try again, add sweep.resume=true" in caplog.text) is fails


def test_failures_come_in_the_order_of_jobs(tmp_path: Path) -> None:
    for name in ("10-a", "9-a", "1-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "failure.json").write_text('{"message": "m"}')
    assert [path.name for path in failures(tmp_path)] == ["1-b", "9-a", "10-a"]
