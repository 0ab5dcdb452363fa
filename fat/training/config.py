"""Options of training: distillation, block-wise reconstruction and fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from fat.utils.errors import FatError
from fat.utils.validation import _one_of, _whole

__all__ = ["FinetuneSpec", "LossName", "ReconstructSpec", "ScheduleName", "TrainSpec"]


LossName = Literal["rmse", "authors_code", "mse", "kl", "cosine"]

ScheduleName = Literal["cosine", "authors_code", "constant"]


@dataclass(frozen=True)
class ReconstructSpec:
    """Block-wise reconstruction before the distillation.

    See :mod:`fat.training.block_reconstruction`.

    Attributes:
        steps: Optimizer steps for each block; 0 leaves reconstruction out.
        images: So many training images, or crops of them from several passes where there are
            fewer, are held in memory, as their activations at one block.
        batch_size: Images per step.
        rate: The rates of :class:`TrainSpec` are multiplied by this.
        float_share: Share of a block's input elements that are replaced by the float ones.
    """

    steps: int = 0
    images: int = 256
    batch_size: int = 16
    rate: float = 1.0
    float_share: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("images", 1), ("batch_size", 1)):
            _whole(f"optim.reconstruction.{name}", getattr(self, name), least)
        if not 0.0 < self.rate < math.inf:
            raise FatError(
                f"optim.reconstruction.rate is {self.rate}; it must be above 0 and finite."
            )
        if not 0.0 <= self.float_share <= 1.0:
            raise FatError(
                f"optim.reconstruction.float_share is {self.float_share}; it must lie in 0…1."
            )


@dataclass(frozen=True)
class FinetuneSpec:
    """How a float network is fine-tuned.

    Attributes:
        epochs: At most so many passes over the training images.
        head_epochs: The first of them train the new classifier alone, with the features as they
            are, so that its first, random gradients do no damage there.
        lr: AdamW's largest learning rate for the features; warmed up over their first epoch, then
            annealed to 0 along half a cosine.
        head_lr: The same for the classifier, without a warm-up.
        weight_decay: AdamW's decay of weights; norms and biases are left out.
        label_smoothing: Share of the target that is spread over all classes, 0…1.
        patience: Epochs without a better validation accuracy that end the training.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    epochs: int = 10
    head_epochs: int = 1
    lr: float = 1e-3
    head_lr: float = 1e-2
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    patience: int = 5

    def __post_init__(self) -> None:
        for key, least in (("epochs", 1), ("head_epochs", 0), ("patience", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise FatError(f"teacher.{key} is {value}; allowed are whole numbers from {least}.")
        for key in ("lr", "head_lr"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise FatError(f"teacher.{key} is {value}; it must be above 0, such as 0.001.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise FatError(f"teacher.weight_decay is {self.weight_decay}; it must not be negative.")
        if not 0 <= self.label_smoothing < 1:
            raise FatError(
                f"teacher.label_smoothing is {self.label_smoothing}; allowed: 0 to below 1."
            )


@dataclass(frozen=True)
class TrainSpec:
    """How the thresholds are trained.

    Attributes:
        epochs: Passes over the training images.
        lr: Adam's learning rate for the thresholds' factors at the start of every cycle.
        pointwise_lr: The same for the factors of weights, where they are trained.
        rounding_lr: The same for learned rounding, in steps of a weight's grid.
        bias_lr: The same for biases, in units of the layer's output, where they are trained.
        bias_correction: Whether to start from biases corrected in closed form
            (:func:`fat.training.bias_correction.correct_biases`), if that is better on the
            validation images.
        reconstruction: Block-wise reconstruction before everything else.
        loss: ``rmse`` (the paper's), ``authors_code``, ``mse``, ``kl`` or ``cosine``, see
            :mod:`fat.training.losses`.
        temperature: What ``kl`` divides the logits by; the other losses have none.
        feature_weight: Weight of the mean relative squared error of the blocks' outputs
            (:func:`fat.training.losses.relative_error`), added to the loss; 0 leaves it out.
        label_weight: Weight of the cross-entropy with the labels of the training images
            (:func:`fat.training.losses.label_loss`), added to the loss; 0 uses no labels.
        schedule: ``cosine`` (the paper's annealing), ``authors_code`` or ``constant``, see
            :mod:`fat.training.schedule`.
        period: Steps per cycle of the schedule; ``None`` makes the whole training one cycle.
        reset_optimizer: Whether Adam forgets its moments at the start of every cycle.
        gradient_clip: Largest norm of the gradient over all parameters; ``None`` does not clip.
        validations: How often in an epoch the network is judged on the validation images.
        nan_patience: After so many steps in a row that gave NaN or infinity, training stops.

    Raises:
        FatError: If a value is outside what is allowed.
    """

    epochs: int = 3
    lr: float = 2e-3
    pointwise_lr: float = 1e-4
    rounding_lr: float = 1e-2
    bias_lr: float = 1e-4
    bias_correction: bool = True
    reconstruction: ReconstructSpec = field(default_factory=ReconstructSpec)
    loss: LossName = "rmse"
    temperature: float = 1.0
    feature_weight: float = 0.0
    label_weight: float = 0.0
    schedule: ScheduleName = "cosine"
    period: int | None = None
    reset_optimizer: bool = True
    gradient_clip: float | None = None
    validations: int = 1
    nan_patience: int = 10

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all, or the network only calibrated."""
        return self.epochs > 0 or self.reconstruction.steps > 0

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, get_args(LossName))
        _one_of("schedule", self.schedule, get_args(ScheduleName))
        for name, least in (("epochs", 0), ("period", 1), ("validations", 1), ("nan_patience", 1)):
            if getattr(self, name) is not None:
                _whole(f"optim.{name}", getattr(self, name), least)
        rates = ("lr", "pointwise_lr", "rounding_lr", "bias_lr")
        for name in (*rates, "gradient_clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FatError(f"optim.{name} is {value}; it must be above 0 and finite.")
        for name in ("feature_weight", "label_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise FatError(
                    f"optim.{name} is {value}; it must be a number from 0 (off), as in "
                    f"optim.{name}=1.0."
                )
