"""Reading the files of runs and sweeps, including those of earlier versions.

A run may have failed or been killed at any point, so no file is required: a missing one reads as
empty, and a damaged one is described in ``problems``.
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

from fat.utils.commands import command_line
from fat.utils.errors import FatError, first_line
from fat.utils.nested import leaves

__all__ = [
    "Run",
    "Sweep",
    "current_names",
    "dig",
    "find_runs",
    "finite",
    "is_run",
    "is_sweep",
    "latencies",
    "leaves",
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
"""Depth at which runs are searched below a sweep; Hydra's own layout has them one below."""
_GRANULARITIES = {"vector": "per_channel", "scalar": "per_tensor"}
RENAMED_VALUES = {
    "granularity": _GRANULARITIES,
    "quant.granularity": _GRANULARITIES,
    "quant.weights": {"pointwise": "scale", "rounding": "adaround"},
    "grid": {"signed": "symmetric", "unsigned": "symmetric_unsigned", "asymmetric": "affine"},
}
RENAMED_OPTIONS = {
    "quant.pointwise_range": "quant.weight_scale_range",
    "quant.rounding_range": "quant.adaround_range",
    "optim.pointwise_lr": "optim.weight_scale_lr",
    "optim.rounding_lr": "optim.adaround_lr",
    "optim.reconstruction.float_share": "optim.reconstruction.float_fraction",
}
"""Names that FAT 0.1 wrote into files, and what they are called now: old and new runs compare."""


@dataclass(frozen=True)
class Run:
    """One run, as far as its directory describes it.

    Attributes:
        directory: The run directory; it does not exist for a job that was never started.
        name: Name on pages: the directory, relative to the page.
        status: ``finished``, ``failed``, ``unfinished`` or ``not started``.
        metrics: metrics.json; empty without the file.
        failure: failure.json; ``None`` without the file.
        config: config.yaml; empty without the file.
        overrides: What was typed for this run, such as ``quant.bits=4``; empty if unknown.
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
        """The command line that repeats this run; ``None`` if it is unknown."""
        recorded = word(self.metrics, "command") or word(self.failure, "command")
        if recorded:
            return _current_command(recorded)
        return command_line("train", *self.overrides) if self.overrides else None

    @property
    def error(self) -> str | None:
        """Why the run failed, in one line; ``None`` if nothing says so."""
        if self.failure is None:
            return None
        parts = (word(self.failure, "error"), word(self.failure, "message"))
        return " ".join(": ".join(part for part in parts if part).split()) or "failed"


@dataclass(frozen=True)
class Sweep:
    """Several runs on one page.

    Attributes:
        directory: The folder of the page; names and links are relative to it.
        title: Title of the page.
        command: The command line that repeats the sweep; ``None`` if it is unknown.
        runs: In the order in which they were requested.
        problems: Files that could not be read, one sentence each.
    """

    directory: Path
    title: str
    command: str | None
    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()


def finite(value: object) -> float | None:
    """Return a finite number, or ``None`` for other text, NaN, infinity, booleans and nothing.

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
    """Return the value at a dotted path, ``None`` if there is no such path.

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
    """Return the finite number at a dotted path, else ``None``."""
    return finite(dig(nested, path))


def word(nested: object, path: str) -> str | None:
    """Return the text at a dotted path, else ``None``."""
    found = dig(nested, path)
    return found if isinstance(found, str) and found else None


def latencies(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured latency of one image by export target, milliseconds."""
    exported = metrics.get("exported")
    found = {
        str(target): number(report, "latency_ms.quantized")
        for target, report in (exported.items() if isinstance(exported, Mapping) else ())
    }
    return {target: time for target, time in found.items() if time is not None}


def total_seconds(metrics: Mapping[str, Any]) -> float | None:
    """Return the total seconds of all stages of a run; ``None`` if none is known."""
    stages = metrics.get("seconds")
    found = [finite(value) for value in stages.values()] if isinstance(stages, Mapping) else []
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def texts(value: object) -> tuple[str, ...]:
    """Return a list as a tuple of texts; anything else gives an empty tuple."""
    return tuple(str(entry) for entry in value) if isinstance(value, list) else ()


