"""The run directory: names of its files, starting or resuming a run in it, opening it again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from fat.data.datamodule import FatDataModule
from fat.data.dataset import ImageLoader
from fat.experiment.build import InputSpec, make_data
from fat.experiment.config import (
    DataConfig,
    EvaluateConfig,
    RunConfig,
    TrainerConfig,
    parse_run,
    to_config,
)
from fat.experiment.machine import describe, device_of, resolve
from fat.models.float_model import Preprocessing
from fat.models.serialization import check_finite, load
from fat.models.student import Student
from fat.quant.config import QuantSpec
from fat.report.records import CONFIG, FAILURE, METRICS
from fat.utils import distributed
from fat.utils.commands import command_line
from fat.utils.errors import FatError, first_line, no_run
from fat.utils.io import check_writable, torn_part, write_text
from fat.utils.memory import keep_freed_memory
from fat.utils.precision import use_full_precision

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EQUALIZATION",
    "FAILURE",
    "HISTORY",
    "IMAGES",
    "METRICS",
    "STUDENT",
    "THRESHOLDS",
    "FinishedRun",
    "begin",
    "check_unchanged",
    "load_checkpoint",
    "objective",
    "open_run",
    "read_metrics",
    "resumable_config",
    "set_up",
    "stored_config",
]

logger = logging.getLogger(__name__)

STUDENT, THRESHOLDS = "student.safetensors", "thresholds.csv"
EQUALIZATION, IMAGES, HISTORY = "equalization.csv", "images.csv", "history.csv"
CHECKPOINTS = "checkpoints"

NOT_THE_RUN = ("resume", "sweep", "hub")
"""Options that do not define the result and are not stored with it."""
WHERE_IT_RUNS = ("name", "trainer", "logger")
"""Options that may differ when a run is resumed."""


def begin(directory: Path, config: RunConfig, *, resume: bool) -> dict[str, Any] | None:
    """Start a run in a directory, or resume the one in it, and store the config.

    Args:
        directory: The run directory.
        config: The options.
        resume: Resume the run in the directory, if there is one.

    Returns:
        The metrics of the interrupted or finished run; ``None`` for a new run, and for one that was
        interrupted before its first metrics.

    Raises:
        FatError: If the directory cannot be written, or holds a run that would be overwritten.
    """
    there = (directory / METRICS).is_file()  # without them there is nothing to lose
    if there and not resume:
        raise FatError(
            f"{directory} already holds a run, which would be overwritten. Type resume={directory} "
            "to resume it, or give another directory: hydra.run.dir=DIR."
        )
    if there:
        check_unchanged(directory, config)
        return read_metrics(directory)
    if distributed.is_main_process():
        check_writable(directory)
        write_text(directory / CONFIG, yaml.safe_dump(stored_config(config), sort_keys=False))
    return None


def resumable_config(directory: Path, *, resume: bool) -> RunConfig | None:
    """Return the options of the run that :func:`begin` would resume, ``None`` for a new run."""
    return read_config(directory) if resume and (directory / METRICS).is_file() else None


def stored_config(config: RunConfig) -> dict[str, Any]:
    """Return the content of config.yaml: all options that define the result."""
    return {key: value for key, value in to_config(config).items() if key not in NOT_THE_RUN}


def check_unchanged(directory: Path, config: RunConfig) -> None:
    """Raise a FatError if the run in a directory has other options."""
    theirs = stored_config(read_config(directory))
    ours = stored_config(config)
    for key in ours:
        if key not in WHERE_IT_RUNS and theirs.get(key) != ours[key]:
            raise FatError(
                f"{directory} holds a run with other options: "
                f"{_difference(theirs[key], ours[key])} (under {key}). A run is resumed with its "
                "own options; give another directory for these."
            )


def read_config(directory: Path) -> RunConfig:
    """Read the options of a run.

    Raises:
        FatError: If config.yaml is missing or damaged.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise no_run(directory, CONFIG)
    try:
        text = path.read_text(encoding="utf-8")
        # FAT writes none, and a few lines of aliases can expand to more than fits into memory.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise FatError(
                f"{path} was changed: it holds YAML aliases (*name). Replace them by their values."
            )
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FatError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise FatError(
            f"{path} is damaged: it holds {str(content)[:50]!r} in place of options. Restore the "
            "file from a copy; .hydra/config.yaml beside it has the options at the start."
        )
    return parse_run(content)


def read_metrics(directory: Path) -> dict[str, Any] | None:
    """Read metrics.json of a run; ``None`` if the run has not got that far.

    Raises:
        FatError: If the file is damaged.
    """
    path = directory / METRICS
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        _check_metrics(metrics)
    except (OSError, ValueError, RecursionError) as error:
        raise FatError(
            f"{path} is damaged: {first_line(error)}. Restore it from a copy, or run again in "
            "another directory: hydra.run.dir=DIR."
        ) from error
    found: dict[str, Any] = metrics
    return found


