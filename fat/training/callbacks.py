"""Lightning callbacks: best student, guard against NaN, checkpoints, history, progress bar."""

from __future__ import annotations

import copy
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from fat.models.student import Student
from fat.training.loggers import log_histograms
from fat.training.module import DistillModule
from fat.utils.distributed import all_max
from fat.utils.errors import FatError
from fat.utils.io import put_in_place, write_text

__all__ = [
    "AlphaHistory",
    "BestStudent",
    "CSVHistory",
    "NanGuard",
    "PeriodicCheckpoint",
    "ProgressBar",
]

logger = logging.getLogger(__name__)


class BestStudent(pl.Callback):
    """Keeps the student with the smallest validation loss in memory, and restores it at the end.

    Unlike Lightning's ModelCheckpoint, it needs no folder, covers the calibrated student before the
    first step, and its state is part of the checkpoint to resume from.

    Attributes:
        calibrated_loss: Validation loss before the first step.
        best_loss: Smallest validation loss.
        best_step: Optimizer step after which it was seen; 0 is the calibrated student.
    """

    @property
    def state_key(self) -> str:
        """Key of its state in checkpoints, the name of the class in FAT 0.1."""
        return "KeepBest"

    def __init__(self) -> None:
        self.calibrated_loss: float | None = None
        self.best_loss = float("inf")
        self.best_step = 0
        self._best: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the student if its loss is the smallest so far."""
        loss = float(trainer.callback_metrics["val/loss"])
        if self.calibrated_loss is None:
            self.calibrated_loss = loss
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
            self._best = student_of(pl_module).trained_state()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the best student."""
        self.restore(pl_module)

    def restore(self, pl_module: pl.LightningModule) -> None:
        """Restore the best student so far."""
        if self._best:
            student_of(pl_module).load_trained_state(self._best)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "calibrated_loss": self.calibrated_loss,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best": self._best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.calibrated_loss = state_dict["calibrated_loss"]
        self.best_loss = state_dict["best_loss"]
        self.best_step = state_dict["best_step"]
        self._best = state_dict["best"]


