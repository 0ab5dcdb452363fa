"""Annealing schedules as pure functions of the step."""

from __future__ import annotations

import math

__all__ = ["annealed"]


def annealed(step: int, period: int) -> float:
    """Return ½(1 + cos(π·step/period)), which falls from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / period))
