"""Files and texts of a run: metrics.json, tables of thresholds and equalization, the summary."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch

import fat
from fat.evaluation.layer_analysis import LayerError
from fat.graph.passes.equalization import EqualizeReport, PairReport
from fat.models.student import Student
from fat.quant import kernels
from fat.quant.config import QuantSpec
from fat.quant.quantizers import ActivationQuantizer, WeightQuantizer
from fat.report.text import METRICS_KEYS, format_metrics
from fat.training.fitting import FitResult
from fat.utils.io import write_csv, write_json

__all__ = [
    "advice",
    "has_failed",
    "summary",
    "versions",
    "write_equalization",
    "write_metrics",
    "write_thresholds",
]

COLLAPSE = 80.0
"""Agreement with the float network in percent below which calibration has collapsed."""


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json atomically, with all keys of the schema."""
    unknown = set(metrics) - set(METRICS_KEYS)
    assert not unknown, unknown
    write_json(path, {key: metrics.get(key) for key in METRICS_KEYS})


def write_thresholds(path: Path, student: Student) -> None:
    """Write one row per quantizer as CSV; several thresholds are summarized by their range.

    Columns: layer, kind, bits, grid, thresholds (their number), T_low, T_max (calibrated range),
    alpha, alpha_min, alpha_max, shift (trained factors: mean and range), scale (the largest),
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
        f"{float(scale.max()):.9g}",  # exact for float32, so that powers of two stay powers of two
        int(zero_point.max()),
    )


def write_equalization(path: Path, report: EqualizeReport) -> None:
    """Write one row per equalized pair as CSV, the columns of :class:`PairReport`.

    A spread is the largest range divided by the smallest.
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


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of FAT and what it depends on, by package name.

    Args:
        device: Device of the run, for the implementation of the kernels.
    """
    packages = ("torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics")
    found = {"python": platform.python_version(), "fat-quant": fat.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "kernels": kernels.backend(device)}


def summary(spec: QuantSpec, metrics: Mapping[str, Any], training: FitResult | None) -> str:
    """Return the metrics of a run and what training did, as text for the terminal.

    Args:
        spec: The quantization.
        metrics: Content of metrics.json.
        training: The result of the training; ``None`` if there was none.
    """
    stages = ("float", "calibrated", "trained")
    rows = {stage: metrics[stage] for stage in stages if metrics[stage] is not None}
    size, bits = metrics["size_mb"], "mixed" if spec.layer_bits else spec.for_weights
    lines = [
        f"{metrics['model']} ({metrics['weights']}), W{bits}A{spec.for_activations} "
        f"{spec.granularity} {spec.scheme}:",
        format_metrics(rows),
        f"Weights and biases: {size['float']:.3f} MB -> {size['quantized']:.3f} MB, "
        f"{metrics['bits']['weight']:.4g} bits per weight.",
    ]
    if metrics["accuracy_drop"] is not None:
        lines.append(f"Accuracy drop: {metrics['accuracy_drop']:.2f} points of top-1.")
    if training is not None:
        lines.append(
            f"Reconstruction {training.reconstruction}; bias correction "
            f"{training.bias_correction}; {training.steps} steps, kept the student of step "
            f"{training.best_step}: validation loss {training.calibrated_loss:.4g} -> "
            f"{training.best_loss:.4g}."
        )
    return "\n".join(lines)


def has_failed(calibrated: Mapping[str, float | None], training: FitResult | None) -> bool:
    """Return whether calibration collapsed or training did not help, so that there is advice."""
    return _collapsed(calibrated) or _useless(training)


def _collapsed(calibrated: Mapping[str, float | None]) -> bool:
    agreement = calibrated["agreement"]
    return agreement is not None and agreement < COLLAPSE


def _useless(training: FitResult | None) -> bool:
    return training is not None and (
        training.steps > 0 and training.best_loss >= training.calibrated_loss
    )


def advice(
    spec: QuantSpec,
    calibrated: Mapping[str, float | None],
    training: FitResult | None,
    errors: Sequence[LayerError],
) -> str | None:
    """Say what failed, which tensors are the worst, and which option would help.

    Args:
        spec: The quantization.
        calibrated: Metrics after calibration.
        training: The result of the training; ``None`` if there was none.
        errors: The error of each tensor when it alone is quantized, the worst first.

    Returns:
        ``None`` if nothing failed.
    """
    if not has_failed(calibrated, training):
        return None
    lines = []
    if _collapsed(calibrated):
        lines.append(
            f"COLLAPSE: after calibration only {calibrated['agreement']:.1f} % of the predictions "
            "agree with the float network."
        )
    if _useless(training):
        lines.append("Training did not help: the calibrated student is the best one.")
    worst = ", ".join(f"{e.layer} {e.kind} {e.sqnr_db:.1f} dB" for e in errors[:5])
    lines.append(f"Worst tensors when quantized alone: {worst}.")
    lines.append("What would help: " + _remedy(spec, errors))
    return "\n".join(lines)


def _remedy(spec: QuantSpec, errors: Sequence[LayerError]) -> str:
    weights = sum(error.kind == "weight" for error in errors[:5])
    if weights >= 3 and spec.granularity == "per_tensor":
        return "quant.granularity=per_channel gives each filter its own threshold."
    if spec.layer_bits and weights >= 3:
        return "a larger quant.budget_mb."
    if spec.for_weights < 8 and weights >= 3:
        return f"quant.weight.bits={spec.for_weights + 1} or more."
    if spec.for_activations < 8 and weights < 3:
        return f"quant.activation.bits={spec.for_activations + 1} or more."
    if spec.scheme == "symmetric":
        return "quant.scheme=asymmetric uses the whole grid for asymmetric activations."
    if spec.activation_init.name == "minmax":
        return "init=percentile does not let outliers set the thresholds."
    return "a third of optim.lr, or more training images (data.train_images, optim.epochs)."
