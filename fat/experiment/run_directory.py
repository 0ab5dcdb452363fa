"""A run's directory: its files, what an interrupted run left there, and opening it again."""

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
    "accelerator_of",
    "begin",
    "check_unchanged",
    "device_of",
    "load_checkpoint",
    "objective",
    "open_run",
    "read_metrics",
    "set_up",
    "stored_config",
]

logger = logging.getLogger(__name__)

STUDENT, THRESHOLDS = "student.safetensors", "thresholds.csv"
EQUALIZATION, IMAGES, HISTORY = "equalization.csv", "images.csv", "history.csv"
CHECKPOINTS = "checkpoints"

NOT_THE_RUN = ("resume", "sweep", "hub")
"""Options that say how to get a result, and not which: they are not kept with it."""
WHERE_IT_RUNS = ("name", "trainer", "logger")
"""Options that may differ when a run goes on."""


def begin(directory: Path, config: RunConfig, *, resume: bool) -> dict[str, Any] | None:
    """Take a directory for a run, and keep its config there.

    Args:
        directory: The run directory.
        config: The run's options.
        resume: Go on with the run that the directory holds, if it holds one.

    Returns:
        The metrics of an interrupted or finished run that goes on; ``None`` for a new one, and for
        one that had not come as far.

    Raises:
        FatError: If the directory cannot be written into, or holds a run that would be lost.
    """
    there = (directory / METRICS).is_file()  # before that nothing has been found out
    if there and not resume:
        raise FatError(
            f"{directory} holds a run already, and a new one would take its place. Type "
            f"resume={directory} to go on with it, or give another directory: hydra.run.dir=DIR."
        )
    if there:
        check_unchanged(directory, config)
        return read_metrics(directory)
    if distributed.is_main_process():
        check_writable(directory)
        write_text(directory / CONFIG, yaml.safe_dump(stored_config(config), sort_keys=False))
    return None


def stored_config(config: RunConfig) -> dict[str, Any]:
    """What config.yaml keeps: all options that make the result, in plain containers."""
    return {key: value for key, value in to_config(config).items() if key not in NOT_THE_RUN}


def check_unchanged(directory: Path, config: RunConfig) -> None:
    """Raise a FatError if a directory holds a run with other options than these."""
    theirs = stored_config(read_config(directory))
    ours = stored_config(config)
    for key in ours:
        if key not in WHERE_IT_RUNS and theirs.get(key) != ours[key]:
            raise FatError(
                f"{directory} holds a run of other options: {_difference(theirs[key], ours[key])} "
                f"(under {key}). A run goes on with the options it began with; give another "
                "directory for these."
            )


def read_config(directory: Path) -> RunConfig:
    """The options of a run.

    Raises:
        FatError: If there are none, or they are damaged.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise no_run(directory, CONFIG)
    try:
        text = path.read_text(encoding="utf-8")
        # FAT writes none, and a few lines of them stand for more than any memory holds.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise FatError(f"{path} was changed: it holds YAML aliases (*name). Write them out.")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FatError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise FatError(
            f"{path} is damaged: it holds no options, but {str(content)[:50]!r}. Bring the file "
            "back from a copy; .hydra/config.yaml beside it has what the run began with."
        )
    return parse_run(content)


def read_metrics(directory: Path) -> dict[str, Any] | None:
    """metrics.json of a run, ``None`` where it has not come as far.

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
            f"{path} is damaged: {first_line(error)}. Bring it back from a copy, or run again in "
            "another directory: hydra.run.dir=DIR."
        ) from error
    found: dict[str, Any] = metrics
    return found


def _check_metrics(metrics: Any) -> None:
    """Raise a ValueError unless what other files rely on is there, and of its kind."""
    if not isinstance(metrics, dict):
        raise ValueError(f"it holds no figures, but {str(metrics)[:50]!r}")
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
    """What a sweeper should make small: points of top-1 lost, or 100 − agreement without labels.

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
        directory: Where it is.
        config: What it was run with.
        student: Its student, or that of the checkpoint asked for, on ``device``.
        data: The images asked for.
        data_config: What ``data`` was made from.
        device: Where the student is; ``batches`` brings images there.
    """

    directory: Path
    config: RunConfig
    student: Student
    data: FatDataModule
    data_config: DataConfig
    device: torch.device

    def batches(self, loader: ImageLoader) -> ImageLoader:
        """A loader's batches, on the student's device."""
        return loader.to(self.device)


def open_run(config: EvaluateConfig) -> FinishedRun:
    """Open a finished run from its directory alone.

    Args:
        config: What conf/evaluate.yaml composed.

    Raises:
        FatError: If the directory, its student or a given checkpoint is not what it should be.
    """
    if not config.run:
        raise FatError(
            f"No run was given. Type {command_line('evaluate', 'run=DIR')} with the directory that "
            "a training printed."
        )
    directory = Path(config.run).expanduser()
    if not (directory / STUDENT).is_file():
        raise no_run(directory, STUDENT)
    stored = read_config(directory)
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
            cache="none",  # that of training images, which may be gone
            index=str(index) if index.is_file() else stored.data.index,
        )
    elif data_config.image_size is not None or data_config.crop_pct is not None:
        raise FatError(
            "data.image_size and data.crop_pct are those that the run was made with: leave them "
            "out."
        )
    data = make_data(data_config, _target_of_run(student.origin), seed)
    device = device_of(config.trainer)
    return FinishedRun(directory, stored, student.to(device), data, data_config, device)


def load_checkpoint(student: Student, path: Path) -> None:
    """Put what a Lightning checkpoint of the same run holds into the student.

    Raises:
        FatError: If the file is missing, damaged, or of another network or bit-width.
    """
    if not path.is_file():
        raise FatError(f"There is no checkpoint {path}; a run keeps its own under checkpoints/.")
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
            f"{path} is no checkpoint of a FAT run, or it is damaged: {first_line(error)}"
        ) from error
    for what, theirs, ours in (
        ("network", origin.get("name"), student.origin.get("name")),
        ("quantization", stored_spec, student.spec.to_dict()),
    ):
        if theirs != ours:
            raise FatError(
                f"{path} is of another {what} than the run: {_difference(theirs, ours)}. Give a "
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
    """Threads, random states and messages of a process that runs something."""
    if device_of(trainer).type == "cpu":
        keep_freed_memory()
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def device_of(trainer: TrainerConfig) -> torch.device:
    """Where a student goes.

    Raises:
        FatError: If there is no such thing here.
    """
    found = torch.cuda.is_available()
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise FatError(
            f"trainer.accelerator={trainer.accelerator}, but torch finds no GPU here. "
            "Type trainer=cpu."
        )
    return torch.device("cuda")


def accelerator_of(trainer: TrainerConfig) -> str:
    """Lightning's name for :func:`device_of`: ``"cpu"`` or ``"gpu"``."""
    return "cpu" if device_of(trainer).type == "cpu" else "gpu"


def _target_of_run(origin: Mapping[str, Any]) -> InputSpec:
    try:
        classes = origin.get("classes")
        names = None if classes is None else tuple(map(str, classes))
        return InputSpec(
            Preprocessing.from_dict(origin["preprocessing"]), int(origin["num_classes"]), names
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FatError(
            f"The student of the run does not say which images it takes ({first_line(error)}): "
            "its file was changed. Run it again."
        ) from error


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in ours:
            if theirs.get(key) != ours[key]:
                return f"{key} is {theirs.get(key)}, the run's is {ours[key]}"
    return f"{theirs}, the run's is {ours}"
