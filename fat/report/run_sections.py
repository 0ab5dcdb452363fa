"""Contents of a run page's sections about the network: training, thresholds, layers, images.

``details`` is the content of details.json; the rows of a CSV file are ``None`` without the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fat.report import html
from fat.report.html import Column, format_number, short
from fat.report.plots import BARS, curves, filter_ranges, histogram, layer_figures, sensitivity_bars
from fat.report.records import Run, dig, finite, number, word
from fat.utils.errors import FatError, first_line

__all__ = [
    "example_section",
    "filter_section",
    "layer_section",
    "sensitivity_section",
    "threshold_section",
    "training_section",
]

LOSSES = ("train/loss", "val/loss")
MOST_HISTOGRAMS = 12
MOST_FILTERS = 12
MOST_SENSITIVE = 30
MOST_EXAMPLES = 24
IMAGE = re.compile(r"data:image/(?:jpeg|png|webp|gif);base64,[A-Za-z0-9+/=]+")


def training_section(run: Run, history: Sequence[Mapping[str, str]] | None) -> dict[str, Any]:
    """Return loss curves, the learning rate, and the step that was kept."""
    training = run.metrics.get("training")
    entries = [
        (name, format_number(number(training, key), digits))
        for name, key, digits in (
            ("Steps", "steps", 0),
            ("Calibrated loss", "calibrated_loss", 5),
            ("Best loss", "best_loss", 5),
            ("Best step", "best_step", 0),
            ("Steps undone (NaN)", "restored", 0),
        )
        if number(training, key) is not None
    ]
    entries += [
        (name, text)
        for name, key in (
            ("Block reconstruction", "reconstruction"),
            ("Bias correction", "bias_correction"),
        )
        if (text := word(training, key))
    ]
    named: dict[str, tuple[list[float], list[float]]] = {}
    for row in history or ():
        step, value = finite(row.get("step")), finite(row.get("value"))
        if row.get("name") and step is not None and value is not None:
            steps, values = named.setdefault(row["name"], ([], []))
            steps.append(step)
            values.append(value)
    losses = {name: points for name, points in named.items() if name in LOSSES}
    best = number(training, "best_step") if "val/loss" in losses else None
    loss = html.plot(
        curves(losses, log=True, best=best),
        "Loss on training batches and validation images over the training steps",
        height=340,
        title="Loss",
    )
    metrics = [
        html.plot(curves({name: named[name]}), f"{title} over the steps", height=220, title=title)
        for name, title in (
            ("train/lr", "Learning rate"),
            ("val/agreement", "Agreement on validation images, %"),
            ("val/sqnr_db", "SQNR on validation images, dB"),
        )
        if name in named
    ]
    return {"entries": entries, "loss": loss if losses else "", "metrics": metrics}


def _listed(details: object, key: str) -> list[Mapping[str, Any]]:
    """The mappings of a list in details.json; anything else in it is skipped."""
    found = dig(details, key)
    return (
        [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    )


def _numbers(value: object, least: int = 1) -> list[float] | None:
    """A list of finite numbers, or ``None`` if it is anything else or shorter."""
    if not isinstance(value, list):
        return None
    found = [entry for entry in map(finite, value) if entry is not None]
    return found if len(found) == len(value) >= least else None


def threshold_section(details: object) -> list[str]:
    """Return histograms of the worst tensors with their thresholds before and after training."""
    plots: list[str] = []
    for entry in _listed(details, "histograms"):
        edges, counts = _numbers(entry.get("edges"), 2), _numbers(entry.get("counts"))
        if edges is None or counts is None or len(edges) != len(counts) + 1:
            continue
        before, after = _numbers(entry.get("before")) or [], _numbers(entry.get("after")) or []
        layer, kind = str(entry.get("layer", "")), str(entry.get("kind", ""))
        ranges = " → ".join(
            f"{short(pair[0])} … {short(pair[-1])}" for pair in (before, after) if pair
        )
        plots.append(
            html.plot(
                histogram(edges, counts, before, after),
                f"Histogram of {layer}, {kind}; thresholds before and after training {ranges}",
                height=190,
                title=layer,
                below=f"{kind}, {format_number(entry.get('sqnr_db'), 1, ' dB')}, T {ranges}",
            )
        )
    return plots[:MOST_HISTOGRAMS]


def filter_section(
    run: Run, details: object, pairs: Sequence[Mapping[str, str]] | None
) -> dict[str, Any]:
    """Return the ranges of filters before and after equalization."""
    drawn = []
    for entry in _listed(details, "filters"):
        before, after = _numbers(entry.get("before")), _numbers(entry.get("after"))
        if before and after and len(before) == len(after):
            drawn.append((str(entry.get("layer", "")), before, after))
    drawn.sort(key=lambda one: -_ratio(one[1]))
    plots = [
        html.plot(
            filter_ranges(before, after),
            f"Largest weight of each filter of {layer} before and after equalization",
            height=220,
            title=layer,
            below="widest over narrowest: "
            f"{format_number(_ratio(before), 1)} → {format_number(_ratio(after), 1)}",
        )
        for layer, before, after in drawn[:MOST_FILTERS]
    ]
    return {
        "plots": plots,
        "omitted": max(0, len(drawn) - MOST_FILTERS),
        "pairs": _csv_table(pairs) if pairs else None,
        "method": word(run.metrics, "equalization.method"),
        "shift": number(run.metrics, "equalization.float_shift_db"),
    }


def _ratio(values: Sequence[float]) -> float:
    alive = [value for value in values if value > 0]
    return max(alive) / min(alive) if alive else 1.0


LAYER_COLUMNS = {
    "bits": (Column("bits", True, "", 0), 1.0),
    "thresholds": (Column("thresholds", True, "number: one per tensor or one per filter", 0), 1.0),
    "sqnr_db": (Column("SQNR, dB", True, "of this tensor against its quantized values", 1), 1.0),
    "saturated": (Column("saturated, %", True, "values outside the thresholds", 3), 100.0),
    "threshold_before": (Column("T before", True, "largest calibrated threshold", 4), 1.0),
    "threshold_after": (Column("T after", True, "largest trained threshold", 4), 1.0),
    "alpha_mean": (Column("α mean", True, "trained factor of the calibrated threshold", 3), 1.0),
    "alpha_min": (Column("α min", True, "smallest factor of the tensor", 3), 1.0),
    "alpha_max": (Column("α max", True, "largest factor of the tensor", 3), 1.0),
    "alpha_at_edge": (Column("α at limit, %", True, "factors at a limit of their range", 1), 100.0),
}
"""Column of layers.csv: how it is shown, and the factor that gives its unit."""
BAR_TITLES = {
    "sqnr_db": ("SQNR of each tensor", "Short bars are the least accurate tensors."),
    "saturated": ("Saturated values", "Values outside the thresholds are clipped."),
    "alpha_at_edge": ("α at a limit of its range", "A wider range may let these train further."),
}


def layer_section(
    layers: Sequence[Mapping[str, str]] | None, thresholds: Sequence[Mapping[str, str]] | None
) -> dict[str, Any]:
    """Return bars and a table of layers.csv or, without it, a table of thresholds.csv."""
    if not layers:
        return {
            "intro": "From thresholds.csv: there is no layers.csv with errors of the layers.",
            "plots": [],
            "name": "Thresholds of all tensors",
            "table": _csv_table(thresholds) if thresholds else None,
        }
    plots = []
    for key, figure in layer_figures(layers).items():
        title = f"{BAR_TITLES[key][0]}, {BARS[key][0]}"
        label = f"{title}, for each tensor"
        plots.append(html.plot(figure, label, height=260, title=title, below=BAR_TITLES[key][1]))
    columns = [Column("layer"), Column("kind"), *(column for column, _ in LAYER_COLUMNS.values())]
    rows = [
        [
            html.code(row.get("layer", "")),
            row.get("kind", ""),
            *(_scaled(row, key) for key in LAYER_COLUMNS),
        ]
        for row in layers
    ]
    return {
        "intro": "Each quantizer by itself, in network order. Click a heading to sort.",
        "plots": plots,
        "name": "All quantized tensors",
        "table": (columns, rows),
    }


def _scaled(row: Mapping[str, str], key: str) -> float | None:
    value = finite(row.get(key))
    return None if value is None else LAYER_COLUMNS[key][1] * value


def _csv_table(rows: Sequence[Mapping[str, str]]) -> tuple[list[Column], list[list[str]]]:
    """Columns and rows of a CSV file as it is, numbers right-aligned."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = [
        Column(key, all(not row.get(key) or finite(row[key]) is not None for row in rows), "", None)
        for key in names
    ]
    return columns, [[row.get(key, "") for key in names] for row in rows]


