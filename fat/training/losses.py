"""What training makes small: how far the student is from its teacher.

The distances between logits stand in ``LOSSES`` by name. Two terms may be added to them: one
between what the networks' blocks give, and one that uses labels.
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
    """√(mean (z_T − z_A)²) over all images and classes; the gradient at equal logits is 0, not NaN.

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
    """Mean over the batch of Σ_classes √(Δ² + 1e-5), what the authors' TensorFlow code uses.

    Args:
        teacher: Logits [N, classes].
        student: Logits [N, classes].

    Returns:
        0-dim tensor, in units of a logit, summed over classes.
    """
    return ((teacher - student).square() + AUTHORS_EPSILON).sqrt().sum(dim=1).mean()


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean of (z_T − z_A)² over all images and classes.

    Unlike :func:`rmse`, whose gradient keeps its length, this one fades as the logits meet.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].

    Returns:
        0-dim tensor, in units of a logit squared.
    """
    return (teacher - student).square().mean()


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T² times the mean over images of KL(softmax(z_T / T) ‖ softmax(z_A / T)).

    T² keeps the gradient's size when T changes. A constant added to all logits of an image changes
    nothing.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].
        temperature: T; the larger, the more the improbable classes count.

    Returns:
        0-dim tensor, in nats.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    p, q = log_p.exp(), log_q.exp()
    # q − p sums to 0 over the classes. With it no term is negative, and at equal logits the
    # gradient is 0 to the last bit.
    terms = p * (log_p - log_q) + (q - p)
    return temperature**2 * terms.sum(dim=1).mean()


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over images of 1 − cos(z_T, z_A).

    It is blind to the scale of an image's logits: a student whose logits are the teacher's times
    any positive number has loss 0. The order of the classes does not suffer by that, calibrated
    probabilities do.

    Args:
        teacher: Logits z_T [N, classes].
        student: Logits z_A [N, classes].

    Returns:
        0-dim tensor, 0…2.
    """
    # ½‖u − v‖² is 1 − u·v for unit vectors, without taking the difference of numbers close to 1.
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
    """The loss of that name, a function of (z_T, z_A).

    Args:
        name: A key of ``LOSSES``.
        temperature: For ``kl``; the others have none.
    """
    return partial(kl, temperature=temperature) if name == "kl" else LOSSES[name]


def relative_error(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Mean over places of ‖f_T − f_A‖² / ‖f_T‖², each norm over the batch.

    Relative, so that places count alike however large their values and however many they are.

    Args:
        teacher: A tensor f_T per place, of any shape.
        student: A tensor f_A per place, of the same shapes.
        total: Sums over processes, each of which has a part of the batch. ``total(‖f_T‖²)`` is what
            the errors are taken relative to; the error itself stays this process's own part.

    Returns:
        0-dim float32 tensor without unit.

    Examples:
        >>> ones = [torch.ones(2, 3), 100 * torch.ones(4)]
        >>> relative_error(ones, [0.5 * f for f in ones]).item()
        0.25
    """
    errors = []
    for exact, given in zip(teacher, student, strict=True):
        exact, given = exact.float(), given.float()  # the squares leave half precision's range
        power = total(exact.square().sum()) / exact.numel()
        errors.append((exact - given).square().mean() / power.clamp_min(1e-12))
    return torch.stack(errors).mean()


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of softmax(z_A) with the labels: the mean over the images whose label is known.

    Args:
        student: Logits z_A [N, classes].
        labels: int64 [N]; below 0 where unknown.

    Returns:
        0-dim tensor, in nats; 0, with a gradient of 0, where no label is known.

    Raises:
        FatError: If a label is no class of the network.
    """
    largest, classes = int(labels.max()), student.shape[1]
    if largest >= classes:
        raise FatError(
            f"A label is {largest}, but the network has the classes 0 to {classes - 1}. Check the "
            "labels of the training images, or type optim.label_weight=0 to use none."
        )
    known = labels >= 0
    total = F.cross_entropy(student, labels.where(known, -1), ignore_index=-1, reduction="sum")
    return total / known.sum().clamp_min(1)
