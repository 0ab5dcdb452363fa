"""A sweep's page: all its runs side by side, as one report.html that opens alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

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
    plot,
    section,
    table,
    tiles,
)
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
"""A network this many points below float, or fewer, counts as near it."""
RUNS_A_PANEL = 2
"""With fewer cells a panel than this, heat maps would be single squares."""
MOST_OPTIONS = 12
"""So many options that differ are shown at once; loose runs may differ in dozens."""


def write_sweep(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a sweep's sweep.csv and report.html into its directory, each atomically.

    Args:
        directory: The directory of a sweep, also of one that still goes on.

    Returns:
        The table and the page.

    Raises:
        FatError: If the folder is no sweep's directory, holds no run, or cannot be written.
    """
    place = Path(directory).expanduser()
    if not is_sweep(place):
        raise FatError(
            f"{place} is not the directory of a sweep: it holds no sweep.json and no "
            "multirun.yaml. python train.py -m … makes one, by default under multirun/."
        )
    sweep = read_sweep(place)
    return write_table(place / CSV, sweep), write_text(place / HTML, sweep_page(sweep, CSV))


def write_comparison(file: str | os.PathLike[str], runs: Sequence[Run]) -> tuple[Path, Path]:
    """Write a page over any runs, and the same as a table beside it with the ending .csv.

    Args:
        file: The page.
        runs: From any sweeps and directories.

    Returns:
        The table and the page.

    Raises:
        FatError: If no run was given, or the place cannot be written.
    """
    target = Path(file).expanduser()
    beside = target.with_suffix(".csv")
    sweep = combine(runs, target.parent)
    return write_table(beside, sweep), write_text(target, sweep_page(sweep, beside.name))


def combine(runs: Sequence[Run], folder: Path) -> Sweep:
    """Runs of several places as one sweep, named relative to the folder of its page.

    Args:
        runs: In the order to show them; the same directory twice counts once.
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
class _Shown:
    """What all parts of the page look at."""

    sweep: Sweep
    runs: Sequence[Run]
    labels: Sequence[Labels]
    varied: Mapping[str, Sequence[str]]
    measure: Measure

    @property
    def points(self) -> str:
        return MEASURES[self.measure]

    def options(self, place: int) -> list[tuple[str, str]]:
        return [
            (name, values[place])
            for name, values in self.varied.items()
            if values[place] and not is_axis(name)
        ]

    def link(self, place: int) -> str | None:
        """Where the run's own page is, ``None`` where there is none."""
        run = self.runs[place]
        return quote(f"{run.name}/{HTML}") if (run.directory / HTML).is_file() else None


def sweep_page(sweep: Sweep, table_name: str | None = None) -> str:
    """A sweep's page as HTML that needs no other file and no network.

    Args:
        sweep: From :func:`fat.report.records.read_sweep` or :func:`combine`.
        table_name: Name of the CSV file beside the page, to link to; ``None`` where there is none.
    """
    runs = sweep.runs
    shown = _Shown(sweep, runs, labels_of(runs), varied_options(runs), choose_measure(runs))
    sections = [
        _summary(shown),
        _heat_maps(shown),
        _trade_offs(shown),
        _table(shown, table_name),
        _failures(shown),
        _others(shown),
    ]
    picks = [_pick(shown, place) for place in range(len(runs))]
    return page(f"{sweep.title} · sweep", _header(shown), sections, data=picks)


def _header(shown: _Shown) -> str:
    sweep = shown.sweep
    counts = [
        f"{count} {status}"
        for status in STATUSES
        if (count := sum(run.status == status for run in shown.runs))
    ]
    plural = "run" if len(shown.runs) == 1 else "runs"
    line = f"{len(shown.runs)} {plural}: {', '.join(counts)}"
    command = command_line(sweep.command) if sweep.command else ""
    return f'<h1>{escape(sweep.title)}</h1><p class="under">{escape(line)}</p>{command}'


