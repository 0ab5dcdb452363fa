"""One run as a flat list: built from a config, everything left in a directory."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import environments
from pytorch_lightning.strategies import DDPStrategy
from tqdm.auto import tqdm

from fat.data.datamodule import FatDataModule
from fat.evaluation.bit_allocation import choose_bits, mean_bits, size_mb
from fat.evaluation.details import LAYERS, write_details
from fat.evaluation.evaluator import Disagreements, accuracy_drop, evaluate
from fat.evaluation.layer_analysis import float_shift_db, layer_errors
from fat.evaluation.sensitivity_file import SensitivityReport, format_bits, read_sensitivity
from fat.experiment.build import (
    InputSpec,
    asked_target,
    export_student,
    finetuned,
    for_images,
    make_data,
    own_classes,
)
from fat.experiment.config import RunConfig, TrainerConfig
from fat.experiment.run_directory import (
    CHECKPOINTS,
    EQUALIZATION,
    HISTORY,
    IMAGES,
    METRICS,
    STUDENT,
    THRESHOLDS,
    accelerator_of,
    begin,
    device_of,
    objective,
    set_up,
    stored_config,
)
from fat.experiment.run_files import (
    advice,
    versions,
    write_equalization,
    write_metrics,
    write_thresholds,
)
from fat.models.calibration import calibrate
from fat.models.float_model import FloatNetwork, load_float_network
from fat.models.logits_cache import TeacherLogitsCache
from fat.models.preparation import prepare
from fat.models.serialization import check_saveable, save
from fat.models.student import Student
from fat.quant.config import QuantSpec
from fat.report.hub.upload import check_before, push_to_hub
from fat.report.plots import run_figures
from fat.report.run_page import HTML, write_run
from fat.report.text import format_export, format_metrics
from fat.training.callbacks import AlphaHistory, CSVHistory
from fat.training.fitting import FitResult, fit
from fat.training.loggers import finish, log_results, make_logger, sync_command
from fat.training.module import NO_LABELS
from fat.training.resume import clear_starts
from fat.utils import distributed
from fat.utils.errors import FatError

__all__ = ["run"]

logger = logging.getLogger(__name__)

LOG = "train.log"
DETAILED = 16
"""So many validation images are what the run's page shows of the layers."""


def run(
    config: RunConfig,
    directory: Path,
    *,
    command: str | None = None,
    sweep: str | None = None,
    shared: Path | None = None,
    resume: bool = False,
) -> float:
    """Quantize one network, train its thresholds, judge it, and leave the run directory.

    Args:
        config: What conf/ composed. With more than one device, one process is started for each,
            unless torchrun has done so.
        directory: The run directory.
        command: What gives this run again, for reports.
        sweep: What the sweep that it belongs to is called.
        shared: Folder where the runs of a sweep leave what they have in common.
        resume: Go on with the run that the directory holds, if it holds one.

    Returns:
        What a sweeper should make small: points of top-1 lost against the float network, or
        100 − agreement where there are no labels.

    Raises:
        FatError: For anything the user can mend.
        KeyboardInterrupt: After Ctrl-C, when the best student so far has been saved.
    """
    trainer = config.trainer
    arguments = (config, directory, command, sweep, shared, resume)
    accelerator = accelerator_of(trainer)
    if distributed.started_outside():
        distributed.check_devices(trainer.devices)
        distributed.join(accelerator)
        if not distributed.is_main_process():
            logging.getLogger().setLevel(logging.ERROR)
        # Each process was given one of its own, named after the time.
        directory = Path(distributed.broadcast_object(str(directory)))
        arguments = (config, directory, command, sweep, shared, resume)
    elif trainer.devices > 1:
        value: float = distributed.launch(_run_as_one_of, arguments, trainer.devices, accelerator)
        return value
    return _run(*arguments)


