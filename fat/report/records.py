"""What runs and sweeps left on disk, read as far as it is there.

A run may have failed or been killed at any point, so nothing here insists on a file: what is
missing reads as nothing, and what is damaged is said in ``problems``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fat.utils.errors import FatError, first_line

__all__ = [
    "Run",
    "Sweep",
    "dig",
    "find_runs",
    "finite",
    "is_run",
    "is_sweep",
    "latencies",
    "number",
    "read_csv",
    "read_json",
    "read_run",
    "read_sweep",
    "texts",
    "total_seconds",
    "word",
]

METRICS, FAILURE, CONFIG = "metrics.json", "failure.json", "config.yaml"
OVERRIDES = ".hydra/overrides.yaml"
SWEEP, MULTIRUN = "sweep.json", "multirun.yaml"
DEEPEST = 4
"""How many folders below a sweep its runs may lie; Hydra's own layout has them one below."""


@dataclass(frozen=True)
class Run:
    """One run, as far as its directory tells.

    Attributes:
        directory: Where it is; it may not exist, for a job that was never started.
        name: How pages name it: its directory, relative to the page.
        status: ``finished``, ``failed``, ``unfinished`` or ``not started``.
        metrics: metrics.json; empty where there is none.
        failure: failure.json; ``None`` where there is none.
        config: config.yaml; empty where there is none.
        overrides: What was typed for this run, such as ``quant.bits=4``; empty where unknown.
        problems: Files that could not be read, one sentence each.
    """

    directory: Path
    name: str
    status: str
    metrics: Mapping[str, Any]
    failure: Mapping[str, Any] | None
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def command(self) -> str | None:
        """The line that gives this run again; ``None`` where nothing tells it."""
        for place in (self.metrics, self.failure or {}):
            if word(place, "command"):
                return word(place, "command")
        if self.overrides:
            return shlex.join(["python", "train.py", *self.overrides])
        return None

    @property
    def error(self) -> str | None:
        """Why the run failed, in one line; ``None`` where nothing says so."""
        if self.failure is None:
            return None
        parts = (word(self.failure, "error"), word(self.failure, "message"))
        return " ".join(": ".join(part for part in parts if part).split()) or "failed"


@dataclass(frozen=True)
class Sweep:
    """Several runs that one page shows.

    Attributes:
        directory: The folder that the page lies in; names and links are relative to it.
        title: What the page is called.
        command: The line that gives all of it again; ``None`` where nothing tells it.
        runs: In the order in which they were asked for.
        problems: Files that could not be read, one sentence each.
    """

    directory: Path
    title: str
    command: str | None
    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()


def finite(value: object) -> float | None:
    """A number that can be drawn, or ``None``: for text, NaN, infinity, truth values and nothing.

    Examples:
        >>> finite(3), finite("2.5"), finite(float("nan")), finite(""), finite(True)
        (3.0, 2.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def dig(nested: object, path: str) -> Any:
    """What stands under a dotted path, ``None`` where there is no such place.

    Examples:
        >>> dig({"float": {"top1": 90.0}}, "float.top1"), dig({"float": None}, "float.top1")
        (90.0, None)
    """
    for key in path.split("."):
        if not isinstance(nested, Mapping):
            return None
        nested = nested.get(key)
    return nested


def number(nested: object, path: str) -> float | None:
    """The finite number under a dotted path, else ``None``."""
    return finite(dig(nested, path))


def word(nested: object, path: str) -> str | None:
    """The text under a dotted path, else ``None``."""
    found = dig(nested, path)
    return found if isinstance(found, str) and found else None


def latencies(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds that one image takes, by export target, of files that were measured."""
    exported = metrics.get("exported")
    found = {
        str(target): number(report, "latency_ms.quantized")
        for target, report in (exported.items() if isinstance(exported, Mapping) else ())
    }
    return {target: time for target, time in found.items() if time is not None}


def total_seconds(metrics: Mapping[str, Any]) -> float | None:
    """Seconds of all stages of a run together; ``None`` where none is known."""
    stages = metrics.get("seconds")
    found = [finite(value) for value in stages.values()] if isinstance(stages, Mapping) else []
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def texts(value: object) -> tuple[str, ...]:
    """A list of words; nothing where something else came."""
    return tuple(str(entry) for entry in value) if isinstance(value, list) else ()


def read_json(file: Path, problems: list[str]) -> Any:
    """A JSON file, or ``None`` if there is none; a damaged one is added to ``problems``."""
    return _read(file, json.loads, problems)


def read_csv(file: Path, problems: list[str]) -> list[dict[str, str]] | None:
    """The rows of a CSV file, or ``None`` if there is none; missing cells are empty."""

    def parse(text: str) -> list[dict[str, str]]:
        table = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
        return [{key: value for key, value in row.items() if key} for row in table]

    rows: list[dict[str, str]] | None = _read(file, parse, problems)
    return rows


def _read(file: Path, parse: Any, problems: list[str]) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file.name} cannot be read: {first_line(error)}.")
        return None
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError, csv.Error, RecursionError) as error:
        problems.append(f"{file.name} is damaged: {first_line(error)}.")
        return None


