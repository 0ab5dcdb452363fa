"""The parts of a run's page that look into the network: training, thresholds, layers, images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fat.evaluation.sensitivity_file import JSON as SENSITIVITY
from fat.evaluation.sensitivity_file import read_sensitivity
from fat.report.html import (
    Column,
    cell,
    escape,
    facts,
    figure_cell,
    note,
    plain,
    plot,
    section,
    short,
    table,
)
from fat.report.plots import curves, filter_ranges, histogram, layer_bars, sensitivity_bars
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


def training_section(run: Run, history: Sequence[Mapping[str, str]] | None) -> str:
    """Loss curves, the learning rate, and which step was kept.

    Args:
        run: The run.
        history: Rows of history.csv, ``None`` where there is none.
    """
    told = run.metrics.get("training")
    entries = []
    if isinstance(told, Mapping):
        for name, key, digits in (
            ("Steps", "steps", 0),
            ("Calibrated loss", "calibrated_loss", 5),
            ("Best loss", "best_loss", 5),
            ("Best step", "best_step", 0),
            ("Steps undone (NaN)", "restored", 0),
        ):
            if number(told, key) is not None:
                entries.append((name, escape(plain(number(told, key), digits))))
        for name, key in (
            ("Blocks trained one by one", "reconstruction"),
            ("Bias correction", "bias_correction"),
        ):
            if word(told, key):
                entries.append((name, escape(told[key])))
    curves_found = _named(history or ())
    losses = {name: points for name, points in curves_found.items() if name in LOSSES}
    parts = [facts(entries)]
    if losses:
        best = number(told, "best_step") if "val/loss" in losses else None
        parts.append(
            plot(
                curves(losses, log=True, best=best),
                "Loss over the steps of the training, on training batches and validation images",
                height=340,
                title="Loss",
            )
        )
    small = []
    for name, title in (
        ("train/lr", "Learning rate"),
        ("val/agreement", "Agreement on validation images, %"),
        ("val/sqnr_db", "SQNR on validation images, dB"),
    ):
        if name in curves_found:
            figure = curves({name: curves_found[name]})
            small.append(plot(figure, f"{title} over the steps", height=220, title=title))
    if small:
        parts.append(f'<div class="panels">{"".join(small)}</div>')
    if not losses and entries:
        parts.append(note("No step of the whole network's training was recorded (history.csv)."))
    return section(
        "Training",
        *parts,
        intro="The network with the smallest loss on validation images is the one that was kept; "
        "step 0 is the calibrated one.",
    )


def _named(history: Sequence[Mapping[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in history:
        step, value = finite(row.get("step")), finite(row.get("value"))
        name = row.get("name")
        if name and step is not None and value is not None:
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return found


def _listed(details: object, key: str) -> list[Mapping[str, Any]]:
    """The mappings of a list in details.json; whatever else stands there is passed over."""
    found = details.get(key) if isinstance(details, Mapping) else None
    return (
        [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    )


def _numbers(value: object, least: int = 1) -> list[float] | None:
    """A list of finite numbers, or ``None`` if it is anything else or shorter."""
    if not isinstance(value, list):
        return None
    numbers = [finite(entry) for entry in value]
    found = [entry for entry in numbers if entry is not None]
    return found if len(found) == len(value) >= least else None


def threshold_section(details: object) -> str:
    """Histograms of the worst tensors with their thresholds before and after training.

    Args:
        details: Content of details.json, whatever it is.
    """
    parts = []
    for entry in _listed(details, "histograms"):
        edges, counts = _numbers(entry.get("edges"), 2), _numbers(entry.get("counts"))
        if edges is None or counts is None or len(edges) != len(counts) + 1:
            continue
        before, after = _numbers(entry.get("before")) or [], _numbers(entry.get("after")) or []
        layer, kind = str(entry.get("layer", "")), str(entry.get("kind", ""))
        ranges = " → ".join(
            f"{short(pair[0])} … {short(pair[-1])}" for pair in (before, after) if pair
        )
        parts.append(
            plot(
                histogram(edges, counts, before, after),
                f"Histogram of {layer}, {kind}; thresholds before and after training {ranges}",
                height=190,
                title=layer,
                below=f"{kind}, {plain(entry.get('sqnr_db'), 1, ' dB')}, T {ranges}",
            )
        )
        if len(parts) == MOST_HISTOGRAMS:
            break
    if not parts:
        return ""
    return section(
        "Thresholds",
        f'<div class="panels">{"".join(parts)}</div>',
        intro="How often each value occurs in the tensors with the lowest SQNR (log axis), and the "
        "range that the integer grid covers: "
        '<span class="key before">before</span> and <span class="key after">after</span> training. '
        "What lies outside the lines saturates.",
    )


def filter_section(run: Run, details: object, pairs: Sequence[Mapping[str, str]] | None) -> str:
    """Ranges of filters before and after equalization; nothing for a run without it.

    Args:
        run: The run.
        details: Content of details.json, whatever it is.
        pairs: Rows of equalization.csv, ``None`` where there is none.
    """
    drawn = []
    for entry in _listed(details, "filters"):
        before, after = _numbers(entry.get("before")), _numbers(entry.get("after"))
        if before and after and len(before) == len(after):
            drawn.append((str(entry.get("layer", "")), before, after))
    drawn.sort(key=lambda one: -_spread(one[1]))
    parts = [
        plot(
            filter_ranges(before, after),
            f"Largest weight of each filter of {layer} before and after equalization",
            height=220,
            title=layer,
            below="widest over narrowest: "
            f"{plain(_spread(before), 1)} → {plain(_spread(after), 1)}",
        )
        for layer, before, after in drawn[:MOST_FILTERS]
    ]
    body = [f'<div class="panels">{"".join(parts)}</div>'] if parts else []
    if len(drawn) > MOST_FILTERS:
        body.append(note(f"The {MOST_FILTERS} layers with the widest spread, of {len(drawn)}."))
    if pairs:
        inner = _csv_table("Equalized pairs of layers", pairs)
        body.append(f"<details><summary>All pairs of layers</summary>{inner}</details>")
    if not body:
        return ""
    shift = number(run.metrics, "equalization.float_shift_db")
    moved = "" if shift is None else f" It moved the float logits to {escape(plain(shift, 1))} dB."
    method = word(run.metrics, "equalization.method")
    by = "" if method is None else f"by {escape(method)} "
    return section(
        "Filter ranges",
        *body,
        intro="The largest weight of each filter "
        '<span class="key before">before</span> and <span class="key after">after</span> '
        f"equalization {by}(log axis). A flat line is good: all filters use their grid.{moved}",
    )


def _spread(values: Sequence[float]) -> float:
    alive = [value for value in values if value > 0]
    return max(alive) / min(alive) if alive else 1.0


LAYER_COLUMNS = (
    ("bits", "bits", 0, 1.0, ""),
    ("thresholds", "thresholds", 0, 1.0, "how many: one for each tensor or for each filter"),
    ("sqnr_db", "SQNR, dB", 1, 1.0, "of the tensor alone against its own quantized form"),
    ("saturated", "saturated, %", 3, 100.0, "share of values outside the thresholds"),
    ("threshold_before", "T before", 4, 1.0, "largest threshold as calibrated"),
    ("threshold_after", "T after", 4, 1.0, "largest threshold as trained"),
    ("alpha_mean", "α mean", 3, 1.0, "trained factor on the calibrated threshold"),
    ("alpha_min", "α least", 3, 1.0, "smallest factor of the tensor"),
    ("alpha_max", "α most", 3, 1.0, "largest factor of the tensor"),
    ("alpha_at_edge", "α at edge, %", 1, 100.0, "share of factors at an end of their range"),
)
"""Column of layers.csv, heading, digits, factor, what it means."""


def layer_section(
    layers: Sequence[Mapping[str, str]] | None, thresholds: Sequence[Mapping[str, str]] | None
) -> str:
    """Errors and shares per layer as bars, and all of them as a table.

    Args:
        layers: Rows of layers.csv, ``None`` where there is none.
        thresholds: Rows of thresholds.csv, shown in their place.
    """
    if not layers:
        if not thresholds:
            return ""
        return section(
            "Layers",
            _csv_table("Thresholds of all tensors", thresholds),
            intro="From thresholds.csv: there is no layers.csv with errors and shares.",
        )

    def drawn(key: str, factor: float = 1.0) -> list[tuple[str, str, float | None]]:
        return [
            (
                row.get("layer", ""),
                row.get("kind", ""),
                None if (value := finite(row.get(key))) is None else factor * value,
            )
            for row in layers
        ]

    parts = []
    for key, title, unit, factor, why in (
        ("sqnr_db", "SQNR of each tensor alone", "dB", 1.0, "Short bars are the weak ones."),
        ("saturated", "Saturated values", "%", 100.0, "Values outside the thresholds, cut off."),
        (
            "alpha_at_edge",
            "α at the edge of its range",
            "%",
            100.0,
            "Factors that would go further if they were allowed to.",
        ),
    ):
        values = drawn(key, factor)
        if any(value is not None for *_, value in values):
            heading = f"{title}, {unit}"
            parts.append(
                plot(
                    layer_bars(values, unit),
                    f"{heading}, of each tensor",
                    height=260,
                    title=heading,
                    below=why,
                )
            )
    columns = [
        Column("layer"),
        Column("kind"),
        *(Column(title, True, why) for _, title, _, _, why in LAYER_COLUMNS),
    ]
    rows = []
    for row in layers:
        cells = [
            cell(f"<code>{escape(row.get('layer', ''))}</code>"),
            cell(escape(row.get("kind", ""))),
        ]
        for key, _, digits, factor, _ in LAYER_COLUMNS:
            value = finite(row.get(key))
            cells.append(figure_cell(None if value is None else factor * value, digits))
        rows.append(cells)
    return section(
        "Layers",
        *parts,
        table("All quantized tensors", columns, rows),
        intro="Every quantizer by itself, in the order of the network. Choose a heading to sort.",
    )


def _csv_table(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A CSV file as it is, figures to the right."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {
        key: all(not row.get(key) or finite(row[key]) is not None for row in rows) for key in names
    }
    body = [
        [
            _as_written(row.get(key, "")) if numeric[key] else cell(escape(row.get(key, "")))
            for key in names
        ]
        for row in rows
    ]
    return table(name, [Column(key, numeric[key]) for key in names], body)


def _as_written(figure: str) -> str:
    return f'<td class="n" data-sort="{escape(figure)}">{escape(figure or "–")}</td>'


def sensitivity_section(directory: Path, problems: list[str]) -> str:
    """What each tensor's quantization costs the logits; nothing where it was not measured.

    Args:
        directory: The run directory.
        problems: A sentence is added if the measurement is damaged.
    """
    if not (directory / SENSITIVITY).is_file():
        return ""
    try:
        report = read_sensitivity(directory)
        count = finite(report.images.get("count"))
    except (FatError, AttributeError) as error:
        problems.append(first_line(error))
        return ""
    rows = [(row.layer, row.kind, row.bits, row.alone_db) for row in report.rows]
    shown = [row for row in rows if finite(row[3]) is not None][:MOST_SENSITIVE]
    if not shown:
        return ""
    return section(
        "Sensitivity",
        plot(
            sensitivity_bars(shown),
            "Relative error of the logits when one tensor alone is quantized",
            height=80 + 21 * len(shown),
        ),
        intro="How far the logits move when this tensor alone is quantized; long bars harm. The "
        f"{len(shown)} most harmful of {len(rows)} tensors, on {escape(plain(count, 0))} images.",
    )


def example_section(details: object) -> str:
    """Test images on which the networks differ, with the likeliest classes of both.

    Args:
        details: Content of details.json, whatever it is.
    """
    cards = []
    for entry in _listed(details, "examples")[:MOST_EXAMPLES]:
        image, name = word(entry, "image") or "", str(entry.get("name", ""))
        # Nothing but a picture that is in the page itself: an address would be a request.
        shown = (
            f'<img src="{image}" alt="{escape(name)}">'
            if IMAGE.fullmatch(image)
            else '<div class="no-image">no picture</div>'
        )
        label = entry.get("label")
        truth = "" if label is None else f'<p class="truth">label: {escape(label)}</p>'
        cards.append(
            f'<article class="example">{shown}<div><h3>{escape(name)}</h3>{truth}'
            f"{_guesses('float', entry.get('float'), label)}"
            f"{_guesses('integers', entry.get('quantized'), label)}"
            "</div></article>"
        )
    looked, differ = number(details, "images"), number(details, "differing")
    if looked is None and not cards:
        return ""
    text = (
        f"Of {plain(looked, 0)} test images the two networks differ on {plain(differ, 0)}."
        if looked is not None and differ is not None
        else "Test images on which the two networks differ."
    )
    if not cards:
        return section("Differing images", note(text))
    return section(
        "Differing images",
        f'<div class="examples">{"".join(cards)}</div>',
        intro=escape(text) + " Each network's three likeliest classes:",
    )


def _guesses(title: str, guesses: object, label: object) -> str:
    rows = []
    for guess in guesses if isinstance(guesses, list) else []:
        share = number(guess, "p")
        width = 100 * min(max(share or 0.0, 0.0), 1.0)
        name = dig(guess, "class")
        mark = ' class="right"' if label is not None and name == label else ""
        rows.append(
            f'<li><span class="bar" style="width:{width:.1f}%"></span>'
            f"<span{mark}>{escape(name)}</span>"
            f"<b>{plain(None if share is None else 100 * share, 0, ' %')}</b></li>"
        )
    return f'<h4>{escape(title)}</h4><ol class="guesses">{"".join(rows)}</ol>' if rows else ""
