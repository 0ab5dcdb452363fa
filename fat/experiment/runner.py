"""One run, from a config to a run directory; :func:`_run` lists its steps."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import environments
from pytorch_lightning.strategies import DDPStrategy
from tqdm.auto import tqdm

from fat.data.datamodule import FatDataModule
from fat.evaluation.bit_allocation import mean_bits, size_mb
from fat.evaluation.details import LAYERS, write_details
from fat.evaluation.evaluator import Disagreements, accuracy_drop, evaluate
from fat.evaluation.layer_analysis import float_shift_db, layer_errors
from fat.evaluation.sensitivity_file import SensitivityReport
from fat.experiment.build import (
    InputSpec,
    export_backend,
    export_student,
    finetuned,
    for_images,
    make_data,
    own_classes,
)
from fat.experiment.config import RunConfig, TrainerConfig
from fat.experiment.machine import (
    accelerator_of,
    check_batch_size,
    check_devices,
    describe,
    device_of,
    resolve,
)
from fat.experiment.mixed_bits import check_layers, check_network, mixed_spec
from fat.experiment.run_directory import (
    CHECKPOINTS,
    EQUALIZATION,
    HISTORY,
    IMAGES,
    METRICS,
    STUDENT,
    THRESHOLDS,
    begin,
    objective,
    resumable_config,
    set_up,
    stored_config,
)
from fat.experiment.run_files import (
    advice,
    has_failed,
    summary,
    versions,
    write_equalization,
    write_metrics,
    write_thresholds,
)
from fat.export.base import ExportBackend
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
from fat.training.finetuning import FinetuneResult
from fat.training.fitting import FitResult, fit
from fat.training.loggers import finish, log_results, make_logger, sync_command
from fat.training.module import NO_LABELS
from fat.training.resume import clear_starts
from fat.utils import distributed
from fat.utils.commands import command_line
from fat.utils.errors import FatError

__all__ = ["run"]

logger = logging.getLogger(__name__)

LOG = "train.log"
DETAILED = 16
"""Number of validation images for the layer statistics on the run's page."""


def run(
    config: RunConfig,
    directory: Path,
    *,
    command: str | None = None,
    sweep: str | None = None,
    shared: Path | None = None,
    resume: bool = False,
) -> float:
    """Quantize a network, train its thresholds, evaluate it, and write the run directory.

    Args:
        config: The options. With more than one device, one process is started for each, unless
            torchrun has done so.
        directory: The run directory.
        command: The command that repeats this run, for reports.
        sweep: Name of the sweep that the run belongs to.
        shared: Folder for what the runs of a sweep share.
        resume: Resume the run in the directory, if there is one.

    Returns:
        The value that a sweeper minimizes: points of top-1 accuracy lost against the float
        network, or 100 − agreement if there are no labels.

    Raises:
        FatError: For anything that the user can fix.
        KeyboardInterrupt: After Ctrl-C, when the best student so far has been saved.
    """
    trainer = config.trainer
    accelerator = accelerator_of(trainer)
    if not distributed.started_outside():
        check_devices(trainer)
        check_batch_size(config)
    if distributed.started_outside():
        distributed.check_devices(trainer.devices)
        distributed.join(accelerator)
        if not distributed.is_main_process():
            logging.getLogger().setLevel(logging.ERROR)
        # Each process has been given its own directory, named after the time.
        directory = Path(distributed.broadcast_object(str(directory)))
    arguments = (config, directory, command, sweep, shared, resume)
    if trainer.devices > 1 and not distributed.started_outside():
        value: float = distributed.launch(_run_as_one_of, arguments, trainer.devices, accelerator)
        return value
    return _run(*arguments)