def _read_mapping(file: Path, problems: list[str]) -> dict[str, Any] | None:
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    found = _read(file, parse, problems)
    if found is None or isinstance(found, dict):
        return found
    problems.append(f"{file.name} is damaged: it holds a {type(found).__name__}, no mapping.")
    return None


def is_run(directory: Path) -> bool:
    """Whether a folder is the directory of a run, be it of one that stopped at once."""
    return any((directory / name).is_file() for name in (CONFIG, METRICS, FAILURE, OVERRIDES))


def is_sweep(directory: Path) -> bool:
    """Whether a folder is the directory of a sweep."""
    return any((directory / name).is_file() for name in (SWEEP, MULTIRUN))


def find_runs(directory: Path) -> list[Path]:
    """Directories of runs below a folder, ``2-…`` before ``10-…``; nothing inside a run counts."""
    return list(_below(directory, DEEPEST))


def _below(directory: Path, depth: int) -> Iterable[Path]:
    try:
        folders = [entry for entry in directory.iterdir() if entry.is_dir()]
    except OSError:
        return
    for folder in sorted(folders, key=lambda entry: _natural(entry.name)):
        if folder.name.startswith("."):
            continue
        if is_run(folder):
            yield folder
        elif depth > 1:
            yield from _below(folder, depth - 1)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Numbers in a name as numbers, before letters."""
    return [
        (False, int(part), "") if part.isdecimal() else (True, 0, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    ]


def read_run(
    directory: Path,
    *,
    name: str | None = None,
    overrides: Sequence[str] = (),
    stated: str | None = None,
) -> Run:
    """Read what a run left.

    Args:
        directory: The run directory, which may not exist.
        name: How pages shall name it; the folder's own name when ``None``.
        overrides: What was typed for it, where the sweep knows; else Hydra's own note is read.
        stated: What the sweep says of its status.
    """
    problems: list[str] = []
    metrics = _read_mapping(directory / METRICS, problems) or {}
    failure = _read_mapping(directory / FAILURE, problems)
    config = _read_mapping(directory / CONFIG, problems) or {}
    typed = tuple(overrides) or texts(_read(directory / OVERRIDES, yaml.safe_load, problems))
    return Run(
        directory=directory,
        name=name if name is not None else directory.resolve().name,
        status=_status(directory, metrics, failure, stated),
        metrics=metrics,
        failure=failure,
        config=config,
        overrides=typed,
        problems=tuple(problems),
    )


def _status(
    directory: Path,
    metrics: Mapping[str, Any],
    failure: Mapping[str, Any] | None,
    stated: str | None,
) -> str:
    # The run's own files come first: the sweep's list may be older, when the sweep was killed.
    if failure is not None or (directory / FAILURE).is_file():
        return "failed"
    if metrics.get("status") == "finished":
        return "finished"
    if metrics and "status" not in metrics and isinstance(metrics.get("trained"), Mapping):
        return "finished"  # written by a FAT that did not note the status yet
    if stated == "failed":
        return "failed"
    return "unfinished" if is_run(directory) else "not started"


def read_sweep(directory: Path) -> Sweep:
    """Read a sweep: by its sweep.json, or where there is none by the runs found below it.

    Args:
        directory: The sweep's directory.

    Raises:
        FatError: If it holds no run and no list of jobs.
    """
    problems: list[str] = []
    notes = _read_mapping(directory / SWEEP, problems) or {}
    jobs = notes.get("jobs")
    runs: list[Run] = []
    for job in jobs if isinstance(jobs, list) else []:
        place = word(job, "directory")
        if place is None:
            problems.append(f"{SWEEP} lists a job without a directory.")
            continue
        folder = _job_directory(directory, place)
        runs.append(
            read_run(
                folder,
                name=Path(os.path.relpath(folder, directory)).as_posix(),
                overrides=texts(dig(job, "overrides")),
                stated=word(job, "status"),
            )
        )
    listed = {run.directory.resolve() for run in runs}
    runs += [
        read_run(found, name=found.relative_to(directory).as_posix())
        for found in find_runs(directory)
        if found.resolve() not in listed
    ]
    if not runs:
        raise FatError(
            f"{directory} is a sweep without any run. Start it again: python train.py -m …, or "
            "give another directory."
        )
    command = word(notes, "command") or _multirun_command(directory / MULTIRUN, problems)
    title = word(notes, "id") or directory.resolve().name
    return Sweep(directory, title, command, tuple(runs), tuple(problems))


def _job_directory(sweep: Path, place: str) -> Path:
    given = sweep / place  # an absolute place stays as it is
    # A sweep that was moved still holds its jobs, under their names.
    beside = sweep / Path(place).name
    return beside if not given.is_dir() and beside.is_dir() else given


def _multirun_command(file: Path, problems: list[str]) -> str | None:
    """What was typed for the sweep, from Hydra's note of it."""
    content = _read_mapping(file, problems)
    task = texts(dig(content, "hydra.overrides.task"))
    own = texts(dig(content, "hydra.overrides.hydra"))
    words = [*task, *(entry for entry in own if not entry.startswith("hydra.mode="))]
    if content is None:
        return None
    return shlex.join(["python", "train.py", "-m", *words])
