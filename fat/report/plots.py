"""Figures of the report pages as plain data, which plotly.js draws.

What stands for a run carries its place in the sweep as ``customdata``: page.js then shows the run
beside the pointer. plotly.js itself leaves out a label that is higher than its plot.

They are built as dictionaries, not with plotly's graph objects: those take a fifth of a second a
page and put eight kilobytes of unused styles into every figure. A test gives each figure to the
graph objects, which refuse what plotly.js would ignore.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fat.report.html import escape, plain
from fat.report.records import finite, read_csv, read_json
from fat.report.sweep_grid import Panel, Stage, pareto_front

__all__ = [
    "BARS",
    "COLOURS",
    "SCALE",
    "Dot",
    "before_after",
    "curves",
    "filter_ranges",
    "heat_map",
    "histogram",
    "layer_bars",
    "run_figures",
    "scale_top",
    "sensitivity_bars",
    "trade_off",
]

Figure = dict[str, Any]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK, MUTED, GRID, PAPER = "#1f2933", "#52606d", "#e4e7eb", "#eceff2"
WEIGHT, ACTIVATION = "#2a6f97", "#c2720c"
COLOURS = {"weight": WEIGHT, "activation": ACTIVATION}
BEFORE, AFTER = "#c2720c", "#2a6f97"
# Okabe and Ito's colours, which people with any colour vision can tell apart, darkest first.
NETWORKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#56b4e9", "#8c6d1f", "#444444")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SCALE = (
    "#fdfcea",
    "#edf6c5",
    "#c9e8b8",
    "#93d2b9",
    "#5cb8c0",
    "#3796bb",
    "#2c6da5",
    "#27478c",
    "#1c2a66",
)
"""Light yellow to dark blue, after ColorBrewer's YlGnBu: lightness alone tells more from less."""
DARK = 0.705
"""Place in the scale from which on letters are white: there black and white are read alike."""
LEAST_TOP = 2.0
"""Where the colours of heat maps end at least, points: below that, differences are noise."""
MOST_POINTS = 1500
"""Longest curve that is drawn; more points than pixels only make the page large."""
MOST_BINS = 200


def _figure(data: list[Any], layout: Mapping[str, Any]) -> Figure:
    font = {"family": FONT, "size": 12, "color": INK}
    base = {
        "font": font,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 52, "r": 12, "t": 10, "b": 44},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "#ffffff",
            "bordercolor": "#9aa5b1",
            "font": font,
        },
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    }
    return {"data": data, "layout": {**base, **layout}}


def _axis(title: str = "", /, **more: Any) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#9aa5b1",
        "ticks": "",
        "automargin": True,
    }
    if title:
        axis["title"] = {"text": title, "standoff": 8, "font": {"size": 12, "color": MUTED}}
    return {**axis, **more}