def _summary(shown: _Shown) -> str:
    losses = [(final_loss(run, shown.measure), place) for place, run in enumerate(shown.runs)]
    judged = [(lost, place) for lost, place in losses if lost is not None]
    entries = []
    for status in STATUSES[:2]:
        count = sum(run.status == status for run in shown.runs)
        entries.append((status.capitalize(), f"{count}", f"of {len(shown.runs)} runs"))
    if judged:
        lost, place = min(judged)
        entries.append((f"Smallest {shown.points}", plain(lost), _what(shown, place)))
    near = [
        (size, place)
        for lost, place in judged
        if lost <= POINT
        and (size := number(shown.runs[place].metrics, "size_mb.quantized")) is not None
    ]
    if near:
        size, place = min(near)
        entries.append(
            (f"Smallest within {POINT:g} point", plain(size, 2, " MB"), _what(shown, place))
        )
    options = [
        (name, ", ".join(escape(value) for value in dict.fromkeys(values) if value))
        for name, values in shown.varied.items()
    ]
    parts = [tiles(entries)]
    if len(options) > MOST_OPTIONS:
        more = facts(options[MOST_OPTIONS:])
        parts.append(
            facts(options[:MOST_OPTIONS])
            + f"<details><summary>{len(options) - MOST_OPTIONS} more options differ</summary>"
            f"{more}</details>"
        )
    else:
        parts.append(facts(options))
    parts += [note(problem, "bad") for problem in shown.sweep.problems]
    title = "What was swept" if shown.sweep.command else "What differs"
    return section(title, *parts)


def _what(shown: _Shown, place: int) -> str:
    label = shown.labels[place]
    return " ".join(text for text in (label.network, label.bits, label.init) if text)


def _told(run: Run) -> list[tuple[str, str]]:
    """Figures of a run in words, without those it does not have."""
    metrics = run.metrics
    entries = [
        (
            "top-1",
            " → ".join(
                plain(value)
                for key in ("float", "calibrated", "trained")
                if (value := number(metrics, f"{key}.top1")) is not None
            ),
        ),
        (
            "agreement",
            " → ".join(
                plain(value, 2, " %")
                for key in ("calibrated", "trained")
                if (value := number(metrics, f"{key}.agreement")) is not None
            ),
        ),
        ("size", plain(number(metrics, "size_mb.quantized"), 2, " MB")),
        *(
            (f"latency in {target}", plain(time, 2, " ms"))
            for target, time in latencies(metrics).items()
        ),
    ]
    return [(name, value) for name, value in entries if value not in ("", "–")]


def _pick(shown: _Shown, place: int) -> dict[str, object]:
    """What page.js shows when a cell or a point is chosen."""
    run = shown.runs[place]
    return {
        "title": _what(shown, place),
        "directory": run.name,
        "status": run.status,
        "link": shown.link(place),
        "command": run.command,
        "lines": [
            *(f"{n}={v}" for n, v in shown.options(place)),
            *(f"{n}: {v}" for n, v in _told(run)),
            *([run.error] if run.error else []),
        ],
    }


