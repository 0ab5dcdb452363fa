"""What watches a training: the best state, states that are not finite, and the time left."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor

from fat.errors import FatError
from fat.module import DistillModule
from fat.student import Student

__all__ = ["AlphaHistory", "KeepBest", "NanGuard", "Progress"]

logger = logging.getLogger(__name__)


class KeepBest(pl.Callback):
    """Remembers the student with the smallest validation loss, the calibrated one included.

    At the end of the training, also of one that was interrupted, that student is put back.

    Attributes:
        calibrated_loss: Validation loss before the first step.
        best_loss: Smallest validation loss.
        best_step: Optimizer steps after which it was seen; 0 is the calibrated student.
    """

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

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._good = (student_of(pl_module).trained_state(), optimizers)


class Progress(TQDMProgressBar):
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
    """Logs, after each validation, where every quantizer's α stands: mean, smallest, largest."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log one row of figures."""
        figures: dict[str, float] = {}
        for layer, kind, quantizer in student_of(pl_module).quantizers():
            for name, values in quantizer.thresholds.factors().items():
                key = f"{name}/{layer}.{kind}"
                figures[key] = float(values.mean())
                if values.numel() > 1:
                    figures[f"{key}.min"] = float(values.min())
                    figures[f"{key}.max"] = float(values.max())
        for log in trainer.loggers:
            log.log_metrics(figures, step=trainer.global_step)


def student_of(pl_module: pl.LightningModule) -> Student:
    """The student that a module trains."""
    assert isinstance(pl_module, DistillModule)
    return pl_module.student