def _log_axis(values: Sequence[float | None], title: str = "", **more: Any) -> dict[str, Any]:
    """A log axis whose ticks are whole figures: plotly.js would write 2 for 0.2 and 5 for 0.5."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    every = max(1, math.ceil(len(decades) / 6))
    ticks = [step * 10.0**decade for decade in decades[::every] for step in steps]
    return _axis(
        title,
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[_tick(value) for value in ticks],
        **more,
    )


def _tick(value: float) -> str:
    """A round number, short.

    Examples:
        >>> [_tick(value) for value in (1e-5, 0.02, 1, 500, 20000, 1e6)]
        ['1e-5', '0.02', '1', '500', '20k', '1M']
    """
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{sign}"
    if value < 1e-3:
        digits, _, power = f"{value:.0e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:g}"


def scale_top(values: Sequence[float]) -> float:
    """The loss at which the colours of all heat maps of a page end, points."""
    return max([LEAST_TOP, *values])


class _Layer:
    """Cells of a heat map whose letters have one colour; the others are empty."""

    def __init__(self, rows: int, columns: int) -> None:
        self.z: list[list[float | None]] = [[None] * columns for _ in range(rows)]
        self.text, self.runs = ([[""] * columns for _ in range(rows)] for _ in range(2))

    def put(self, y: int, x: int, z: float, text: str, runs: str) -> None:
        self.z[y][x], self.text[y][x], self.runs[y][x] = z, text, runs


def heat_map(panel: Panel, stage: Stage, top: float, status: Sequence[str]) -> Figure:
    """What was lost, by network and bits, with the figure in each cell.

    Colours follow the square root of the loss, so that one and two points can be told apart beside
    eighty.

    Args:
        panel: From :func:`fat.report.sweep_grid.panels`.
        stage: ``calibrated`` or ``trained``.
        top: Loss of the darkest colour, points.
        status: For every run of the sweep what stands in its cell without a figure.
    """
    rows, columns = range(len(panel.networks)), range(len(panel.bits))
    # One layer for cells without a figure, one for light and one for dark ones: letters of a layer
    # have one colour, and plotly.js's own choice is hard to read on the middle tones.
    layers = [_Layer(len(rows), len(columns)) for _ in range(3)]
    gaps, light, dark = layers
    for y, network in enumerate(panel.networks):
        for x, bits in enumerate(panel.bits):
            cell = panel.cells.get((network, bits))
            if cell is None:
                continue
            mean = cell.mean(stage)
            runs = cell.runs
            places = " ".join(map(str, runs))
            if mean is None:
                # Finished without a figure of this stage: nothing was trained.
                word = "–" if status[runs[0]] == "finished" else escape(status[runs[0]])
                gaps.put(y, x, 0.0, word, places)
            else:
                shade = math.sqrt(min(max(mean, 0.0), top) / top)
                layer = dark if shade > DARK else light
                layer.put(y, x, shade, plain(mean, 2 if abs(mean) < 10 else 1), places)
    steps = len(SCALE) - 1
    colours = [[i / steps, colour] for i, colour in enumerate(SCALE)]
    looks = (
        ([[0, PAPER], [1, PAPER]], MUTED, 11),
        (colours, "#000000", 12),
        (colours, "#ffffff", 12),
    )
    data = [
        {
            "type": "heatmap",
            "x": [*columns],
            "y": [*rows],
            "z": layer.z,
            "text": layer.text,
            "customdata": layer.runs,
            "texttemplate": "%{text}",
            "hoverinfo": "none",
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
            "hoverongaps": False,
            "zmin": 0,
            "zmax": 1,
            "colorscale": scale,
            "textfont": {"size": size, "color": ink},
        }
        for layer, (scale, ink, size) in zip(layers, looks, strict=True)
    ]
    flat = {"showgrid": False, "showline": False, "fixedrange": True, "tickmode": "array"}
    layout = {
        "xaxis": _axis(
            tickvals=[*columns],
            ticktext=[*map(escape, panel.bits)],
            side="top",
            range=[-0.5, len(panel.bits) - 0.5],
            **flat,
        ),
        "yaxis": _axis(
            tickvals=[*rows],
            ticktext=[_short(name) for name in panel.networks],
            range=[len(panel.networks) - 0.5, -0.5],
            ticklabelstandoff=6,
            **flat,
        ),
        "margin": {"l": 8, "r": 4, "t": 26, "b": 4},
    }
    return _figure(data, layout)


def _short(name: str, most: int = 22) -> str:
    return escape(name if len(name) <= most else name[: most - 1] + "…")


def before_after(rows: Sequence[tuple[str, float | None, float | None]], title: str) -> Figure:
    """What each run lost after calibration and after training, one line for each run.

    Args:
        rows: Name, loss after calibration and loss after training; the place in the list is that
            in the sweep.
        title: What was lost, with its unit.
    """
    data: list[Any] = [
        {
            "type": "scatter",
            "mode": "lines",
            "hoverinfo": "skip",
            "showlegend": False,
            "x": [x for _, before, after in rows for x in (before, after, None)],
            "y": [y for place in range(len(rows)) for y in (place, place, None)],
            "line": {"color": "#9aa5b1", "width": 2},
        }
    ]
    for name, colour, symbol, place in (
        ("calibrated only", BEFORE, "circle-open", 1),
        ("trained", AFTER, "circle", 2),
    ):
        members = [i for i, row in enumerate(rows) if row[place] is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "y": members,
                "x": [rows[i][place] for i in members],
                "hoverinfo": "none",
                "customdata": [str(i) for i in members],
                "marker": {
                    "size": 11,
                    "color": colour,
                    "symbol": symbol,
                    "line": {"width": 2, "color": colour},
                },
            }
        )
    layout = {
        "xaxis": _axis(title, zeroline=True, zerolinecolor="#9aa5b1", rangemode="tozero"),
        "yaxis": _axis(
            range=[len(rows) - 0.4, -0.6],
            tickmode="array",
            ticklabelstandoff=6,
            tickvals=[*range(len(rows))],
            ticktext=[_short(row[0], 26) for row in rows],
        ),
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        "hovermode": "closest",
        "margin": {"l": 8, "r": 16, "t": 30, "b": 44},
    }
    return _figure(data, layout)


@dataclass(frozen=True)
class Dot:
    """A network in a scatter plot.

    Attributes:
        x: Size or time.
        y: Loss, points.
        group: Its architecture.
        run: Its place in the sweep.
    """

    x: float
    y: float
    group: str
    run: int


def trade_off(dots: Sequence[Dot], x_title: str, y_title: str) -> Figure:
    """Loss against what a network costs, with the Pareto front: small is good in both.

    Args:
        dots: One for each network.
        x_title: What the cost is, with its unit.
        y_title: What was lost, with its unit.
    """
    front = [dots[i] for i in pareto_front([(dot.x, dot.y) for dot in dots])]
    data: list[Any] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "hoverinfo": "skip",
            "x": [dot.x for dot in front],
            "y": [dot.y for dot in front],
            "line": {"shape": "hv", "color": INK, "width": 1.5, "dash": "dot"},
        }
    ]
    for place, group in enumerate(dict.fromkeys(dot.group for dot in dots)):
        members = [dot for dot in dots if dot.group == group]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _short(group, 30),
                "x": [dot.x for dot in members],
                "y": [dot.y for dot in members],
                "hoverinfo": "none",
                "customdata": [str(dot.run) for dot in members],
                "marker": {
                    "size": 11,
                    "opacity": 0.9,
                    "color": NETWORKS[place % len(NETWORKS)],
                    "symbol": SYMBOLS[place // len(NETWORKS) % len(SYMBOLS)],
                    "line": {"color": "#ffffff", "width": 1},
                },
            }
        )
    layout = {
        "xaxis": _axis(x_title, rangemode="tozero"),
        "yaxis": _axis(y_title, zeroline=True, zerolinecolor="#9aa5b1", rangemode="tozero"),
        "showlegend": True,
        "hovermode": "closest",
    }
    return _figure(data, layout)


def curves(
    named: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    best: float | None = None,
) -> Figure:
    """Figures over the steps of a training.

    Args:
        named: Steps and values by name; a name that starts with ``val/`` has few points, which are
            marked.
        log: Whether the axis of values is logarithmic; values that are not positive are left out.
        best: The step whose network was kept.
    """
    data: list[Any] = []
    drawn = [value for _, values in named.values() for value in values]
    for name, (steps, values) in named.items():
        points = [(x, y if not log or y > 0 else None) for x, y in zip(steps, values, strict=True)]
        points = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
        judged = name.startswith("val/")
        colour = AFTER if judged else "#9db7c9"
        data.append(
            {
                "type": "scatter",
                "name": escape(_CURVES.get(name, name)),
                "mode": "lines+markers" if judged or len(points) == 1 else "lines",
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "line": {"color": colour, "width": 2 if judged else 1.2},
                "marker": {"size": 7, "color": colour},
                "hovertemplate": "step %{x}: %{y:.5g}<extra>%{fullData.name}</extra>",
            }
        )
    layout: dict[str, Any] = {
        "margin": {"l": 44, "r": 12, "t": 10, "b": 44},
        "xaxis": _axis("optimizer step", rangemode="tozero"),
        "yaxis": _log_axis(drawn) if log else _axis(),
        "showlegend": len(named) > 1,
        "hovermode": "closest",
    }
    if best is not None:
        layout["shapes"] = [_upright(best, BEFORE, "dash")]
        layout["annotations"] = [
            {
                "x": best,
                "y": 1,
                "yref": "paper",
                "text": f"best: step {best:g}",
                "showarrow": False,
                "xanchor": "auto",
                "yanchor": "bottom",
                "font": {"size": 11, "color": BEFORE},
            }
        ]
        layout["margin"] = {"l": 44, "r": 12, "t": 26, "b": 44}
    return _figure(data, layout)


_CURVES = {"train/loss": "training batch", "val/loss": "validation images"}


def _upright(x: float, colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.8, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def histogram(
    edges: Sequence[float], counts: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> Figure:
    """How often each value occurs, on a log axis, and where the thresholds stand.

    Args:
        edges: n + 1 ascending edges.
        counts: n counts.
        before: Calibrated thresholds, low and high.
        after: Trained thresholds, low and high.
    """
    together = math.ceil(len(counts) / MOST_BINS) or 1
    ends = [*edges[:-1:together], edges[-1]]
    sums = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    middles = [(a + b) / 2 for a, b in pairwise(ends)]
    widths = [b - a for a, b in pairwise(ends)]
    data = [
        {
            "type": "bar",
            "x": middles,
            "width": widths,
            "hoverinfo": "x+y",
            "y": [count if count > 0 else None for count in sums],
            "marker": {"color": "#b8c4ce", "line": {"width": 0}},
        }
    ]
    marks = [_upright(x, BEFORE, "dash") for x in before] + [
        _upright(x, AFTER, "solid") for x in after
    ]
    lowest = min([ends[0], *before, *after])
    highest = max([ends[-1], *before, *after])
    room = 0.02 * (highest - lowest) or 1.0
    layout = {
        "xaxis": _axis(range=[lowest - room, highest + room], nticks=6),
        "yaxis": _log_axis([1.0, *sums]),
        "shapes": marks,
        "bargap": 0,
        "margin": {"l": 44, "r": 8, "t": 8, "b": 28},
    }
    return _figure(data, layout)


def filter_ranges(before: Sequence[float], after: Sequence[float]) -> Figure:
    """The largest weight of each filter before and after equalization, narrow filters first.

    Args:
        before: max|W_k| of each filter k.
        after: The same once scaled.
    """
    order = sorted(range(len(before)), key=lambda k: before[k])
    data = []
    for name, values, colour, symbol in (
        ("before", before, BEFORE, "circle-open"),
        ("after", after, AFTER, "circle"),
    ):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [*range(1, len(order) + 1)],
                "y": [values[k] if values[k] > 0 else None for k in order],
                "customdata": order,
                "marker": {"size": 5, "color": colour, "symbol": symbol},
                "hovertemplate": "filter %{customdata}: %{y:.4g}<extra>" + name + "</extra>",
            }
        )
    layout = {
        "xaxis": _axis("filters, narrow to wide before"),
        "yaxis": _log_axis([*before, *after]),
        "margin": {"l": 44, "r": 8, "t": 8, "b": 40},
    }
    return _figure(data, layout)


def layer_bars(layers: Sequence[tuple[str, str, float | None]], unit: str) -> Figure:
    """One bar for each quantized tensor, in the order of the network.

    Args:
        layers: Layer, kind (``weight`` or ``activation``) and value.
        unit: Of the values.
    """
    data = []
    for kind, colour in COLOURS.items():
        members = [
            (place, layer, value)
            for place, (layer, of, value) in enumerate(layers, 1)
            if of == kind and value is not None
        ]
        if members:
            data.append(
                {
                    "type": "bar",
                    "name": f"{kind}s",
                    "x": [place for place, _, _ in members],
                    "y": [value for _, _, value in members],
                    "width": 0.86,
                    "customdata": [escape(layer) for _, layer, _ in members],
                    "marker": {"color": colour, "line": {"width": 0}},
                    "hovertemplate": f"%{{customdata}}<br>{kind}: %{{y:.4g}} {unit}<extra></extra>",
                }
            )
    layout = {
        "xaxis": _axis("tensors, first to last", range=[0, len(layers) + 1], showgrid=False),
        "yaxis": _axis(zeroline=True, zerolinecolor="#9aa5b1"),
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "barmode": "overlay",
        "hovermode": "closest",
        "margin": {"l": 40, "r": 12, "t": 34, "b": 44},
    }
    return _figure(data, layout)


MOST_ERROR = 200.0
"""Longest bar of a sensitivity, %; past it the logits have nothing left of the float network's."""