def _check_metrics(metrics: Any) -> None:
    """Raise a ValueError if an entry that other code reads is missing or of a wrong type."""
    if not isinstance(metrics, dict):
        raise ValueError(f"it holds {str(metrics)[:50]!r} in place of metrics")
    kinds: dict[str, type | tuple[type, ...]] = {
        "status": str,
        "float": dict,
        "calibrated": dict,
        "seconds": dict,
        "trained": (dict, type(None)),
        "command": (str, type(None)),
        "accuracy_drop": (int, float, type(None)),
    }
    for key, kind in kinds.items():
        if key not in metrics or not isinstance(metrics[key], kind):
            raise ValueError(f"its {key} is {str(metrics.get(key, 'missing'))[:50]!r}")
    numbers = {f"seconds.{stage}": spent for stage, spent in metrics["seconds"].items()} | {
        f"{stage}.{key}": metrics[stage].get(key, "missing")
        for stage, keys in (("float", ("top1",)), ("calibrated", ("top1", "agreement")))
        for key in keys
    }
    for key, value in numbers.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"its {key} is {str(value)[:50]!r}")


def objective(metrics: Mapping[str, Any]) -> float:
    """Return what a sweeper minimizes: points of top-1 lost, or 100 − agreement without labels.

    Args:
        metrics: Content of metrics.json.
    """
    drop = metrics["accuracy_drop"]
    if drop is not None:
        return float(drop)
    return 100.0 - float((metrics["trained"] or metrics["calibrated"])["agreement"])


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, opened again.

    Attributes:
        directory: The run directory.
        config: The options of the run.
        student: Its student, or that of the given checkpoint, on ``device``.
        data: The requested images.
        data_config: The options of ``data``.
        device: Device of the student.
    """

    directory: Path
    config: RunConfig
    student: Student
    data: FatDataModule
    data_config: DataConfig
    device: torch.device

    def batches(self, loader: ImageLoader) -> ImageLoader:
        """Return the batches of a loader on the student's device."""
        return loader.to(self.device)


def open_run(config: EvaluateConfig) -> FinishedRun:
    """Open a finished run from its directory alone.

    Args:
        config: The options of the command.

    Raises:
        FatError: If the directory is not a run directory, or its student or checkpoint is damaged.
    """
    if not config.run:
        raise FatError(
            f"No run was given. Type {command_line('evaluate', 'run=DIR')} with the directory that "
            "a training printed."
        )
    directory = Path(config.run).expanduser()
    if not (directory / STUDENT).is_file():
        raise no_run(directory, STUDENT)
    stored, config = read_config(directory), resolve(config)
    seed = stored.seed if config.seed is None else config.seed
    set_up(config.trainer, seed)
    student = load(directory / STUDENT)
    if config.checkpoint:
        load_checkpoint(student, Path(config.checkpoint).expanduser())
    data_config = config.data
    if data_config.source == "of_run":
        index = directory / IMAGES
        data_config = replace(
            stored.data,
            batch_size=config.data.batch_size,
            workers=config.data.workers,
            cache="none",  # of training images, which may be gone
            index=str(index) if index.is_file() else stored.data.index,
        )
    elif data_config.image_size is not None or data_config.crop_pct is not None:
        raise FatError(
            "data.image_size and data.crop_pct are part of the run itself: leave them out."
        )
    data = make_data(data_config, _target_of_run(student.origin), seed)
    device = device_of(config.trainer)
    logger.info("Running on %s.", describe(config))
    return FinishedRun(directory, stored, student.to(device), data, data_config, device)


def load_checkpoint(student: Student, path: Path) -> None:
    """Load a Lightning checkpoint of the same run into the student.

    Raises:
        FatError: If the file is missing, damaged, or of another network or quantization.
    """
    if not path.is_file():
        raise FatError(f"There is no checkpoint {path}; a run has its own in checkpoints/.")
    try:
        if part := torn_part(path):
            raise ValueError(f"its part {part} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored, origin = content["fat"], dict(content["fat"]["origin"])
        prefix = "student."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith(prefix)
        }
        check_finite(state)
        # Options that a checkpoint of an earlier version lacks have their defaults.
        stored_spec = QuantSpec.from_dict(stored["spec"]).to_dict()
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise FatError(
            f"{path} is not a checkpoint of a FAT run, or it is damaged: {first_line(error)}"
        ) from error
    for what, theirs, ours in (
        ("network", origin.get("name"), student.origin.get("name")),
        ("quantization", stored_spec, student.spec.to_dict()),
    ):
        if theirs != ours:
            raise FatError(
                f"{path} has another {what} than the run: {_difference(theirs, ours)}. Give a "
                "checkpoint from the run's own checkpoints/."
            )
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise FatError(
            f"{path} does not fit the student of the run: {' '.join(str(error).split())[:300]} "
            "Give a checkpoint from the run's own checkpoints/."
        ) from error


def set_up(trainer: TrainerConfig, seed: int) -> None:
    """Set the threads, seeds, log levels and precision of the process."""
    if device_of(trainer).type == "cpu":
        keep_freed_memory()
    else:
        use_full_precision()
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def _target_of_run(origin: Mapping[str, Any]) -> InputSpec:
    try:
        classes = origin.get("classes")
        names = None if classes is None else tuple(map(str, classes))
        return InputSpec(
            Preprocessing.from_dict(origin["preprocessing"]), int(origin["num_classes"]), names
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FatError(
            f"The student of the run does not state its preprocessing ({first_line(error)}): the "
            "file was changed. Run it again."
        ) from error


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in ours:
            if theirs.get(key) != ours[key]:
                return f"{key} is {theirs.get(key)}, the run's is {ours[key]}"
    return f"{theirs}, the run's is {ours}"
