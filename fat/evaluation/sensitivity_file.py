"""Files and text of a sensitivity analysis: sensitivity.csv, .json and .png."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fat.evaluation.sensitivity_analysis import TensorSensitivity
from fat.quant.config import BITS, QuantSpec
from fat.utils.commands import command_line
from fat.utils.errors import FatError
from fat.utils.io import write_atomic, write_csv, write_json

__all__ = [
    "SensitivityReport",
    "format_bits",
    "format_worst",
    "read_sensitivity",
    "write_plot",
    "write_sensitivity",
]

FORMAT, VERSION = "fat-sensitivity", 1
CSV, JSON, PNG = "sensitivity.csv", "sensitivity.json", "sensitivity.png"
COLUMNS = (
    "rank",
    "layer",
    "kind",
    "bits",
    "alone_db",
    "alone_agreement",
    "without_db",
    "without_agreement",
    "parameters",
)
PLOTTED_TENSORS = 30
PLOTTED_ERROR = 200.0
"""Longest bar of the plot, %; beyond it the logits are unrelated to the float network's."""
COLORS = {"weight": "#2a6f97", "activation": "#e09f3e"}


@dataclass(frozen=True)
class SensitivityReport:
    """Results of a sensitivity analysis, and the network and images it was run on.

    Attributes:
        rows: Results of :func:`fat.evaluation.sensitivity`, the most sensitive tensor first.
        model: Name of the network.
        weights: Source of its weights.
        images: ``source``, ``root``, ``split`` and ``count`` of the images.
        spec: Quantization options of the student.
    """

    rows: Sequence[TensorSensitivity]
    model: str
    weights: str
    images: Mapping[str, Any]
    spec: QuantSpec


def write_sensitivity(directory: Path, report: SensitivityReport) -> None:
    """Write sensitivity.csv and sensitivity.json into a directory, each atomically.

    The columns of the CSV file are :data:`COLUMNS`. The JSON file has all fields of
    :class:`TensorSensitivity` under ``tensors``, and beside it the other fields of the report.
    """
    tensors = [{"rank": rank, **asdict(row)} for rank, row in enumerate(report.rows, 1)]
    table = ([_cell(tensor[column]) for column in COLUMNS] for tensor in tensors)
    write_csv(directory / CSV, COLUMNS, table)
    write_json(
        directory / JSON,
        {
            "format": FORMAT,
            "version": VERSION,
            "model": report.model,
            "weights": report.weights,
            "images": dict(report.images),
            "quantization": report.spec.to_dict(),
            "tensors": tensors,
        },
    )


def _cell(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else value


def read_sensitivity(path: str | os.PathLike[str]) -> SensitivityReport:
    """Read a report that :func:`write_sensitivity` wrote.

    Args:
        path: A sensitivity.json file, or a run directory with one.

    Raises:
        FatError: If the file is missing, damaged, or of another kind or version.
    """
    file = Path(path).expanduser()
    try:
        file = file / JSON if file.is_dir() else file
        found = file.is_file()
    except OSError:  # for example, the name is too long
        found = False
    if not found:
        raise FatError(f"There is no {file}. First analyze a run of this network: {_command()}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind, version = content["format"], content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    if (kind, version) != (FORMAT, VERSION):
        raise FatError(
            f"{file} has the format {kind} {version}; this version of FAT reads {FORMAT} "
            f"{VERSION}. Repeat the analysis: {_command()}."
        )
    try:
        return SensitivityReport(
            rows=[_row(stored) for stored in content["tensors"]],
            model=content["model"],
            weights=content["weights"],
            images=content["images"],
            spec=QuantSpec.from_dict(content["quantization"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def _row(stored: Mapping[str, Any]) -> TensorSensitivity:
    fields = {name: stored[name] for name in TensorSensitivity.__dataclass_fields__}
    fields["bits_db"] = {int(bits): float(db) for bits, db in stored["bits_db"].items()}
    for name in ("position", "bits", "parameters", "biases"):
        if type(fields[name]) is not int or fields[name] < 0:
            raise ValueError(f"{name} of {stored['layer']} is {fields[name]!r}")
    if stored["kind"] == "weight" and set(fields["bits_db"]) != set(BITS):
        raise ValueError(f"bits_db of {stored['layer']} has {sorted(fields['bits_db'])}")
    return TensorSensitivity(**fields)


def _damaged(file: Path, error: Exception) -> FatError:
    return FatError(
        f"{file} is not a valid sensitivity report ({type(error).__name__}: {error}). Repeat the "
        f"analysis: {_command()}."
    )


def _command() -> str:
    return command_line("evaluate", "run=DIR", "analysis=sensitivity")


def format_worst(rows: Sequence[TensorSensitivity], count: int = 10) -> str:
    """Format the first rows as a text table."""
    shown = rows[:count]
    width = max(len(row.layer) for row in shown)
    head = f"{'layer':<{width}}  {'kind':<10} bits  alone dB  agreement  without dB  agreement"
    lines = [
        f"{row.layer:<{width}}  {row.kind:<10} {row.bits:>4} {row.alone_db:>9.2f} "
        f"{row.alone_agreement:>10.2f} {row.without_db:>11.2f} {row.without_agreement:>10.2f}"
        for row in shown
    ]
    return "\n".join([head, *lines])


def format_bits(bits: Mapping[str, int]) -> str:
    """Format the layers of each bit-width as one line, the widest first.

    Examples:
        >>> print(format_bits({"stem": 8, "conv": 4, "head": 8}))
        8 bits: stem, head
        4 bits: conv
    """
    ordered = sorted(bits.items(), key=lambda item: -item[1])
    return "\n".join(
        f"{width} bits: {', '.join(layer for layer, _ in group)}"
        for width, group in groupby(ordered, key=lambda item: item[1])
    )


def write_plot(directory: Path, report: SensitivityReport) -> bool:
    """Plot the most sensitive tensors as sensitivity.png, if matplotlib is installed.

    The bars show the relative error of the logits, 100·10^(−SQNR/20) in percent.

    Returns:
        ``True`` if the file was written, ``False`` without matplotlib.
    """
    try:
        # Not pyplot, which needs a window system and has global state.
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return False
    rows = report.rows[:PLOTTED_TENSORS]
    errors = [min(100.0 * 10 ** (-row.alone_db / 20), PLOTTED_ERROR) for row in rows]
    figure = Figure(figsize=(9, 1.3 + 0.25 * len(rows)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(rows)), errors, 0.75, color=[COLORS[row.kind] for row in rows])
    axis.bar_label(bars, [f"{row.alone_db:.1f} dB" for row in rows], fontsize=7, padding=3)
    axis.set_yticks(
        range(len(rows)), [f"{row.layer}  ({row.bits} bits)" for row in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.set_xlabel("Relative error of the logits when only this tensor is quantized, %")
    axis.set_title(
        f"{report.model}: the {len(rows)} most sensitive of {len(report.rows)} tensors, "
        f"{report.images['count']} images",
        fontsize=10,
        loc="left",
    )
    axis.legend(
        handles=[
            Patch(color=color, label=kind)
            for kind, color in COLORS.items()
            if any(row.kind == kind for row in rows)
        ],
        frameon=False,
        loc="lower right",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    write_atomic(directory / PNG, lambda path: figure.savefig(path, dpi=130, format="png"))
    return True