def _heat_maps(shown: _Shown) -> str:
    laid, along = panels(shown.runs, shown.varied, shown.measure)
    stages = [
        stage
        for stage in STAGES
        if any(cell.values[stage] for panel in laid for cell in panel.cells.values())
    ]
    if not stages:
        return ""
    lost = (
        "Points of top-1 below the float network"
        if shown.measure == "accuracy"
        else "100 − agreement with the float network, in points, because not every run has labels"
    )
    title = shown.points.capitalize()
    if len(laid) > 1 and sum(len(panel.cells) for panel in laid) < RUNS_A_PANEL * len(laid):
        # Loose runs, each in a panel of its own: one below the other says more.
        return section(
            title,
            plot(
                before_after(
                    [
                        (
                            run.name,
                            loss(run, "calibrated", shown.measure),
                            loss(run, "trained", shown.measure),
                        )
                        for run in shown.runs
                    ],
                    f"{shown.points}, points",
                ),
                f"The {shown.points} of each run, calibrated and trained; the table below has the "
                "same figures",
                height=90 + 30 * len(shown.runs),
            ),
            intro=f"{lost}; left is good. Choose a point for the command that gives its run again.",
        )
    values = [
        mean
        for panel in laid
        for cell in panel.cells.values()
        for stage in stages
        if (mean := cell.mean(stage)) is not None
    ]
    top = scale_top(values)
    status = [run.status for run in shown.runs]
    parts = [_legend(top, shown.points)]
    for panel in laid:
        maps = [
            plot(
                heat_map(panel, stage, top, status),
                f"Heat map of the {shown.points}, {STAGES[stage]}, {_panel_title(panel)}: networks "
                "down, bits across; the table below has the same figures",
                height=34 + 40 * len(panel.networks),
                title=STAGES[stage],
                least_width=150 + 48 * len(panel.bits),
            )
            for stage in stages
        ]
        parts.append(
            f'<div class="group"><h3>{escape(_panel_title(panel))}</h3>'
            f'<div class="panels two">{"".join(maps)}</div></div>'
        )
    if along:
        parts.append(
            note(
                f"Runs also differ in {', '.join(along[:MOST_OPTIONS])}"
                + (" and more" if len(along) > MOST_OPTIONS else "")
                + ", together with what the heat maps show."
            )
        )
    several = any(len(cell.runs) > 1 for panel in laid for cell in panel.cells.values())
    return section(
        title,
        *parts,
        intro=f"{lost}; light is good. W4A8 is 4 bits for weights, 8 for activations. Choose a "
        "cell for the command that gives its run again."
        + (" A cell with several runs shows their mean." if several else ""),
    )


def _panel_title(panel: Panel) -> str:
    options = [f"{name}={value or 'not known'}" for name, value in panel.options.items()]
    return " · ".join([f"init {panel.init or 'not known'}", *options])


def _legend(top: float, what: str) -> str:
    """The colour scale of all heat maps of the page."""
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 40, 80) if tick <= top * 0.9]
    marks = "".join(
        f'<span style="left:{100 * (tick / top) ** 0.5:.1f}%">{tick}</span>' for tick in ticks
    )
    return (
        f'<div class="legend" role="img" aria-label="Colours from light, 0, to dark, {top:.0f} '
        f'points"><b>{escape(what)}, points</b><div class="ramp" '
        f'style="background:linear-gradient(90deg,{",".join(SCALE)})"></div>'
        f'<div class="ticks">{marks}<span style="left:100%">{top:.0f}</span></div></div>'
    )


def _trade_offs(shown: _Shown) -> str:
    sized: list[Dot] = []
    timed: dict[str, list[Dot]] = {}
    for place, run in enumerate(shown.runs):
        lost = final_loss(run, shown.measure)
        if lost is None:
            continue
        network = shown.labels[place].network
        size = number(run.metrics, "size_mb.quantized")
        if size is not None:
            sized.append(Dot(size, lost, network, place))
        for target, time in latencies(run.metrics).items():
            timed.setdefault(target, []).append(Dot(time, lost, network, place))
    if not sized and not timed:
        return ""
    y = f"{shown.points}, points"
    parts = []
    if sized:
        parts.append(_scatter(sized, "size of the quantized network, MB", y, "Size"))
    for target, dots in timed.items():
        runtimes = {word(shown.runs[dot.run].metrics, f"exported.{target}.runtime") for dot in dots}
        runtime = ", ".join(sorted(name for name in runtimes if name))
        parts.append(
            _scatter(dots, "latency of one image, ms", y, f"Latency in {runtime or target}")
        )
    missing = ""
    if not timed:
        missing = note(
            "No run wrote a file that ships (export=onnx, …), so there is no latency to show."
        )
    return section(
        "What accuracy costs",
        f'<div class="panels two">{"".join(parts)}</div>',
        missing,
        intro="Left and low is good. The dotted line is the Pareto front: no other run is as good "
        "in both. Latencies were measured on the machine of each run.",
    )


def _scatter(dots: Sequence[Dot], x: str, y: str, title: str) -> str:
    groups = len({dot.group for dot in dots})
    return plot(
        trade_off(dots, x, y),
        f"{title}: {y} against {x}, one point for each of {len(dots)} runs",
        height=340 + 20 * groups,
        title=title,
    )


