"""What is said of an exported file, to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fat.report.run import format_figures

__all__ = ["format_export"]


def format_export(report: Mapping[str, Any]) -> str:
    """Several lines on a file: equality, accuracy, kernels, speed and size.

    Args:
        report: What :func:`fat.export.export.export` returned.
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
