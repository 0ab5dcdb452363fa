"""A sweep's page: all its runs side by side, as one self-contained report.html."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fat.report import html
from fat.report.html import Column, Sorted, format_number, render
from fat.report.plots import SCALE, Dot, before_after, heat_map, scale_top, trade_off
from fat.report.records import (
    Run,
    Sweep,
    is_sweep,
    latencies,
    number,
    read_sweep,
    total_seconds,
    word,
)
from fat.report.run_page import HTML
from fat.report.sweep_grid import (
    MEASURES,
    Labels,
    Measure,
    Panel,
    Stage,
    choose_measure,
    final_loss,
    is_axis,
    labels_of,
    loss,
    panels,
    varied_options,
)
from fat.report.tables import CSV, write_table
from fat.utils.errors import FatError
from fat.utils.io import write_text

__all__ = ["combine", "sweep_page", "write_comparison", "write_sweep"]

STATUSES = ("finished", "failed", "unfinished", "not started")
STAGES: Mapping[Stage, str] = {"trained": "trained", "calibrated": "calibrated only"}
POINT = 1.0
"""A network counts as close to the float network up to this loss, points."""
CELLS_PER_PANEL = 2
"""With fewer cells per panel than this, heat maps would be single squares."""
MOST_OPTIONS = 12
"""Differing options that are shown at once; separate runs may differ in dozens."""
COLUMNS = {
    "float.top1": ("float top-1", 2),
    "calibrated.top1": ("calibrated top-1", 2),
    "trained.top1": ("trained top-1", 2),
    "calibrated.agreement": ("calibrated agreement", 2),
    "trained.agreement": ("trained agreement", 2),
    "calibrated.sqnr_db": ("calibrated SQNR, dB", 1),
    "trained.sqnr_db": ("trained SQNR, dB", 1),
    "size_mb.quantized": ("size, MB", 2),
}
"""Keys of metrics.json in the table of all runs: heading and digits."""


def write_sweep(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a sweep's sweep.csv and report.html into its directory, each atomically.

    Args:
        directory: The directory of a sweep, also of one that is still running.

    Returns:
        The table and the page.

    Raises:
        FatError: If the folder is not a sweep directory, has no run, or cannot be written.
    """
    place = Path(directory).expanduser()
    if not is_sweep(place):
        raise FatError(
            f"{place} is not the directory of a sweep: it contains no sweep.json and no "
            "multirun.yaml. python train.py -m … starts a sweep, by default under multirun/."
        )
    sweep = read_sweep(place)
    return write_table(place / CSV, sweep), write_text(place / HTML, sweep_page(sweep, CSV))


def write_comparison(file: str | os.PathLike[str], runs: Sequence[Run]) -> tuple[Path, Path]:
    """Write a page that compares runs, and a table of them with the suffix .csv beside it.

    Args:
        file: The page.
        runs: From any sweeps and directories.

    Returns:
        The table and the page.

    Raises:
        FatError: If no run was given, or a file cannot be written.
    """
    target = Path(file).expanduser()
    beside = target.with_suffix(".csv")
    sweep = combine(runs, target.parent)
    return write_table(beside, sweep), write_text(target, sweep_page(sweep, beside.name))


def combine(runs: Sequence[Run], folder: Path) -> Sweep:
    """Combine runs of several places into one sweep, named relative to the folder of its page.

    Args:
        runs: In the order to show them; a directory that is given twice counts once.
        folder: Where the page will be.

    Raises:
        FatError: If no run was given.
    """
    once = {run.directory.resolve(): run for run in runs}
    if not once:
        raise FatError("There is no run to compare; give directories of runs or sweeps.")
    named = tuple(
        replace(run, name=Path(os.path.relpath(place, folder.resolve())).as_posix())
        for place, run in once.items()
    )
    return Sweep(folder, f"Comparison of {len(named)} runs", None, named)


@dataclass(frozen=True)
class _View:
    """Input of all parts of the page."""

    runs: Sequence[Run]
    labels: Sequence[Labels]
    varied: Mapping[str, Sequence[str]]
    measure: Measure

    @property
    def points(self) -> str:
        return MEASURES[self.measure]

    def title(self, place: int) -> str:
        label = self.labels[place]
        return " ".join(text for text in (label.network, label.bits, label.init) if text)

    def link(self, place: int) -> str | None:
        """Address of the run's page, ``None`` if it has none."""
        run = self.runs[place]
        return quote(f"{run.name}/{HTML}") if (run.directory / HTML).is_file() else None


