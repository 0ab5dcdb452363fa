"""Train a student's thresholds, as a library call."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import RandomSampler

from fat.models.student import Student
from fat.training.bias_correction import correct_biases
from fat.training.block_reconstruction import reconstruct
from fat.training.callbacks import BestStudent, NanGuard, PeriodicCheckpoint, ProgressBar
from fat.training.config import TrainSpec
from fat.training.module import DistillModule
from fat.training.resume import LAST, RECONSTRUCTION, START, TrainingState
from fat.utils import distributed
from fat.utils.batches import AnyBatch, Images, counted, split
from fat.utils.errors import FatError
from fat.utils.random import random_states, set_random_states

__all__ = ["FitResult", "fit"]

logger = logging.getLogger(__name__)

EVERY = 10
"""Without validation images every tenth batch is set aside to choose the best student by."""


@dataclass(frozen=True)
class FitResult:
    """What a training did.

    Attributes:
        steps: Optimizer steps.
        calibrated_loss: Validation loss before training.
        best_loss: Validation loss of the student that was kept.
        best_step: Steps after which that student was seen; 0: training did not help.
        bias_correction: ``kept``, ``undone`` (it made things worse on the validation images), or
            ``off``.
        reconstruction: The same for block-wise reconstruction.
        restored: How often a step that gave NaN was undone.
        interrupted: Whether the user stopped it.
    """

    steps: int
    calibrated_loss: float
    best_loss: float
    best_step: int
    bias_correction: str
    reconstruction: str
    restored: int
    interrupted: bool


class _Part:
    """Every n-th batch of an iterable, or all the others, with a length.

    Lightning keeps :meth:`state_dict` in its checkpoints, and a training that goes on in the middle
    of an epoch starts with the batch after it. What is skipped is drawn with the random states of
    then, so that loaders that shuffle by them, as torch's do, go on in the same order.

    Args:
        batches: Iterable anew for each epoch.
        count: How many batches it gives.
        every: n.
        chosen: Whether this part is the n-th ones or the others.
    """

    def __init__(
        self, batches: Iterable[AnyBatch], count: int, every: int, *, chosen: bool
    ) -> None:
        self._batches, self._every, self._chosen = batches, every, chosen
        self._drawn = 0  # of the batches, in this pass
        self._skip = 0
        self._begun: dict[str, Any] | None = None  # random states when this pass began
        # Lightning looks for samplers here to tell them the epoch; without, every epoch is alike.
        self.sampler = getattr(batches, "sampler", None)
        self.batch_sampler = getattr(batches, "batch_sampler", None)
        held = count // every
        self._length = held if chosen else count - held

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[AnyBatch]:
        skip, self._skip = self._skip, 0
        now = random_states()
        if not skip or self._begun is None:
            self._begun = now
        # A loader that knows how need not load what is skipped.
        start_at = getattr(self._batches, "start_at", None)
        if skip and start_at is not None:
            start_at(skip)
        elif skip:
            set_random_states(self._begun)
        numbered: Iterator[tuple[int, AnyBatch]] = enumerate(
            self._batches, skip if start_at is not None else 0
        )
        for index, batch in numbered:
            # The loader's own count, as it leaves out batches in which nothing could be read.
            self._drawn = getattr(self._batches, "drawn", index + 1)
            if index < skip:
                if index == skip - 1:
                    set_random_states(now)
                continue
            if (index % self._every == self._every - 1) == self._chosen:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far this pass has come, and how it began."""
        return {"drawn": self._drawn, "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next pass where the other was left; where it had ended, at the first batch."""
        drawn, self._begun = state["drawn"], state.get("begun")
        held = drawn // self._every
        given = held if self._chosen else drawn - held
        self._skip = 0 if given >= self._length else drawn


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
    **overrides: Any,
) -> FitResult:
    """Distil the float network into the student, in place; the best student seen is what remains.

    Args:
        student: Calibrated student.
        images: Training batches, labelled or not; a list, a DataLoader or anything that can be
            iterated once per epoch. Labels are used with ``label_weight`` above 0 only. Of several
            processes each gives its share of every step.
        validation: Batches to choose the best student by. Without them every tenth training batch
            is set aside (the training batches themselves when there is but one).
        spec: The recipe.
        callbacks: More Lightning callbacks.
        progress: Whether to show a progress bar.
        seed: Seeds whatever draws from global random state in the user's own data.
        trainer_options: More arguments of :class:`pytorch_lightning.Trainer`, such as ``logger``.
        checkpoints: Folder to keep the state of the training in, so that it can go on after a
            crash, and the best student so far (``step=….ckpt``). ``None`` keeps nothing.
        checkpoint_every: Seconds between such states; each validation leaves one too.
        resume: Go on from what ``checkpoints`` holds, at the step that was kept last; with the same
            student, images and options the result is that of a training which never stopped.
        **overrides: Fields of :class:`fat.TrainSpec` to replace, such as ``epochs=3``.

    Returns:
        What was done. The student is in eval mode and never worse on the validation images than it
        came.

    Raises:
        KeyboardInterrupt: If the user stopped it before the calibrated student was judged.
        FatError: If the student is not calibrated, nothing in it can be trained, the images cannot
            be iterated twice, the validation loss is not finite, training keeps giving NaN, or
            ``checkpoints`` holds the state of a training with other options.

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
    train, validation = _split(images, validation)
    keep, guard, going = BestStudent(), NanGuard(spec.nan_patience), TrainingStarted()
    kept = TrainingState(checkpoints, student, spec)
    if not resume:
        with distributed.main_process_first():
            kept.clear()
    options: dict[str, Any] = {
        "max_epochs": spec.epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": kept.folder is not None,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "val_check_interval": 1.0 / spec.validations if spec.validations > 1 else None,
        "gradient_clip_val": spec.gradient_clip,
        "enable_progress_bar": progress,
        **(trainer_options or {}),
    }
    bar = bool(options["enable_progress_bar"])
    watchers: list[Callback] = [going, keep, guard, *callbacks, *([ProgressBar()] if bar else [])]
    if kept.folder is not None:  # last, so that what is kept is what the others left
        watchers += [
            _best_checkpoint(kept.folder),
            PeriodicCheckpoint(kept.folder / LAST, checkpoint_every),
        ]
    pl.seed_everything(seed, verbose=False)
    module = DistillModule(student, spec)
    trainer = pl.Trainer(callbacks=watchers, **options)
    correction, reconstruction, interrupted = "off", "off", False
    on_interrupt = signal.getsignal(signal.SIGINT)
    student.eval()
    try:
        with warnings.catch_warnings():
            # The student is trained in eval mode on purpose: it holds nothing that behaves
            # differently; checkpoints lie beside what was kept before; a training that was cut off
            # at its very end has nothing left to judge; and what is logged was reduced over
            # processes by itself. The last warning is about Lightning's own code.
            for expected in (
                ".*in eval mode at the start of training.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*could not find the monitored key.*",
                ".*sync_dist=True.*",
                ".*LeafSpec.*",
            ):
                warnings.filterwarnings("ignore", expected)
            begun = kept.load(START)
            if begun is None:
                trainer.validate(module, validation, verbose=False)
                if keep.calibrated_loss is None or not math.isfinite(keep.calibrated_loss):
                    raise FatError(
                        f"The loss on the validation images is {keep.calibrated_loss} before "
                        "training: check them, and the float network's logits on them, for NaN and "
                        "infinity."
                    )
                attempt = partial(
                    _attempt, validation=validation, module=module, trainer=trainer, keep=keep
                )
                if spec.reconstruction.steps:
                    reconstruction = attempt(
                        "Block-wise reconstruction",
                        lambda: reconstruct(
                            student,
                            train,
                            validation,
                            spec,
                            seed=seed,
                            progress=bar,
                            done=kept.load(RECONSTRUCTION),
                            keep=partial(kept.save, RECONSTRUCTION),
                        ),
                    )
                if spec.bias_correction:
                    correction = attempt("Bias correction", lambda: correct_biases(student, train))
                kept.save(
                    START,
                    {
                        "student": student.trained_state(),
                        "best": keep.state_dict(),
                        "reconstruction": reconstruction,
                        "correction": correction,
                        "random": random_states(),
                    },
                )
            else:
                module.select(split(next(iter(validation)))[0])
                try:
                    student.load_trained_state(begun["student"])
                    keep.load_state_dict(begun["best"])
                    reconstruction = str(begun["reconstruction"])
                    correction = str(begun["correction"])
                    set_random_states(begun["random"])
                except Exception as error:  # whatever another content of the file leads to
                    assert kept.folder is not None
                    raise kept.damaged(kept.folder / START, error) from error
            if spec.epochs:
                last = kept.path(LAST)
                if last is not None:
                    kept.check(last)
                    logger.info("Going on from %s.", last)
                try:
                    trainer.fit(module, train, validation, ckpt_path=last, weights_only=True)
                except Exception as error:
                    # Until the first step Lightning does nothing but put the state back.
                    if last is None or going.on or isinstance(error, FatError):
                        raise
                    raise kept.damaged(last, error) from error
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
    finally:
        # Lightning leaves Ctrl-C switched off. Only the main thread has a say in signals.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        keep.restore(module)
        student.eval()
    if keep.calibrated_loss is None:  # Ctrl-C came before anything was known
        raise KeyboardInterrupt
    return FitResult(
        steps=trainer.global_step,
        calibrated_loss=keep.calibrated_loss,
        best_loss=keep.best_loss,
        best_step=keep.best_step,
        bias_correction=correction,
        reconstruction=reconstruction,
        restored=guard.restored,
        interrupted=interrupted or trainer.interrupted,
    )


class TrainingStarted(Callback):
    """Notes that a training has all its states and takes its first step."""

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


def _attempt(
    what: str,
    change: Callable[[], object],
    validation: Iterable[AnyBatch],
    module: DistillModule,
    trainer: pl.Trainer,
    keep: BestStudent,
) -> str:
    """Change the student and keep that only if the validation loss fell; say which."""
    before = keep.best_loss
    if distributed.rank() == 0:
        with distributed.local_only():
            change()
    if distributed.size() > 1:
        shared = distributed.broadcast_state(module.student.trained_state())
        module.student.load_trained_state(shared)
    trainer.validate(module, validation, verbose=False)
    if keep.best_loss < before:
        logger.info("%s: validation loss %.4g -> %.4g.", what, before, keep.best_loss)
        return "kept"
    keep.restore(module)
    logger.info("%s did not lower the validation loss (%.4g) and was undone.", what, before)
    return "undone"


def _split(
    images: Images, validation: Images | None
) -> tuple[Iterable[AnyBatch], Iterable[AnyBatch]]:
    batches, count = counted("training", images)
    # Parts also of what is used whole: Lightning takes a list for a list of loaders.
    if validation is not None:
        return _whole(batches, count), _whole(*counted("validation", validation))
    if count == 1:
        return _whole(batches, count), _whole(batches, count)
    if isinstance(getattr(images, "sampler", None), RandomSampler):
        logger.warning(
            "The training loader shuffles, so the batches set aside to choose the best student are "
            "others in each epoch. Give validation=... to choose on images that are held out."
        )
    every = min(EVERY, count)
    return tuple(_Part(batches, count, every, chosen=c) for c in (False, True))  # type: ignore[return-value]


def _whole(batches: Iterable[AnyBatch], count: int) -> _Part:
    return _Part(batches, count, count + 1, chosen=False)
