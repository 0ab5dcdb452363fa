"""A sweep as a table for programs: sweep.csv, one row per job."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fat.report.records import Run, Sweep, number
from fat.report.sweep_grid import varied_options
from fat.report.text import METRICS_KEYS
from fat.utils.io import write_csv

__all__ = ["CSV", "flatten_metrics", "format_sweep", "sweep_table", "write_table"]

CSV = "sweep.csv"
FIRST = ("directory", "status", "error", "command")
SAID_ELSEWHERE = ("command", "status")
"""Keys of metrics.json that have a column of their own."""
FIGURES = ("top1", "top5", "agreement", "sqnr_db", "rmse")
KNOWN = (
    "model",
    "weights",
    "data.source",
    "data.root",
    "data.labelled",
    "bits.weight",
    "bits.activation",
    "granularity",
    "scheme",
    "init.weight",
    "init.activation",
    "seed",
    "float.top1",
    "float.top5",
    *(f"calibrated.{figure}" for figure in FIGURES),
    *(f"trained.{figure}" for figure in FIGURES),
    "accuracy_drop",
    *(
        f"seconds.{stage}"
        for stage in ("load", "finetune", "prepare", "calibrate", "evaluate", "train", "export")
    ),
    "training.steps",
    "training.calibrated_loss",
    "training.best_loss",
    "training.best_step",
    "size_mb.float",
    "size_mb.quantized",
)
"""Columns that are always there, so that programs find them whatever the jobs did."""


def flatten_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of metrics.json by dotted name, as text.

    Numbers are written with all their digits, lists as JSON; what says nothing (null, NaN,
    infinity) is empty.

    Examples:
        >>> flatten_metrics({"float": {"top1": 90.0, "top5": None}, "trained": None})
        {'float.top1': '90.0', 'float.top5': '', 'trained': ''}
    """
    flat: dict[str, str] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten_metrics(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _text(value)
    return flat


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # half a surrogate cannot be stored
    return json.dumps(value, default=str)


def sweep_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """A sweep's header and rows, one per job.

    Columns: ``directory`` (relative to the sweep), ``status``, ``error`` (one line), ``command``;
    each option that differs between jobs, as ``option.NAME``; then metrics.json flattened with
    dotted names in the order of its schema. Columns that every sweep has are there even if empty;
    what only some runs have, such as a target's export, follows its key.

    Args:
        sweep: From :func:`fat.report.records.read_sweep`.
    """
    options = varied_options(sweep.runs)
    flat = [_results(run) for run in sweep.runs]
    metrics = _columns(name for row in flat for name in row)
    header = [*FIRST, *(f"option.{name}" for name in options), *metrics]
    rows = [
        [
            *map(_text, (run.name, run.status, run.error, run.command)),
            *(_text(values[place]) for values in options.values()),
            *(row.get(name, "") for name in metrics),
        ]
        for place, (run, row) in enumerate(zip(sweep.runs, flat, strict=True))
    ]
    return header, rows


def _results(run: Run) -> dict[str, str]:
    kept = {key: value for key, value in run.metrics.items() if key not in SAID_ELSEWHERE}
    flat = flatten_metrics(kept)
    # "trained": null is no column beside "trained.top1".
    return {name: text for name, text in flat.items() if text or name in KNOWN}


def _columns(found: Iterable[str]) -> list[str]:
    keys = {key: place for place, key in enumerate(METRICS_KEYS)}
    known = {name: place for place, name in enumerate(KNOWN)}

    def order(name: str) -> tuple[int, int, str]:
        key = name.partition(".")[0]
        return keys.get(key, len(keys)), known.get(name, len(known)), name

    return sorted({*KNOWN, *found}, key=order)


def write_table(file: str | os.PathLike[str], sweep: Sweep) -> Path:
    """Write :func:`sweep_table` as CSV, atomically.

    Args:
        file: Where.
        sweep: From :func:`fat.report.records.read_sweep`.

    Raises:
        FatError: If the place cannot be written.
    """
    header, rows = sweep_table(sweep)
    return write_csv(file, header, rows)


def format_sweep(sweep: Sweep) -> str:
    """A sweep as text for a terminal: a line per job with its options, and what came of it.

    Args:
        sweep: From :func:`fat.report.records.read_sweep`.
    """
    options = varied_options(sweep.runs)
    measures = (
        ("drop", "accuracy_drop", 2),
        ("agreement", "agreement", 1),
        ("SQNR dB", "sqnr_db", 1),
        ("MB", "size_mb.quantized", 2),
    )
    rows = [[*options, *(title for title, *_ in measures)]]
    for place, run in enumerate(sweep.runs):
        row = [str(values[place]) for values in options.values()]
        if run.status == "finished":
            final = run.metrics.get("trained") or run.metrics.get("calibrated") or {}
            for _, key, digits in measures:
                value = number({**run.metrics, **final}, key)
                row.append("" if value is None else f"{value:.{digits}f}")
        else:
            row.append(run.status)
        rows.append(row)
    columns = range(len(rows[0]))
    kept = [i for i in columns if any(row[i] for row in rows[1:] if i < len(row))] or list(columns)
    wide = {i: max(len(row[i]) for row in rows if i < len(row)) for i in kept}
    return "\n".join(
        "  ".join(
            row[i].rjust(wide[i]) if i >= len(options) else row[i].ljust(wide[i])
            for i in kept
            if i < len(row)
        ).rstrip()
        for row in rows
    )