def sensitivity_bars(rows: Sequence[tuple[str, str, int, float]]) -> Figure:
    """What quantizing one tensor alone does to the logits: their relative error, so long is bad.

    Args:
        rows: Layer, kind, bits and the logits' SQNR in dB, the most harmful first.
    """
    data = []
    for kind, colour in COLOURS.items():
        members = [(place, *row) for place, row in enumerate(rows) if row[1] == kind]
        if members:
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": f"{kind}s",
                    "width": 0.78,
                    "y": [place for place, *_ in members],
                    "x": [min(100 * 10 ** (-db / 20), MOST_ERROR) for *_, db in members],
                    "text": [plain(db, 1, " dB") for *_, db in members],
                    "textposition": "auto",
                    "textfont": {"size": 10},
                    "cliponaxis": False,
                    "customdata": [f"{escape(row[1])} ({row[3]} bits)" for row in members],
                    "marker": {"color": colour, "line": {"width": 0}},
                    "hovertemplate": "%{customdata}<br>%{x:.3g} % of the logits, %{text}"
                    "<extra></extra>",
                }
            )
    names = [_short(layer, 24) for layer, *_ in rows]
    layout = {
        "xaxis": _axis("relative error of the logits, %", rangemode="tozero"),
        "yaxis": _axis(
            range=[len(rows) - 0.4, -0.6],
            showgrid=False,
            tickmode="array",
            tickvals=[*range(len(rows))],
            ticktext=names,
            tickfont={"size": 11},
        ),
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        "hovermode": "closest",
        "margin": {"l": 8, "r": 12, "t": 30, "b": 44},
    }
    return _figure(data, layout)


BARS = (("sqnr_db", "dB", 1.0), ("saturated", "%", 100.0), ("alpha_at_edge", "%", 100.0))


def run_figures(directory: Path) -> dict[str, Figure]:
    """Bars over all quantizers, and the thresholds of the worst tensors on their histograms.

    Args:
        directory: A run with layers.csv and details.json.
    """
    problems: list[str] = []
    layers = read_csv(directory / "layers.csv", problems) or []
    details = read_json(directory / "details.json", problems) or {}
    figures: dict[str, Figure] = {}
    for column, unit, factor in BARS:
        values = [(row["layer"], row["kind"], finite(row[column])) for row in layers]
        if any(value is not None for *_, value in values):
            scaled = [(a, b, None if value is None else factor * value) for a, b, value in values]
            figures[column] = layer_bars(scaled, unit)
    for entry in details.get("histograms", []):
        figures[f"thresholds/{entry['layer']}.{entry['kind']}"] = histogram(
            entry["edges"], entry["counts"], entry["before"], entry["after"]
        )
    return figures