def _table(shown: _Shown, table_name: str | None) -> str:
    runs = shown.runs
    targets = list(dict.fromkeys(target for run in runs for target in latencies(run.metrics)))
    figures = [
        ("float top-1", "float.top1", 2),
        ("calibrated top-1", "calibrated.top1", 2),
        ("trained top-1", "trained.top1", 2),
        ("calibrated agreement", "calibrated.agreement", 2),
        ("trained agreement", "trained.agreement", 2),
        ("calibrated SQNR, dB", "calibrated.sqnr_db", 1),
        ("trained SQNR, dB", "trained.sqnr_db", 1),
        ("size, MB", "size_mb.quantized", 2),
    ]
    figures = [
        entry for entry in figures if any(number(run.metrics, entry[1]) is not None for run in runs)
    ]
    # Network, bits and init have columns of their own.
    options = [name for name in shown.varied if not is_axis(name)][:MOST_OPTIONS]
    columns = [
        Column("run"),
        Column("status"),
        Column("network"),
        Column("bits"),
        Column("init"),
        *(Column(name) for name in options),
        Column(shown.points, True, "of the network that the run ended with, points"),
        *(Column(title, True) for title, _, _ in figures),
        *(Column(f"{target}, ms", True, "latency of one image") for target in targets),
        Column("seconds", True, "all stages"),
        Column("command"),
    ]
    rows = []
    for place, run in enumerate(runs):
        label, link = shown.labels[place], shown.link(place)
        name = escape(run.name)
        widths = 1000 * label.widths[0] + label.widths[1]
        rows.append(
            [
                cell(f'<a href="{escape(link)}">{name}</a>' if link else name, run.name),
                cell(pill(run.status), run.status),
                cell(escape(label.network)),
                cell(escape(label.bits or "–"), widths if label.bits else ""),
                cell(escape(label.init or "–"), label.init),
                *(
                    cell(escape(shown.varied[name][place] or "–"), shown.varied[name][place])
                    for name in options
                ),
                figure_cell(final_loss(run, shown.measure)),
                *(figure_cell(number(run.metrics, key), digits) for _, key, digits in figures),
                *(figure_cell(latencies(run.metrics).get(target)) for target in targets),
                figure_cell(total_seconds(run.metrics), 0),
                cell(command_line(run.command), run.command or ""),
            ]
        )
    beside = ""
    if table_name is not None:
        link = f'<a href="{escape(quote(table_name))}">{escape(table_name)}</a>'
        beside = f'<p class="small">All figures of all runs: {link}</p>'
    return section(
        "All runs",
        table("All runs", columns, rows, row_ids=[f"run-{i}" for i in range(len(runs))]),
        beside,
        intro="Choose a heading to sort. A run's name leads to its own page.",
    )


def _failures(shown: _Shown) -> str:
    parts = []
    for place, run in enumerate(shown.runs):
        if run.status != "failed":
            continue
        failure = run.failure or {}
        message = word(failure, "message") or run.error
        what = word(failure, "error") or "failed"
        link = shown.link(place)
        name = escape(run.name)
        inner = [
            f"<h3>{f'<a href={chr(34)}{escape(link)}{chr(34)}>{name}</a>' if link else name}</h3>",
            f'<p class="small">{escape(_what(shown, place))}</p>',
            f'<p class="note bad pre"><b>{escape(what)}</b> '
            f"{escape(message or 'It left no word of why; its log may say.')}</p>",
        ]
        traceback = word(failure, "traceback")
        if traceback:
            inner.append(folded("Traceback", traceback))
        inner.append(f"<p>Try again:</p>{command_line(run.command)}")
        parts.append(f'<article class="failure">{"".join(inner)}</article>')
    return section("Why runs failed", *parts)


def _others(shown: _Shown) -> str:
    parts = [
        f"<li>{pill(run.status)} {escape(run.name)}: {command_line(run.command)}</li>"
        for run in shown.runs
        if run.status in STATUSES[2:]
    ]
    if not parts:
        return ""
    return section(
        "Still to do",
        f'<ul class="todo">{"".join(parts)}</ul>',
        intro="These go on, were stopped, or never started.",
    )
