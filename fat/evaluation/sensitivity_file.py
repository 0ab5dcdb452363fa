"""A sensitivity measurement as files, sensitivity.csv, .json and .png, and as text."""

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
SHOWN = 30
"""How many tensors the plot shows."""
MOST_SHOWN = 200.0
"""Longest bar of the plot, %; past it the logits have nothing left of the float network's."""
COLOURS = {"weight": "#2a6f97", "activation": "#e09f3e"}


@dataclass(frozen=True)
class SensitivityReport:
    """A measurement and what it was made on.

    Attributes:
        rows: From :func:`fat.evaluation.sensitivity_analysis`, the most harmful tensor first.
        model: Name of the network.
        weights: Where its weights came from.
        images: ``source``, ``root``, ``split`` and ``count`` of the images.
        spec: What was asked of the network that was measured.
    """

    rows: Sequence[TensorSensitivity]
    model: str
    weights: str
    images: Mapping[str, Any]
    spec: QuantSpec


def write_sensitivity(directory: Path, report: SensitivityReport) -> None:
    """Write sensitivity.csv and sensitivity.json into a directory, each atomically.

    CSV columns: rank, layer, kind, bits, alone_db, alone_agreement, without_db, without_agreement,
    parameters. The JSON has the same by tensor, with ``position``, ``biases`` and ``bits_db``, and
    beside ``tensors`` what was measured on what.
    """
    table = (
        (
            rank,
            row.layer,
            row.kind,
            row.bits,
            f"{row.alone_db:.3f}",
            f"{row.alone_agreement:.3f}",
            f"{row.without_db:.3f}",
            f"{row.without_agreement:.3f}",
            row.parameters,
        )
        for rank, row in enumerate(report.rows, 1)
    )
    write_csv(directory / CSV, COLUMNS, table)
    tensors = [{"rank": rank, **asdict(row)} for rank, row in enumerate(report.rows, 1)]
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


def read_sensitivity(path: str | os.PathLike[str]) -> SensitivityReport:
    """Read back what :func:`write_sensitivity` wrote.

    Args:
        path: A sensitivity.json, or a run directory that holds one.

    Raises:
        FatError: If there is none, or it is damaged, of another kind or of another version.
    """
    file = Path(path).expanduser()
    try:
        file = file / JSON if file.is_dir() else file
        found = file.is_file()
    except OSError:  # a name that is too long, for example
        found = False
    if not found:
        raise FatError(
            f"There is no {file}. Measure a run of the network first: "
            "python evaluate.py run=DIR analysis=sensitivity."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind, version = content["format"], content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    if (kind, version) != (FORMAT, VERSION):
        raise FatError(
            f"{file} is of the format {kind} {version}; this FAT reads {FORMAT} {VERSION}. "
            "Measure again: python evaluate.py run=DIR analysis=sensitivity."
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
        f"{file} is not what a sensitivity measurement wrote ({type(error).__name__}: {error}). "
        "Measure again: python evaluate.py run=DIR analysis=sensitivity."
    )


def format_worst(rows: Sequence[TensorSensitivity], count: int = 10) -> str:
    """The first rows as a table for people."""
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
    """Layers by bit-width, the widest first, one line for each width.

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
    """Draw the most harmful tensors as sensitivity.png, if matplotlib is installed.

    The bars are the relative error of the logits, 100·10^(−SQNR/20) in percent, so that long is
    bad.

    Returns:
        Whether the file was written; without matplotlib it is not.
    """
    try:
        # Without pyplot no window system is asked for and no state is shared.
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return False
    rows = report.rows[:SHOWN]
    errors = [min(100.0 * 10 ** (-row.alone_db / 20), MOST_SHOWN) for row in rows]
    figure = Figure(figsize=(9, 1.3 + 0.25 * len(rows)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(rows)), errors, 0.75, color=[COLOURS[row.kind] for row in rows])
    axis.bar_label(bars, [f"{row.alone_db:.1f} dB" for row in rows], fontsize=7, padding=3)
    axis.set_yticks(
        range(len(rows)), [f"{row.layer}  ({row.bits} bits)" for row in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.set_xlabel("Relative error of the logits when only this tensor is quantized, %")
    axis.set_title(
        f"{report.model}: the {len(rows)} most harmful of {len(report.rows)} tensors, "
        f"{report.images['count']} images",
        fontsize=10,
        loc="left",
    )
    axis.legend(
        handles=[
            Patch(color=colour, label=kind)
            for kind, colour in COLOURS.items()
            if any(row.kind == kind for row in rows)
        ],
        frameon=False,
        loc="lower right",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    write_atomic(directory / PNG, lambda path: figure.savefig(path, dpi=130, format="png"))
    return True
