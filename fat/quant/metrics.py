"""Signal-to-noise ratio and agreement of two sets of logits."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["MAX_DB", "agreement", "logits_sqnr_db", "sqnr_db"]


MAX_DB = 200.0
"""Bound of reported values: JSON cannot hold the infinity of equal logits."""


def logits_sqnr_db(reference: Tensor, logits: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio 10·log10(Σ z_T² / Σ (z_T − z_A)²) in dB.

    Args:
        reference: Logits z_T of the float network, any shape.
        logits: Logits z_A of the quantized network, same shape.

    Examples:
        >>> from torch import tensor
        >>> logits_sqnr_db(tensor([3.0, 4.0]), tensor([3.0, 4.5]))
        20.0
    """
    reference, logits = reference.detach(), logits.detach()
    signal = reference.double().square().sum()
    return sqnr_db(float(signal), float((reference.double() - logits.double()).square().sum()))


def agreement(reference: Tensor, logits: Tensor) -> float:
    """Return the percentage of images for which both have the same largest logit.

    Args:
        reference: [N, classes].
        logits: [N, classes].
    """
    return 100.0 * float((reference.argmax(1) == logits.argmax(1)).double().mean())


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10·log10(signal / noise), clipped to ±200 dB.

    NaN or infinite noise, from a network that diverged, gives −200 dB.

    Args:
        signal: Sum of squares of the reference.
        noise: Sum of squares of the difference.

    Examples:
        >>> sqnr_db(100.0, 1.0), sqnr_db(1.0, 0.0)
        (20.0, 200.0)
    """
    if noise == 0.0:
        return MAX_DB
    if not math.isfinite(noise) or signal == 0.0:
        return -MAX_DB
    return max(-MAX_DB, min(MAX_DB, 10.0 * (math.log10(signal) - math.log10(noise))))