def _run_as_one_of(config: RunConfig, directory: Path, *others: Any) -> float:
    """Run in one of the processes that :func:`run` started, which have no logging set up."""
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
    # The main process decides, as another may not find what it reads.
    resumed = resumable_config(directory, resume=resume)
    config = distributed.broadcast_object(resolve(config, resumed))
    with distributed.main_process_first():
        earlier = begin(directory, config, resume=resume or not writes)
    target = export_backend(config.export)
    if config.hub is not None:
        check_before(config.hub)
    spec, measured = mixed_spec(config)
    set_up(config.trainer, config.seed)
    if earlier is not None and earlier["status"] == "finished":
        logger.info("%s is finished already.", directory)
        return objective(earlier)
    logger.info("Running on %s.", describe(config))

    seconds = {} if earlier is None else earlier["seconds"]
    progress = config.trainer.progress and writes
    job = _Job(config, directory, sweep, resume, writes, progress, _Clock(seconds))
    network, inputs, data = job.load(measured)
    network, teacher = job.finetune(network, inputs, data)
    student = job.prepare(network, data, spec, measured)
    student.teacher_cache = TeacherLogitsCache(student.teacher, shared and shared / "logits.sqlite")
    shift = job.calibrate(student, data)
    before, differing = job.evaluate(student, data, "calibrated", earlier)
    metrics = {
        "model": network.name,
        "weights": network.weights,
        "teacher": None if teacher is None else asdict(teacher),
        "data": {"source": config.data.source, "root": config.data.root, **data.summary()},
        "bits": {"weight": mean_bits(student), "activation": spec.for_activations},
        "size_mb": size_mb(student),
        "granularity": spec.granularity,
        "scheme": spec.scheme,
        "init": {"weight": spec.weight_init.name, "activation": spec.activation_init.name},
        "seed": config.seed,
        "versions": versions(student.device),
        "command": command,
        "sweep": sweep,
        "status": "calibrated",
        "float": before["float"],
        "calibrated": before["quantized"],
        "trained": None,
        "accuracy_drop": before["accuracy_drop"],
        "equalization": _equalization(student, shift),
        "seconds": job.clock.seconds,
    }
    if earlier is None:
        job.save_calibrated(student, metrics, before["images"])

    result, run_logger = None, None
    if config.optim.trains:
        run_logger = job.make_logger(network.name, spec)
        result = job.train(student, data, run_logger)
        after, differing = job.evaluate(student, data, "trained")
        metrics["trained"] = after["quantized"]
        metrics["training"] = asdict(result)
        metrics["accuracy_drop"] = after["accuracy_drop"]
    elif writes:
        write_thresholds(directory / THRESHOLDS, student)

    data.share_skipped()
    seen, processes = differing.gather(), distributed.size()
    if not writes:
        return objective(metrics)
    with distributed.local_only():
        metrics["data"] |= data.summary()
        metrics["status"] = "finished" if target is None else "trained"
        # Of several processes the first knows the names of its own images only.
        names = data.test.readable_names() if processes == 1 else None
        job.report(student, data, metrics, seen, names)
        job.log_summary(student, data, metrics, spec, result, sync_command(run_logger))
        files = []
        if target is not None:  # last: an export that fails loses no finished result
            files.append(job.export(student, data, metrics, target))
        if run_logger is not None:
            log_results(
                run_logger,
                metrics,
                result.steps if result else 0,
                table=directory / LAYERS,
                figures=run_figures(directory),
                files=files,
            )
            finish(run_logger)
        clear_starts(directory / CHECKPOINTS)
        if config.hub is not None:
            logger.info("On the hub: %s", push_to_hub(directory, config.hub))
    return objective(metrics)


class _Clock:
    """Seconds spent under each name, added to those of an interrupted run."""

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


