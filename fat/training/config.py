"""Options of training: distillation, block-wise reconstruction and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fat.utils.options import Options, nested, option

__all__ = ["FinetuneSpec", "LossName", "ReconstructSpec", "ScheduleName", "TrainSpec"]

LossName = Literal["rmse", "authors_code", "mse", "kl", "cosine"]
ScheduleName = Literal["cosine", "authors_code", "constant"]
CompileMode = Literal["none", "default", "reduce-overhead"]
"""Modes of :func:`torch.compile`; ``none`` does not compile."""


@dataclass(frozen=True)
class ReconstructSpec(Options, prefix="optim.reconstruction"):
    """Options of block-wise reconstruction, see :mod:`fat.training.block_reconstruction`."""

    steps: int = option(0, "optimizer steps per block; 0 skips the reconstruction", at_least=0)
    images: int = option(
        256,
        "number of training images (crops) whose activations at one block are held in memory",
        at_least=1,
    )
    batch_size: int = option(16, "images per step", at_least=1)
    rate: float = option(1.0, "factor of the learning rates of optim", above=0)
    float_fraction: float = option(
        0.5,
        "fraction of the elements of a block's input taken from the float network",
        at_least=0,
        at_most=1,
        earlier=("float_share",),
    )


@dataclass(frozen=True)
class FinetuneSpec(Options, prefix="teacher"):
    """Options of fine-tuning a float network, see :func:`fat.training.finetuning.finetune`."""

    epochs: int = option(10, "maximum number of passes over the training images", at_least=1)
    head_epochs: int = option(
        1,
        "epochs at the start that train the new classifier alone, whose first, random gradients "
        "would damage the features",
        at_least=0,
    )
    lr: float = option(
        1e-3,
        "AdamW's peak learning rate of the features: one epoch of warm-up, then half a cosine to 0",
        above=0,
    )
    head_lr: float = option(1e-2, "the same for the classifier, without warm-up", above=0)
    weight_decay: float = option(
        0.02, "AdamW's weight decay; normalization layers and biases have none", at_least=0
    )
    label_smoothing: float = option(
        0.1, "fraction of the target that is spread over all classes", at_least=0, below=1
    )
    patience: int = option(
        5, "epochs without a better validation accuracy before training stops", at_least=1
    )


@dataclass(frozen=True)
class TrainSpec(Options, prefix="optim"):
    """Options of training the thresholds."""

    epochs: int = option(3, "passes over the training images; 0 only calibrates", at_least=0)
    lr: float = option(
        2e-3, "Adam's learning rate of the thresholds' factors at the start of a cycle", above=0
    )
    weight_scale_lr: float = option(
        1e-4,
        "learning rate of the factors of weights (quant.weights=scale)",
        above=0,
        earlier=("pointwise_lr",),
    )
    adaround_lr: float = option(
        1e-2,
        "learning rate of learned rounding (quant.weights=adaround), in steps of a weight's grid",
        above=0,
        earlier=("rounding_lr",),
    )
    bias_lr: float = option(
        1e-4, "learning rate of biases, in units of the layer's output", above=0
    )
    bias_correction: bool = option(
        True, "start from biases corrected in closed form if that is better on validation images"
    )
    reconstruction: ReconstructSpec = nested(
        ReconstructSpec,
        "block-wise reconstruction before distillation, kept if it is better on validation images",
    )
    loss: LossName = option("rmse", "distance between the logits; rmse is the paper's")
    temperature: float = option(
        1.0, "divisor of the logits in the kl loss; other losses have none", above=0
    )
    feature_weight: float = option(
        0.0, "weight of the relative squared error of the block outputs; 0 disables it", at_least=0
    )
    label_weight: float = option(
        0.0, "weight of the cross-entropy with the labels; 0 uses no labels", at_least=0
    )
    schedule: ScheduleName = option("cosine", "learning-rate schedule; cosine is the paper's")
    period: int | None = option(
        None, "steps per cycle of the schedule; null: one cycle", at_least=1, example=400
    )
    reset_optimizer: bool = option(True, "reset Adam's moments at the start of every cycle")
    gradient_clip: float | None = option(
        None, "maximum norm of the gradient of all parameters; null: none", above=0, example=1.0
    )
    validations: int = option(1, "validations per epoch", at_least=1)
    nan_patience: int = option(
        10, "consecutive steps with NaN or infinity after which training stops", at_least=1
    )

    @property
    def trains(self) -> bool:
        """``True`` if anything is trained; ``False`` if the network is only calibrated."""
        return self.epochs > 0 or self.reconstruction.steps > 0
