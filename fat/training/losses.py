"""Training losses.

``LOSSES`` holds the losses between the logits of teacher and student by name. Two terms may be
added: one between the outputs of the networks' blocks, and one that uses labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fat.training.config import LossName
from fat.utils.errors import FatError

__all__ = [
    "LOSSES",
    "authors_code",
    "check_labels",
    "cosine",
    "kl",
    "label_loss",
    "make_loss",
    "mse",
    "relative_error",
    "rmse",
]

AUTHORS_EPSILON = 1e-5


def rmse(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute √(mean (z_T − z_A)²) over all images and classes.

    The gradient at equal logits is 0, not NaN.

    Args:
        teacher: Logits z_T [N, classes] before softmax.
        student: Logits z_A [N, classes] before softmax.

    Returns:
        0-dim tensor, in units of a logit.

    Source: arXiv 1812.07872, eq. 21.

    Examples:
        >>> rmse(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).square().item()
        12.5
    """
    error = (teacher - student).square().mean()
    return torch.sqrt(error.clamp_min(torch.finfo(error.dtype).tiny))


def authors_code(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the mean over images of Σ_classes √(Δ² + 1e-5), as in the authors' TensorFlow code.

    Args:
        teacher: Logits [N, classes].
        student: Logits [N, classes].

    Returns:
        0-dim tensor, in units of a logit, summed over classes.
    """
    return ((teacher - student).square() + AUTHORS_EPSILON).sqrt().sum(dim=1).mean()


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the mean of (z_T − z_A)² over all images and classes.

    Unlike the gradient of :func:`rmse`, which has a constant norm, its gradient vanishes as the
    logits converge.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].

    Returns:
        0-dim tensor, in units of a logit squared.
    """
    return (teacher - student).square().mean()


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² times the mean over images of KL(softmax(z_T / T) ‖ softmax(z_A / T)).

    T² keeps the scale of the gradient independent of T. The loss is invariant to a constant added
    to all logits of an image.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].
        temperature: T; larger values give more weight to improbable classes.

    Returns:
        0-dim tensor, in nats.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    p, q = log_p.exp(), log_q.exp()
    # q − p sums to 0 over the classes. Adding it makes every term non-negative, and the gradient
    # at equal logits exactly 0.
    terms = p * (log_p - log_q) + (q - p)
    return temperature**2 * terms.sum(dim=1).mean()


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the mean over images of 1 − cos(z_T, z_A).

    It is invariant to the scale of an image's logits: a student whose logits are a positive
    multiple of the teacher's has loss 0. The order of the classes is unaffected by that, calibrated
    probabilities are not.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].

    Returns:
        0-dim tensor, 0…2.
    """
    # ½‖u − v‖² is 1 − u·v for unit vectors, without cancellation close to 1.
    difference = F.normalize(teacher, dim=1) - F.normalize(student, dim=1)
    return 0.5 * difference.square().sum(dim=1).mean()


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "rmse": rmse,
    "authors_code": authors_code,
    "mse": mse,
    "kl": kl,
    "cosine": cosine,
}


def make_loss(name: LossName, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss by name, a function of (z_T, z_A).

    Args:
        name: A key of ``LOSSES``.
        temperature: Temperature of ``kl``; ignored by the others.
    """
    return partial(kl, temperature=temperature) if name == "kl" else LOSSES[name]


def relative_error(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Compute the mean over tensors of ‖f_T − f_A‖² / ‖f_T‖², each norm over the batch.

    Relative errors give all tensors the same weight, whatever their magnitude and size.

    Args:
        teacher: Tensors f_T of any shape.
        student: Tensors f_A of the same shapes.
        total: Sum of a vector over processes, each of which has a part of the batch. The norms
            ‖f_T‖² are summed; the errors are those of this process, so that the sum over processes
            is the error of the batch.

    Returns:
        0-dim float32 tensor, dimensionless.

    Examples:
        >>> ones = [torch.ones(2, 3), 100 * torch.ones(4)]
        >>> relative_error(ones, [0.5 * f for f in ones]).item()
        0.25
    """
    # Squares overflow in half precision. All norms are summed in one collective.
    powers = total(torch.stack([exact.float().square().sum() for exact in teacher])).unbind()
    errors = []
    for exact, given, norm in zip(teacher, student, powers, strict=True):
        error = (exact.float() - given.float()).square().mean()
        errors.append(error / (norm / exact.numel()).clamp_min(1e-12))
    return torch.stack(errors).mean()


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the images with a known label.

    Args:
        student: Logits z_A [N, classes].
        labels: int64 [N]; negative if unknown.

    Returns:
        0-dim tensor, in nats; 0, with a gradient of 0, if no label is known.

    Raises:
        FatError: If a label on the CPU is not a class of the network. On other devices, where
            reading the labels would wait for the device, such labels count as unknown; call
            :func:`check_labels` on their maximum from time to time.
    """
    classes = student.shape[1]
    if labels.device.type == "cpu":
        check_labels(labels.max(), classes)
    known = (labels >= 0) & (labels < classes)
    total = F.cross_entropy(student, labels.where(known, -1), ignore_index=-1, reduction="sum")
    return total / known.sum().clamp_min(1)


def check_labels(largest: Tensor, classes: int) -> None:
    """Raise a FatError if a label is not a class of the network.

    Args:
        largest: The largest label, 0-dim; it is read.
        classes: Number of classes.
    """
    label = int(largest)
    if label >= classes:
        raise FatError(
            f"A label is {label}, but the network has the classes 0 to {classes - 1}. Check the "
            "labels of the training images, or type optim.label_weight=0 to use none."
        )
