"""The LightningModule that trains a student's thresholds to give its teacher's logits."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from fat.batches import AnyBatch, split
from fat.errors import FatError
from fat.losses import LOSSES
from fat.metrics import Comparison
from fat.schedule import learning_rate, starts_cycle
from fat.spec import TrainSpec
from fat.student import Student

__all__ = ["DistillModule"]


class DistillModule(pl.LightningModule):
    """Distillation from the float teacher, without labels; only the student's factors are trained.

    Args:
        student: Calibrated student; trained in place.
        spec: Loss, optimizer and schedule.
    """

    def __init__(self, student: Student, spec: TrainSpec) -> None:
        super().__init__()
        self.student = student
        self.spec = spec
        self.loss = LOSSES[spec.loss]
        self.comparison = Comparison()
        self._validation_loss: list[tuple[int, Tensor]] = []

    def training_step(self, batch: AnyBatch, batch_index: int) -> Tensor:
        """Loss of one batch."""
        images = split(batch)[0]
        with torch.no_grad():
            teacher = self.student.float_logits(images)
        loss: Tensor = self.loss(teacher, self.student(images))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation_loss.clear()
        self.comparison.reset()

    def validation_step(self, batch: AnyBatch, batch_index: int) -> None:
        """Compare student and teacher on one batch."""
        images, labels = split(batch)
        teacher, student = self.student.float_logits(images), self.student(images)
        self._validation_loss.append((len(images), self.loss(teacher, student)))
        self.comparison.update(student, teacher, labels)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss`` and the comparison's figures."""
        total = sum(count for count, _ in self._validation_loss)
        loss = torch.stack([count * loss for count, loss in self._validation_loss]).sum() / total
        self.log("val/loss", loss, prog_bar=True)
        figures = self.comparison.compute()
        self.log_dict(
            {f"val/{name}": value for name, value in figures.items() if value is not None}
        )

    def configure_optimizers(self) -> Optimizer:
        """Adam over everything that is trained."""
        layers = self.student.layers()
        factors = [p for thresholds in self.student.thresholds() for p in thresholds.parameters()]
        weights = [layer.factor for layer in layers if layer.factor is not None]
        biases = [layer.bias for layer in layers if isinstance(layer.bias, nn.Parameter)]
        spec = self.spec
        rounding = self.student.spec.weights == "rounding"
        weights_lr = spec.rounding_lr if rounding else spec.pointwise_lr
        groups = [
            {"params": parameters, "share": rate / spec.lr}
            for parameters, rate in (
                (factors, spec.lr), (weights, weights_lr), (biases, spec.bias_lr)
            )
            if parameters
        ]  # fmt: skip
        if not groups:
            raise FatError(
                "Nothing to train: thresholds, weights and biases are all frozen. "
                "Type optim.epochs=0, or quant.thresholds=fat."
            )
        return Adam(groups, lr=self.spec.lr)

    def optimizer_step(
        self, epoch: int, batch_index: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One step at the schedule's rate; factors that left their range come back to its edge."""
        step = self.global_step
        rate = learning_rate(self.spec, step, int(self.trainer.estimated_stepping_batches))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        if self.spec.reset_optimizer and starts_cycle(self.spec, step):
            # In place, because Lightning wraps the optimizer and keeps a reference to its state.
            optimizer.optimizer.state.clear()
        optimizer.step(closure=optimizer_closure)
        self.student.project()
        self.log("train/lr", rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note, in plain values, whose thresholds these are."""
        checkpoint["fat"] = {"spec": self.student.spec.to_dict(), "origin": self.student.origin}
