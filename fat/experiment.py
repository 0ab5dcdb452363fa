"""One run as a flat list: built from a config, everything left in a directory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from tqdm.auto import tqdm

from fat.analysis import float_shift_db, layer_errors
from fat.calibrate import calibrate
from fat.callbacks import AlphaHistory
from fat.checkpoint import check_saveable, load, save
from fat.config import DataConfig, EvaluateConfig, RunConfig, TrainerConfig, parse_run
from fat.data.datamodule import FatDataModule
from fat.data.dataset import ImageLoader
from fat.errors import FatError, first_line
from fat.evaluate import evaluate
from fat.exports import asked_target, export_student
from fat.files import check_writable, write_text
from fat.fit import FitResult, fit
from fat.inputs import Target, finetuned, for_images, make_data, own_classes
from fat.loggers import make_logger, sync_command
from fat.memory import keep_freed_memory
from fat.mixed import choose_bits, mean_bits, size_mb
from fat.models import FloatNetwork, Preprocessing, load_float_network
from fat.module import NO_LABELS
from fat.pipeline import prepare
from fat.report.export import format_export
from fat.report.run import (
    advice,
    format_figures,
    versions,
    write_equalization,
    write_metrics,
    write_thresholds,
)
from fat.report.sensitivity import SensitivityReport, format_bits, read_sensitivity
from fat.spec import QuantSpec
from fat.student import Student

__all__ = ["FinishedRun", "evaluate_run", "open_run", "run"]

logger = logging.getLogger(__name__)

STUDENT, METRICS, CONFIG, THRESHOLDS = (
    "student.safetensors",
    "metrics.json",
    "config.yaml",
    "thresholds.csv",
)
EQUALIZATION, IMAGES = "equalization.csv", "images.csv"


def run(config: RunConfig, directory: Path, group: str | None = None) -> float:
    """Quantize one network, train its thresholds, judge it, and leave the run directory.

    Args:
        config: What conf/ composed.
        directory: The run directory.
        group: Name that the runs of one sweep share in the logger.

    Returns:
        What a sweeper should make small: points of top-1 lost against the float network, or
        100 − agreement where there are no labels.

    Raises:
        FatError: For anything the user can mend.
        KeyboardInterrupt: After Ctrl-C, when the best student so far has been saved.
    """
    spec, recipe, finetuning = config.quant_spec(), config.train_spec(), config.finetune_spec()
    target = asked_target(config.export)
    measured = read_sensitivity(config.quant.mixed) if config.quant.mixed is not None else None
    if measured is not None:
        spec = _with_mixed_bits(spec, measured, config.quant.budget_mb)
    check_writable(directory)
    write_text(directory / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
    _set_up(config.trainer, config.seed)
    device = _device(config.trainer)
    progress = config.trainer.progress
    clock = _Clock()

    with clock("load"):
        loaded = load_float_network(**asdict(config.model), seed=config.seed)
        source = for_images(loaded, config.data)
        _check_measured(measured, source)
        wanted = Target.of(source)
        if finetuning is not None:  # the network will have the data's own classes
            classes = own_classes(config.data)
            wanted = replace(wanted, num_classes=len(classes), classes=classes)
        data = make_data(config.data, wanted, config.seed, device=device, progress=progress)
        data.setup()
        if data.index is not None:
            data.index.save(directory / IMAGES)
        if recipe.label_weight and recipe.epochs and not data.train.source.labelled:
            raise FatError(NO_LABELS)  # known now, rather than after the first epoch

    teacher = None
    if finetuning is not None:
        assert wanted.classes is not None
        with clock("finetune"):
            source, teacher = finetuned(
                source, data, finetuning, wanted.classes,
                seed=config.seed, device=device, progress=progress,
            )  # fmt: skip

    with clock("prepare"):
        examples = data.calibration_dataloader() if spec.equalize.method != "none" else None
        student = prepare(source.network, examples or data.example_batch()[0], spec)
        _check_layers(measured, student)
        student.origin = _origin(source)
        check_saveable(student)
        _say_prepared(student)
        if student.report is not None and student.report.equalize is not None:
            write_equalization(directory / EQUALIZATION, student.report.equalize)
    student = student.to(device)

    with clock("calibrate"):
        images = data.calibration_dataloader().to(device)
        calibrate(student, tqdm(images, "Calibrate", leave=False, disable=not progress))
        shift = None
        if spec.equalize.method != "none":
            shift = float_shift_db(student, data.val_dataloader().to(device))
            logger.info("Equalization moved the float logits to %.1f dB on unseen images.", shift)

    with clock("evaluate"):
        before = evaluate(
            student, data.test_dataloader().to(device), progress=_bar(config, "calibrated")
        )
    metrics: dict[str, Any] = {
        "model": source.name,
        "weights": source.weights,
        "teacher": None if teacher is None else asdict(teacher),
        "data": {"source": config.data.source, "root": config.data.root, **data.summary()},
        "bits": {"weight": mean_bits(student), "activation": spec.for_activations},
        "size_mb": size_mb(student),
        "granularity": spec.granularity,
        "scheme": spec.scheme,
        "init": {"weight": spec.weight_init.name, "activation": spec.activation_init.name},
        "seed": config.seed,
        "versions": versions(),
        "float": before["float"],
        "calibrated": before["quantized"],
        "accuracy_drop": before["accuracy_drop"],
        "equalization": _equalization(student, shift),
        "seconds": clock.seconds,
    }
    # Written now, so that whatever happens while training costs no finished result.
    write_metrics(directory / METRICS, metrics)
    save(student, directory / STUDENT)
    rows = {"float": before["float"], "calibrated": before["quantized"]}
    logger.info("Before training, on %d test images:\n%s", before["images"], format_figures(rows))

    result: FitResult | None = None
    after = before
    log = None
    if recipe.trains:
        log = make_logger(
            run_name=config.name or _run_name(source.name, spec),
            folder=directory,
            config=asdict(config),
            **{**asdict(config.logger), "group": config.logger.group or group},
        )
        with clock("train"):
            result = fit(
                student,
                data.train_dataloader().to(device),
                validation=data.val_dataloader().to(device),
                spec=recipe,
                callbacks=_callbacks(directory, logging_on=log is not None),
                progress=config.trainer.progress,
                seed=config.seed,
                trainer_options={
                    "accelerator": config.trainer.accelerator,
                    "devices": config.trainer.devices,
                    "precision": config.trainer.precision,
                    "logger": log or False,
                    "enable_checkpointing": True,
                },
            )
            student = student.to(device)
            save(student, directory / STUDENT)
            write_thresholds(directory / THRESHOLDS, student)
        if result.interrupted:
            logger.warning(
                "Interrupted after %d steps. The best student so far (step %d) is in %s; judge it "
                "with: python evaluate.py run=%s",
                result.steps, result.best_step, directory / STUDENT, directory,
            )  # fmt: skip
            raise KeyboardInterrupt
        with clock("evaluate"):
            after = evaluate(
                student, data.test_dataloader().to(device), progress=_bar(config, "trained")
            )
        rows["trained"] = after["quantized"]
        metrics["trained"] = after["quantized"]
        metrics["training"] = asdict(result)
    else:
        write_thresholds(directory / THRESHOLDS, student)

    metrics["accuracy_drop"] = after["accuracy_drop"]
    metrics["data"] |= data.summary()
    metrics["seconds"] = clock.seconds
    write_metrics(directory / METRICS, metrics)
    if log is not None:
        log.log_metrics(flatten(metrics), step=result.steps if result else 0)
    _summarise(directory, spec, rows, metrics, result, student, data, device, sync_command(log))
    if target is not None:  # last: a file that fails its test costs no finished result
        with clock("export"):
            report = export_student(
                student, target, directory, data.test_dataloader(), config.export, metrics,
                progress=progress,
            )  # fmt: skip
        metrics["exported"] = {target.name: report}
        metrics["seconds"] = clock.seconds
        write_metrics(directory / METRICS, metrics)
        logger.info("\n%s", format_export(report))
        if log is not None:
            log.log_metrics(flatten({"exported": metrics["exported"]}))
    if log is not None:
        log.finalize("success")
    return _objective(after)


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
        raise FatError("Which run? Type python evaluate.py run=DIR with a directory of train.py.")
    directory = Path(config.run).expanduser()
    if not (directory / STUDENT).is_file():
        raise FatError(
            f"{directory} holds no {STUDENT}: it is not the directory of a run. train.py prints "
            "the directory at the end; by default it lies under outputs/ or multirun/."
        )
    stored = parse_run(yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8")))
    seed = stored.seed if config.seed is None else config.seed
    _set_up(config.trainer, seed)
    student = load(directory / STUDENT)
    if config.checkpoint:
        load_checkpoint(student, Path(config.checkpoint).expanduser())
    data_config = config.data
    if data_config.source == "of_run":
        data_config = stored.data
        data_config.batch_size, data_config.workers = config.data.batch_size, config.data.workers
        data_config.cache = "none"  # that of training images, which may be gone
        if (directory / IMAGES).is_file():
            data_config.index = str(directory / IMAGES)
    data = make_data(data_config, _target_of_run(student.origin), seed)
    device = _device(config.trainer)
    return FinishedRun(directory, stored, student.to(device), data, data_config, device)


def evaluate_run(config: EvaluateConfig) -> dict[str, Any]:
    """Judge a finished run again, from its directory alone.

    Args:
        config: What conf/evaluate.yaml composed.

    Returns:
        What :func:`fat.evaluate` gives.

    Raises:
        FatError: If the directory, its student or a given checkpoint is not what it should be.
    """
    opened = open_run(config)
    bar = "evaluate" if config.trainer.progress else None
    figures = evaluate(opened.student, opened.batches(opened.data.test_dataloader()), progress=bar)
    rows = {"float": figures["float"], "quantized": figures["quantized"]}
    logger.info(
        "%s, %d test images of %s:\n%s",
        opened.directory, figures["images"],
        opened.data_config.root or opened.data_config.source, format_figures(rows),
    )  # fmt: skip
    return figures


def load_checkpoint(student: Student, path: Path) -> None:
    """Put what a Lightning checkpoint of the same run holds into the student.

    Raises:
        FatError: If the file is missing, damaged, or of another network or bit-width.
    """
    if not path.is_file():
        raise FatError(f"There is no checkpoint {path}; a run keeps its own under checkpoints/.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored, state = content["fat"], content["state_dict"]
        # Options that a checkpoint of an earlier version lacks have their defaults.
        stored_spec = QuantSpec.from_dict(stored["spec"]).to_dict()
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise FatError(
            f"{path} is no checkpoint of a FAT run, or it is damaged: {first_line(error)}"
        ) from error
    for what, theirs, ours in (
        ("network", stored["origin"].get("name"), student.origin.get("name")),
        ("quantization", stored_spec, student.spec.to_dict()),
    ):
        if theirs != ours:
            raise FatError(
                f"{path} is of another {what} than the run: {_difference(theirs, ours)}. Give a "
                "checkpoint from the run's own checkpoints/."
            )
    prefix = "student."
    student.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping by dotted name, for loggers.

    Examples:
        >>> flatten({"trained": {"top1": 90.0, "top5": None}, "model": "x"})
        {'trained.top1': 90.0}
    """
    flat: dict[str, float] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


