"""What training makes small: the distance between the teacher's and the student's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fat.spec import LossName

__all__ = ["LOSSES", "authors_code", "rmse"]

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


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "rmse": rmse,
    "authors_code": authors_code,
}
