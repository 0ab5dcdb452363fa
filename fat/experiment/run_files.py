"""What a run leaves for people and programs: metrics.json, the threshold table, the summary."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from fat.evaluation.layer_analysis import LayerError
from fat.graph.passes.equalization import EqualizeReport, PairReport
from fat.models.student import Student
from fat.quant import kernels
from fat.quant.config import QuantSpec
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.report.text import METRICS_KEYS
from fat.training.fitting import FitResult
from fat.utils.io import write_csv, write_json

__all__ = ["advice", "versions", "write_equalization", "write_metrics", "write_thresholds"]

COLLAPSE = 80.0
"""Agreement with the float network, in percent, below which plain calibration has collapsed."""


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json atomically, all keys of the schema present."""
    unknown = set(metrics) - set(METRICS_KEYS)
    assert not unknown, unknown
    write_json(path, {key: metrics.get(key) for key in METRICS_KEYS})


def write_thresholds(path: Path, student: Student) -> None:
    """Write one row per quantizer as CSV; of several thresholds the range is given.

    Columns: layer, kind, bits, grid, thresholds (how many), T_low, T_max (the calibrated range),
    alpha, alpha_min, alpha_max, shift (the trained factors, mean and range), scale (largest),
    zero_point.
    """
    header = (
        "layer",
        "kind",
        "bits",
        "grid",
        "thresholds",
        "T_low",
        "T_max",
        "alpha",
        "alpha_min",
        "alpha_max",
        "shift",
        "scale",
        "zero_point",
    )
    write_csv(path, header, (_thresholds_row(*entry) for entry in student.quantizers()))


def _thresholds_row(
    layer: str, kind: str, quantizer: ActivationQuantizer | WeightQuantizer
) -> tuple[object, ...]:
    thresholds = quantizer.thresholds
    scale, zero_point = (t.detach() for t in thresholds())
    factors = thresholds.factors()
    alpha, shift = factors.get("alpha"), factors.get("shift")
    return (
        layer,
        kind,
        quantizer.grid.bits,
        quantizer.grid.kind,
        thresholds.high.numel(),
        f"{float(thresholds.low.min()):.6g}",
        f"{float(thresholds.high.max()):.6g}",
        "" if alpha is None else f"{float(alpha.mean()):.6g}",
        "" if alpha is None else f"{float(alpha.min()):.6g}",
        "" if alpha is None else f"{float(alpha.max()):.6g}",
        "" if shift is None else f"{float(shift.mean()):.6g}",
        f"{float(scale.max()):.9g}",  # all of a float32: powers of two stay such
        int(zero_point.max()),
    )


def write_equalization(path: Path, report: EqualizeReport) -> None:
    """Write one row per equalized pair as CSV, the columns of :class:`PairReport`.

    Spreads are the largest range over the smallest.
    """
    names = [column.name for column in fields(PairReport)]
    write_csv(
        path,
        names,
        (
            [f"{value:.6g}" if isinstance(value, float) else value for value in astuple(pair)]
            for pair in report.pairs
        ),
    )


def versions() -> dict[str, str]:
    """Versions of what a run depends on, by package name."""
    packages = ("fat-quant", "torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "kernels": kernels.backend()}


def advice(
    spec: QuantSpec,
    calibrated: Mapping[str, float | None],
    training: FitResult | None,
    errors: Sequence[LayerError],
) -> str | None:
    """Say that calibration collapsed or training did not help, where, and what would; or nothing.

    Args:
        spec: What was asked for.
        calibrated: Figures after calibration.
        training: What training did, ``None`` when there was none.
        errors: Each tensor's own error, worst first.
    """
    agreement = calibrated["agreement"]
    lines = []
    if agreement is not None and agreement < COLLAPSE:
        lines.append(
            f"COLLAPSE: plain calibration agrees with the float network on {agreement:.1f} % only."
        )
    if training is not None and training.steps and training.best_loss >= training.calibrated_loss:
        lines.append("Training did not help: the calibrated student is the best one.")
    if not lines:
        return None
    worst = ", ".join(f"{e.layer} {e.kind} {e.sqnr_db:.1f} dB" for e in errors[:5])
    lines.append(f"Worst tensors, each quantized alone: {worst}.")
    lines.append("What would help: " + _remedy(spec, errors))
    return "\n".join(lines)


def _remedy(spec: QuantSpec, errors: Sequence[LayerError]) -> str:
    weights = sum(error.kind == "weight" for error in errors[:5])
    if weights >= 3 and spec.granularity == "per_tensor":
        return "quant.granularity=per_channel gives each filter a threshold of its own."
    if spec.layer_bits and weights >= 3:
        return "a larger quant.budget_mb."
    if spec.for_weights < 8 and weights >= 3:
        return f"quant.weight.bits={spec.for_weights + 1} or more."
    if spec.for_activations < 8 and weights < 3:
        return f"quant.activation.bits={spec.for_activations + 1} or more."
    if spec.scheme == "symmetric":
        return "quant.scheme=asymmetric uses the grid fully where activations are not symmetric."
    if spec.activation_init.name == "minmax":
        return "init=percentile keeps outliers from setting the thresholds."
    return "optim.lr at a third, or more training images (data.train_images, optim.epochs)."
