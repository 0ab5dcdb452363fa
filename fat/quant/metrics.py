"""Distances between two sets of logits, as pure functions."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["MAX_DB", "agreement", "logits_sqnr_db", "sqnr_db"]


MAX_DB = 200.0
"""What equal logits report in place of infinity, which JSON cannot hold."""


def logits_sqnr_db(reference: Tensor, logits: Tensor) -> float:
    """Signal to quantization noise ratio: 10·log10(Σ z_T² / Σ (z_T − z_A)²), in dB, at most 200.

    Args:
        reference: Float network's logits z_T, any shape.
        logits: Quantized network's logits z_A, the same shape.

    Examples:
        >>> logits_sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        20.0
    """
    signal = reference.double().square().sum()
    return sqnr_db(float(signal), float((reference.double() - logits.double()).square().sum()))


def agreement(reference: Tensor, logits: Tensor) -> float:
    """Share of images, in percent, on which both have the same largest logit.

    Args:
        reference: [N, classes].
        logits: [N, classes].
    """
    return 100.0 * float((reference.argmax(1) == logits.argmax(1)).double().mean())


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal / noise), kept inside ±200 dB so that JSON can hold it.

    Noise that is NaN or infinite, from a network that broke down, gives −200 dB.

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