class _Clock:
    """Seconds spent under each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)


def _set_up(trainer: TrainerConfig, seed: int) -> None:
    if trainer.accelerator == "cpu":
        keep_freed_memory()
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def _device(trainer: TrainerConfig) -> torch.device:
    if trainer.accelerator == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FatError(
            f"trainer.accelerator={trainer.accelerator}, but torch finds no GPU here. "
            "Type trainer=cpu."
        )
    return torch.device("cuda")


def _bar(config: RunConfig, name: str) -> str | None:
    return f"Evaluate {name}" if config.trainer.progress else None


def _origin(source: FloatNetwork) -> dict[str, Any]:
    return {
        "name": source.name,
        "weights": source.weights,
        "num_classes": source.num_classes,
        "classes": source.classes,
        "preprocessing": source.preprocessing.to_dict(),
    }


def _target_of_run(origin: Mapping[str, Any]) -> Target:
    classes = origin.get("classes")
    return Target(
        Preprocessing.from_dict(origin["preprocessing"]),
        origin["num_classes"],
        None if classes is None else tuple(classes),
    )


def _run_name(model: str, spec: QuantSpec) -> str:
    return f"{model}-w{_weights(spec)}a{spec.for_activations}-{spec.granularity}"


def _weights(spec: QuantSpec) -> str:
    return "mixed" if spec.layer_bits else str(spec.for_weights)


def _with_mixed_bits(
    spec: QuantSpec, measured: SensitivityReport, budget_mb: float | None
) -> QuantSpec:
    assert budget_mb is not None  # QuantConfig was checked
    chosen = choose_bits(
        measured.rows, budget_mb, first_bits=spec.first_bits, last_bits=spec.last_bits
    )
    logger.info(
        "Bits of weights for %.3f of %g MB; their noise alone is predicted to leave %.1f dB, and "
        "no choice is predicted to leave more than %.1f dB:\n%s",
        chosen.size_mb, budget_mb, chosen.predicted_db, chosen.bound_db, format_bits(chosen.bits),
    )  # fmt: skip
    for option in ("granularity", "weight_init", "equalize"):
        theirs, ours = getattr(measured.spec, option), getattr(spec, option)
        if theirs != ours:
            logger.warning(
                "The sensitivity was measured with %s %s, this run has %s: its prediction may be "
                "off. Measure a run with the same options.", option, theirs, ours,
            )  # fmt: skip
    return replace(spec, layer_bits=chosen.bits)


def _check_measured(measured: SensitivityReport | None, source: FloatNetwork) -> None:
    """Raise a FatError if a sensitivity was measured on another network."""
    if measured is None:
        return
    if measured.model != source.name:
        raise _of_another_network(f"on {measured.model}, and this run is of {source.name}")
    if measured.weights != source.weights:
        logger.warning(
            "The sensitivity was measured with weights from %s, this run has them from %s.",
            measured.weights, source.weights,
        )  # fmt: skip


def _check_layers(measured: SensitivityReport | None, student: Student) -> None:
    """The same for networks of one name, such as one with another number of classes."""
    if measured is None:
        return
    theirs = {row.layer: row.parameters for row in measured.rows if row.kind == "weight"}
    ours = {layer.layer: layer.weight.numel() for layer in student.layers()}
    for name in theirs | ours:
        if theirs.get(name) != ours.get(name):
            raise _of_another_network(
                f"where '{name}' has {theirs.get(name, 0)} weights, and here it has "
                f"{ours.get(name, 0)}"
            )


def _of_another_network(difference: str) -> FatError:
    return FatError(
        f"The sensitivity of quant.mixed was measured {difference}. Measure a run of this network: "
        "python evaluate.py run=DIR analysis=sensitivity."
    )


def _callbacks(directory: Path, *, logging_on: bool) -> list[Callback]:
    checkpoint = ModelCheckpoint(
        dirpath=directory / "checkpoints",
        filename="step={step}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        save_top_k=1,
        save_last=True,
    )
    return [checkpoint, *([AlphaHistory()] if logging_on else [])]


def _say_prepared(student: Student) -> None:
    report = student.report
    assert report is not None
    logger.info(
        "Folded %d batch norms (logits equal to %.0f dB); %d layers and %d activations quantized.",
        len(report.fold.pairs), report.fold_sqnr_db, len(report.insert.layers),
        len(report.insert.activations),
    )  # fmt: skip
    logger.debug("Folded: %s", "; ".join(f"{norm} -> {layer}" for norm, layer in report.fold.pairs))
    logger.debug("Quantized activations: %s", ", ".join(report.insert.activations))
    if report.equalize is not None:
        logger.info(
            "Equalized %d pairs of layers, %.0f %% of the channels locked: spread of filters %s",
            len(report.equalize.pairs), 100 * report.equalize.locked_share,
            "; ".join(
                f"{pair.first} {pair.first_before:.0f} -> {pair.first_after:.0f}"
                for pair in report.equalize.pairs
            ),
        )  # fmt: skip


def _equalization(student: Student, shift: float | None) -> dict[str, Any] | None:
    report = student.report
    if report is None or report.equalize is None:
        return None
    return {
        "method": student.spec.equalize.method,
        "pairs": len(report.equalize.pairs),
        "locked_share": report.equalize.locked_share,
        "float_shift_db": shift,
    }


def _summarise(
    directory: Path,
    spec: QuantSpec,
    rows: Mapping[str, Mapping[str, float | None]],
    metrics: Mapping[str, Any],
    result: FitResult | None,
    student: Student,
    data: FatDataModule,
    device: torch.device,
    sync: str | None,
) -> None:
    lines = [
        f"{metrics['model']} ({metrics['weights']}), W{_weights(spec)}A{spec.for_activations} "
        f"{spec.granularity} {spec.scheme}:",
        format_figures(rows),
    ]
    size = metrics["size_mb"]
    lines.append(
        f"Weights and biases: {size['float']:.3f} MB -> {size['quantized']:.3f} MB, "
        f"{metrics['bits']['weight']:.4g} bits per weight."
    )
    if metrics["accuracy_drop"] is not None:
        lines.append(f"Accuracy drop: {metrics['accuracy_drop']:.2f} points of top-1.")
    if result is not None:
        lines.append(
            f"Reconstruction {result.reconstruction}; bias correction {result.bias_correction}; "
            f"{result.steps} steps, kept the student of step {result.best_step}: validation loss "
            f"{result.calibrated_loss:.4f} -> {result.best_loss:.4f}."
        )
    collapsed = advice(spec, rows["calibrated"], result, [])
    if collapsed is not None:
        batch = next(iter(data.val_dataloader().to(device)))
        lines.append(advice(spec, rows["calibrated"], result, layer_errors(student, [batch])) or "")
    seconds = metrics["seconds"]
    lines.append("Seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    lines.append(f"Run directory: {directory}")
    if sync:
        lines.append(f"Logged offline; upload with: {sync}")
    logger.info("\n%s", "\n".join(lines))


def _objective(figures: Mapping[str, Any]) -> float:
    drop = figures["accuracy_drop"]
    return float(drop if drop is not None else 100.0 - figures["quantized"]["agreement"])


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in ours:
            if theirs.get(key) != ours[key]:
                return f"{key} is {theirs.get(key)}, the run's is {ours[key]}"
    return f"{theirs}, the run's is {ours}"