def sweep_page(sweep: Sweep, table_name: str | None = None) -> str:
    """Return a sweep's page as self-contained HTML.

    Args:
        sweep: From :func:`fat.report.records.read_sweep` or :func:`combine`.
        table_name: Name of the CSV file beside the page, to link to; ``None`` if there is none.
    """
    runs = sweep.runs
    view = _View(runs, labels_of(runs), varied_options(runs), choose_measure(runs))
    counts = {status: sum(run.status == status for run in runs) for status in STATUSES}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    options = [
        (name, ", ".join(value for value in dict.fromkeys(values) if value))
        for name, values in view.varied.items()
    ]
    picks = [_pick(view, place) for place in range(len(runs))]
    return render(
        "sweep.html.j2",
        title=f"{sweep.title} · sweep",
        sweep=sweep,
        counts=f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {counted}",
        best=_best(view, counts),
        options=options,
        most_options=MOST_OPTIONS,
        measure=view.measure,
        points=view.points,
        scale=SCALE,
        targets=_targets(runs),
        scatter=_scatter(view),
        runs_table=_table(view),
        table_name=table_name,
        picks=picks,
        failed=[(place, run) for place, run in enumerate(runs) if run.status == "failed"],
        remaining=[run for run in runs if run.status in STATUSES[2:]],
        data=picks,
        **_losses(view),
    )


def _targets(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(target for run in runs for target in latencies(run.metrics)))


def _best(view: _View, counts: Mapping[str, int]) -> list[tuple[str, str, str]]:
    tiles = [
        (status.capitalize(), f"{counts[status]}", f"of {len(view.runs)} runs")
        for status in STATUSES[:2]
    ]
    losses = [
        (lost, place)
        for place, run in enumerate(view.runs)
        if (lost := final_loss(run, view.measure)) is not None
    ]
    if losses:
        lost, place = min(losses)
        tiles.append((f"Lowest {view.points}", format_number(lost), view.title(place)))
    close = [
        (size, place)
        for lost, place in losses
        if lost <= POINT
        and (size := number(view.runs[place].metrics, "size_mb.quantized")) is not None
    ]
    if close:
        size, place = min(close)
        title = f"Smallest within {POINT:g} point"
        tiles.append((title, format_number(size, 2, " MB"), view.title(place)))
    return tiles


def _pick(view: _View, place: int) -> dict[str, Any]:
    """Return the facts that page.js shows when the cell or point of a run is selected."""
    run, metrics = view.runs[place], view.runs[place].metrics

    def stages(*keys: str, unit: str = "") -> str:
        found = [number(metrics, key) for key in keys]
        return " → ".join(format_number(value, 2, unit) for value in found if value is not None)

    measured = {
        "top-1": stages("float.top1", "calibrated.top1", "trained.top1"),
        "agreement": stages("calibrated.agreement", "trained.agreement", unit=" %"),
        "size": stages("size_mb.quantized", unit=" MB"),
    } | {
        f"latency in {target}": format_number(time, 2, " ms")
        for target, time in latencies(metrics).items()
    }
    options = {name: values[place] for name, values in view.varied.items() if not is_axis(name)}
    return {
        "title": view.title(place),
        "directory": run.name,
        "status": run.status,
        "link": view.link(place),
        "command": run.command,
        "lines": [
            *(f"{name}={value}" for name, value in options.items() if value),
            *(f"{name}: {value}" for name, value in measured.items() if value),
            *([run.error] if run.error else []),
        ],
    }


def _losses(view: _View) -> dict[str, Any]:
    """Heat maps of the loss, or one plot of separate runs that have little in common."""
    laid, along = panels(view.runs, view.varied, view.measure)
    cells = [cell for panel in laid for cell in panel.cells.values()]
    stages = [stage for stage in STAGES if any(cell.values[stage] for cell in cells)]
    found: dict[str, Any] = {"single": None, "maps": [], "several": False, "top": 0, "along": along}
    if not stages:
        return found
    if len(laid) > 1 and len(cells) < CELLS_PER_PANEL * len(laid):
        rows = [
            (run.name, loss(run, "calibrated", view.measure), loss(run, "trained", view.measure))
            for run in view.runs
        ]
        plot = html.plot(
            before_after(rows, f"{view.points}, points"),
            f"The {view.points} of each run, calibrated and trained; the table below has the same "
            "numbers",
            height=90 + 30 * len(rows),
        )
        return found | {"single": plot}
    means = [cell.mean(stage) for cell in cells for stage in stages]
    top = scale_top([mean for mean in means if mean is not None])
    status = [run.status for run in view.runs]
    maps = [
        (
            _panel_title(panel),
            [
                html.plot(
                    heat_map(panel, stage, top, status),
                    f"Heat map of the {view.points}, {STAGES[stage]}, {_panel_title(panel)}: "
                    "networks down, bits across; the table below has the same numbers",
                    height=34 + 40 * len(panel.networks),
                    title=STAGES[stage],
                    least_width=150 + 48 * len(panel.bits),
                )
                for stage in stages
            ],
        )
        for panel in laid
    ]
    return found | {"maps": maps, "top": top, "several": any(len(cell.runs) > 1 for cell in cells)}


