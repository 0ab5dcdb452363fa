"""Train a student's thresholds."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import RandomSampler

from fat.evaluation.metrics import BEFORE_UPDATE
from fat.models.self_test import self_test
from fat.models.student import Student
from fat.training.bias_correction import correct_biases
from fat.training.block_reconstruction import reconstruct
from fat.training.callbacks import BestStudent, NanGuard, PeriodicCheckpoint, ProgressBar
from fat.training.config import CompileMode, TrainSpec
from fat.training.module import DistillModule
from fat.training.resumable_loader import ResumableLoader, whole
from fat.training.resume import LAST, RECONSTRUCTION, START, TrainingState
from fat.training.trainer import (
    UNUSED_GPU,
    ignore_warnings,
    keep_interrupt_handler,
    trainer_options_with_defaults,
)
from fat.utils import distributed
from fat.utils.batches import AnyBatch, Images, counted, to_device
from fat.utils.errors import FatError
from fat.utils.precision import full_precision
from fat.utils.random import random_states, set_random_states

__all__ = ["FitResult", "fit"]

logger = logging.getLogger(__name__)

EVERY = 10
"""Without validation images, every tenth batch is set aside to select the best student."""

LOG_EVERY = 20
"""Steps between logged values on other devices than the CPU, where reading them waits."""

EXPECTED = (
    # The student has no layers that depend on the mode.
    ".*in eval mode at the start of training.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    # A training that was interrupted at its very end has nothing left to validate.
    ".*could not find the monitored key.*",
    # A process may have no validation batch.
    BEFORE_UPDATE,
    # Logged values are already reduced over processes.
    ".*sync_dist=True.*",
    # History has every step, and loggers every LOG_EVERY-th over all epochs.
    ".*smaller than the logging interval.*",
    # About Lightning's own code.
    ".*LeafSpec.*",
)
"""Warnings about intended behavior."""


@dataclass(frozen=True)
class FitResult:
    """Result of a training.

    Attributes:
        steps: Number of optimizer steps.
        calibrated_loss: Validation loss before training.
        best_loss: Validation loss of the returned student.
        best_step: Step after which the returned student was seen; 0 if training did not help.
        bias_correction: ``kept``, ``undone`` (it increased the validation loss), or ``off``.
        reconstruction: The same for block-wise reconstruction.
        restored: Number of steps that gave NaN or infinity and were undone.
        interrupted: Whether the user interrupted it.
    """

    steps: int
    calibrated_loss: float
    best_loss: float
    best_step: int
    bias_correction: str
    reconstruction: str
    restored: int
    interrupted: bool


def fit(
    student: Student,
    images: Images,
    *,
    validation: Images | None = None,
    spec: TrainSpec | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    seed: int = 0,
    trainer_options: dict[str, Any] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    compile: CompileMode = "none",
    **overrides: Any,
) -> FitResult:
    """Train a student to reproduce the logits of its float teacher, in place.

    The student with the smallest validation loss is kept. Training runs on the student's device,
    to which batches are moved.

    Args:
        student: Calibrated student.
        images: Training batches, with or without labels: a list, a DataLoader, or any iterable that
            starts anew for each epoch. Labels are used if ``label_weight`` is above 0. With several
            processes, each passes its part of every batch.
        validation: Batches to select the best student. If ``None``, every tenth training batch is
            set aside (the training batch itself if there is only one). With several processes,
            each passes some of the batches, or none.
        spec: Training options.
        callbacks: Additional Lightning callbacks.
        progress: Show a progress bar.
        seed: Seed of the global random states, which user-defined data may draw from.
        trainer_options: Additional arguments of :class:`pytorch_lightning.Trainer`, such as
            ``logger``. If they name another device, training runs there, and the student returns to
            its own afterwards.
        checkpoints: Folder for the training state, to resume after a crash, and for the best
            student so far (``step=….ckpt``). ``None`` saves nothing.
        checkpoint_every: Seconds between checkpoints; each validation saves one, too.
        resume: Resume from the last checkpoint in ``checkpoints``. With the same student, images
            and options, the result is that of an uninterrupted training.
        compile: On GPUs, mode of :func:`torch.compile` for the student's forward and backward
            pass: ``default``, ``reduce-overhead`` (with CUDA graphs), or ``none``. The first step
            then takes minutes.
        **overrides: Fields of :class:`fat.TrainSpec` to replace, such as ``epochs=3``.

    Returns:
        A summary of the training. The student is in eval mode, and its validation loss is at most
        that of the calibrated student.

    Raises:
        KeyboardInterrupt: If the user interrupted it before the calibrated student was evaluated.
        FatError: If the student is not calibrated or has nothing to train, its device fails the
            self-test (:func:`fat.models.self_test.self_test`), the images cannot be iterated twice,
            the validation loss is not finite, training keeps giving NaN, or ``checkpoints`` holds a
            training with other options.

    Examples:
        >>> import torch, fat
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        >>> batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
        >>> student = fat.prepare(net.eval(), batches)
        >>> fat.calibrate(student, batches)
        >>> result = fat.fit(student, batches, epochs=2, progress=False)
        >>> result.steps, result.best_loss <= result.calibrated_loss
        (6, True)
    """
    spec = replace(spec or TrainSpec(), **overrides)
    student.check_calibrated()
    self_test(student)
    train, validation = _split(images, validation)
    best, guard, started = BestStudent(), NanGuard(spec.nan_patience), TrainingStarted()
    state = TrainingState(checkpoints, student, spec)
    if not resume:
        with distributed.main_process_first():
            state.clear()
    device = student.device
    options = trainer_options_with_defaults(
        trainer_options,
        device,
        max_epochs=spec.epochs,
        enable_checkpointing=state.folder is not None,
        log_every_n_steps=1 if device.type == "cpu" else LOG_EVERY,
        val_check_interval=1.0 / spec.validations if spec.validations > 1 else None,
        gradient_clip_val=spec.gradient_clip,
        enable_progress_bar=progress,
    )
    watchers: list[Callback] = [started, best, guard, *callbacks]
    if options["enable_progress_bar"]:
        watchers.append(ProgressBar())
    if state.folder is not None:  # last, to save the state that the other callbacks left
        watchers.append(_best_checkpoint(state.folder))
        watchers.append(PeriodicCheckpoint(state.folder / LAST, checkpoint_every, guard.check))
    pl.seed_everything(seed, verbose=False)
    with ignore_warnings(UNUSED_GPU):
        trainer = pl.Trainer(callbacks=watchers, **options)
    root = trainer.strategy.root_device
    module = DistillModule(student, spec, compile="none" if root.type == "cpu" else compile)
    if root != device:
        logger.info("Training on %s (trainer_options); the student returns to %s.", root, device)
    attempts = _Attempts(student, validation, module, trainer, best, device)
    interrupted = False
    student.eval()
    try:
        # Mixed precision is switched on inside.
        with keep_interrupt_handler(), ignore_warnings(*EXPECTED), full_precision(root):
            start = state.load(START)
            if start is None:
                bar = bool(options["enable_progress_bar"])
                _improve_start(attempts, state, train, spec, seed=seed, progress=bar)
            else:
                module.select(to_device(next(iter(validation)), device)[0])
                _load_start(attempts, state, start)
            if spec.epochs:
                last = state.path(LAST)
                if last is not None:
                    state.check(last)
                    logger.info("Resuming from %s.", last)
                try:
                    trainer.fit(module, train, validation, ckpt_path=last, weights_only=True)
                except Exception as error:
                    # Until the first step, Lightning only restores the state.
                    if last is None or started.on or isinstance(error, FatError):
                        raise
                    raise state.damaged(last, error) from error
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
    finally:
        module.end_validation()
        module.to(device)  # Lightning leaves it on the CPU
        best.restore(module)
        student.eval()
    if best.calibrated_loss is None:  # interrupted before the first validation
        raise KeyboardInterrupt
    return FitResult(
        steps=trainer.global_step,
        calibrated_loss=best.calibrated_loss,
        best_loss=best.best_loss,
        best_step=best.best_step,
        bias_correction=attempts.results["correction"],
        reconstruction=attempts.results["reconstruction"],
        restored=guard.restored,
        interrupted=interrupted or trainer.interrupted,
    )


class TrainingStarted(Callback):
    """Records that the state is restored and the first step begins."""

    on = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on = True


def _best_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder,
        filename="step={step}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        save_top_k=1,
    )


@dataclass
class _Attempts:
    """Changes to the student that are kept only if they lower the validation loss.

    Args:
        student: The student, on its device.
        validation: Batches to validate on.
        module: The student's module.
        trainer: Trainer that validates.
        best: The best student so far.
        device: Device of the student.

    Attributes:
        results: ``kept``, ``undone`` or ``off`` for each change.
    """

    student: Student
    validation: Iterable[AnyBatch]
    module: DistillModule
    trainer: pl.Trainer
    best: BestStudent
    device: torch.device

    def __post_init__(self) -> None:
        self.results = {"reconstruction": "off", "correction": "off"}

    def validate(self) -> None:
        try:
            self.trainer.validate(self.module, self.validation, verbose=False)
        finally:
            self.module.to(self.device)  # Lightning leaves it on the CPU

    def __call__(
        self, key: str, title: str, change: Callable[[], object], *, together: bool = False
    ) -> None:
        """Try a change, in all processes together or in the main process alone."""
        before = self.best.best_loss
        if together:
            change()
        elif distributed.rank() == 0:
            with distributed.local_only():
                change()
        if distributed.size() > 1:
            shared = distributed.broadcast_state(self.student.trained_state())
            self.student.load_trained_state(shared)
        self.validate()
        if self.best.best_loss < before:
            logger.info("%s: validation loss %.4g -> %.4g.", title, before, self.best.best_loss)
            self.results[key] = "kept"
            return
        self.best.restore(self.module)
        logger.info("%s did not lower the validation loss (%.4g); undone.", title, before)
        self.results[key] = "undone"


def _improve_start(
    attempts: _Attempts,
    state: TrainingState,
    train: Iterable[AnyBatch],
    spec: TrainSpec,
    *,
    seed: int,
    progress: bool,
) -> None:
    """Evaluate the calibrated student, try reconstruction and bias correction, save the result."""
    student, best = attempts.student, attempts.best
    attempts.validate()
    if best.calibrated_loss is None or not math.isfinite(best.calibrated_loss):
        raise FatError(
            f"The loss on the validation images is {best.calibrated_loss} before training: check "
            "them, and the float network's logits on them, for NaN and infinity."
        )
    if spec.reconstruction.steps:

        def reconstruct_blocks() -> None:
            reconstruct(
                student,
                train,
                attempts.validation,
                spec,
                seed=seed,
                progress=progress,
                done=state.load(RECONSTRUCTION),
                keep=lambda content: state.save(RECONSTRUCTION, content),
            )

        attempts("reconstruction", "Block-wise reconstruction", reconstruct_blocks, together=True)
    if spec.bias_correction:
        attempts("correction", "Bias correction", lambda: correct_biases(student, train))
    state.save(
        START,
        {
            "student": student.trained_state(),
            "best": best.state_dict(),
            **attempts.results,
            "random": random_states(),
        },
    )


def _load_start(attempts: _Attempts, state: TrainingState, start: dict[str, Any]) -> None:
    """Load the content that :func:`_improve_start` saved."""
    try:
        attempts.student.load_trained_state(start["student"])
        attempts.best.load_state_dict(start["best"])
        attempts.results = {key: str(start[key]) for key in attempts.results}
        set_random_states(start["random"])
    except Exception as error:  # a damaged file may lead to any type
        assert state.folder is not None
        raise state.damaged(state.folder / START, error) from error


def _split(images: Images, validation: Images | None) -> tuple[ResumableLoader, ResumableLoader]:
    if validation is not None:
        return whole("training", images), whole("validation", validation, elsewhere=True)
    batches, count = counted("training", images)
    if count > 1 and isinstance(getattr(images, "sampler", None), RandomSampler):
        logger.warning(
            "The training loader shuffles, so the batches set aside to select the best student "
            "differ between epochs. Pass validation=... to select on held-out images."
        )
    every = min(EVERY, count) if count > 1 else 2  # 2: both parts have the only batch
    train = ResumableLoader(batches, count, every, chosen=False)
    return train, ResumableLoader(batches, count, every, chosen=count > 1)
