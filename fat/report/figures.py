"""The plots of a run's page by name, for loggers that show plots of their own."""

from __future__ import annotations

from pathlib import Path

from fat.report.plots import Figure, histogram, layer_bars
from fat.report.reading import finite, read_csv, read_json

__all__ = ["run_figures"]

BARS = (("sqnr_db", "dB", 1.0), ("saturated", "%", 100.0), ("alpha_at_edge", "%", 100.0))


def run_figures(directory: Path) -> dict[str, Figure]:
    """Bars over all quantizers, and the thresholds of the worst tensors on their histograms.

    Args:
        directory: A run with layers.csv and details.json.
    """
    problems: list[str] = []
    layers = read_csv(directory / "layers.csv", problems) or []
    details = read_json(directory / "details.json", problems) or {}
    figures: dict[str, Figure] = {}
    for column, unit, factor in BARS:
        values = [(row["layer"], row["kind"], finite(row[column])) for row in layers]
        if any(value is not None for *_, value in values):
            scaled = [(a, b, None if value is None else factor * value) for a, b, value in values]
            figures[column] = layer_bars(scaled, unit)
    for entry in details.get("histograms", []):
        figures[f"thresholds/{entry['layer']}.{entry['kind']}"] = histogram(
            entry["edges"], entry["counts"], entry["before"], entry["after"]
        )
    return figures
