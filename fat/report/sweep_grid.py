"""Layout of a sweep: differing options, panels of heat maps, and Pareto fronts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from fat.report.records import Run, dig, leaves, number, word

__all__ = [
    "MEASURES",
    "Cell",
    "Labels",
    "Measure",
    "Panel",
    "Stage",
    "choose_measure",
    "final_loss",
    "is_axis",
    "labels_of",
    "loss",
    "panels",
    "pareto_front",
    "varied_options",
]

Measure = Literal["accuracy", "agreement"]
Stage = Literal["calibrated", "trained"]
STAGES: tuple[Stage, ...] = ("calibrated", "trained")
MEASURES: Mapping[Measure, str] = {"accuracy": "accuracy drop", "agreement": "loss of agreement"}
"""Losses that are drawn: points of top-1 below the float network, and 100 − agreement."""

AXES = ("model", "init", "quant.bits", "quant.weight.bits", "quant.activation.bits")
"""Options that the axes and titles of heat maps show, so that they need no panels."""
IGNORED = ("name", "logger", "trainer.progress", "trainer.threads", "data.workers")
"""Options that do not change a result."""
REPEATS = ("seed", "export")
"""Options that repeat a measurement: a cell shows the mean of such runs."""


def choose_measure(runs: Sequence[Run]) -> Measure:
    """Return ``accuracy`` if every run with metrics has labels, else ``agreement``."""
    evaluated = [run for run in runs if isinstance(run.metrics.get("calibrated"), Mapping)]
    labelled = [run for run in evaluated if loss(run, "calibrated", "accuracy") is not None]
    return "accuracy" if evaluated and len(labelled) == len(evaluated) else "agreement"


def loss(run: Run, stage: Stage, measure: Measure) -> float | None:
    """Return the loss of a run against the float network after a stage, percentage points.

    Args:
        run: Any run.
        stage: ``calibrated`` or ``trained``.
        measure: ``accuracy``: float top-1 − top-1; ``agreement``: 100 − agreement.

    Returns:
        The loss; ``None`` if the run has no such metric.
    """
    if measure == "agreement":
        agreement = number(run.metrics, f"{stage}.agreement")
        return None if agreement is None else 100.0 - agreement
    before, after = number(run.metrics, "float.top1"), number(run.metrics, f"{stage}.top1")
    return None if before is None or after is None else before - after


def final_loss(run: Run, measure: Measure) -> float | None:
    """Return the loss of a run's final network; ``None`` for a run without one."""
    if isinstance(run.metrics.get("trained"), Mapping):
        return loss(run, "trained", measure)
    return loss(run, "calibrated", measure) if run.status == "finished" else None