def _run_as_one_of(config: RunConfig, directory: Path, *others: Any) -> float:
    """A run in one of the processes that :func:`run` started, where nobody set up logging."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if distributed.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(directory / LOG)]
    level = logging.INFO if distributed.rank() == 0 else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level, handlers=handlers, force=True)
    return _run(config, directory, *others)


def _run(
    config: RunConfig,
    directory: Path,
    command: str | None,
    sweep: str | None,
    shared: Path | None,
    resume: bool,
) -> float:
    writes = distributed.is_main_process()
    with distributed.main_process_first():
        earlier = begin(directory, config, resume=resume or not writes)
    spec, recipe, finetuning = config.quant, config.optim, config.finetuning
    target = asked_target(config.export)
    if config.hub is not None:
        check_before(config.hub)
    measured = read_sensitivity(config.mixed) if config.mixed is not None else None
    if measured is not None:
        spec = _with_mixed_bits(spec, measured, config.budget_mb)
    set_up(config.trainer, config.seed)
    device = device_of(config.trainer)
    if earlier is not None and earlier["status"] == "finished":
        logger.info("%s is finished already.", directory)
        return objective(earlier)
    progress = config.trainer.progress and writes
    clock = _Clock({} if earlier is None else earlier["seconds"])

    with clock("load"), distributed.main_process_first():
        loaded = load_float_network(**asdict(config.model), seed=config.seed)
        source = for_images(loaded, config.data)
        _check_measured(measured, source)
        wanted = InputSpec.of(source)
        if finetuning is not None:  # the network will have the data's own classes
            classes = own_classes(config.data)
            wanted = replace(wanted, num_classes=len(classes), classes=classes)
        images = config.data
        if resume and images.index is None and (directory / IMAGES).is_file():
            images = replace(images, index=str(directory / IMAGES))  # whatever came since
        data = make_data(images, wanted, config.seed, device=device, progress=progress)
        data.setup()
        if data.index is not None and writes:
            data.index.save(directory / IMAGES)
        if recipe.label_weight and recipe.epochs and not data.train.source.labelled:
            raise FatError(NO_LABELS)  # known now, rather than after the first epoch

    teacher = None
    if finetuning is not None:
        assert wanted.classes is not None
        with clock("finetune"), distributed.main_process_first():  # the others find it in the cache
            source, teacher = finetuned(
                source,
                data,
                finetuning,
                wanted.classes,
                seed=config.seed,
                device=device,
                progress=progress,
            )

    with clock("prepare"), distributed.local_only():
        examples = data.calibration_dataloader() if spec.equalize.method != "none" else None
        student = prepare(source.network, examples or data.example_batch()[0], spec)
        _check_layers(measured, student)
        student.origin = _origin(source)
        check_saveable(student)
        _say_prepared(student)
        if student.report is not None and student.report.equalize is not None and writes:
            write_equalization(directory / EQUALIZATION, student.report.equalize)
    student = student.to(device)
    student.teacher_cache = TeacherLogitsCache(student.teacher, shared and shared / "logits.sqlite")

    with clock("calibrate"):
        batches = data.calibration_dataloader().to(device)
        calibrate(student, tqdm(batches, "Calibrate", leave=False, disable=not progress))
        shift = None
        if spec.equalize.method != "none":
            shift = float_shift_db(student, data.val_dataloader().to(device))
            logger.info("Equalization moved the float logits to %.1f dB on unseen images.", shift)

    differing = Disagreements()
    if earlier is None:
        with clock("evaluate"):
            before = evaluate(
                student,
                data.test_dataloader().to(device),
                progress=_bar(progress, "calibrated"),
                differing=differing,
            )
    else:
        before = _before(earlier)
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
        "command": command,
        "sweep": sweep,
        "status": "calibrated",
        "float": before["float"],
        "calibrated": before["quantized"],
        "trained": None,
        "accuracy_drop": before["accuracy_drop"],
        "equalization": _equalization(student, shift),
        "seconds": clock.seconds,
    }
    rows = {"float": before["float"], "calibrated": before["quantized"]}
    if earlier is None:
        if writes:  # now, so that whatever happens while training costs no finished result
            write_metrics(directory / METRICS, metrics)
            save(student, directory / STUDENT)
        logger.info(
            "Before training, on %d test images:\n%s", before["images"], format_metrics(rows)
        )

    result: FitResult | None = None
    after = before
    log = None
    if recipe.trains:
        log = (
            make_logger(
                run_name=config.name or _run_name(source.name, spec),
                folder=directory,
                config=stored_config(config),
                **{**asdict(config.logger), "group": config.logger.group or sweep},
            )
            if writes
            else None
        )
        with clock("train"):
            result = fit(
                student,
                data.train_dataloader().to(device),
                validation=data.val_dataloader().to(device),
                spec=recipe,
                callbacks=[
                    CSVHistory(directory / HISTORY),
                    *([AlphaHistory()] if log is not None else []),
                ],
                progress=progress,
                seed=config.seed,
                trainer_options={**_devices(config.trainer), "logger": log or False},
                checkpoints=directory / CHECKPOINTS,
                checkpoint_every=config.trainer.checkpoint_every,
                resume=resume,
            )
            student = student.to(device)
            if writes:
                save(student, directory / STUDENT)
                write_thresholds(directory / THRESHOLDS, student)
        if result.interrupted:
            logger.warning(
                "Interrupted after %d steps. The best student so far (step %d) is in %s; judge it "
                "with: python evaluate.py run=%s\nGo on with: python train.py resume=%s",
                result.steps,
                result.best_step,
                directory / STUDENT,
                directory,
                directory,
            )
            raise KeyboardInterrupt
        differing = Disagreements()
        with clock("evaluate"):
            after = evaluate(
                student,
                data.test_dataloader().to(device),
                progress=_bar(progress, "trained"),
                differing=differing,
            )
        rows["trained"] = after["quantized"]
        metrics["trained"] = after["quantized"]
        metrics["training"] = asdict(result)
    elif writes:
        write_thresholds(directory / THRESHOLDS, student)
    metrics["accuracy_drop"] = after["accuracy_drop"]
    data.share_skipped()
    seen, together = differing.gather(), distributed.size()
    if not writes:
        return objective(metrics)

    with distributed.local_only():  # the rest needs one process
        metrics["data"] |= data.summary()
        metrics["status"] = "finished" if target is None else "trained"
        with clock("report"):
            shown = [part.to(device) for part in data.example_batch(DETAILED, "validation")]
            # Of several processes the first knows its own images' names only.
            names = data.test.readable_names() if together == 1 else None
            write_details(directory, student, shown, seen, names=names)
        metrics["seconds"] = clock.seconds
        _keep(directory, metrics)
        _summarise(directory, spec, rows, metrics, result, student, data, device, sync_command(log))
        files: list[Path] = []
        if target is not None:  # last: a file that fails its test costs no finished result
            with clock("export"):
                report = export_student(
                    student,
                    target,
                    directory,
                    data.test_dataloader(),
                    config.export,
                    metrics,
                    progress=progress,
                )
            files.append(directory / report["file"])
            metrics["exported"] = {target.name: report}
            metrics["status"] = "finished"
            metrics["seconds"] = clock.seconds
            _keep(directory, metrics)
            logger.info("\n%s", format_export(report))
        if log is not None:
            log_results(
                log,
                metrics,
                result.steps if result else 0,
                table=directory / LAYERS,
                figures=run_figures(directory),
                files=files,
            )
            finish(log)
        clear_starts(directory / CHECKPOINTS)
        if config.hub is not None:
            logger.info("On the hub: %s", push_to_hub(directory, config.hub))
    return objective(metrics)


def _keep(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Write what is known of a run, for programs and for people."""
    write_metrics(directory / METRICS, metrics)
    write_run(directory)


