"""A sweep as a table: sweep.csv with one row per job, and a text for the terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fat.report.records import Run, Sweep, leaves, number
from fat.report.sweep_grid import varied_options
from fat.report.text import METRICS_KEYS
from fat.utils.io import write_csv

__all__ = ["CSV", "flatten_metrics", "format_sweep", "sweep_table", "write_table"]

CSV = "sweep.csv"
FIRST = ("directory", "status", "error", "command")
SEPARATE = ("command", "status")
"""Keys of metrics.json that have a column of their own."""
_MEASURES = ("top1", "top5", "agreement", "sqnr_db", "rmse")
_STAGES = ("load", "finetune", "prepare", "calibrate", "evaluate", "train", "export")
KNOWN = (
    *("model", "weights", "data.source", "data.root", "data.labelled"),
    *("bits.weight", "bits.activation", "granularity", "scheme"),
    *("init.weight", "init.activation", "seed", "float.top1", "float.top5"),
    *(f"calibrated.{measure}" for measure in _MEASURES),
    *(f"trained.{measure}" for measure in _MEASURES),
    "accuracy_drop",
    *(f"seconds.{stage}" for stage in _STAGES),
    *("training.steps", "training.calibrated_loss", "training.best_loss", "training.best_step"),
    *("size_mb.float", "size_mb.quantized"),
)
"""Columns that are always present, so that programs can rely on them."""


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Flatten metrics.json to texts by dotted name.

    Numbers have all their digits and lists are JSON; null, NaN and infinity are empty.

    Examples:
        >>> flatten_metrics({"float": {"top1": 90.0, "top5": None}, "trained": None})
        {'float.top1': '90.0', 'float.top5': '', 'trained': ''}
    """
    return {name: _text(value) for name, value in leaves(metrics).items()}


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # UTF-8 has no lone surrogates
    return json.dumps(value, default=str)


def sweep_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a sweep, one row per job.

    Columns: ``directory`` (relative to the sweep), ``status``, ``error`` (one line), ``command``;
    each option that differs between jobs as ``option.NAME``; then metrics.json flattened with
    dotted names in the order of its schema. Columns that only some runs have, such as those of an
    exported file, are next to the others of their key.

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
    kept = {key: value for key, value in run.metrics.items() if key not in SEPARATE}
    flat = flatten_metrics(kept)
    # "trained": null gets no column beside "trained.top1".
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
        file: The CSV file.
        sweep: From :func:`fat.report.records.read_sweep`.

    Raises:
        FatError: If the file cannot be written.
    """
    header, rows = sweep_table(sweep)
    return write_csv(file, header, rows)


def format_sweep(sweep: Sweep) -> str:
    """Format a sweep for the terminal: a line per job with its options and results.

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
            found = [number({**run.metrics, **final}, key) for _, key, _ in measures]
            row += [
                "" if value is None else f"{value:.{digits}f}"
                for value, (*_, digits) in zip(found, measures, strict=True)
            ]
        else:
            row += [run.status, *[""] * (len(measures) - 1)]
        rows.append(row)
    columns = list(zip(*rows, strict=True))
    shown = [i for i, column in enumerate(columns) if any(column[1:])] or range(len(columns))
    width = {i: max(map(len, columns[i])) for i in shown}
    return "\n".join(
        "  ".join(
            row[i].rjust(width[i]) if i >= len(options) else row[i].ljust(width[i]) for i in shown
        ).rstrip()
        for row in rows
    )