def current_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config or metrics with the names of earlier versions replaced by today's.

    Args:
        values: Content of config.yaml or metrics.json.
        prefix: Path of ``values`` inside the file, with a dot behind it.

    Examples:
        >>> current_names({"quant": {"weights": "rounding", "rounding_range": [-1, 1]}})
        {'quant': {'weights': 'adaround', 'adaround_range': [-1, 1]}}
    """
    current: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            value = current_names(value, f"{path}.")
        elif isinstance(value, str):
            value = RENAMED_VALUES.get(path, {}).get(value, value)
        current[RENAMED_OPTIONS[path].rpartition(".")[2] if path in RENAMED_OPTIONS else key] = (
            value
        )
    return current


def _current_override(text: str) -> str:
    """An override such as ``quant.granularity=vector,scalar`` with today's names."""
    name, equals, value = text.partition("=")
    key = name.lstrip("+~")
    values = RENAMED_VALUES.get(key, {}) if key.startswith("quant.") else {}
    current = ",".join(values.get(part, part) for part in value.split(","))
    return name.removesuffix(key) + RENAMED_OPTIONS.get(key, key) + equals + current


def _current_command(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    current = [_current_override(word) for word in words]
    return command if current == words else shlex.join(current)


def read_json(file: Path, problems: list[str]) -> Any:
    """Read a JSON file, ``None`` without it; a damaged file is added to ``problems``."""
    return _read(file, json.loads, problems)


def read_csv(file: Path, problems: list[str]) -> list[dict[str, str]] | None:
    """Read the rows of a CSV file, ``None`` without it; missing cells are empty."""

    def parse(text: str) -> list[dict[str, str]]:
        table = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
        return [
            {
                key: RENAMED_VALUES.get(key, {}).get(value, value)
                for key, value in row.items()
                if key
            }
            for row in table
        ]

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
    def parse(text: str) -> Any:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        return current_names(found) if isinstance(found, dict) else found

    found = _read(file, parse, problems)
    if found is None or isinstance(found, dict):
        return found
    problems.append(f"{file.name} is damaged: it contains a {type(found).__name__}, not a mapping.")
    return None


def is_run(directory: Path) -> bool:
    """Return whether a folder is a run directory, also of a run that failed immediately."""
    return any((directory / name).is_file() for name in (CONFIG, METRICS, FAILURE, OVERRIDES))


def is_sweep(directory: Path) -> bool:
    """Return whether a folder is the directory of a sweep."""
    return any((directory / name).is_file() for name in (SWEEP, MULTIRUN))


def find_runs(directory: Path) -> list[Path]:
    """Return the run directories below a folder, ``2-…`` before ``10-…``; runs are not nested."""
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
    """Sort key that compares numbers in a name by value, before letters."""
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
    """Read the files of a run.

    Args:
        directory: The run directory, which may not exist.
        name: Name on pages; the name of the folder when ``None``.
        overrides: What was typed for it, if the sweep knows; otherwise Hydra's record is read.
        stated: Its status according to the sweep.
    """
    problems: list[str] = []
    metrics = _read_mapping(directory / METRICS, problems) or {}
    failure = _read_mapping(directory / FAILURE, problems)
    config = _read_mapping(directory / CONFIG, problems) or {}
    typed = tuple(overrides) or texts(_read(directory / OVERRIDES, yaml.safe_load, problems))
    typed = tuple(map(_current_override, typed))
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
    # The run's own files take precedence: the list of a sweep that was killed may be outdated.
    if failure is not None or (directory / FAILURE).is_file():
        return "failed"
    if metrics.get("status") == "finished":
        return "finished"
    if metrics and "status" not in metrics and isinstance(metrics.get("trained"), Mapping):
        return "finished"  # written by a version that did not record the status
    if stated == "failed":
        return "failed"
    return "unfinished" if is_run(directory) else "not started"


def read_sweep(directory: Path) -> Sweep:
    """Read a sweep: the jobs of its sweep.json, and all other runs found below it.

    Args:
        directory: The sweep's directory.

    Raises:
        FatError: If it has no run and no list of jobs.
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
            f"{directory} is a sweep without any run. Start it again: "
            f"{command_line('train', '-m')} …, or give another directory."
        )
    recorded = word(notes, "command") or _multirun_command(directory / MULTIRUN, problems)
    command = _current_command(recorded) if recorded else None
    title = word(notes, "id") or directory.resolve().name
    return Sweep(directory, title, command, tuple(runs), tuple(problems))


def _job_directory(sweep: Path, place: str) -> Path:
    given = sweep / place  # which an absolute place replaces
    # A sweep that was moved still contains its jobs under their names.
    beside = sweep / Path(place).name
    return beside if not given.is_dir() and beside.is_dir() else given


def _multirun_command(file: Path, problems: list[str]) -> str | None:
    """The command line of a sweep, from Hydra's record of it."""
    content = _read_mapping(file, problems)
    task = texts(dig(content, "hydra.overrides.task"))
    own = texts(dig(content, "hydra.overrides.hydra"))
    words = [*task, *(entry for entry in own if not entry.startswith("hydra.mode="))]
    if content is None:
        return None
    return command_line("train", "-m", *words)
