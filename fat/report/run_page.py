"""A run's page: everything its directory holds, as one report.html that opens alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fat.report.html import (
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
    section,
    table,
    tiles,
)
from fat.report.records import (
    Run,
    dig,
    finite,
    is_run,
    is_sweep,
    latencies,
    number,
    read_csv,
    read_json,
    read_run,
    total_seconds,
    word,
)
from fat.report.run_sections import (
    example_section,
    filter_section,
    layer_section,
    sensitivity_section,
    threshold_section,
    training_section,
)
from fat.report.sweep_grid import Measure, Stage, choose_measure, final_loss, labels_of
from fat.utils.errors import FatError
from fat.utils.io import write_text

__all__ = ["HTML", "run_page", "write_run"]

HTML = "report.html"
FIGURES = (
    ("top1", "top-1, %", "share of labelled images whose class is the largest logit"),
    ("top5", "top-5, %", "share of labelled images whose class is among the five largest logits"),
    ("agreement", "agreement, %", "share of images with the float network's largest logit"),
    ("sqnr_db", "SQNR, dB", "power of the float logits over the power of the difference"),
    ("rmse", "RMSE", "root of the mean squared difference between the logits"),
)
LEFT = (
    "metrics.json",
    "config.yaml",
    "failure.json",
    "history.csv",
    "layers.csv",
    "thresholds.csv",
    "equalization.csv",
    "sensitivity.csv",
    "details.json",
    "images.csv",
    "train.log",
)
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
        training_section(run, history),
        threshold_section(details),
        filter_section(run, details, pairs),
        layer_section(layers, thresholds),
        sensitivity_section(directory, problems),
        example_section(details),
    ]
    absent = [
        name
        for name, found in (
            ("metrics.json", run.metrics),
            ("config.yaml", run.config),
            ("history.csv", history),
            ("layers.csv", layers),
            ("details.json", details),
        )
        if not found
    ]
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
        f'<p class="under">{escape(under)}</p>{command_line(run.command) if run.command else ""}'
    )


def _init(run: Run) -> str:
    (label,) = labels_of([run])
    return f"init {label.init}" if label.init else ""


def _what_happened(run: Run) -> str:
    if run.status == "finished":
        return ""
    if run.status == "failed":
        failure = run.failure or {}
        message = word(failure, "message") or "It left no word of why; its log may say."
        parts = [
            f'<p class="note bad pre"><b>{escape(word(failure, "error") or "failed")}</b> '
            f"{escape(message)}</p>"
        ]
        if word(failure, "traceback"):
            parts.append(folded("Traceback", str(failure["traceback"])))
        if run.command:
            parts.append(f"<p>Try again:</p>{command_line(run.command)}")
        return section("Why it failed", *parts)
    reached = {
        "calibrated": "Its last figures are those after calibration.",
        "trained": "Its last figures are those after training.",
    }
    where = reached.get(str(run.metrics.get("status")), "It has no figures so far.")
    text = f"This run has not finished: it goes on, or it was stopped. {where}"
    return section("What happened", note(text))


def _figures(run: Run, measure: Measure) -> str:
    metrics = run.metrics
    stage: Stage = "trained" if isinstance(metrics.get("trained"), Mapping) else "calibrated"
    if not isinstance(metrics.get(stage), Mapping):
        return section(
            "Figures", note("There are no figures: the run did not get to its first ones.")
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
        ("Time", _duration(total_seconds(metrics)), "all stages"),
    ]
    rows = [
        [
            cell(name),
            *(
                figure_cell(number(metrics, f"{key}.{figure}"), 4 if figure == "rmse" else 2)
                for figure, _, _ in FIGURES
            ),
        ]
        for key, name in (("float", "float"), ("calibrated", "calibrated"), ("trained", "trained"))
        if isinstance(metrics.get(key), Mapping)
    ]
    columns = [Column("network"), *(Column(title, True, why) for _, title, why in FIGURES)]
    test = number(metrics, "data.splits.test.images")
    images = "on the test images" if test is None else f"on {test:.0f} test images"
    kind = (
        ""
        if measure == "accuracy"
        else " They have no labels: agreement with the float network takes accuracy's place."
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
    for target, time in latencies(metrics).items():
        before = plain(number(metrics, f"exported.{target}.latency_ms.float"), 2, " ms")
        return f"Latency in {target}", plain(time, 2, " ms"), f"float {before}"
    return "Latency", "–", ""


def _bits(metrics: Mapping[str, Any]) -> str:
    weight, activation = number(metrics, "bits.weight"), number(metrics, "bits.activation")
    if weight is None or activation is None:
        return "–"
    return f"W{weight:.3g}A{activation:.3g}"


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
            percent = plain(None if share is None else 100 * share, 3, " %")
            integers += f"; worst {worst.get('layer')}: {percent} by up to {worst.get('steps')}"
    floating = dig(report, "kernels.float_layers")
    names = ", ".join(map(str, floating)) if isinstance(floating, list) else ""
    kernels = f"{plain(number(report, 'kernels.integer_layers'), 0)} layers in integers, "
    kernels += f"in float: {names}" if names else "none in float"
    time, size = "latency_ms", "size_mb"
    threads = number(report, "latency_ms.threads")
    faster = plain(number(report, f"{time}.ratio"), 2)
    entries = [
        ("File", f"{escape(report.get('file', '–'))} in {escape(report.get('runtime', '–'))}"),
        ("Judged on", escape(f"{report.get('images', '–')} {report.get('on', 'images')}")),
        ("Top-1", escape(plain(number(report, "quantized.top1"), 2, " %"))),
        (
            "Agreement",
            escape(plain(number(report, "quantized.agreement"), 2, " %"))
            + " with the float network, "
            + escape(plain(number(report, "simulation.agreement"), 2, " %"))
            + " with its simulation",
        ),
        ("Integers", escape(integers)),
        ("Kernels", escape(kernels)),
        (
            "Latency",
            escape(
                f"{plain(number(report, f'{time}.float'), 2, ' ms')} in float → "
                f"{plain(number(report, f'{time}.quantized'), 2, ' ms')}, {faster} of float's time"
                + ("" if threads is None else f", one image, {threads:.0f} thread(s)")
            ),
        ),
        (
            "Size",
            escape(
                f"{plain(number(report, f'{size}.float'), 2, ' MB')} in float → "
                f"{plain(number(report, f'{size}.quantized'), 2, ' MB')}"
            ),
        ),
    ]
    return [facts(entry for entry in entries if entry[1] != "–")]


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
    return section("Files", *parts)
