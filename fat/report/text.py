"""Metrics and export reports as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["METRICS_KEYS", "format_export", "format_metrics"]


def format_export(report: Mapping[str, Any]) -> str:
    """Format the report on an exported file: equality, accuracy, kernels, speed and size.

    Args:
        report: Return value of :func:`fat.export.exporter.export`.
    """
    layers, kernels, simulation = report["layers"], report["kernels"], report["simulation"]
    time, size = report["latency_ms"], report["size_mb"]
    worst = layers["worst"]
    differing = "all integers equal"
    if worst is not None:
        differing = (
            f"{layers['differing']} with other integers, worst '{worst['layer']}': "
            f"{100 * worst['share']:.2g} % by {worst['steps']}"
        )
    operators = ", ".join(f"{count} {kind}" for kind, count in kernels["operators"].items())
    return "\n".join(
        [
            f"{report['file']} in {report['runtime']}, {report['images']} {report['on']}:",
            format_metrics({"float": report["float"], "file": report["quantized"]}),
            f"Against the simulation: {simulation['agreement']:.2f} % agreement, logits at "
            f"{simulation['sqnr_db']:.1f} dB, at most {simulation['largest_step']:g} steps off.",
            f"Single operations: {layers['compared']} compared on {layers['images']} images, "
            f"{differing}.",
            f"Integer kernels: {kernels['integer_operators']} operators, "
            f"{kernels['integer_layers']} of them convolutions and linear layers, no layer in "
            f"float ({operators}).",
            f"Latency, one image, {time['threads']} thread(s): float {time['float']:.2f} ms -> "
            f"{time['quantized']:.2f} ms ({time['ratio']:.2f}x). Size: {size['float']:.3f} MB -> "
            f"{size['quantized']:.3f} MB ({size['ratio']:.3f}x).",
        ]
    )


METRICS_KEYS = (
    *("model", "weights", "teacher", "data", "bits", "granularity", "scheme", "init", "seed"),
    *("versions", "command", "sweep", "status", "float", "calibrated", "trained", "accuracy_drop"),
    *("seconds", "equalization", "training", "size_mb", "exported"),
)
"""Keys of metrics.json in order; docs/metrics.md describes each."""


def format_metrics(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Format metrics as a table, one row per network, without empty rows and columns.

    Examples:
        >>> rows = {"float": {"top1": 90.0}, "int8": {"top1": 89.5, "rmse": None}, "none": {}}
        >>> print(format_metrics(rows))
                  top-1
        float     90.00
        int8      89.50
    """
    titles = {
        "top1": ("top-1", 5),
        "top5": ("top-5", 5),
        "agreement": ("agreement", 10),
        "sqnr_db": ("SQNR dB", 8),
        "rmse": ("RMSE", 8),
    }
    columns = [key for key in titles if any(row.get(key) is not None for row in rows.values())]
    rows = {
        name: row for name, row in rows.items() if any(row.get(key) is not None for key in columns)
    }
    width = max([10, *(len(name) + 2 for name in rows)])
    lines = [" " * width + " ".join(f"{titles[key][0]:>{titles[key][1]}}" for key in columns)]
    for name, row in rows.items():
        cells = []
        for key in columns:
            value = row.get(key)
            text = "-" if value is None else format(value, ".4g" if key == "rmse" else ".2f")
            cells.append(f"{text:>{titles[key][1]}}")
        lines.append(f"{name:<{width}}" + " ".join(cells))
    return "\n".join(line.rstrip() for line in lines)