@dataclass(frozen=True)
class _Job:
    """The steps of a run, and what they have in common."""

    config: RunConfig
    directory: Path
    sweep: str | None
    resume: bool
    writes: bool
    progress: bool
    clock: _Clock

    @property
    def device(self) -> torch.device:
        """Device of the student."""
        return device_of(self.config.trainer)

    def load(
        self, measured: SensitivityReport | None
    ) -> tuple[FloatNetwork, InputSpec, FatDataModule]:
        """Load the float network and the images; the spec says what images the network takes."""
        config = self.config
        with self.clock("load"), distributed.main_process_first():
            loaded = load_float_network(**asdict(config.model), seed=config.seed)
            network = for_images(loaded, config.data)
            check_network(measured, network)
            inputs = InputSpec.of(network)
            if config.finetuning is not None:  # the network gets the data's own classes
                classes = own_classes(config.data)
                inputs = replace(inputs, num_classes=len(classes), classes=classes)
            images = config.data
            if self.resume and images.index is None and (self.directory / IMAGES).is_file():
                # The images of the first start, whatever has been added since.
                images = replace(images, index=str(self.directory / IMAGES))
            data = make_data(
                images, inputs, config.seed, device=self.device, progress=self.progress
            )
            data.setup()
            if data.index is not None and self.writes:
                data.index.save(self.directory / IMAGES)
            recipe = config.optim
            if recipe.label_weight and recipe.epochs and not data.train.source.labelled:
                raise FatError(NO_LABELS)  # now rather than after the first epoch
        return network, inputs, data

    def finetune(
        self, network: FloatNetwork, inputs: InputSpec, data: FatDataModule
    ) -> tuple[FloatNetwork, FinetuneResult | None]:
        """Train a new classifier for the data's own classes, if ``teacher=finetune``."""
        if self.config.finetuning is None:
            return network, None
        assert inputs.classes is not None
        # The other processes find it in the cache.
        with self.clock("finetune"), distributed.main_process_first():
            return finetuned(
                network,
                data,
                self.config.finetuning,
                inputs.classes,
                seed=self.config.seed,
                device=self.device,
                progress=self.progress,
            )

    def prepare(
        self,
        network: FloatNetwork,
        data: FatDataModule,
        spec: QuantSpec,
        measured: SensitivityReport | None,
    ) -> Student:
        """Build the student: fold batch norms, equalize layers, insert quantizers."""
        with self.clock("prepare"), distributed.local_only():
            examples = data.calibration_dataloader() if spec.equalize.method != "none" else None
            student = prepare(network.network, examples or data.example_batch()[0], spec)
            check_layers(measured, student)
            student.origin = {
                "name": network.name,
                "weights": network.weights,
                "num_classes": network.num_classes,
                "classes": network.classes,
                "preprocessing": network.preprocessing.to_dict(),
            }
            check_saveable(student)
            _log_prepared(student)
            if student.report is not None and student.report.equalize is not None and self.writes:
                write_equalization(self.directory / EQUALIZATION, student.report.equalize)
        return student.to(self.device)

    def calibrate(self, student: Student, data: FatDataModule) -> float | None:
        """Set the thresholds; return how much equalization moved the float logits, in dB."""
        with self.clock("calibrate"):
            batches = data.calibration_dataloader().to(self.device)
            calibrate(student, tqdm(batches, "Calibrate", leave=False, disable=not self.progress))
            if student.spec.equalize.method == "none":
                return None
            shift = float_shift_db(student, data.val_dataloader().to(self.device))
            logger.info("Equalization moved the float logits to %.1f dB on unseen images.", shift)
            return shift

    def evaluate(
        self,
        student: Student,
        data: FatDataModule,
        stage: str,
        earlier: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], Disagreements]:
        """Evaluate on the test images, unless an interrupted run has done so."""
        differing = Disagreements()
        if earlier is not None:
            top1 = earlier["float"]["top1"], earlier["calibrated"]["top1"]
            drop = accuracy_drop(*top1)
            measured = {"float": earlier["float"], "quantized": earlier["calibrated"]}
            return {**measured, "accuracy_drop": drop}, differing
        with self.clock("evaluate"):
            found = evaluate(
                student,
                data.test_dataloader().to(self.device),
                progress=f"Evaluate {stage}" if self.progress else None,
                differing=differing,
            )
        return found, differing

    def save_calibrated(self, student: Student, metrics: Mapping[str, Any], images: int) -> None:
        """Save the calibrated student before training, which may be interrupted."""
        if self.writes:
            write_metrics(self.directory / METRICS, metrics)
            save(student, self.directory / STUDENT)
        rows = {name: metrics[name] for name in ("float", "calibrated")}
        logger.info("Before training, on %d test images:\n%s", images, format_metrics(rows))

    def make_logger(self, model: str, spec: QuantSpec) -> Logger | None:
        """Create the Lightning logger of the main process."""
        if not self.writes:
            return None
        options = self.config.logger
        bits = "mixed" if spec.layer_bits else spec.for_weights
        name = f"{model}-w{bits}a{spec.for_activations}-{spec.granularity}"
        return make_logger(
            run_name=self.config.name or name,
            folder=self.directory,
            config=stored_config(self.config),
            **{**asdict(options), "group": options.group or self.sweep},
        )

    def train(self, student: Student, data: FatDataModule, run_logger: Logger | None) -> FitResult:
        """Train the thresholds and save the best student."""
        directory, trainer = self.directory, self.config.trainer
        with self.clock("train"):
            result = fit(
                student,
                data.train_dataloader().to(self.device),
                validation=data.val_dataloader().to(self.device),
                spec=self.config.optim,
                callbacks=[
                    CSVHistory(directory / HISTORY),
                    *([AlphaHistory()] if run_logger is not None else []),
                ],
                progress=self.progress,
                seed=self.config.seed,
                trainer_options={**_devices(trainer), "logger": run_logger or False},
                compile=trainer.compile,
                checkpoints=directory / CHECKPOINTS,
                checkpoint_every=trainer.checkpoint_every,
                resume=self.resume,
            )
            if self.writes:
                save(student, directory / STUDENT)
                write_thresholds(directory / THRESHOLDS, student)
        if result.interrupted:
            logger.warning(
                "Interrupted after %d steps. The best student so far (step %d) is in %s; evaluate "
                "it with: %s\nResume with: %s",
                result.steps,
                result.best_step,
                directory / STUDENT,
                command_line("evaluate", f"run={directory}"),
                command_line("train", f"resume={directory}"),
            )
            raise KeyboardInterrupt
        return result

    def report(
        self,
        student: Student,
        data: FatDataModule,
        metrics: Mapping[str, Any],
        seen: Disagreements,
        names: Sequence[str] | None,
    ) -> None:
        """Write the statistics of the layers, metrics.json and the run's page."""
        with self.clock("report"):
            shown = [part.to(self.device) for part in data.example_batch(DETAILED, "validation")]
            write_details(self.directory, student, shown, seen, names=names)
        write_metrics(self.directory / METRICS, metrics)
        write_run(self.directory)

    def log_summary(
        self,
        student: Student,
        data: FatDataModule,
        metrics: Mapping[str, Any],
        spec: QuantSpec,
        result: FitResult | None,
        sync: str | None,
    ) -> None:
        """Log the metrics, what training did, advice, and where everything is."""
        lines = [summary(spec, metrics, result)]
        if has_failed(metrics["calibrated"], result):
            batch = next(iter(data.val_dataloader().to(self.device)))
            errors = layer_errors(student, [batch])
            lines.append(advice(spec, metrics["calibrated"], result, errors) or "")
        seconds = (f"{name} {spent:.1f}" for name, spent in metrics["seconds"].items())
        lines.append("Seconds: " + ", ".join(seconds))
        lines.append(f"Run directory: {self.directory}")
        lines.append(f"Report: {self.directory / HTML}")
        if sync:
            lines.append(f"Logged offline; upload with: {sync}")
        logger.info("\n%s", "\n".join(lines))

    def export(
        self, student: Student, data: FatDataModule, metrics: dict[str, Any], target: ExportBackend
    ) -> Path:
        """Write the exported file, verify it, and finish the metrics."""
        with self.clock("export"):
            report = export_student(
                student,
                target,
                self.directory,
                data.test_dataloader(),
                self.config.export,
                metrics,
                progress=self.progress,
            )
        metrics["exported"] = {target.name: report}
        metrics["status"] = "finished"
        write_metrics(self.directory / METRICS, metrics)
        write_run(self.directory)
        logger.info("\n%s", format_export(report))
        return self.directory / str(report["file"])


def _devices(trainer: TrainerConfig) -> dict[str, Any]:
    """Arguments of Lightning's trainer."""
    options: dict[str, Any] = {"precision": trainer.precision}
    if distributed.size() > 1:
        options |= {
            "accelerator": accelerator_of(trainer),
            "devices": trainer.devices,
            "num_nodes": distributed.size() // trainer.devices,
            # Only trained tensors change: the teacher's need not be sent each step. And processes
            # may have different numbers of validation batches.
            "strategy": DDPStrategy(
                cluster_environment=environments.TorchElasticEnvironment(),  # type: ignore[attr-defined]
                forward_sync_buffers=False,
            ),
            "use_distributed_sampler": False,  # the loaders divide the images themselves
        }
    return options


def _log_prepared(student: Student) -> None:
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
            "Equalized %d pairs of layers, %.0f %% of the channels locked; spread of the filters' "
            "ranges: %s",
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
