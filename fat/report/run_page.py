"""A run's page: everything its directory holds, as one report.html that opens alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fat.errors import FatError, first_line
from fat.files import write_text
from fat.report.grid import Measure, Stage, choose_measure, final_loss, labels_of, loss
from fat.report.page import (
    Column,
    cell,
    command_line,
    escape,
    facts,
    figure_cell,
    folded,
    note,
    page,
    pill,
    plain,
    plot,
    section,
    table,
    tiles,
)
from fat.report.plots import (
    curves,
    filter_ranges,
    histogram,
    layer_bars,
    sensitivity_bars,
)
from fat.report.reading import (
    Run,
    dig,
    finite,
    is_run,
    is_sweep,
    number,
    read_csv,
    read_json,
    read_run,
    word,
)
from fat.report.sensitivity import JSON as SENSITIVITY
from fat.report.sensitivity import read_sensitivity

__all__ = ["HTML", "run_page", "write_run"]

HTML = "report.html"
FIGURES = (
    ("top1", "top-1, %", "share of labelled images whose class is the largest logit"),
    ("top5", "top-5, %", "share of labelled images whose class is among the five largest logits"),
    ("agreement", "agreement, %", "share of images with the float network's largest logit"),
    ("sqnr_db", "SQNR, dB", "power of the float logits over the power of the difference"),
    ("rmse", "RMSE", "root of the mean squared difference between the logits"),
)
MOST_HISTOGRAMS = 12
MOST_FILTERS = 12
MOST_SENSITIVE = 30
MOST_EXAMPLES = 24
IMAGE = re.compile(r"data:image/(?:jpeg|png|webp|gif);base64,[A-Za-z0-9+/=]+")
LEFT = (
    "metrics.json", "config.yaml", "failure.json", "history.csv", "layers.csv", "thresholds.csv",
    "equalization.csv", "sensitivity.csv", "details.json", "images.csv", "train.log",
)  # fmt: skip
"""Files of a run that the page links to."""


def write_run(directory: str | os.PathLike[str]) -> Path:
    """Write a run's report.html into its directory, atomically.

    Args:
        directory: The directory of a run, also of one that failed or was killed.

    Returns:
        The page.

    Raises:
        FatError: If the folder is no run's directory, or the page cannot be written.
    """
    place = Path(directory).expanduser()
    if not is_run(place):
        raise FatError(
            f"{place} is not the directory of a run: it holds no config.yaml, metrics.json or "
            "failure.json. train.py prints the directory of a run at its end; by default it lies "
            "under outputs/ or multirun/."
        )
    return write_text(place / HTML, run_page(place))


def run_page(directory: Path) -> str:
    """A run's page as HTML that needs no other file and no network.

    Args:
        directory: The directory of a run; what it lacks, the page says.
    """
    run = read_run(directory)
    problems = list(run.problems)
    history = read_csv(directory / "history.csv", problems)
    layers = read_csv(directory / "layers.csv", problems)
    details = read_json(directory / "details.json", problems)
    thresholds = None if layers else read_csv(directory / "thresholds.csv", problems)
    pairs = read_csv(directory / "equalization.csv", problems)
    measure = choose_measure([run])
    sections = [
        _what_happened(run),
        _figures(run, measure),
        _exported(run),
        _training(run, history),
        _thresholds(details),
        _equalization(run, details, pairs),
        _layers(layers, thresholds),
        _sensitivity(directory, problems),
        _examples(details),
    ]
    absent = [
        name
        for name, found in (
            ("metrics.json", run.metrics), ("config.yaml", run.config), ("history.csv", history),
            ("layers.csv", layers), ("details.json", details),
        )
        if not found
    ]  # fmt: skip
    sections.append(_files(directory, absent, problems))
    return page(f"{_title(run)} · {run.status}", _header(run), sections)


def _title(run: Run) -> str:
    (label,) = labels_of([run])
    network = word(run.metrics, "model") or word(run.config, "model.name") or run.name
    return f"{network} {label.bits}".strip()


def _header(run: Run) -> str:
    words = [
        word(run.metrics, "granularity") or word(run.config, "quant.granularity"),
        word(run.metrics, "scheme") or word(run.config, "quant.scheme"),
        _init(run),
    ]
    under = " · ".join(text for text in words if text)
    place = run.directory.resolve()
    # Only where the sweep's own folder is the one above: the link has to work after a move.
    back = '<a class="back" href="../report.html">The sweep</a>' if is_sweep(place.parent) else ""
    return (
        f"{back}<h1>{escape(_title(run))} {pill(run.status)}</h1>"
        f'<p class="under">{escape(under)}</p>{command_line(run.command)}'
    )


def _init(run: Run) -> str:
    (label,) = labels_of([run])
    return f"init {label.init}" if label.init else ""


def _what_happened(run: Run) -> str:
    if run.status == "finished":
        return ""
    if run.status == "failed":
        parts = [
            f'<p class="note bad pre">{escape(run.error or "It failed; why is not known.")}</p>'
        ]
        failure = run.failure or {}
        message = word(failure, "message")
        if message and len(message.splitlines()) > 1:
            parts.append(folded("The whole message", message))
        if word(failure, "traceback"):
            parts.append(folded("Traceback", str(failure["traceback"])))
        if run.command:
            parts.append(f"<p>Try again:</p>{command_line(run.command)}")
        return section("Why it failed", *parts)
    reached = {"calibrated": "after calibration", "trained": "after training"}
    where = reached.get(str(run.metrics.get("status")), "before its first figures")
    text = f"This run has not finished: its last figures were written {where}. "
    text += "It goes on, or it was stopped. What it left so far is below."
    return section("What happened", note(text))


def _figures(run: Run, measure: Measure) -> str:
    metrics = run.metrics
    stage: Stage = "trained" if isinstance(metrics.get("trained"), Mapping) else "calibrated"
    if not isinstance(metrics.get(stage), Mapping):
        return section(
            "Figures", note("There are no figures: the run ended before its first ones.")
        )
    before = number(metrics, "calibrated.top1")
    entries = [
        ("Float top-1", plain(number(metrics, "float.top1"), 2, " %"), ""),
        ("Calibrated top-1", plain(before, 2, " %"), "before training"),
        ("Trained top-1", plain(number(metrics, "trained.top1"), 2, " %"), ""),
        ("Accuracy drop", plain(final_loss(run, "accuracy"), 2), "points of top-1"),
        (
            "Agreement",
            plain(number(metrics, f"{stage}.agreement"), 2, " %"),
            "with the float network",
        ),
        ("SQNR", plain(number(metrics, f"{stage}.sqnr_db"), 1, " dB"), "of the logits"),
        _size(metrics),
        ("Bits", _bits(metrics), "weights, activations"),
        _latency(metrics),
        ("Time", _duration(_seconds(metrics)), "all stages"),
    ]
    rows = [
        [cell(name), *(figure_cell(number(metrics, f"{key}.{figure}"), 4 if figure == "rmse" else 2)
                       for figure, _, _ in FIGURES)]
        for key, name in (("float", "float"), ("calibrated", "calibrated"), ("trained", "trained"))
        if isinstance(metrics.get(key), Mapping)
    ]  # fmt: skip
    columns = [Column("network"), *(Column(title, True, why) for _, title, why in FIGURES)]
    test = number(metrics, "data.splits.test.images")
    images = "on the test images" if test is None else f"on {test:.0f} test images"
    kind = (
        ""
        if measure == "accuracy"
        else " They have no labels, so there is no accuracy: agreement with the float network takes its place."
    )
    stages = dig(metrics, "seconds")
    spent = [
        (str(name), plain(seconds, 1, " s"))
        for name, seconds in (stages.items() if isinstance(stages, Mapping) else ())
        if finite(seconds) is not None
    ]
    return section(
        "Figures",
        tiles(entries),
        table("Figures of each network", columns, rows, interactive=False),
        f'<p class="small">Seconds: {escape(", ".join(f"{n} {s}" for n, s in spent))}.</p>'
        if spent
        else "",
        intro=f"Measured {images}, which nothing was trained or chosen on.{kind}",
    )


def _size(metrics: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = number(metrics, "size_mb.float"), number(metrics, "size_mb.quantized")
    more = "weights and biases" if before is None else f"from {plain(before, 2)} MB in float"
    return "Size", plain(after, 2, " MB"), more


def _latency(metrics: Mapping[str, Any]) -> tuple[str, str, str]:
    exported = metrics.get("exported")
    for target, report in exported.items() if isinstance(exported, Mapping) else ():
        time = number(report, "latency_ms.quantized")
        if time is not None:
            before = plain(number(report, "latency_ms.float"), 2, " ms")
            return f"Latency in {target}", plain(time, 2, " ms"), f"float {before}"
    return "Latency", "–", ""


def _bits(metrics: Mapping[str, Any]) -> str:
    weight, activation = number(metrics, "bits.weight"), number(metrics, "bits.activation")
    if weight is None or activation is None:
        return "–"
    return f"{weight:.3g}, {activation:.3g}"


def _seconds(metrics: Mapping[str, Any]) -> float | None:
    stages = metrics.get("seconds")
    if not isinstance(stages, Mapping):
        return None
    return sum(finite(value) or 0.0 for value in stages.values())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return plain(seconds, 1, " s")
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _exported(run: Run) -> str:
    exported = run.metrics.get("exported")
    if not isinstance(exported, Mapping):
        return ""
    parts = []
    for target, report in exported.items():
        if not isinstance(report, Mapping):
            continue
        parts += [f"<h3>{escape(target)}</h3>", *_verdict(report)]
    return section(
        "The file that ships",
        *parts,
        intro="The file was run in its runtime and compared with the simulated network before it "
        "took its place.",
    )


def _verdict(report: Mapping[str, Any]) -> list[str]:
    worst = dig(report, "layers.worst")
    differing = number(report, "layers.differing")
    compared = plain(number(report, "layers.compared"), 0)
    if differing is None:
        integers = "not compared"
    elif not differing:
        integers = f"all equal, in {compared} operations"
    else:
        integers = f"{differing:.0f} of {compared} operations have other integers"
        if isinstance(worst, Mapping):
            share = number(worst, "share")
            integers += (
                f"; worst {worst.get('layer')}: {plain(None if share is None else 100 * share, 3)} % "
                f"by {worst.get('steps')}"
            )
    floating = dig(report, "kernels.float_layers")
    kernels = f"{plain(number(report, 'kernels.integer_layers'), 0)} layers in integers"
    kernels += ", none in float" if not floating else f", in float: {floating}"
    time, size = "latency_ms", "size_mb"
    threads = number(report, "latency_ms.threads")
    faster = plain(number(report, f"{time}.ratio"), 2)
    entries = [
        ("File", f"{escape(report.get('file', '–'))} in {escape(report.get('runtime', '–'))}"),
        ("Judged on", escape(f"{report.get('images', '–')} {report.get('on', 'images')}")),
        ("Top-1", escape(plain(number(report, "quantized.top1"), 2, " %"))),
        ("Agreement", escape(plain(number(report, "quantized.agreement"), 2, " %"))
            + " with the float network, "
            + escape(plain(number(report, "simulation.agreement"), 2, " %"))
            + " with its simulation"),
        ("Integers", escape(integers)),
        ("Kernels", escape(kernels)),
        ("Latency", escape(
            f"{plain(number(report, f'{time}.float'), 2, ' ms')} in float → "
            f"{plain(number(report, f'{time}.quantized'), 2, ' ms')}, {faster} of float's time"
            + ("" if threads is None else f", one image, {threads:.0f} thread(s)"))),
        ("Size", escape(
            f"{plain(number(report, f'{size}.float'), 2, ' MB')} in float → "
            f"{plain(number(report, f'{size}.quantized'), 2, ' MB')}")),
    ]  # fmt: skip
    return [facts(entry for entry in entries if entry[1] != "–")]


def _training(run: Run, history: Sequence[Mapping[str, str]] | None) -> str:
    told = run.metrics.get("training")
    entries = []
    if isinstance(told, Mapping):
        for name, key, digits in (
            ("Steps", "steps", 0),
            ("Loss before, validation images", "calibrated_loss", 5),
            ("Best loss", "best_loss", 5),
            ("Best step", "best_step", 0),
            ("Steps undone because of NaN", "restored", 0),
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
    losses = {
        name: curves_found[name] for name in ("train/loss", "val/loss") if name in curves_found
    }
    parts = [facts(entries)]
    if losses:
        best = number(told, "best_step") if "val/loss" in losses else None
        parts.append(
            plot(
                curves(losses, "loss", log=True, best=best),
                "Loss over the steps of the training, on training batches and validation images",
                height=340,
                title="Loss",
            )
        )
    small = []
    for name, title, unit in (
        ("train/lr", "Learning rate", ""),
        ("val/agreement", "Agreement, validation images", "%"),
        ("val/sqnr_db", "SQNR, validation images", "dB"),
    ):
        if name in curves_found:
            figure = curves({name: curves_found[name]}, unit)
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


def _thresholds(details: object) -> str:
    parts = []
    for entry in _listed(details, "histograms"):
        edges, counts = _numbers(entry.get("edges"), 2), _numbers(entry.get("counts"))
        if edges is None or counts is None or len(edges) != len(counts) + 1:
            continue
        before, after = _numbers(entry.get("before")) or [], _numbers(entry.get("after")) or []
        layer, kind = str(entry.get("layer", "")), str(entry.get("kind", ""))
        ranges = " → ".join(
            f"{plain(pair[0], 3)} … {plain(pair[-1], 3)}" for pair in (before, after) if pair
        )
        parts.append(
            plot(
                histogram(edges, counts, before, after),
                f"Histogram of {layer}, {kind}; thresholds before and after training {ranges}",
                height=190,
                title=layer,
                below=f"{kind}, {plain(entry.get('sqnr_db'), 1, ' dB')}, {ranges}",
            )
        )
        if len(parts) == MOST_HISTOGRAMS:
            break
    if not parts:
        return ""
    return section(
        "Thresholds of the worst tensors",
        f'<div class="panels">{"".join(parts)}</div>',
        intro="How often each value occurs (log axis), and the range that the integer grid covers: "
        '<span class="key before">before</span> and <span class="key after">after</span> training. '
        "What lies outside the lines saturates. The tensors with the lowest SQNR come first.",
    )


def _equalization(run: Run, details: object, pairs: Sequence[Mapping[str, str]] | None) -> str:
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
            below=f"widest over narrowest: {plain(_spread(before), 1)} → {plain(_spread(after), 1)}",
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
    return section(
        "Filter ranges",
        *body,
        intro=f"The largest weight of each filter {'' if method is None else 'by ' + escape(method) + ' '}"
        '<span class="key before">before</span> and <span class="key after">after</span> '
        f"equalization, log axis. A flat line is good: all filters use their grid.{moved}",
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


def _layers(
    layers: Sequence[Mapping[str, str]] | None, thresholds: Sequence[Mapping[str, str]] | None
) -> str:
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
            (row.get("layer", ""), row.get("kind", ""),
             None if (value := finite(row.get(key))) is None else factor * value)
            for row in layers
        ]  # fmt: skip

    parts = []
    for key, title, unit, factor, why in (
        ("sqnr_db", "SQNR of each tensor alone", "dB", 1.0, "Short bars are the weak ones."),
        ("saturated", "Saturated values", "%", 100.0, "Values outside the thresholds, cut off."),
        ("alpha_at_edge", "α at the edge of its range", "%", 100.0,
         "Factors that would go further if they were allowed to."),
    ):  # fmt: skip
        values = drawn(key, factor)
        if any(value is not None for *_, value in values):
            figure = layer_bars(values, unit, suffix=f" {unit}")
            parts.append(plot(figure, f"{title}, per layer", height=260, title=title, below=why))
    columns = [Column("layer"), Column("kind"),
               *(Column(title, True, why) for _, title, _, _, why in LAYER_COLUMNS)]  # fmt: skip
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
            f'<td class="n" data-sort="{escape(row.get(key, ""))}">{escape(row.get(key, "") or "–")}</td>'
            if numeric[key]
            else cell(escape(row.get(key, "")))
            for key in names
        ]
        for row in rows
    ]
    return table(name, [Column(key, numeric[key]) for key in names], body)


def _sensitivity(directory: Path, problems: list[str]) -> str:
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


def _examples(details: object) -> str:
    cards = []
    for entry in _listed(details, "examples")[:MOST_EXAMPLES]:
        image, name = word(entry, "image") or "", str(entry.get("name", ""))
        # Nothing but a picture that is in the page itself: an address would be a request.
        shown = (
            f'<img src="{image}" alt="{escape(name)}" loading="lazy">'
            if IMAGE.fullmatch(image)
            else '<div class="no-image">no picture</div>'
        )
        label = entry.get("label")
        truth = "" if label is None else f'<p class="truth">label: {escape(label)}</p>'
        cards.append(
            f'<article class="example">{shown}<div><h3>{escape(name)}</h3>{truth}'
            f"{_guesses('float', entry.get('float'))}{_guesses('integers', entry.get('quantized'))}"
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
        return section("Images on which the networks differ", note(text))
    return section(
        "Images on which the networks differ",
        f'<div class="examples">{"".join(cards)}</div>',
        intro=escape(text) + " Each network's three likeliest classes:",
    )


def _guesses(title: str, guesses: object) -> str:
    rows = []
    for guess in guesses if isinstance(guesses, list) else []:
        share = number(guess, "p")
        width = 100 * min(max(share or 0.0, 0.0), 1.0)
        rows.append(
            f'<li><span class="bar" style="width:{width:.1f}%"></span>'
            f"<span>{escape(dig(guess, 'class'))}</span>"
            f"<b>{plain(None if share is None else 100 * share, 0, ' %')}</b></li>"
        )
    return f'<h4>{escape(title)}</h4><ol class="guesses">{"".join(rows)}</ol>' if rows else ""


def _files(directory: Path, absent: Sequence[str], problems: Sequence[str]) -> str:
    parts = [note(problem, "bad") for problem in problems]
    if absent:
        parts.append(
            note("Not in this directory, or empty, so not on this page: " + ", ".join(absent) + ".")
        )
    there = [name for name in LEFT if (directory / name).is_file()]
    if there:
        links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in there)
        parts.append(f"<p>Beside this page: {links}</p>")
    config = directory / "config.yaml"
    try:
        parts.append(folded("Configuration", config.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        parts.append(note("There is no configuration to show."))
    return section("Files and configuration", *parts)
