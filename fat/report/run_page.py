"""A run's page: everything its directory contains, as one self-contained report.html."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fat.report.html import Column, format_number, render
from fat.report.records import (
    CONFIG,
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
from fat.report.sweep_grid import choose_measure, final_loss, labels_of
from fat.utils.errors import FatError
from fat.utils.io import write_text

__all__ = ["HTML", "run_page", "write_run"]

HTML = "report.html"
MEASURES = {
    "top1": Column("top-1, %", True, "labeled images whose class has the largest logit"),
    "top5": Column("top-5, %", True, "labeled images whose class is among the top five logits"),
    "agreement": Column("agreement, %", True, "images with the float network's top class"),
    "sqnr_db": Column("SQNR, dB", True, "power of the float logits over power of the difference"),
    "rmse": Column("RMSE", True, "root mean squared difference between the logits", 4),
}
LINKED = (
    *("metrics.json", "config.yaml", "failure.json", "history.csv", "layers.csv"),
    *("thresholds.csv", "equalization.csv", "sensitivity.csv", "details.json"),
    *("images.csv", "train.log"),
)
"""Files of a run that the page links to."""


def write_run(directory: str | os.PathLike[str]) -> Path:
    """Write a run's report.html into its directory, atomically.

    Args:
        directory: The directory of a run, also of one that failed or was killed.

    Returns:
        The page.

    Raises:
        FatError: If the folder is not a run directory, or the page cannot be written.
    """
    place = Path(directory).expanduser()
    if not is_run(place):
        raise FatError(
            f"{place} is not the directory of a run: it contains no config.yaml, metrics.json or "
            "failure.json. train.py prints the run directory when it ends; by default it is under "
            "outputs/ or multirun/."
        )
    return write_text(place / HTML, run_page(place))


def run_page(directory: Path) -> str:
    """Return a run's page as self-contained HTML.

    Args:
        directory: The directory of a run; the page names the files that are missing.
    """
    run = read_run(directory)
    metrics = run.metrics
    problems = list(run.problems)
    history = read_csv(directory / "history.csv", problems)
    layers = read_csv(directory / "layers.csv", problems)
    details = read_json(directory / "details.json", problems)
    thresholds = None if layers else read_csv(directory / "thresholds.csv", problems)
    pairs = read_csv(directory / "equalization.csv", problems)
    sensitivity = sensitivity_section(directory, problems)
    read = {
        "metrics.json": metrics,
        "config.yaml": run.config,
        "history.csv": history,
        "layers.csv": layers,
        "details.json": details,
    }
    (label,) = labels_of([run])
    network = word(metrics, "model") or word(run.config, "model.name") or run.name
    name = f"{network} {label.bits}".strip()
    subtitle = (
        word(metrics, "granularity") or word(run.config, "quant.granularity"),
        word(metrics, "scheme") or word(run.config, "quant.scheme"),
        f"init {label.init}" if label.init else "",
    )
    return render(
        "run.html.j2",
        title=f"{name} · {run.status}",
        run=run,
        metrics=metrics,
        name=name,
        subtitle=" · ".join(text for text in subtitle if text),
        # Only when the sweep is the folder above: the link has to work after a move.
        in_sweep=is_sweep(directory.resolve().parent),
        reached={
            "calibrated": "Its last metrics are those after calibration.",
            "trained": "Its last metrics are those after training.",
        }.get(str(metrics.get("status")), "It has no metrics yet."),
        exported=_exported(metrics),
        training=training_section(run, history),
        histograms=threshold_section(details),
        filters=filter_section(run, details, pairs),
        layers=layer_section(layers, thresholds),
        sensitivity=sensitivity,
        examples=example_section(details),
        problems=problems,
        absent=[file for file, content in read.items() if not content],
        present=[file for file in LINKED if (directory / file).is_file()],
        config=_config(run),
        **_metrics(run),
    )


def _config(run: Run) -> str | None:
    """The configuration with today's names; a damaged file as it is."""
    if run.config:
        return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=1000)
    try:
        return (run.directory / CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _metrics(run: Run) -> dict[str, Any]:
    metrics = run.metrics
    stages = [key for key in ("float", "calibrated", "trained") if _has(metrics, key)]
    rows = [
        [stage, *(number(metrics, f"{stage}.{measure}") for measure in MEASURES)]
        for stage in stages
    ]
    test = number(metrics, "data.splits.test.images")
    before = number(metrics, "size_mb.float")
    spent = metrics.get("seconds")
    seconds = spent.items() if isinstance(spent, Mapping) else ()
    bits = number(metrics, "bits.weight"), number(metrics, "bits.activation")
    latency = ("Latency", "–", "")
    for target, time in latencies(metrics).items():
        floating = format_number(dig(metrics, f"exported.{target}.latency_ms.float"), 2, " ms")
        latency = (f"Latency in {target}", format_number(time, 2, " ms"), f"float {floating}")
        break
    return {
        "stage": next((key for key in ("trained", "calibrated") if _has(metrics, key)), None),
        "measures": ([Column("network"), *MEASURES.values()], rows),
        "test_images": "the test images" if test is None else f"{test:.0f} test images",
        "labelled": choose_measure([run]) == "accuracy",
        "drop": final_loss(run, "accuracy"),
        "size_note": "weights and biases" if before is None else f"float {before:.2f} MB",
        "bits": "–" if None in bits else f"W{bits[0]:.3g}A{bits[1]:.3g}",
        "latency": latency,
        "time": _duration(total_seconds(metrics)),
        "seconds": [
            f"{name} {format_number(value, 1, ' s')}"
            for name, value in seconds
            if finite(value) is not None
        ],
    }


def _has(metrics: Mapping[str, Any], stage: str) -> bool:
    return isinstance(metrics.get(stage), Mapping)


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds < 100:
        return format_number(seconds, 1, " s")
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _exported(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    exported = metrics.get("exported")
    return [
        (str(target), [(name, text) for name, text in _verified(report) if text != "–"])
        for target, report in (exported.items() if isinstance(exported, Mapping) else ())
        if isinstance(report, Mapping)
    ]


def _verified(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Results of verifying an exported file, with a dash where one is missing."""

    def shown(path: str, digits: int = 2, unit: str = "") -> str:
        return format_number(dig(report, path), digits, unit)

    worst, differing = dig(report, "layers.worst"), number(report, "layers.differing")
    compared = shown("layers.compared", 0)
    if differing is None:
        integers = "not compared"
    elif not differing:
        integers = f"all equal in {compared} operations"
    else:
        integers = f"{differing:.0f} of {compared} operations give other integers"
        if isinstance(worst, Mapping):
            fraction = number(worst, "share")
            percent = format_number(None if fraction is None else 100 * fraction, 3, " %")
            integers += f"; worst {worst.get('layer')}: {percent} by up to {worst.get('steps')}"
    floating = dig(report, "kernels.float_layers")
    names = ", ".join(map(str, floating)) if isinstance(floating, list) else ""
    threads = number(report, "latency_ms.threads")
    return [
        ("File", f"{report.get('file', '–')} in {report.get('runtime', '–')}"),
        ("Evaluated on", f"{report.get('images', '–')} {report.get('on', 'images')}"),
        ("Top-1", shown("quantized.top1", 2, " %")),
        (
            "Agreement",
            f"{shown('quantized.agreement', 2, ' %')} with the float network, "
            f"{shown('simulation.agreement', 2, ' %')} with the simulation",
        ),
        ("Integers", integers),
        (
            "Kernels",
            f"{shown('kernels.integer_layers', 0)} integer layers, float: {names or 'none'}",
        ),
        (
            "Latency",
            f"{shown('latency_ms.float', 2, ' ms')} in float → "
            f"{shown('latency_ms.quantized', 2, ' ms')} ({shown('latency_ms.ratio')} of the float "
            "time)" + ("" if threads is None else f", one image, {threads:.0f} thread(s)"),
        ),
        (
            "Size",
            f"{shown('size_mb.float', 2, ' MB')} in float → {shown('size_mb.quantized', 2, ' MB')}",
        ),
    ]
