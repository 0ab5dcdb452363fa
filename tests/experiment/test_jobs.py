"""Jobs of a sweep that launchers run elsewhere, and that clusters stop and start again."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fat.experiment import sweep as sweeps
from fat.experiment.config import DataConfig, ModelConfig, RunConfig, TrainerConfig
from fat.experiment.jobs import _exit_status_of_submitit, share_of_cores
from fat.experiment.sweep import Sweep, failures, job_failed, jobs_of, run_job, start_sweep
from fat.utils.errors import FatError
from tests.report.fake_runs import metrics


def config() -> RunConfig:
    return RunConfig(ModelConfig("a"), DataConfig("photos"))


def touch(path: Path, seconds: float, text: str = json.dumps(metrics())) -> None:
    """A file as if written so many seconds after sweep.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    at = (path.parents[1] / sweeps.SWEEP).stat().st_mtime + seconds
    os.utime(path, (at, at))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace :func:`fat.experiment.runner.run` and return the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def run(config: RunConfig, directory: Path, **options: Any) -> float:
        calls.append({**options, "threads": torch.get_num_threads()})
        return 1.5

    monkeypatch.setattr(sweeps, "run", run)
    return calls


@pytest.mark.parametrize(
    ("written", "resume", "wanted"),
    [(None, False, False), (-5.0, False, False), (5.0, False, True), (-5.0, True, True)],
)
def test_a_job_goes_on_if_this_start_of_the_sweep_began_it(
    tmp_path: Path, seen: list[dict[str, Any]], written: float | None, resume: bool, wanted: bool
) -> None:
    start_sweep(tmp_path, "s", "command", 3)
    if written is not None:
        touch(tmp_path / "0-a" / "metrics.json", written)
    assert run_job(config(), tmp_path / "0-a", sweep=Sweep("s", tmp_path, resume, 0)) == 1.5
    assert seen[0]["resume"] is wanted


def test_threads_of_the_sweep_are_for_jobs_that_leave_it_open(
    tmp_path: Path, seen: list[dict[str, Any]]
) -> None:
    before = torch.get_num_threads()
    try:
        chosen = replace(config(), trainer=TrainerConfig(threads=before))
        run_job(chosen, tmp_path / "0-a", sweep=Sweep("s", tmp_path, False, 0, before + 1))
        run_job(config(), tmp_path / "0-a", sweep=Sweep("s", tmp_path, False, 0, before + 1))
    finally:
        torch.set_num_threads(before)
    assert [call["threads"] for call in seen] == [before, before + 1]


def test_a_failed_job_leaves_the_reason(tmp_path: Path) -> None:
    sweep = Sweep("s", tmp_path, False, 4)
    assert math.isnan(job_failed(tmp_path / "4-a", FatError("no such thing"), "do it", sweep))
    noted = failures(tmp_path)[tmp_path / "4-a"]
    assert (noted["error"], noted["message"], noted["traceback"]) == (
        "FatError",
        "no such thing",
        None,
    )
    job_failed(tmp_path / "5-a", ValueError("a bug"), None, sweep)
    assert "ValueError: a bug" in failures(tmp_path)[tmp_path / "5-a"]["traceback"]


def test_jobs_of_a_sweep(tmp_path: Path) -> None:
    assert jobs_of(tmp_path) == 1
    start_sweep(tmp_path, "s", "command", 7)
    assert jobs_of(tmp_path) == 7


def test_the_time_left_counts_ended_jobs_only(
    tmp_path: Path, seen: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    start_sweep(tmp_path, "s", "command", 10)
    noted = json.loads((tmp_path / sweeps.SWEEP).read_text())
    noted["started"] -= 600  # ten minutes ago
    (tmp_path / sweeps.SWEEP).write_text(json.dumps(noted))
    touch(tmp_path / "0-a" / "metrics.json", -700)  # an earlier start of the sweep did it
    touch(tmp_path / "1-a" / "metrics.json", -100)
    touch(tmp_path / "2-a" / "failure.json", -50)
    touch(tmp_path / "3-a" / "metrics.json", -20, '{"status": "calibrated"}')  # still runs
    with caplog.at_level(logging.INFO):
        run_job(config(), tmp_path / "4-a", sweep=Sweep("s", tmp_path, False, 4))
    # Two took ten minutes, seven are to come or under way.
    assert "Job 5 of 10, about 35 minutes left." in caplog.text


@pytest.mark.parametrize(
    ("launcher", "jobs", "environment", "wanted"),
    [
        ("hydra._internal.core_plugins.basic_launcher.BasicLauncher", 4, {}, None),
        ("joblib_launcher.JoblibLauncher", 4, {}, None),
        ("submitit_launcher.LocalLauncher", 4, {}, 2),
        ("submitit_launcher.LocalLauncher", 40, {}, 1),
        ("submitit_launcher.LocalLauncher", 4, {"OMP_NUM_THREADS": "8"}, None),
        ("submitit_launcher.SlurmLauncher", 4, {"SLURM_CPUS_PER_TASK": "6"}, 6),
        ("submitit_launcher.SlurmLauncher", 4, {}, None),
    ],
)
def test_jobs_at_once_share_the_cores(
    launcher: str, jobs: int, environment: dict[str, str], wanted: int | None
) -> None:
    assert share_of_cores(launcher, 8, jobs, environment) == wanted


def training_that_is_stopped() -> None:
    """Saves what there is and ends as after Ctrl-C, whatever stopped it."""
    try:
        signal.raise_signal(signal.SIGUSR2)
    except SystemExit:
        raise KeyboardInterrupt from None


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no such signal here")
def test_a_job_that_its_queue_stops_leaves_with_the_queues_status() -> None:
    def handler(*arguments: object) -> None:
        raise SystemExit(144)

    handler.__module__ = "submitit.core.job_environment"
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SystemExit) as left, _exit_status_of_submitit():
            training_that_is_stopped()
        assert left.value.code == 144
        assert signal.getsignal(signal.SIGUSR2) is handler
        with pytest.raises(KeyboardInterrupt), _exit_status_of_submitit():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGUSR2, before)
