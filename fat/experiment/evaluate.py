"""Evaluate, analyze or export a finished run, or evaluate any model file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fat.data.datamodule import FatDataModule
from fat.evaluation.evaluator import evaluate
from fat.evaluation.sensitivity_analysis import sensitivity
from fat.evaluation.sensitivity_file import (
    SensitivityReport,
    format_worst,
    write_plot,
    write_sensitivity,
)
from fat.experiment.build import InputSpec, export_backend, export_student, for_images, make_data
from fat.experiment.config import MOST_CLASSES, EvaluateConfig
from fat.experiment.run_directory import METRICS, open_run, read_metrics
from fat.experiment.run_files import write_metrics
from fat.export.base import Runtime
from fat.export.file_evaluation import evaluate_file
from fat.export.registry import open_artifact
from fat.models.float_model import Preprocessing, load_float_network
from fat.report.text import format_export, format_metrics
from fat.utils.batches import first_images
from fat.utils.commands import install_command
from fat.utils.errors import FatError, first_line, no_run
from fat.utils.io import check_writable

__all__ = ["analyze_run", "evaluate_artifact", "evaluate_run", "export_run"]

logger = logging.getLogger(__name__)


def analyze_run(config: EvaluateConfig) -> dict[str, Any]:
    """Rank the tensors of a run by the damage of their quantization (``analysis=sensitivity``).

    It is measured on calibration images, since bits are chosen by it and test images must not
    influence any choice. Writes sensitivity.csv, sensitivity.json and sensitivity.png.

    Args:
        config: The options of the command.

    Returns:
        ``images`` (their number) and ``worst``, the name and kind of the most sensitive tensor.

    Raises:
        FatError: If the analysis is unknown, the directory is no run or cannot be written into, or
            ``analysis_images`` is below 1.
    """
    opened = open_run(config)
    check_writable(opened.directory)
    loader = opened.batches(opened.data.calibration_dataloader())
    images = list(first_images(loader, config.analysis_images))
    count = sum(map(len, images))
    bar = "Sensitivity" if config.trainer.progress else None
    rows = sensitivity(opened.student, images, progress=bar)
    report = SensitivityReport(
        rows=rows,
        model=opened.student.origin["name"],
        weights=opened.student.origin["weights"],
        images={
            "source": opened.data_config.source,
            "root": opened.data_config.root,
            "split": "calibration",
            "count": count,
        },
        spec=opened.student.spec,
    )
    write_sensitivity(opened.directory, report)
    drawn = write_plot(opened.directory, report)
    logger.info(
        "The most sensitive of %d tensors on %d calibration images (logits' SQNR and agreement "
        "when it alone is quantized, and when all others are):\n%s\nAll tensors: %s",
        len(rows),
        count,
        format_worst(rows),
        opened.directory / "sensitivity.csv",
    )
    if not drawn:
        logger.warning(
            "No plot was written: matplotlib is not installed. Type %s.", install_command("plot")
        )
    return {"images": count, "worst": (rows[0].layer, rows[0].kind)}


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a finished run from its directory alone.

    Args:
        config: The options of the command.

    Returns:
        The result of :func:`fat.evaluation.evaluate`.

    Raises:
        FatError: If the directory, its student or a given checkpoint is not what it should be.
    """
    opened = open_run(config)
    bar = "evaluate" if config.trainer.progress else None
    metrics = evaluate(opened.student, opened.batches(opened.data.test_dataloader()), progress=bar)
    rows = {"float": metrics["float"], "quantized": metrics["quantized"]}
    logger.info(
        "%s, %d test images of %s:\n%s",
        opened.directory,
        metrics["images"],
        opened.data_config.root or opened.data_config.source,
        format_metrics(rows),
    )
    return metrics


def export_run(config: EvaluateConfig) -> dict[str, Any]:
    """Export a finished run into its directory.

    The metrics of the file go into the run's metrics.json under ``exported``.

    Args:
        config: The options of the command.

    Returns:
        The result of :func:`fat.export.export`.

    Raises:
        FatError: If the target is not installed, the directory is no run, its training was
            interrupted, or the file does not compute what the student does.
    """
    target = export_backend(config.export)
    assert target is not None
    opened = open_run(config)
    check_writable(opened.directory)
    metrics = read_metrics(opened.directory)
    if metrics is None:
        raise no_run(opened.directory, METRICS)
    unfinished = opened.config.optim.trains and metrics.get("training") is None
    if unfinished and not config.export.unfinished:
        raise FatError(
            f"The training of {opened.directory} was interrupted; its student is the best until "
            "then. Resume it, or type export.unfinished=true to export the student as it is."
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


def evaluate_artifact(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model file on the images of a run, or on any that conf/data offers.

    Args:
        config: The options of the command.

    Returns:
        The results of :func:`fat.export.file_evaluation.evaluate_file`, and ``kernels`` if the
        runtime exposes them.

    Raises:
        FatError: If the file cannot be run, or its preprocessing is unknown.
    """
    assert config.artifact is not None
    path = Path(config.artifact).expanduser()
    runtime = open_artifact(path, config.runtime, threads=config.trainer.threads)
    data, reference = _images_and_reference(config, runtime)
    bar = f"Evaluate {path.name}" if config.trainer.progress else None
    metrics = evaluate_file(runtime, data.test_dataloader(), reference, progress=bar)
    rows = {"file": metrics["quantized"]}
    if reference is not None:
        rows = {"float": metrics["float"], **rows}
    try:
        kernels = runtime.kernels()
        metrics["kernels"] = asdict(kernels)
        computing = (
            f"{kernels.integer_layers} convolutions and linear layers in integers, "
            f"{len(kernels.float_layers)} in float"
        )
    except FatError as error:  # some files do not tell; their metrics are still valid
        metrics["kernels"] = None
        computing = str(error)
    logger.info(
        "%s in %s, %d test images:\n%s\n%s",
        path,
        runtime.name,
        metrics["images"],
        format_metrics(rows),
        computing,
    )
    return metrics


def _images_and_reference(
    config: EvaluateConfig, runtime: Runtime
) -> tuple[FatDataModule, nn.Module | None]:
    """The images to evaluate a file on, and the float network to compare it with."""
    if config.run is not None:
        opened = open_run(config)
        return opened.data, opened.student.teacher
    if config.data.source == "of_run":
        raise FatError(
            "No images were given. Type data=folder data.root=DIR, or run=DIR for those of a run."
        )
    seed = config.seed or 0
    if config.model.name is not None:
        loaded = load_float_network(**asdict(config.model), seed=seed)
        source = for_images(loaded, config.data)
        return make_data(config.data, InputSpec.of(source), seed), source.network
    stored = runtime.metadata
    if "fat.preprocessing" not in stored:
        raise FatError(
            "The file does not state its preprocessing. Type model=NAME or model.name=NAME, the "
            "float network that it was made from, or run=DIR."
        )
    return make_data(config.data, _stored_target(stored), seed), None


def _stored_target(stored: Mapping[str, str]) -> InputSpec:
    """The preprocessing and classes that are stored in a file."""
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
            f"The preprocessing in the file is not valid ({first_line(error)}). Type model=NAME or "
            "model.name=NAME, the float network that it was made from, or run=DIR."
        ) from error
    return InputSpec(preprocessing, count, None if classes is None else tuple(classes))
