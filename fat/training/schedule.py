"""Learning rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from fat.training.config import TrainSpec
from fat.utils.schedules import annealed

__all__ = ["learning_rate", "starts_cycle"]

AUTHORS_DECAY = 1e-4
AUTHORS_FLOOR = 1e-7


def learning_rate(spec: TrainSpec, step: int, total: int) -> float:
    """Compute the learning rate of one step.

    With d steps since the start of the cycle, and P = ``spec.period`` or, if that is ``None``,
    ``total``:

    * ``cosine``: lr · ½(1 + cos(π·d/P)), annealed to 0 and restarted (as in the paper);
    * ``authors_code``: lr · exp(−1e-4·step) · abs(cos(π·d/(4·P))) + 1e-7;
    * ``constant``: lr.

    Args:
        spec: Schedule, period and initial rate.
        step: Number of optimizer steps before this one.
        total: Number of steps of the whole training.

    Examples:
        >>> learning_rate(TrainSpec(lr=1.0, period=10), 15, 100)
        0.5
    """
    period = spec.period or max(total, 1)
    since = step % period
    if spec.schedule == "cosine":
        return spec.lr * annealed(since, period)
    if spec.schedule == "authors_code":
        wave = abs(math.cos(math.pi * since / (4 * period)))
        return spec.lr * math.exp(-AUTHORS_DECAY * step) * wave + AUTHORS_FLOOR
    return spec.lr


def starts_cycle(spec: TrainSpec, step: int) -> bool:
    """Return whether a cycle other than the first starts with this step."""
    return spec.period is not None and step > 0 and step % spec.period == 0
