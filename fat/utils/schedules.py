"""Annealing schedules as pure functions of the step."""

from __future__ import annotations

import math

__all__ = ["annealed"]


def annealed(step: int, period: int) -> float:
    """½(1 + cos(π·step/period)), from 1 down to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / period))