def sensitivity_section(directory: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return the error of the logits per quantized tensor; ``None`` if it was not measured."""
    if not (directory / "sensitivity.json").is_file():
        return None
    from fat.evaluation.sensitivity_file import read_sensitivity  # imports torch, which is slow

    try:
        report = read_sensitivity(directory)
        count = finite(report.images.get("count"))
    except (FatError, AttributeError) as error:
        problems.append(first_line(error))
        return None
    rows = [(row.layer, row.kind, row.bits, row.alone_db) for row in report.rows]
    shown = [row for row in rows if finite(row[3]) is not None][:MOST_SENSITIVE]
    if not shown:
        return None
    label = "Relative error of the logits when only one tensor is quantized"
    return {
        "plot": html.plot(sensitivity_bars(shown), label, height=80 + 21 * len(shown)),
        "shown": len(shown),
        "total": len(rows),
        "images": count,
    }


def example_section(details: object) -> dict[str, Any]:
    """Return test images for which the networks differ, with the top classes of both."""
    cards = []
    for entry in _listed(details, "examples")[:MOST_EXAMPLES]:
        image = word(entry, "image") or ""
        cards.append(
            {
                # Only a picture that is inside the page: an address would be a request.
                "image": image if IMAGE.fullmatch(image) else None,
                "name": str(entry.get("name", "")),
                "label": entry.get("label"),
                **{
                    network: [
                        (dig(guess, "class"), number(guess, "p"))
                        for guess in (found if isinstance(found, list) else [])
                    ]
                    for network in ("float", "quantized")
                    for found in [entry.get(network)]
                },
            }
        )
    return {
        "cards": cards,
        "images": number(details, "images"),
        "differing": number(details, "differing"),
    }