def varied_options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options that differ between runs, with the value in each run ("" if unknown).

    If the same options were typed for all runs, as in the jobs of one sweep, those are compared.
    Otherwise whole configurations are compared.

    Args:
        runs: Any runs.
    """
    options = [_typed(run) for run in runs]
    if len({frozenset(typed) for typed in options}) != 1 or not any(options):
        # For a run without a configuration, what was typed is used as far as the names agree.
        whole = [
            {
                name: value if isinstance(value, str) else json.dumps(value, default=str)
                for name, value in leaves(run.config).items()
            }
            for run in runs
        ]
        known = {name for flat in whole for name in flat}
        options = [
            flat or {name: value for name, value in typed.items() if name in known or not known}
            for flat, typed in zip(whole, options, strict=True)
        ]
    names = dict.fromkeys(name for found in options for name in found)
    columns = {name: [found.get(name, "") for found in options] for name in names}
    return {
        name: values
        for name, values in columns.items()
        if len(set(values) - {""}) > 1 and not _is(name, IGNORED)
    }


def _typed(run: Run) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in run.overrides)
    return {name.lstrip("+~"): value for name, _, value in pairs}


def _is(name: str, among: Sequence[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in among)


def is_axis(option: str) -> bool:
    """Return whether the axes and titles of heat maps show an option: network, bits and init."""
    return _is(option, AXES)


@dataclass(frozen=True)
class Labels:
    """Names of a run on heat maps.

    Attributes:
        network: Architecture.
        bits: Bits of weights and activations, as in ``W4A8``; "" if unknown.
        init: Init strategy of the thresholds.
        widths: Bits of weights and of activations, for sorting.
    """

    network: str
    bits: str
    init: str
    widths: tuple[float, float]


def labels_of(runs: Sequence[Run]) -> list[Labels]:
    """Return the network, bits and init of every run.

    Names as they were typed are used if every run has one, so that a job that never started is in
    the same row as those that did.
    """
    typed = [_typed(run) for run in runs]
    short = {
        group: all(group in options for options in typed)
        and not any(name.startswith(f"{group}.") for options in typed for name in options)
        for group in ("model", "init")
    }
    found = []
    for run, options in zip(runs, typed, strict=True):
        widths = _widths(run, options)
        found.append(
            Labels(
                network=options["model"] if short["model"] else _network(run, options),
                bits="" if widths is None else f"W{widths[0]:.3g}A{widths[1]:.3g}",
                init=options["init"] if short["init"] else _init(run, options),
                widths=widths or (0.0, 0.0),
            )
        )
    return found


def _network(run: Run, typed: Mapping[str, str]) -> str:
    return (
        word(run.metrics, "model")
        or word(run.config, "model.name")
        or typed.get("model.name")
        or typed.get("model")
        or run.name
    )


def _init(run: Run, typed: Mapping[str, str]) -> str:
    names = [
        word(run.metrics, f"init.{kind}") or word(run.config, f"init.{kind}.name")
        for kind in ("weight", "activation")
    ]
    weight, activation = (name or "" for name in names)
    if weight == activation:
        return weight or typed.get("init", "")
    return f"{weight} / {activation}"


def _widths(run: Run, typed: Mapping[str, str]) -> tuple[float, float] | None:
    # The config takes precedence, because a run that failed early has no metrics. With mixed bits
    # the metrics do, because they have the mean over all weights.
    found: list[float | None] = []
    for kind in ("weight", "activation"):
        asked = number(run.config, f"quant.{kind}.bits") or number(run.config, "quant.bits")
        if kind == "weight" and dig(run.config, "quant.mixed") is not None:
            asked = None
        option = typed.get(f"quant.{kind}.bits") or typed.get("quant.bits")
        given = float(option) if option and option.isdigit() else None
        found.append(asked or number(run.metrics, f"bits.{kind}") or given)
    weight, activation = found
    return None if weight is None or activation is None else (weight, activation)


@dataclass(frozen=True)
class Cell:
    """Runs of one network at one bit-width in one panel: one, or several that differ in seed.

    Attributes:
        runs: Their places in the sweep.
        values: Known losses by stage, percentage points.
    """

    runs: tuple[int, ...]
    values: Mapping[Stage, tuple[float, ...]]

    def mean(self, stage: Stage) -> float | None:
        """Return the mean over the runs that have a value, ``None`` if there is none."""
        return fmean(self.values[stage]) if self.values[stage] else None


@dataclass(frozen=True)
class Panel:
    """A heat map: networks down, bits across.

    Attributes:
        init: Init strategy of the thresholds.
        options: Further options that distinguish this panel from the others.
        networks: Rows.
        bits: Columns, the widest first.
        cells: Cells by row and column; pairs without a run are left out.
    """

    init: str
    options: Mapping[str, str]
    networks: tuple[str, ...]
    bits: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]


def panels(
    runs: Sequence[Run], varied: Mapping[str, Sequence[str]], measure: Measure
) -> tuple[list[Panel], list[str]]:
    """Lay out runs as heat maps, one panel per init and per further option that separates runs.

    Args:
        runs: Runs of one sweep.
        varied: From :func:`varied_options`.
        measure: The loss in the cells.

    Returns:
        The panels, and the names of differing options that need no panel, because they only change
        together with network, bits, init or an option that has panels.
    """
    names = labels_of(runs)
    places = [i for i, label in enumerate(names) if label.bits]
    further = [name for name in varied if not is_axis(name) and not _is(name, REPEATS)]
    cells: list[tuple[str, ...]] = [(n.network, n.bits, n.init) for n in names]
    used, along = [], []
    for name in further:
        refined = [(*cell, value) for cell, value in zip(cells, varied[name], strict=True)]
        if len({refined[i] for i in places}) > len({cells[i] for i in places}):
            cells = refined
            used.append(name)
        else:
            along.append(name)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in places:
        groups.setdefault(cells[i][2:], []).append(i)
    networks = tuple(dict.fromkeys(names[i].network for i in places))
    widths = dict.fromkeys(sorted({(names[i].widths, names[i].bits) for i in places}, reverse=True))
    columns = tuple(dict.fromkeys(bits for _, bits in widths))
    result = []
    for (init, *values), members in groups.items():
        inside: dict[tuple[str, str], list[int]] = {}
        for i in members:
            inside.setdefault((names[i].network, names[i].bits), []).append(i)
        result.append(
            Panel(
                init=init,
                options=dict(zip(used, values, strict=True)),
                networks=tuple(n for n in networks if any(n == key[0] for key in inside)),
                bits=tuple(b for b in columns if any(b == key[1] for key in inside)),
                cells={key: _cell(runs, found, measure) for key, found in inside.items()},
            )
        )
    return result, along


def _cell(runs: Sequence[Run], members: Sequence[int], measure: Measure) -> Cell:
    values: dict[Stage, tuple[float, ...]] = {}
    for stage in STAGES:
        losses = [loss(runs[i], stage, measure) for i in members]
        values[stage] = tuple(value for value in losses if value is not None)
    return Cell(tuple(members), values)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the points that no other point dominates; lower is better in both coordinates.

    A point dominates another if it is not larger in either coordinate and smaller in one. Equal
    points do not dominate each other.

    Args:
        points: Pairs of finite numbers.

    Returns:
        Indices of the points of the front, sorted by the first coordinate.

    Examples:
        >>> pareto_front([(2.0, 1.0), (1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
        [1, 0]
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