def _panel_title(panel: Panel) -> str:
    options = [f"{name}={value or 'unknown'}" for name, value in panel.options.items()]
    return " · ".join([f"init {panel.init or 'unknown'}", *options])


def _scatter(view: _View) -> list[str]:
    """Plots of the loss against size and against the latency in each runtime."""
    costs: dict[tuple[str, str], list[Dot]] = {}
    runtimes: dict[str, set[str]] = {}
    for place, run in enumerate(view.runs):
        lost, network = final_loss(run, view.measure), view.labels[place].network
        if lost is None:
            continue
        size = number(run.metrics, "size_mb.quantized")
        if size is not None:
            key = ("", "size of the quantized network, MB")
            costs.setdefault(key, []).append(Dot(size, lost, network, place))
        for target, time in latencies(run.metrics).items():
            key = (target, "latency of one image, ms")
            costs.setdefault(key, []).append(Dot(time, lost, network, place))
            runtime = word(run.metrics, f"exported.{target}.runtime")
            runtimes.setdefault(target, set()).update([runtime] if runtime else [])
    y = f"{view.points}, points"
    plots = []
    for (target, x), dots in sorted(costs.items(), key=lambda item: item[0][0] != ""):
        runtime = ", ".join(sorted(runtimes.get(target, ())))
        title = f"Latency in {runtime or target}" if target else "Size"
        plots.append(
            html.plot(
                trade_off(dots, x, y),
                f"{title}: {y} against {x}, one point for each of {len(dots)} runs",
                height=340 + 20 * len({dot.group for dot in dots}),
                title=title,
            )
        )
    return plots


def _table(view: _View) -> tuple[list[Column], list[tuple[Any, ...]], list[str]]:
    """Columns, rows and row ids of the table of all runs."""
    runs, labels = view.runs, view.labels
    places = range(len(runs))
    columns: list[tuple[Column, list[Any]]] = [
        (
            Column("run"),
            [Sorted(html.link(view.link(i), runs[i].name), runs[i].name) for i in places],
        ),
        (Column("status"), [Sorted(html.pill(run.status), run.status) for run in runs]),
        (Column("network"), [label.network for label in labels]),
        (
            Column("bits"),
            [
                Sorted(label.bits, 1000 * label.widths[0] + label.widths[1])
                if label.bits
                else Sorted("–", "")
                for label in labels
            ],
        ),
        (Column("init"), [Sorted(label.init or "–", label.init) for label in labels]),
    ]
    # Network, bits and init have columns of their own.
    for name in [name for name in view.varied if not is_axis(name)][:MOST_OPTIONS]:
        cells = [Sorted(value or "–", value) for value in view.varied[name]]
        columns.append((Column(name), cells))
    columns.append(
        (
            Column(view.points, True, "of the final network of the run, points"),
            [final_loss(run, view.measure) for run in runs],
        )
    )
    for key, (title, digits) in COLUMNS.items():
        values = [number(run.metrics, key) for run in runs]
        if any(value is not None for value in values):
            columns.append((Column(title, True, "", digits), values))
    for target in _targets(runs):
        column = Column(f"{target}, ms", True, "latency of one image")
        columns.append((column, [latencies(run.metrics).get(target) for run in runs]))
    columns += [
        (Column("seconds", True, "all stages", 0), [total_seconds(run.metrics) for run in runs]),
        (
            Column("command"),
            [Sorted(html.command_line(run.command), run.command or "") for run in runs],
        ),
    ]
    rows = list(zip(*(values for _, values in columns), strict=True))
    return [column for column, _ in columns], rows, [f"run-{i}" for i in places]
