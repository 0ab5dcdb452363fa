"""Lightning callbacks: best student, guard against NaN, checkpoints, history, progress bar."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
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
from fat.utils.deferred import Deferred
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

    On the CPU, the parameters are checked after every step. Other devices check them every few
    steps, since a parameter that is NaN stays NaN, and the result is read at the next check, when
    it has long arrived: a read would stop the device in every step.

    Args:
        patience: Number of consecutive failed checks after which training fails.
        every: Number of steps between copies of the state, and between checks on other devices than
            the CPU.

    Attributes:
        restored: Number of restored states.
    """

    def __init__(self, patience: int = 10, every: int = 10) -> None:
        self.patience = patience
        self.every = every
        self.restored = 0
        self._in_a_row = 0
        self._good: _Snapshot | None = None
        self._spare: _Snapshot | None = None
        self._unread: tuple[_Snapshot, Deferred] | None = None  # a copy, and whether it is finite

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the state before the first step."""
        if self._good is None:
            self._good = _Snapshot(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Restore the last finite state if a parameter is not finite."""
        assert self._good is not None
        due = trainer.global_step % self.every == 0
        if student_of(pl_module).device.type == "cpu":
            if not bool(_all_finite(pl_module)):
                self._restore(trainer, pl_module)
                return
            self._in_a_row = 0
            if due:
                self._good.update(trainer, pl_module)
        elif due and self._read(trainer, pl_module):
            copy = self._spare or _Snapshot(trainer, pl_module)
            copy.update(trainer, pl_module)
            self._spare, self._unread = None, (copy, Deferred(_all_finite(pl_module)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the parameters that are validated."""
        self.check(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the parameters after the last step."""
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Check the parameters now, where they have not been checked after every step."""
        module = trainer.lightning_module
        if self._good is None or student_of(module).device.type == "cpu":
            return
        if not self._read(trainer, module):
            return
        if not bool(_all_finite(module)):
            self._restore(trainer, module)
        else:
            self._in_a_row = 0
            self._good.update(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the copy, which is taken again on resume."""
        return {"restored": self.restored, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.restored, self._in_a_row = state_dict["restored"], state_dict["in_a_row"]

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Read the result of the last check; restore the last finite state if it has failed."""
        if self._unread is None:
            return True
        copy, finite = self._unread
        self._unread = None
        if bool(finite.tensor()):
            self._good, self._spare, self._in_a_row = copy, self._good, 0
            return True
        self._spare = copy
        self._restore(trainer, pl_module)
        return False

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._good is not None
        self._good.restore(trainer, pl_module)
        self.restored += 1
        self._in_a_row += 1
        on_cpu = student_of(pl_module).device.type == "cpu"
        if self._in_a_row == 1:
            logger.warning(
                "Step %d gave NaN or infinity; restored the last finite state."
                if on_cpu
                else "The parameters became NaN or infinite before step %d; restored the last "
                "finite state.",
                trainer.global_step,
            )
        if self._in_a_row >= self.patience:
            unit = "steps" if on_cpu else f"checks, one every {self.every} steps,"
            raise FatError(
                f"{self._in_a_row} {unit} in a row gave NaN or infinity. The last finite state is "
                "kept. Check the images for extreme values, or try a smaller optim.lr or "
                "optim.gradient_clip=1.0."
            )


class _Snapshot:
    """Copy of the parameters and the optimizers' state, in memory that is used again."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept: list[Tensor] = []
        self.update(trainer, pl_module)

    @torch.no_grad()
    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the current state."""
        parameters = list(pl_module.parameters())
        # By optimizer, the parameters that it has a state of, with the names of its tensors.
        self._states = [
            [(parameter, tuple(state)) for parameter, state in optimizer.state.items()]
            for optimizer in trainer.optimizers
        ]
        now = [
            *parameters,
            *(x for o in trainer.optimizers for s in o.state.values() for x in s.values()),
        ]
        if [(x.shape, x.device) for x in now] != [(x.shape, x.device) for x in self._kept]:
            self._kept = [torch.empty_like(tensor) for tensor in now]
        _copy(now, self._kept)

    @torch.no_grad()
    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the copied state."""
        parameters = list(pl_module.parameters())
        _copy(self._kept[: len(parameters)], parameters)
        rest = iter(self._kept[len(parameters) :])
        for optimizer, states in zip(trainer.optimizers, self._states, strict=True):
            optimizer.state.clear()
            for parameter, names in states:
                optimizer.state[parameter] = {name: next(rest).clone() for name in names}


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy tensors, in one operation for each device."""
    for device in dict.fromkeys(tensor.device for tensor in sources):
        chosen = [index for index, tensor in enumerate(sources) if tensor.device == device]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])


def _all_finite(pl_module: pl.LightningModule) -> Tensor:
    """Return a 0-dim tensor that is true if all parameters are finite."""
    with torch.no_grad():
        largest = torch._foreach_norm(list(pl_module.parameters()), math.inf)
        return torch.stack(largest).isfinite().all()


class PeriodicCheckpoint(pl.Callback):
    """Saves a checkpoint to resume from, in one file that is replaced atomically.

    It is saved after every validation, on SIGTERM, and in between every few seconds, but never
    before a validation at the same step: resuming there would skip the validation, as it does with
    Lightning's ModelCheckpoint.

    Several processes save together, and end together after a SIGTERM to one of them.

    Args:
        path: The file.
        every: Seconds between checkpoints; infinity saves after validations only, for loaders that
            cannot resume in the middle of an epoch.
        before: Called before each is saved.
    """

    def __init__(
        self,
        path: Path,
        every: float,
        before: Callable[[pl.Trainer], object] = lambda trainer: None,
    ) -> None:
        self.path = path
        self.every = every
        self.before = before
        self._saved = time.monotonic()
        self._step = -1
        self._stops: list[int] = []  # SIGTERM to this process that the others do not know of

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the handling of SIGTERM in several processes from Lightning.

        Lightning broadcasts a tensor on the device in every step and reads it, which waits for the
        device, and once more in the signal handler, which none of the others waits for.
        """
        if trainer.world_size > 1 and not math.isinf(self.every):
            loop: Any = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = lambda: None
            connector: Any = trainer._signal_connector
            connector._sigterm_notifier_fn = lambda signum, frame: self._stops.append(signum)

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
        stops = trainer.received_sigterm or bool(self._stops)
        mine = stops or time.monotonic() - self._saved >= self.every
        # On the CPU, between which processes exchange tensors without waiting for a GPU.
        due, ends = all_max(torch.tensor([int(mine), int(stops)])).tolist()
        if ends and trainer.world_size > 1:
            trainer._signal_connector.received_sigterm = True
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
        self.before(trainer)
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

    Values on the CPU are written at once. Those on other devices are read together, at least every
    50 steps, before each checkpoint and at the end.

    Args:
        path: The file.
    """

    HEADER = "step,name,value\n"
    EVERY = 50

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[tuple[int, str, Tensor]] = []
        self._since = 0  # steps since the file was written

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
        self._since += 1
        self._add(trainer, "train/")
        on_cpu = all(value.device.type == "cpu" for _, _, value in self._unwritten)
        if on_cpu or self._since >= self.EVERY:
            self._write()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the values of the validation."""
        self._add(trainer, "val/")
        self._write()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the values of the steps before the checkpoint."""
        self._write()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the values of the last steps."""
        self._write()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Write the values of the steps before an error or interrupt."""
        self._write()

    def _add(self, trainer: pl.Trainer, kind: str) -> None:
        if trainer.is_global_zero:
            self._unwritten += [
                (trainer.global_step, name, value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith(kind)
            ]

    def _write(self) -> None:
        rows, self._unwritten, self._since = self._unwritten, [], 0
        if not rows:
            return
        elsewhere = [value for _, _, value in rows if value.device.type != "cpu"]
        read = iter(torch.stack(elsewhere).tolist() if elsewhere else [])
        lines = [
            f"{step},{name},{float(value) if value.device.type == 'cpu' else next(read):.9g}\n"
            for step, name, value in rows
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


class ProgressBar(TQDMProgressBar):
    """Progress bar with the loss and the remaining time of the whole training.

    On other devices than the CPU it is refreshed once a second, since reading the loss waits for
    the device.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._start: tuple[float, int] | None = None
        self._refreshed = -math.inf

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Refresh the bar."""
        if pl_module.device.type != "cpu":
            now, last = time.monotonic(), batch_idx + 1 == trainer.num_training_batches
            if now - self._refreshed < 1.0 and not last:
                return
            self._refreshed = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return training loss, validation loss, and ``left``, the remaining minutes:seconds."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            metrics = {"train/loss": float(loss), **metrics}
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
            for name, on_device in quantizer.thresholds.factors().items():
                values = on_device.detach().cpu()
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
