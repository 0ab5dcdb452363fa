"""Sweeps whose jobs run in other processes, and searches, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.running import ROOT, command, command_from_cold
from tests.integration.test_commands import TINY

QUICK = [*TINY, "logger=none", "trainer.progress=false"]


def rows(directory: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((directory / "sweep.csv").open()))


def test_joblib_runs_jobs_side_by_side_and_notes_failures(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    # One job is good, one is refused by FAT, one does not even parse.
    words = [
        "train.py",
        "-m",
        *QUICK,
        "experiment=calibration_only",
        "quant.bits=8,9,many",
        "data.workers=1",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        f"hydra.sweep.dir={tmp_path}",
    ]
    result = command_from_cold(*words)
    assert result.returncode == 1, result.stderr
    found = rows(tmp_path)
    assert [row["status"] for row in found] == ["finished", "failed", "failed"]
    assert "whole numbers from 2 to 8" in found[1]["error"]
    assert "quant.bits" in found[2]["error"]
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "shared" / "logits.sqlite").is_file()  # kept for the jobs to come
    text = result.stdout + result.stderr
    assert "Job 1 of 3" in text
    assert "2 jobs failed; the others are finished." in text

    first = (tmp_path / "0-test_efficientnet" / "student.safetensors").stat().st_mtime_ns
    again = command_from_cold(*words, f"sweep.resume={tmp_path}")
    assert again.returncode == 1, again.stderr
    assert "is finished already" in again.stdout + again.stderr
    assert (tmp_path / "0-test_efficientnet" / "student.safetensors").stat().st_mtime_ns == first


def test_a_job_that_is_queued_again_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    place = tmp_path / "sweep"
    process = subprocess.Popen(
        [
            sys.executable,
            "train.py",
            "-m",
            *QUICK,
            "data.train_images=160",
            "optim.epochs=2",
            "data.workers=0",
            "trainer.checkpoint_every=0.5",
            "quant.bits=8,9",
            "hydra/launcher=submitit_local",
            f"hydra.sweep.dir={place}",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not list(place.glob("0-*/checkpoints/*.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # What SLURM does before it takes a job's machine away.
        os.kill(task_of_first_job(place), signal.SIGUSR2)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert [row["status"] for row in rows(place)] == ["finished", "failed"]
    log = "".join(path.read_text() for path in (place / ".submitit").glob("*/*_log.out"))
    assert "Requeued job" in log
    assert "Resuming from" in log
    assert log.count("Before training") == 1  # the second start did not judge again


def task_of_first_job(place: Path) -> int:
    """The process that does the sweep's job 0: submitit names jobs after the task's parent."""
    for log in (place / ".submitit").glob("*/*_log.out"):
        if "Job 1 of" in log.read_text():
            listed = ["ps", "-o", "pid=", "--ppid", log.parent.name]
            return int(subprocess.run(listed, capture_output=True, text=True, check=True).stdout)
    raise AssertionError(f"no job in {place}")


def test_a_search_ends_with_a_command_that_gives_the_best_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the extra search")
    place = tmp_path / "search"
    result = command(
        *("-m", "fat.experiment.recipe_search", "--trials", "2", "--directory", str(place)),
        "optim.lr=tag(log, interval(1e-4,1e-2))",
        *QUICK,
        *("data.train_images=16", "optim.epochs=1", "data.workers=0"),
    )
    assert result.returncode == 0, result.stderr
    losses = {}
    for path in place.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        losses[path.parent.name] = metrics["training"]["best_loss"]
    best = min(sorted(losses), key=lambda name: losses[name])
    stored = json.loads((place / best / "metrics.json").read_text())
    line = result.stdout.splitlines()[-1]
    assert line == stored["command"]
    assert shlex.split(line)[:2] == ["python", "train.py"]
    # The only figures on test images are those of the best, at the end.
    assert result.stdout.count("agreement") == 1
    assert result.stdout.index("test images take no part") < result.stdout.index("Lowest")
    assert len(rows(place)) == 2

    more = command("-m", "fat.search", "--resume", str(place), "--trials", "3")
    assert more.returncode == 0, more.stderr
    assert "Trial 3 of 3" in more.stdout
    assert "Trial 1 of" not in more.stdout
