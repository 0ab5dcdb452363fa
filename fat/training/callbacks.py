"""What watches a training: the best state, broken states, checkpoints, figures, the time left."""

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
    """Remembers the student with the smallest validation loss, the calibrated one included.

    At the end of the training, also of one that was interrupted, that student is put back.

    Attributes:
        calibrated_loss: Validation loss before the first step.
        best_loss: Smallest validation loss.
        best_step: Optimizer steps after which it was seen; 0 is the calibrated student.
    """

    @property
    def state_key(self) -> str:
        """Key of its state in checkpoints: the class's name in FAT 0.1, so that those resume."""
        return "KeepBest"

    def __init__(self) -> None:
        self.calibrated_loss: float | None = None
        self.best_loss = float("inf")
        self.best_step = 0
        self._best: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the student that was just judged with the best so far."""
        loss = float(trainer.callback_metrics["val/loss"])
        if self.calibrated_loss is None:
            self.calibrated_loss = loss
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
            self._best = student_of(pl_module).trained_state()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best student back."""
        self.restore(pl_module)

    def restore(self, pl_module: pl.LightningModule) -> None:
        """Put the best student seen so far back."""
        if self._best:
            student_of(pl_module).load_trained_state(self._best)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "calibrated_loss": self.calibrated_loss,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "best": self._best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.calibrated_loss = state_dict["calibrated_loss"]
        self.best_loss = state_dict["best_loss"]
        self.best_step = state_dict["best_step"]
        self._best = state_dict["best"]


class NanGuard(pl.Callback):
    """After a step that left NaN or infinity, restores the last good factors and optimizer state.

    Args:
        patience: So many such steps in a row end the training with an error.
        every: Good states are copied every so many steps; a copy of all that Adam keeps costs time.

    Attributes:
        restored: How often a state was restored.
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
        """Take a copy before the first step."""
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
        """Keep what is finite, undo what is not."""
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
                "Step %d gave NaN or infinity; the last good state is restored.",
                trainer.global_step,
            )
        if self._in_a_row >= self.patience:
            raise FatError(
                f"{self._in_a_row} steps in a row gave NaN or infinity. The last good state is "
                "kept. Check the images for extreme values, or try a smaller optim.lr or "
                "optim.gradient_clip=1.0."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the last good state is taken anew when training goes on."""
        return {"restored": self.restored, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.restored, self._in_a_row = state_dict["restored"], state_dict["in_a_row"]

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._good = (student_of(pl_module).trained_state(), optimizers)


class PeriodicCheckpoint(pl.Callback):
    """Keeps the whole state of a training in one file, for going on after a crash.

    Written at every validation, when the system asks the process to end (SIGTERM), and in between
    after every so many seconds; never where a validation is still to come at the same step.

    Args:
        path: The file; it is replaced atomically.
        every: Seconds between two of them; infinity keeps validated states alone, for loaders that
            cannot start in the middle of a pass.
    """

    def __init__(self, path: Path, every: float) -> None:
        self.path = path
        self.every = every
        self._kept = time.monotonic()
        self._step = -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the state if it is time."""
        if math.isinf(self.every):
            return
        mine = time.monotonic() - self._kept >= self.every or trainer.received_sigterm
        due = bool(all_max(torch.tensor(int(mine))))  # all processes take part, or none
        last = batch_idx + 1 == trainer.num_training_batches
        # fit's own trainer validates by batches, never by the clock.
        assert isinstance(trainer.val_check_batch, int)
        validates = (batch_idx + 1) % trainer.val_check_batch == 0
        if due and not last and not validates:
            self._keep(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the state that was judged."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._keep(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep the state if SIGTERM came after the step's batch end, where Lightning looks again.

        One process alone sees such an exception between steps; of several, the others may go on,
        and would be waited for.
        """
        if math.isinf(self.every) or trainer.world_size > 1:
            return
        between = isinstance(exception, SIGTERMException) and trainer.training
        if between and trainer.global_step != self._step:
            self._keep(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        # All processes take part in gathering the state; Lightning lets the first one write.
        partial = self.path.with_name(f".{self.path.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            put_in_place(partial, self.path)
        self._kept, self._step = time.monotonic(), trainer.global_step


class CSVHistory(pl.Callback):
    """Writes what is logged, step by step, into a CSV file: ``step,name,value``.

    ``train/…`` of a step is of the batch that made it, ``val/…`` of the network after it. A
    training that goes on from a checkpoint forgets what came after that.

    Args:
        path: The file.
    """

    HEADER = "step,name,value\n"

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the file where there is none."""
        if trainer.is_global_zero and not self.path.exists():
            write_text(self.path, self.HEADER)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what a training that was cut off had written after its last checkpoint."""
        if not trainer.is_global_zero:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = [line for line in lines[1:-1] if re.fullmatch(r"\d{1,15},[^,]+,[^,]+", line)]
        if len(whole) < len(lines) - 2:
            logger.warning(
                "%s: %d damaged lines are left out.", self.path, len(lines) - 2 - len(whole)
            )
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
        """Write the step's figures."""
        self._write(trainer, "train/")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures of the network as it is."""
        self._write(trainer, "val/")

    def _write(self, trainer: pl.Trainer, kind: str) -> None:
        if not trainer.is_global_zero:
            return
        figures = trainer.callback_metrics.items()
        rows = [
            f"{trainer.global_step},{k},{float(v):.9g}\n"
            for k, v in figures
            if k[: len(kind)] == kind
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(rows))


class ProgressBar(TQDMProgressBar):
    """Progress bar with the loss and the time left for the whole training, not for the epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._start: tuple[float, int] | None = None

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Loss, validation loss and ``left``, minutes and seconds to the end of the training."""
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
    """Logs, after each validation, where every quantizer's α stands.

    As figures: mean, smallest, largest. As a histogram over its thresholds where the logger has
    histograms.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log one row of figures, and the histograms."""
        if not trainer.is_global_zero:
            return
        figures: dict[str, float] = {}
        factors: dict[str, Tensor] = {}
        for layer, kind, quantizer in student_of(pl_module).quantizers():
            for name, values in quantizer.thresholds.factors().items():
                key = f"{name}/{layer}.{kind}"
                factors[key] = values
                figures[key] = float(values.mean())
                if values.numel() > 1:
                    figures[f"{key}.min"] = float(values.min())
                    figures[f"{key}.max"] = float(values.max())
        for log in trainer.loggers:
            log.log_metrics(figures, step=trainer.global_step)
            log_histograms(log, factors, trainer.global_step)


def student_of(pl_module: pl.LightningModule) -> Student:
    """The student that a module trains."""
    assert isinstance(pl_module, DistillModule)
    return pl_module.student