class NanGuard(pl.Callback):
    """Restores the last finite parameters and optimizer state after a step with NaN or infinity.

    Args:
        patience: Number of consecutive such steps after which training fails.
        every: Number of steps between copies of the state; copying Adam's state takes time.

    Attributes:
        restored: Number of restored states.
    """

    def __init__(self, patience: int = 10, every: int = 10) -> None:
        self.patience = patience
        self.every = every
        self.restored = 0
        self._in_a_row = 0
        self._good: tuple[dict[str, Tensor], list[dict[str, Any]]] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the state before the first step."""
        if self._good is None:
            self._remember(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Restore the last finite state if a parameter is not finite."""
        if all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            self._in_a_row = 0
            if trainer.global_step % self.every == 0:
                self._remember(trainer, pl_module)
            return
        assert self._good is not None
        state, optimizers = self._good
        student_of(pl_module).load_trained_state(state)
        for optimizer, saved in zip(trainer.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        self.restored += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            logger.warning(
                "Step %d gave NaN or infinity; restored the last finite state.", trainer.global_step
            )
        if self._in_a_row >= self.patience:
            raise FatError(
                f"{self._in_a_row} steps in a row gave NaN or infinity. The last finite state is "
                "kept. Check the images for extreme values, or try a smaller optim.lr or "
                "optim.gradient_clip=1.0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the copy, which is taken again on resume."""
        return {"restored": self.restored, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.restored, self._in_a_row = state_dict["restored"], state_dict["in_a_row"]

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._good = (student_of(pl_module).trained_state(), optimizers)


class PeriodicCheckpoint(pl.Callback):
    """Saves a checkpoint to resume from, in one file that is replaced atomically.

    It is saved after every validation, on SIGTERM, and in between every few seconds, but never
    before a validation at the same step: resuming there would skip the validation, as it does with
    Lightning's ModelCheckpoint.

    Args:
        path: The file.
        every: Seconds between checkpoints; infinity saves after validations only, for loaders that
            cannot resume in the middle of an epoch.
    """

    def __init__(self, path: Path, every: float) -> None:
        self.path = path
        self.every = every
        self._saved = time.monotonic()
        self._step = -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save if it is due."""
        if math.isinf(self.every):
            return
        mine = time.monotonic() - self._saved >= self.every or trainer.received_sigterm
        due = bool(all_max(torch.tensor(int(mine))))  # processes save together
        last = batch_idx + 1 == trainer.num_training_batches
        # fit() sets a number of batches, not a time.
        assert isinstance(trainer.val_check_batch, int)
        validates = (batch_idx + 1) % trainer.val_check_batch == 0
        if due and not last and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save if SIGTERM came between the end of a batch and Lightning's check for it.

        With several processes, the others might continue and never take part in saving.
        """
        if math.isinf(self.every) or trainer.world_size > 1:
            return
        between = isinstance(exception, SIGTERMException) and trainer.training
        if between and trainer.global_step != self._step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        # All processes take part; Lightning writes on the main process.
        partial = self.path.with_name(f".{self.path.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            put_in_place(partial, self.path)
        self._saved, self._step = time.monotonic(), trainer.global_step


class CSVHistory(pl.Callback):
    """Writes logged values to a CSV file with the columns ``step,name,value``.

    ``train/…`` values belong to the batch of the step, ``val/…`` values to the network after it. A
    training that resumes drops the rows after its checkpoint; Lightning's CSVLogger would delete
    the whole file.

    Args:
        path: The file.
    """

    HEADER = "step,name,value\n"

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Create the file if it does not exist."""
        if trainer.is_global_zero and not self.path.exists():
            write_text(self.path, self.HEADER)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows that an interrupted training wrote after its last checkpoint."""
        if not trainer.is_global_zero:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = [line for line in lines[1:-1] if re.fullmatch(r"\d{1,15},[^,]+,[^,]+", line)]
        if len(whole) < len(lines) - 2:
            logger.warning("%s: skipped %d damaged lines.", self.path, len(lines) - 2 - len(whole))
        before = [f"{x}\n" for x in whole if int(x.partition(",")[0]) <= trainer.global_step]
        write_text(self.path, self.HEADER + "".join(dict.fromkeys(before)))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the values of the step."""
        self._write(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the values of the validation."""
        self._write(trainer, "val/")

    def _write(self, trainer: pl.Trainer, kind: str) -> None:
        if not trainer.is_global_zero:
            return
        rows = [
            f"{trainer.global_step},{name},{float(value):.9g}\n"
            for name, value in trainer.callback_metrics.items()
            if name.startswith(kind)
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(rows))


class ProgressBar(TQDMProgressBar):
    """Progress bar with the loss and the remaining time of the whole training."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._start: tuple[float, int] | None = None

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return training loss, validation loss, and ``left``, the remaining minutes:seconds."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        now, step = time.monotonic(), trainer.global_step
        if self._start is None or step < self._start[1]:
            self._start = (now, step)
        done = step - self._start[1]
        if done > 0 and trainer.training:
            per_step = (now - self._start[0]) / done
            left = max(int(trainer.estimated_stepping_batches) - step, 0) * per_step
            metrics["left"] = f"{int(left) // 60}:{int(left) % 60:02d}"
        return metrics


class AlphaHistory(pl.Callback):
    """Logs the factors α of every quantizer after each validation.

    Mean, minimum and maximum are logged as metrics, and histograms if the logger supports them.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log metrics and histograms."""
        if not trainer.is_global_zero:
            return
        metrics: dict[str, float] = {}
        factors: dict[str, Tensor] = {}
        for layer, kind, quantizer in student_of(pl_module).quantizers():
            for name, values in quantizer.thresholds.factors().items():
                key = f"{name}/{layer}.{kind}"
                factors[key] = values
                metrics[key] = float(values.mean())
                if values.numel() > 1:
                    metrics[f"{key}.min"] = float(values.min())
                    metrics[f"{key}.max"] = float(values.max())
        for metrics_logger in trainer.loggers:
            metrics_logger.log_metrics(metrics, step=trainer.global_step)
            log_histograms(metrics_logger, factors, trainer.global_step)


def student_of(pl_module: pl.LightningModule) -> Student:
    """Return the student that a module trains."""
    assert isinstance(pl_module, DistillModule)
    return pl_module.student
