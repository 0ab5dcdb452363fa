"""The command line as Hydra gets it: ``resume`` and ``sweep.resume`` turned into directories.

Hydra creates a run's directory before the task starts, so these are resolved beforehand.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fat.experiment.config import RunConfig, current_overrides
from fat.utils.commands import command_line
from fat.utils.errors import FatError, no_run

__all__ = ["AUTO", "arguments", "sweep_command"]

AUTO = "auto"
"""Value of ``resume`` that resumes the run in ``hydra.run.dir`` if there is one."""
_PLACES = ("sweep.resume=", "hydra.sweep.dir=", "resume=")


def arguments(given: Sequence[str]) -> list[str]:
    """Return the command line with the directories that ``resume`` and ``sweep.resume`` mean.

    Args:
        given: The command line without the program's name.

    Raises:
        FatError: If there is nothing to resume.

    Examples:
        >>> arguments(["model=resnet18"])
        ['model=resnet18']
    """
    words = list(given)
    for word in words:
        key, _, value = word.partition("=")
        if key in ("resume", "sweep.resume") and "=" in word and not value.strip("'\""):
            raise FatError(f"{word} names no directory: type {key}=DIR, or leave it out.")
    multirun = any(word in ("-m", "--multirun") for word in words)
    resume, sweep_resume = _value(words, "resume"), _value(words, "sweep.resume")
    if resume is not None:
        words = _resume_run(words, resume, multirun)
    if sweep_resume is not None and sweep_resume.lower() not in ("false", "null"):
        words = _resume_sweep(words, sweep_resume, multirun)
    elif multirun:
        taken = _value(words, "hydra.sweep.dir")
        if taken is not None and (Path(taken) / "sweep.json").is_file():
            raise FatError(
                f"{taken} already holds a sweep. Type sweep.resume={taken} to resume it, or give "
                "another directory: hydra.sweep.dir=DIR."
            )
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun: only the first process writes
        words = [word for word in words if not word.startswith("hydra.run.dir=")]
        words += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    return words


def _resume_run(words: Sequence[str], resume: str, multirun: bool) -> list[str]:
    if multirun:
        raise FatError("resume= resumes a single run; for a sweep type sweep.resume=true.")
    words = [word for word in words if not word.startswith("resume=")]
    words.append(f"resume={_quoted(resume)}")
    if resume == AUTO:
        if _value(words, "hydra.run.dir") is None:
            raise FatError(
                "resume=auto resumes the run in a directory, or starts it there: type "
                "hydra.run.dir=DIR too."
            )
        return words
    if not (Path(resume) / "config.yaml").is_file():  # Hydra would create the folder
        raise no_run(resume, "config.yaml")
    # The folder .hydra of the first start is kept.
    return [*words, f"hydra.run.dir={_quoted(resume)}", "hydra.output_subdir=null"]


def _resume_sweep(words: Sequence[str], resume: str, multirun: bool) -> list[str]:
    if not multirun:
        raise FatError("sweep.resume resumes a sweep: type -m too.")
    found = _find_sweep(words) if resume.lower() == "true" else Path(resume)
    if not found.is_dir():
        raise FatError(f"There is no sweep in {found}: sweep.resume takes its directory.")
    words = [word for word in words if not word.startswith("sweep.resume=")]
    return [*words, "sweep.resume=true", f"hydra.sweep.dir={_quoted(str(found))}"]


def _value(words: Sequence[str], key: str) -> str | None:
    found = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return found[-1].strip("'\"") or None if found else None


def _quoted(value: str) -> str:
    """Quote a value for Hydra's grammar if it is more than plain letters and slashes."""
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return value
    escaped = value.replace("'", r"\'")
    return f"'{escaped}'"


def _find_sweep(words: Sequence[str]) -> Path:
    """The newest sweep that was started by the same command line."""
    given = _value(words, "hydra.sweep.dir")
    if given is not None:
        return Path(given)
    command = sweep_command(words)
    noted = sorted(Path("multirun").glob("*/*/sweep.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(noted):
        earlier = json.loads(path.read_text(encoding="utf-8")).get("command")
        if earlier is not None and _options(earlier) == _options(command):
            return path.parent
    raise FatError(
        f"No sweep under multirun/ was started by: {command}\nType sweep.resume=DIR with the "
        "directory of the sweep, or leave sweep.resume out to start one."
    )


def _options(command: str) -> list[str]:
    """Today's names of the options of a command, which python train.py and fat train share."""
    return current_overrides(shlex.split(command)[2:], RunConfig)


def sweep_command(words: Sequence[str]) -> str:
    """Return the command that identifies a sweep, without the words about resuming and places.

    Examples:
        >>> sweep_command(["-m", "seed=1,2", "sweep.resume=true"])
        'python train.py -m seed=1,2'
    """
    return command_line("train", *(word for word in words if not word.startswith(_PLACES)))