class _Clock:
    """Seconds spent under each name, on top of those that an interrupted run had spent."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)


def _bar(progress: bool, name: str) -> str | None:
    return f"Evaluate {name}" if progress else None


def _devices(trainer: TrainerConfig) -> dict[str, Any]:
    """Arguments of Lightning's trainer."""
    options: dict[str, Any] = {
        "accelerator": accelerator_of(trainer),
        "devices": trainer.devices,
        "precision": trainer.precision,
    }
    if distributed.size() > 1:
        options |= {
            "num_nodes": distributed.size() // trainer.devices,
            # No tensor but the trained ones changes, and the teacher's need not be sent each step;
            # processes may also have different numbers of validation batches.
            "strategy": DDPStrategy(
                cluster_environment=environments.TorchElasticEnvironment(),  # type: ignore[attr-defined]
                forward_sync_buffers=False,
            ),
            "use_distributed_sampler": False,  # the loaders see to it themselves
        }
    return options


def _before(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`fat.evaluation.evaluator` had given before the training of a run that goes on."""
    top1 = earlier["float"]["top1"], earlier["calibrated"]["top1"]
    return {
        "float": earlier["float"],
        "quantized": earlier["calibrated"],
        "accuracy_drop": accuracy_drop(*top1),
    }


def _origin(source: FloatNetwork) -> dict[str, Any]:
    return {
        "name": source.name,
        "weights": source.weights,
        "num_classes": source.num_classes,
        "classes": source.classes,
        "preprocessing": source.preprocessing.to_dict(),
    }


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
        chosen.size_mb,
        budget_mb,
        chosen.predicted_db,
        chosen.bound_db,
        format_bits(chosen.bits),
    )
    for option in ("granularity", "weight_init", "equalize"):
        theirs, ours = getattr(measured.spec, option), getattr(spec, option)
        if theirs != ours:
            logger.warning(
                "The sensitivity was measured with %s %s, this run has %s: its prediction may be "
                "off. Measure a run with the same options.",
                option,
                theirs,
                ours,
            )
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
            measured.weights,
            source.weights,
        )


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


def _say_prepared(student: Student) -> None:
    report = student.report
    assert report is not None
    logger.info(
        "Folded %d batch norms (logits equal to %.0f dB); %d layers and %d activations quantized.",
        len(report.fold.pairs),
        report.fold_sqnr_db,
        len(report.insert.layers),
        len(report.insert.activations),
    )
    logger.debug("Folded: %s", "; ".join(f"{norm} -> {layer}" for norm, layer in report.fold.pairs))
    logger.debug("Quantized activations: %s", ", ".join(report.insert.activations))
    if report.equalize is not None:
        logger.info(
            "Equalized %d pairs of layers, %.0f %% of the channels locked: spread of filters %s",
            len(report.equalize.pairs),
            100 * report.equalize.locked_share,
            "; ".join(
                f"{pair.first} {pair.first_before:.0f} -> {pair.first_after:.0f}"
                for pair in report.equalize.pairs
            ),
        )


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
        format_metrics(rows),
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
            f"{result.calibrated_loss:.4g} -> {result.best_loss:.4g}."
        )
    collapsed = advice(spec, rows["calibrated"], result, [])
    if collapsed is not None:
        batch = next(iter(data.val_dataloader().to(device)))
        lines.append(advice(spec, rows["calibrated"], result, layer_errors(student, [batch])) or "")
    seconds = metrics["seconds"]
    lines.append("Seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    lines.append(f"Run directory: {directory}")
    lines.append(f"Report: {directory / HTML}")
    if sync:
        lines.append(f"Logged offline; upload with: {sync}")
    logger.info("\n%s", "\n".join(lines))
