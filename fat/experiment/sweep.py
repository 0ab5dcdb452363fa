"""Jobs of a sweep: each leaves a result or the reason why not, and the sweep goes on."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fat.experiment.config import RunConfig
from fat.experiment.run_directory import FAILURE, METRICS, read_metrics
from fat.experiment.runner import run
from fat.report.records import read_sweep
from fat.report.sweep_page import write_sweep
from fat.report.tables import format_sweep
from fat.utils import distributed
from fat.utils.errors import FatError, first_line
from fat.utils.io import write_json

__all__ = [
    "SHARED",
    "SWEEP",
    "Sweep",
    "end_sweep",
    "failures",
    "job_failed",
    "jobs_of",
    "run_job",
    "start_sweep",
]

logger = logging.getLogger(__name__)

SWEEP, SHARED = "sweep.json", "shared"
"""File that says what the sweep is, and folder of what its jobs have in common."""


@dataclass(frozen=True)
class Sweep:
    """The sweep that a job belongs to.

    Attributes:
        id: What it is called, in loggers and reports.
        directory: Where its jobs have their run directories.
        resume: Whether finished jobs are left as they are and interrupted ones go on.
        number: Which job this is, from 0.
        threads: Torch threads where ``trainer.threads`` leaves it open; ``None``: torch's choice.
    """

    id: str
    directory: Path
    resume: bool
    number: int
    threads: int | None = None


def start_sweep(directory: Path, id: str, command: str, jobs: int) -> None:
    """Note what a sweep is, before its first job.

    Args:
        directory: The sweep's directory.
        id: What it is called.
        command: What starts it again, and by which ``sweep.resume=true`` finds it.
        jobs: How many jobs it has.
    """
    content = {"id": id, "command": command, "total": jobs, "started": time.time()}
    write_json(directory / SWEEP, content)


def run_job(
    config: RunConfig,
    directory: Path,
    *,
    command: str | None = None,
    sweep: Sweep | None = None,
    resume: bool = False,
) -> float:
    """Do one run, by itself or as a job of a sweep.

    A run that fails leaves ``failure.json``: ``error`` (the exception's name), ``message``,
    ``traceback`` (``null`` where the message says what to do) and ``command``.

    Args:
        config: The run's options.
        directory: The run directory.
        command: What gives this run again.
        sweep: The sweep; failures do not stop it.
        resume: Go on with what the directory holds, if it holds a run.

    Returns:
        What :func:`fat.experiment.runner.run` returns; NaN for a job that failed.

    Raises:
        FatError: For anything the user can mend, of a run by itself.
        KeyboardInterrupt: After Ctrl-C.
    """
    shared = None
    if sweep is not None:
        _say_progress(sweep)
        shared = sweep.directory / SHARED
        resume = resume or sweep.resume or _began_here(sweep.directory, directory)
        if sweep.threads is not None and config.trainer.threads is None:
            torch.set_num_threads(sweep.threads)
    # What fails before a run has begun in a directory must not mark the run that is there.
    known = not (directory / METRICS).is_file() or (resume and not _finished(directory))
    if known and distributed.is_main_process():
        (directory / FAILURE).unlink(missing_ok=True)
    try:
        return run(
            config,
            directory,
            command=command,
            sweep=sweep.id if sweep else None,
            shared=shared,
            resume=resume,
        )
    except Exception as error:
        if sweep is not None:
            return job_failed(directory, error, command, sweep, note=known)
        if known:
            _note_failure(directory, error, command)
        raise


def job_failed(
    directory: Path, error: Exception, command: str | None, sweep: Sweep, *, note: bool = True
) -> float:
    """Say why a job of a sweep failed, and leave it as ``failure.json``.

    Args:
        directory: The job's run directory.
        error: Why.
        command: What gives this run again.
        sweep: The sweep, which goes on.
        note: Whether the file is written.

    Returns:
        NaN, which sweepers take for no result.
    """
    if note:
        _note_failure(directory, error, command)
    if isinstance(error, FatError):
        logger.error("Job %d failed: %s", sweep.number + 1, error)
    else:
        logger.error("Job %d failed.", sweep.number + 1, exc_info=error)
    return math.nan


def _began_here(sweep: Path, directory: Path) -> bool:
    """Whether this start of the sweep began the run: a cluster stopped its job and queued it again.

    Times of files are compared, which one file system gave both: clocks of machines differ.
    """
    try:
        return (directory / METRICS).stat().st_mtime > (sweep / SWEEP).stat().st_mtime
    except FileNotFoundError:
        return False


def jobs_of(directory: Path) -> int:
    """How many jobs a sweep has, by its sweep.json; 1 where nothing says so."""
    try:
        return int(json.loads((directory / SWEEP).read_text(encoding="utf-8"))["total"])
    except (OSError, ValueError, KeyError):
        return 1


def end_sweep(directory: Path) -> list[Path]:
    """Say what came of a sweep, and drop what only its jobs needed.

    Args:
        directory: The sweep's directory.

    Returns:
        The run directories of the jobs that failed.
    """
    table, page = write_sweep(directory)
    logger.info("\n%s\nTable: %s\nReport: %s", format_sweep(read_sweep(directory)), table, page)
    failed = failures(directory)
    for place, why in failed.items():
        logger.error("Failed: %s: %s", place, first_line(why["message"]))
    if failed:
        logger.error(
            "%d job%s failed; the others are done. The same command with sweep.resume=true tries "
            "again.",
            len(failed),
            "" if len(failed) == 1 else "s",
        )
    else:
        shutil.rmtree(directory / SHARED, ignore_errors=True)
    return list(failed)


def failures(directory: Path) -> dict[Path, dict[str, Any]]:
    """What the jobs of a sweep failed of, by run directory.

    Args:
        directory: The sweep's directory.
    """
    found = sorted(directory.glob(f"*/{FAILURE}"), key=lambda path: _number(path.parent))
    return {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in found}


def _finished(directory: Path) -> bool:
    try:
        metrics = read_metrics(directory)
    except FatError:
        return False
    return metrics is not None and metrics.get("status") == "finished"


def _number(directory: Path) -> tuple[int, str]:
    first = directory.name.partition("-")[0]
    return (int(first) if first.isdigit() else 0, directory.name)


def _note_failure(directory: Path, error: Exception, command: str | None) -> None:
    if not distributed.is_main_process():
        return
    told = isinstance(error, FatError)
    content = {
        "error": type(error).__name__,
        "message": str(error),
        "traceback": None if told else "".join(traceback.format_exception(error)),
        "command": command,
    }
    try:
        write_json(directory / FAILURE, content)
    except FatError as unwritable:  # the first error is the one to tell
        logger.warning("The failure could not be noted: %s", unwritable)


def _say_progress(sweep: Sweep) -> None:
    """Which job of how many, and how long the others will take if they take as long."""
    try:
        noted = json.loads((sweep.directory / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    jobs, started = int(noted["total"]), float(noted["started"])
    ended = [
        path.stat().st_mtime
        for path in [
            *(found for found in sweep.directory.glob(f"*/{METRICS}") if _finished(found.parent)),
            *sweep.directory.glob(f"*/{FAILURE}"),
        ]
    ]
    # Only what this start of the sweep did tells how fast it is, also with several jobs at a time.
    done = sum(end > started for end in ended)
    text = f"Job {sweep.number + 1} of {jobs}"
    if done:
        minutes = (time.time() - started) / done * max(jobs - len(ended), 1) / 60
        text += f", about {minutes:.0f} minutes left"
    logger.info("%s.", text)
