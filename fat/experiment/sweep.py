"""Jobs of a sweep: each leaves a result or the reason of its failure, and the sweep continues."""

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
    "log_progress",
    "run_job",
    "start_sweep",
]

logger = logging.getLogger(__name__)

SWEEP, SHARED = "sweep.json", "shared"
"""The file that describes a sweep, and the folder for what its jobs share."""


@dataclass(frozen=True)
class Sweep:
    """The sweep that a job belongs to.

    Attributes:
        id: Its name in loggers and reports.
        directory: The folder of the run directories.
        resume: Whether finished jobs are skipped and interrupted ones resumed.
        number: Number of the job, from 0.
        threads: Torch threads if ``trainer.threads`` is not given; ``None`` for torch's default.
    """

    id: str
    directory: Path
    resume: bool
    number: int
    threads: int | None = None


def start_sweep(directory: Path, id: str, command: str, jobs: int) -> None:
    """Write sweep.json before the first job.

    Args:
        directory: The sweep's directory.
        id: Its name.
        command: The command that starts it, by which ``sweep.resume=true`` finds it.
        jobs: The number of jobs.
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
    """Run one experiment, alone or as a job of a sweep.

    A run that fails leaves ``failure.json``: ``error`` (the exception's name), ``message``,
    ``traceback`` (``null`` where the message says what to do) and ``command``.

    Args:
        config: The options.
        directory: The run directory.
        command: The command that repeats the run.
        sweep: The sweep; failures do not stop it.
        resume: Resume the run in the directory, if there is one.

    Returns:
        The result of :func:`fat.experiment.runner.run`; NaN for a failed job.

    Raises:
        FatError: For anything that the user can fix, of a run that is not part of a sweep.
        KeyboardInterrupt: After Ctrl-C.
    """
    shared = None
    if sweep is not None:
        log_progress(sweep)
        shared = sweep.directory / SHARED
        resume = resume or sweep.resume or _began_here(sweep.directory, directory)
        if sweep.threads is not None and config.trainer.threads is None:
            torch.set_num_threads(sweep.threads)
    # A failure before the run has started must not mark the run that is in the directory.
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
            _record_failure(directory, error, command)
        raise


def job_failed(
    directory: Path, error: Exception, command: str | None, sweep: Sweep, *, note: bool = True
) -> float:
    """Log why a job of a sweep failed, and write ``failure.json``.

    Args:
        directory: The run directory of the job.
        error: The reason.
        command: The command that repeats the run.
        sweep: The sweep, which continues.
        note: Whether to write the file.

    Returns:
        NaN, which sweepers treat as no result.
    """
    if note:
        _record_failure(directory, error, command)
    if isinstance(error, FatError):
        logger.error("Job %d failed: %s", sweep.number + 1, error)
    else:
        logger.error("Job %d failed.", sweep.number + 1, exc_info=error)
    return math.nan


def _began_here(sweep: Path, directory: Path) -> bool:
    """Return whether this start of the sweep started the run: a cluster has queued the job again.

    Compares times of files, which come from one file system: clocks of machines differ.
    """
    try:
        return (directory / METRICS).stat().st_mtime > (sweep / SWEEP).stat().st_mtime
    except FileNotFoundError:
        return False


def jobs_of(directory: Path) -> int:
    """Return the number of jobs according to sweep.json; 1 if that is unknown."""
    try:
        return int(json.loads((directory / SWEEP).read_text(encoding="utf-8"))["total"])
    except (OSError, ValueError, KeyError):
        return 1


def end_sweep(directory: Path) -> list[Path]:
    """Write and log the report of a sweep, and delete what only its jobs needed.

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
            "%d job%s failed; the others are finished. To try again, add sweep.resume=true to the "
            "same command.",
            len(failed),
            "" if len(failed) == 1 else "s",
        )
    else:
        shutil.rmtree(directory / SHARED, ignore_errors=True)
    return list(failed)


def failures(directory: Path) -> dict[Path, dict[str, Any]]:
    """Read why jobs of a sweep failed, by run directory.

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


def _record_failure(directory: Path, error: Exception, command: str | None) -> None:
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
    except FatError as unwritable:  # the first error is the one to report
        logger.warning("The failure could not be recorded: %s", unwritable)


def log_progress(sweep: Sweep) -> None:
    """Log the progress of the sweep and an ETA."""
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
    # Only the jobs of this start count, also if several run at a time.
    done = sum(end > started for end in ended)
    text = f"Job {sweep.number + 1} of {jobs}"
    if done:
        minutes = (time.time() - started) / done * max(jobs - len(ended), 1) / 60
        text += f", about {minutes:.0f} minutes left"
    logger.info("%s.", text)
