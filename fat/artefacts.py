"""Files of finished runs, and files of anybody: written and judged by evaluate.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fat.config import MOST_CLASSES, EvaluateConfig
from fat.data.datamodule import FatDataModule
from fat.errors import FatError, first_line, no_run
from fat.export.artefact import judge
from fat.export.target import Runtime
from fat.export.targets import open_artefact
from fat.exports import asked_target, export_student
from fat.files import check_writable
from fat.inputs import Target, for_images, make_data
from fat.models import Preprocessing, load_float_network
from fat.report.export import format_export
from fat.report.run import format_figures, write_metrics
from fat.runs import METRICS, open_run, read_metrics

__all__ = ["export_run", "judge_artefact"]

logger = logging.getLogger(__name__)


def export_run(config: EvaluateConfig) -> dict[str, Any]:
    """Write the file that ``config.export`` asks for into a finished run's directory.

    Its figures go into the run's metrics.json under ``exported``.

    Args:
        config: What conf/evaluate.yaml composed.

    Returns:
        What :func:`fat.export.export.export` returns.

    Raises:
        FatError: If the target is not installed, the directory is no run, its training was
            interrupted, or the file does not compute what the student does.
    """
    target = asked_target(config.export)
    assert target is not None
    opened = open_run(config)
    check_writable(opened.directory)
    metrics = read_metrics(opened.directory)
    if metrics is None:
        raise no_run(opened.directory, METRICS)
    unfinished = opened.config.train_spec().trains and metrics.get("training") is None
    if unfinished and not config.export.unfinished:
        raise FatError(
            f"The training of {opened.directory} was interrupted; its student is the best that was "
            "seen until then. Run it again, or type export.unfinished=true to export it as it is."
        )
    report = export_student(
        opened.student,
        target,
        opened.directory,
        opened.data.test_dataloader(),
        config.export,
        metrics,
        progress=config.trainer.progress,
    )
    metrics["exported"] = {**(metrics.get("exported") or {}), target.name: report}
    write_metrics(opened.directory / METRICS, metrics)
    logger.info("\n%s\nRun directory: %s", format_export(report), opened.directory)
    return report


def judge_artefact(config: EvaluateConfig) -> dict[str, Any]:
    """Judge a file on any images: those of a run, or any that conf/data has.

    Args:
        config: What conf/evaluate.yaml composed.

    Returns:
        What :func:`fat.export.artefact.judge` gives, with ``kernels`` where the runtime tells.

    Raises:
        FatError: If the file cannot be run, or nobody knows which images it takes.
    """
    assert config.artefact is not None
    path = Path(config.artefact).expanduser()
    runtime = open_artefact(path, config.runtime, threads=config.trainer.threads)
    data, reference = _images_and_reference(config, runtime)
    bar = f"Evaluate {path.name}" if config.trainer.progress else None
    figures = judge(runtime, data.test_dataloader(), reference, progress=bar)
    rows = {"file": figures["quantized"]}
    if reference is not None:
        rows = {"float": figures["float"], **rows}
    try:
        kernels = runtime.kernels()
        figures["kernels"] = asdict(kernels)
        computing = (
            f"{kernels.integer_layers} convolutions and linear layers in integers, "
            f"{len(kernels.float_layers)} in float"
        )
    except FatError as error:  # some files do not tell; their figures stand
        figures["kernels"] = None
        computing = str(error)
    logger.info(
        "%s in %s, %d test images:\n%s\n%s",
        path, runtime.name, figures["images"], format_figures(rows), computing,
    )  # fmt: skip
    return figures


def _images_and_reference(
    config: EvaluateConfig, runtime: Runtime
) -> tuple[FatDataModule, nn.Module | None]:
    """The images that a file is to be judged on, and the float network that it is compared with."""
    if config.run is not None:
        opened = open_run(config)
        return opened.data, opened.student.teacher
    if config.data.source == "of_run":
        raise FatError(
            "Which images? Type data=folder data.root=DIR, or run=DIR for those of a run."
        )
    seed = config.seed or 0
    if config.model.name is not None:
        loaded = load_float_network(**asdict(config.model), seed=seed)
        source = for_images(loaded, config.data)
        return make_data(config.data, Target.of(source), seed), source.network
    stored = runtime.metadata
    if "fat.preprocessing" not in stored:
        raise FatError(
            "The file does not say how its images are to be prepared. Type model=NAME or "
            "model.name=NAME, the float network that it was made of, or run=DIR."
        )
    return make_data(config.data, _stored_target(stored), seed), None


def _stored_target(stored: Mapping[str, str]) -> Target:
    """What the texts in a file say of its images and classes."""
    try:
        classes = json.loads(stored["fat.classes"]) if "fat.classes" in stored else None
        if classes is not None and not (
            isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
        ):
            raise ValueError(f"fat.classes is {str(classes)[:50]!r}")
        preprocessing = Preprocessing.from_dict(json.loads(stored["fat.preprocessing"]))
        count = len(classes) if classes else int(stored["fat.num_classes"])
        if not 1 <= count <= MOST_CLASSES:
            raise ValueError(f"fat.num_classes is {count}")
    except (FatError, ValueError, KeyError, RecursionError) as error:
        raise FatError(
            f"What the file says of its images cannot be used ({first_line(error)}). Type "
            "model=NAME or model.name=NAME, the float network that it was made of, or run=DIR."
        ) from error
    return Target(preprocessing, count, None if classes is None else tuple(classes))
