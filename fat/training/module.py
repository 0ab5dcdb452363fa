"""LightningModule that trains a student to reproduce the logits of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from fat.evaluation.metrics import Comparison
from fat.models.student import Student
from fat.training.block_outputs import BlockOutputs
from fat.training.config import TrainSpec
from fat.training.losses import check_labels, label_loss, make_loss, relative_error
from fat.training.parameter_groups import parameter_groups
from fat.training.schedule import learning_rate, starts_cycle
from fat.training.trainer import RestoresRandomStates, fused
from fat.utils import distributed
from fat.utils.batches import AnyBatch, to_device
from fat.utils.distributed import all_sum, gather_batches
from fat.utils.errors import FatError
from fat.utils.random import random_states

__all__ = ["NO_LABELS", "DistillModule"]

NO_LABELS = (
    "optim.label_weight is above 0, but no training image has a label. Type optim.label_weight=0, "
    "or use labeled images: data=folder data.root=DIR with a subfolder per class, or batches of "
    "(images, labels)."
)


class DistillModule(RestoresRandomStates):
    """Distillation of a student from its float teacher.

    The training loss is the loss between the logits, plus ``feature_weight`` times the relative
    error of the blocks' outputs, plus ``label_weight`` times the cross-entropy with labels. The
    terms are logged separately and unweighted, as ``train/loss``, ``train/features`` and
    ``train/labels``. The validation loss is the loss between the logits alone.

    Args:
        student: Calibrated student, trained in place.
        spec: Loss, optimizer and schedule.
        compile: Mode of :func:`torch.compile` for the student's forward pass, or ``none``.

    Raises:
        FatError: If ``feature_weight`` is above 0 and the network has no blocks. During training,
            if ``label_weight`` is above 0 and an epoch had no labels.
    """

    def __init__(self, student: Student, spec: TrainSpec, *, compile: str = "none") -> None:
        super().__init__()
        self.student = student
        self.spec = spec
        self.loss = make_loss(spec.loss, spec.temperature)
        self.comparison = Comparison()
        self._validation = ExitStack()
        self._validation_loss: list[tuple[int, Tensor]] = []
        self._blocks = BlockOutputs(student) if spec.feature_weight else None
        # Of the labels in this training; tensors on the device, which would have to wait for them.
        self._labeled: Tensor | int = 0
        self._compile = compile
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._largest: Tensor | None = None

    # A process may have no batch of the validation images.
    allow_zero_length_dataloader_with_multiple_devices = True

    def on_train_start(self) -> None:
        """Restore random states, and compile the student, which is on its training device now."""
        super().on_train_start()
        if self._compile != "none":
            self._compiled = self.student.compiled(self._compile)
            if self._blocks is not None:
                self._blocks.compile(self._compile)

    def training_step(self, batch: AnyBatch, batch_index: int) -> Tensor:
        """Compute the loss of one batch."""
        images, labels = to_device(batch, self.device)
        terms: dict[str, Tensor] = {}
        if self._blocks is None:
            teacher = self.student.float_logits(images)
            student = (self._compiled or self.student)(images)
        else:
            teacher, student, wanted, given = self._blocks(images)
            part = relative_error(wanted, given, all_sum)
        # Of the images of all processes, as a loss need not be a mean over images.
        teacher, student, labels = gather_batches(teacher, student, labels)
        loss = total = self.loss(teacher, student)
        if self._blocks is not None:
            # Of the images of this process; the sum over processes is the error of the batch.
            total = total + self.spec.feature_weight * part
            terms["features"] = all_sum(part)
        if self.spec.label_weight:
            terms["labels"] = label_loss(student, labels)
            self._labeled = self._labeled + (labels >= 0).sum()
            largest = labels.max()
            self._largest = largest if self._largest is None else largest.maximum(self._largest)
            self._classes = student.shape[1]
            total = total + self.spec.label_weight * terms["labels"]
        total = total * distributed.size()
        # Not prog_bar=True, for which Lightning would read every step's value.
        self.log("train/loss", loss.detach(), batch_size=len(images))
        for name, term in terms.items():
            self.log(f"train/{name}", term.detach(), batch_size=len(images))
        return total

    def on_train_epoch_end(self) -> None:
        """Raise a FatError if labels are required and none came."""
        self._check_labels()
        if self.spec.label_weight and not int(self._labeled):
            raise FatError(NO_LABELS)

    def _check_labels(self) -> None:
        if self._largest is not None:
            check_labels(self._largest, self._classes)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and compute the student's integers once for all batches."""
        self._check_labels()
        self.end_validation()  # one that ended with an error
        self._validation.enter_context(self.student.cached_integers())
        self._validation_loss.clear()
        self.comparison.reset()

    def validation_step(self, batch: AnyBatch, batch_index: int) -> None:
        """Compare student and teacher on one batch."""
        images, labels = to_device(batch, self.device)
        self.select(images)  # first called before biases are corrected
        if not len(images):  # only other processes have validation images
            return
        teacher, student = self.student.float_logits(images), self.student(images)
        self._validation_loss.append((len(images), self.loss(teacher, student)))
        self.comparison.update(student, teacher, labels)

    def end_validation(self) -> None:
        """Forget the integers of a validation; also to be called after one that was interrupted."""
        self._validation.close()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and the metrics of the comparison."""
        self.end_validation()
        sum_of_losses = torch.zeros((), dtype=torch.float64, device=self.device)
        for count, loss in self._validation_loss:
            sum_of_losses += count * loss.double()
        count = sum(count for count, _ in self._validation_loss)
        sums = torch.stack([sum_of_losses, torch.full_like(sum_of_losses, count)])
        total, images = all_sum(sums).unbind()
        self.log("val/loss", (total / images).float(), prog_bar=True)
        metrics = self.comparison.compute()
        self.log_dict(
            {f"val/{name}": value for name, value in metrics.items() if value is not None}
        )

    def configure_optimizers(self) -> Optimizer:
        """Create Adam over all trained parameters."""
        groups = parameter_groups([self.student], self.spec)
        if not groups:
            raise FatError(
                "Nothing to train: thresholds, weights and biases are all frozen. "
                "Type optim.epochs=0, or quant.thresholds=fat."
            )
        return Adam(groups, lr=self.spec.lr, fused=fused(self, self.student.device))

    def optimizer_step(
        self, epoch: int, batch_index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Make one step at the scheduled learning rate, and clamp the factors to their range."""
        step = self.global_step
        rate = learning_rate(self.spec, step, int(self.trainer.estimated_stepping_batches))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        if self.spec.reset_optimizer and starts_cycle(self.spec, step):
            # In place, as Lightning's wrapper shares the state.
            optimizer.optimizer.state.clear()
        optimizer.step(closure=optimizer_closure)
        self.student.project()
        # A tensor on the CPU: Lightning would copy a number to the device, which waits for it.
        self.log("train/lr", torch.tensor(rate))

    def select(self, images: Tensor) -> None:
        """Select the blocks of the feature loss on images [N, 3, H, W], if it is used; only once.

        Has to be called before the calibrated student is changed.
        """
        if self._blocks is not None:
            self._blocks.select(images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the options and the origin of the student, and the random states."""
        checkpoint["fat"] = {
            "spec": self.student.spec.to_dict(),
            "origin": self.student.origin,
            "labelled": int(self._labeled),
            "random": random_states(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the content of :meth:`on_save_checkpoint`."""
        saved = checkpoint["fat"]
        self._labeled = saved.get("labelled", 0)
        self._random = saved.get("random")
        self.use_fused(checkpoint, self.student.device)
