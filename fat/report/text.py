"""What is said of an exported file, to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["METRICS_KEYS", "format_export", "format_figures"]


def format_export(report: Mapping[str, Any]) -> str:
    """Several lines on a file: equality, accuracy, kernels, speed and size.

    Args:
        report: What :func:`fat.export.exporter.export` returned.
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
    computing = ", ".join(f"{count} {kind}" for kind, count in kernels["operators"].items())
    return "\n".join(
        [
            f"{report['file']} in {report['runtime']}, {report['images']} {report['on']}:",
            format_figures({"float": report["float"], "file": report["quantized"]}),
            f"Against the simulation: {simulation['agreement']:.2f} % agreement, logits at "
            f"{simulation['sqnr_db']:.1f} dB, at most {simulation['largest_step']:g} steps off.",
            f"Single operations: {layers['compared']} compared on {layers['images']} images, "
            f"{differing}.",
            f"Integer kernels: {kernels['integer_operators']} operators, "
            f"{kernels['integer_layers']} of them convolutions and linear layers, no layer in "
            f"float ({computing}).",
            f"Latency, one image, {time['threads']} thread(s): float {time['float']:.2f} ms -> "
            f"{time['quantized']:.2f} ms ({time['ratio']:.2f}x). Size: {size['float']:.3f} MB -> "
            f"{size['quantized']:.3f} MB ({size['ratio']:.3f}x).",
        ]
    )


METRICS_KEYS = (
    "model",
    "weights",
    "teacher",
    "data",
    "bits",
    "granularity",
    "scheme",
    "init",
    "seed",
    "versions",
    "command",
    "sweep",
    "status",
    "float",
    "calibrated",
    "trained",
    "accuracy_drop",
    "seconds",
    "equalization",
    "training",
    "size_mb",
    "exported",
)
"""Keys of metrics.json in their order; docs/metrics.md says what each holds."""


def format_figures(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """A table for people: one row per network; rows and columns without any value are left out.

    Examples:
        >>> rows = {"float": {"top1": 90.0}, "int8": {"top1": 89.5, "rmse": None}, "none": {}}
        >>> print(format_figures(rows))
                  top-1
        float     90.00
        int8      89.50
    """
    titles = {
        "top1": "top-1",
        "top5": "top-5",
        "agreement": "agreement",
        "sqnr_db": "SQNR dB",
        "rmse": "RMSE",
    }
    columns = [key for key in titles if any(row.get(key) is not None for row in rows.values())]
    rows = {
        name: row for name, row in rows.items() if any(row.get(key) is not None for key in columns)
    }
    width = max(len(name) for name in rows) + 2 if rows else 0
    width = max(width, 10)
    lines = [" " * width + " ".join(f"{titles[key]:>{_wide(key)}}" for key in columns)]
    for name, row in rows.items():
        cells = []
        for key in columns:
            value = row.get(key)
            spelling = ".4g" if key == "rmse" else ".2f"
            text = "-" if value is None else format(value, spelling)
            cells.append(f"{text:>{_wide(key)}}")
        lines.append(f"{name:<{width}}" + " ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _wide(key: str) -> int:
    return {"agreement": 10}.get(key, 8 if key in ("sqnr_db", "rmse") else 5)
