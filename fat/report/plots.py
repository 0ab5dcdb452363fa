"""Plotly figures of the report pages.

A mark that stands for a run carries its place in the sweep as ``customdata``; page.js then shows
the run beside the pointer (plotly.js itself hides a label that is higher than its plot).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from fat.report.html import escape, format_number
from fat.report.records import finite, read_csv, read_json
from fat.report.sweep_grid import Panel, Stage, pareto_front

__all__ = [
    "BARS",
    "COLORS",
    "COLOURS",
    "SCALE",
    "Dot",
    "before_after",
    "curves",
    "filter_ranges",
    "heat_map",
    "histogram",
    "layer_bars",
    "layer_figures",
    "run_figures",
    "scale_top",
    "sensitivity_bars",
    "trade_off",
]

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK, MUTED, GRID, LINE, PAPER = "#1f2933", "#52606d", "#e4e7eb", "#9aa5b1", "#eceff2"
BLUE, ORANGE = "#2a6f97", "#c2720c"
BEFORE, AFTER = ORANGE, BLUE
COLORS = {"weight": BLUE, "activation": ORANGE}
COLOURS = COLORS
"""Earlier name of COLORS."""
# Okabe and Ito's colors, which people with any color vision can tell apart, darkest first.
NETWORKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#56b4e9", "#8c6d1f", "#444444")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SCALE = (
    *("#fdfcea", "#edf6c5", "#c9e8b8", "#93d2b9", "#5cb8c0"),
    *("#3796bb", "#2c6da5", "#27478c", "#1c2a66"),
)
"""Light yellow to dark blue, after ColorBrewer's YlGnBu: lightness alone orders the values."""
DARK = 0.705
"""Position in the scale above which text is white: there black and white have equal contrast."""
LEAST_TOP = 2.0
"""Lowest end of the color scale of heat maps, points: smaller differences are noise."""
MOST_POINTS = 1500
"""Longest curve that is drawn; more points than pixels only make the page larger."""
MOST_BINS = 200
MOST_ERROR = 200.0
"""Longest bar of a sensitivity, %; beyond that nothing of the float logits is left."""

_FONT = {"family": FONT, "size": 12, "color": INK}
_AXIS = {
    "gridcolor": GRID,
    "zeroline": False,
    "zerolinecolor": LINE,
    "linecolor": LINE,
    "showline": True,  # the color alone shows it, but not in a template
    "ticks": "",
    "automargin": True,
    "title": {"standoff": 8, "font": {"size": 12, "color": MUTED}},
}
_TEMPLATE = {
    "layout": {
        "font": _FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 44, "r": 12, "t": 10, "b": 44},
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "bordercolor": LINE, "font": _FONT},
        "hovermode": "closest",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        "bargap": 0,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}
_LEGEND_ABOVE = {"legend_y": 1.0, "legend_yanchor": "bottom", "showlegend": True}


def _figure(traces: Sequence[Any], **layout: Any) -> go.Figure:
    return go.Figure(traces, {"template": _TEMPLATE, **layout})


def _path(x: Sequence[float | None], y: Sequence[float | None], **look: Any) -> go.Scatter:
    return go.Scatter(mode="lines", x=x, y=y, hoverinfo="skip", **look)


def _marks(
    name: str, x: Sequence[Any], y: Sequence[Any], runs: Sequence[int], look: Mapping[str, Any]
) -> go.Scatter:
    """Marks that stand for runs."""
    marks = {"customdata": [str(run) for run in runs], "marker": {"size": 11, **look}}
    return go.Scatter(mode="markers", name=name, x=x, y=y, hoverinfo="none", **marks)


def _log_axis(values: Sequence[float | None]) -> dict[str, Any]:
    """A log axis with round tick labels: plotly.js would write 2 for 0.2 and 5 for 0.5."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    every = max(1, math.ceil(len(decades) / 6))
    ticks = [step * 10.0**decade for decade in decades[::every] for step in steps]
    text = [_tick(value) for value in ticks]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": text}


def _tick(value: float) -> str:
    """Format a round number briefly.

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


def _names(names: Sequence[str], most: int = 22) -> dict[str, Any]:
    """Ticks of an axis with one name at each whole number; long names are cut."""
    text = [escape(name if len(name) <= most else name[: most - 1] + "…") for name in names]
    return {"tickmode": "array", "tickvals": [*range(len(names))], "ticktext": text}


def scale_top(values: Sequence[float]) -> float:
    """Return the loss at which the color scale of all heat maps of a page ends, points."""
    return max([LEAST_TOP, *values])


def heat_map(panel: Panel, stage: Stage, top: float, status: Sequence[str]) -> go.Figure:
    """Draw the loss by network and bits, with the number in each cell.

    Colors follow the square root of the loss, so that one and two points can be told apart beside
    eighty.

    Args:
        panel: From :func:`fat.report.sweep_grid.panels`.
        stage: ``calibrated`` or ``trained``.
        top: Loss of the darkest color, points.
        status: Status of every run of the sweep, shown in cells without a number.
    """
    # One layer for cells without a number, one for light and one for dark ones: the text of a
    # layer has one color, and plotly.js's own choice is hard to read on the middle tones.
    rows, columns = range(len(panel.networks)), range(len(panel.bits))
    empty = {"z": None, "text": "", "customdata": ""}
    layers: list[dict[str, Any]] = [
        {key: [[value for _ in columns] for _ in rows] for key, value in empty.items()}
        for _ in range(3)
    ]
    gaps, light, dark = layers
    for (network, bits), cell in panel.cells.items():
        mean = cell.mean(stage)
        shade = 0.0 if mean is None else math.sqrt(min(max(mean, 0.0), top) / top)
        if mean is not None:
            layer = dark if shade > DARK else light
            text = format_number(mean, 2 if abs(mean) < 10 else 1)
        else:  # a run that finished without this stage: nothing was trained
            layer, found = gaps, status[cell.runs[0]]
            text = "–" if found == "finished" else escape(found)
        content = {"z": shade, "text": text, "customdata": " ".join(map(str, cell.runs))}
        for key, value in content.items():
            layer[key][panel.networks.index(network)][panel.bits.index(bits)] = value
    colors = [[place / (len(SCALE) - 1), color] for place, color in enumerate(SCALE)]
    looks = (
        ([[0, PAPER], [1, PAPER]], MUTED, 11),
        (colors, "#000000", 12),
        (colors, "#ffffff", 12),
    )
    traces = [
        go.Heatmap(
            x=[*columns],
            y=[*rows],
            **layer,
            texttemplate="%{text}",
            textfont={"size": size, "color": ink},
            colorscale=scale,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            showscale=False,
            hoverinfo="none",
            hoverongaps=False,
        )
        for layer, (scale, ink, size) in zip(layers, looks, strict=True)
    ]
    flat = {"showgrid": False, "showline": False, "fixedrange": True}
    return _figure(
        traces,
        xaxis=_names(panel.bits) | {"side": "top", "range": [-0.5, len(panel.bits) - 0.5]} | flat,
        yaxis=_names(panel.networks)
        | {"range": [len(panel.networks) - 0.5, -0.5], "ticklabelstandoff": 6}
        | flat,
        margin={"l": 8, "r": 4, "t": 26, "b": 4},
    )


def before_after(rows: Sequence[tuple[str, float | None, float | None]], title: str) -> go.Figure:
    """Draw one line per run: name, loss after calibration, and loss after training."""
    x = [loss for _, *losses in rows for loss in (*losses, None)]
    y = [y for place in range(len(rows)) for y in (place, place, None)]
    traces = [_path(x, y, showlegend=False, line={"color": LINE, "width": 2})]
    for place, name, color, symbol in (
        (1, "calibrated only", BEFORE, "circle-open"),
        (2, "trained", AFTER, "circle"),
    ):
        known = [i for i, row in enumerate(rows) if row[place] is not None]
        look = {"color": color, "symbol": symbol, "line": {"width": 2, "color": color}}
        traces.append(_marks(name, [rows[i][place] for i in known], known, known, look))
    return _figure(
        traces,
        xaxis={"title_text": title, "zeroline": True, "rangemode": "tozero"},
        yaxis=_names([name for name, *_ in rows], 26)
        | {"range": [len(rows) - 0.4, -0.6], "ticklabelstandoff": 6},
        margin={"l": 8, "r": 16, "t": 30},
        **_LEGEND_ABOVE,
    )


@dataclass(frozen=True)
class Dot:
    """A network in a scatter plot: its cost, loss, architecture, and place in the sweep."""

    x: float
    y: float
    group: str
    run: int


def trade_off(dots: Sequence[Dot], x_title: str, y_title: str) -> go.Figure:
    """Draw the loss against the cost of each network, with the Pareto front (less is better)."""
    front = [dots[i] for i in pareto_front([(dot.x, dot.y) for dot in dots])]
    line = {"shape": "hv", "color": INK, "width": 1.5, "dash": "dot"}
    path = [dot.x for dot in front], [dot.y for dot in front]
    traces = [_path(*path, name="Pareto front", line=line)]
    groups = [*dict.fromkeys(dot.group for dot in dots)]
    for place, name in enumerate(_names(groups, 30)["ticktext"]):
        members = [dot for dot in dots if dot.group == groups[place]]
        look = {
            "opacity": 0.9,
            "color": NETWORKS[place % len(NETWORKS)],
            "symbol": SYMBOLS[place // len(NETWORKS) % len(SYMBOLS)],
            "line": {"color": "#ffffff", "width": 1},
        }
        x, y, runs = zip(*((dot.x, dot.y, dot.run) for dot in members), strict=True)
        traces.append(_marks(name, x, y, runs, look))
    return _figure(
        traces,
        xaxis={"title_text": x_title, "rangemode": "tozero"},
        yaxis={"title_text": y_title, "rangemode": "tozero", "zeroline": True},
        showlegend=True,
    )


def curves(
    named: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    best: float | None = None,
) -> go.Figure:
    """Draw metrics over the steps of training.

    Args:
        named: Steps and values by name; a name that starts with ``val/`` has few points, which are
            marked.
        log: Use a logarithmic y axis; values that are not positive are left out.
        best: The step whose network was kept.
    """
    traces = []
    for name, (steps, values) in named.items():
        points = [(x, y if not log or y > 0 else None) for x, y in zip(steps, values, strict=True)]
        points = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
        validated = name.startswith("val/")
        color = AFTER if validated else "#9db7c9"
        traces.append(
            go.Scatter(
                name=escape(_CURVES.get(name, name)),
                mode="lines+markers" if validated or len(points) == 1 else "lines",
                x=[x for x, _ in points],
                y=[y for _, y in points],
                line={"color": color, "width": 2 if validated else 1.2},
                marker={"size": 7, "color": color},
                hovertemplate="step %{x}: %{y:.5g}<extra>%{fullData.name}</extra>",
            )
        )
    figure = _figure(
        traces,
        xaxis={"title_text": "optimizer step", "rangemode": "tozero"},
        yaxis=_log_axis([value for _, values in named.values() for value in values]) if log else {},
        showlegend=len(named) > 1,
    )
    if best is not None:
        label = {"text": f"best: step {best:g}", "showarrow": False, "xanchor": "auto"}
        font = {"size": 11, "color": BEFORE}
        figure.add_annotation(
            x=best, y=1, yref="paper", yanchor="bottom", font=font, **label
        ).update_layout(shapes=[_vertical(best, BEFORE, "dash")], margin_t=26)
    return figure


_CURVES = {"train/loss": "training batch", "val/loss": "validation images"}


def _vertical(x: float, color: str, dash: str) -> dict[str, Any]:
    line = {"color": color, "width": 1.8, "dash": dash}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def histogram(
    edges: Sequence[float], counts: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> go.Figure:
    """Draw a histogram of values on a log axis, and the thresholds.

    Args:
        edges: n + 1 ascending edges.
        counts: n counts.
        before: Calibrated thresholds, low and high.
        after: Trained thresholds, low and high.
    """
    together = math.ceil(len(counts) / MOST_BINS) or 1
    ends = [*edges[:-1:together], edges[-1]]
    sums = [sum(counts[i : i + together]) for i in range(0, len(counts), together)]
    bars = go.Bar(
        x=[(a + b) / 2 for a, b in pairwise(ends)],
        width=[b - a for a, b in pairwise(ends)],
        y=[count if count > 0 else None for count in sums],
        marker={"color": "#b8c4ce", "line": {"width": 0}},
        hoverinfo="x+y",
    )
    lowest, highest = min([ends[0], *before, *after]), max([ends[-1], *before, *after])
    room = 0.02 * (highest - lowest) or 1.0
    return _figure(
        [bars],
        xaxis={"range": [lowest - room, highest + room], "nticks": 6},
        yaxis=_log_axis([1.0, *sums]),
        shapes=[_vertical(x, BEFORE, "dash") for x in before]
        + [_vertical(x, AFTER, "solid") for x in after],
        margin={"r": 8, "t": 8, "b": 28},
    )


def filter_ranges(before: Sequence[float], after: Sequence[float]) -> go.Figure:
    """Draw max|W_k| of each filter k before and after equalization."""
    order = sorted(range(len(before)), key=lambda k: before[k])
    traces = [
        go.Scatter(
            mode="markers",
            name=name,
            x=[*range(1, len(order) + 1)],
            y=[values[k] if values[k] > 0 else None for k in order],
            customdata=order,
            marker={"size": 5, "color": color, "symbol": symbol},
            hovertemplate="filter %{customdata}: %{y:.4g}<extra>" + name + "</extra>",
        )
        for name, values, color, symbol in (
            ("before", before, BEFORE, "circle-open"),
            ("after", after, AFTER, "circle"),
        )
    ]
    return _figure(
        traces,
        xaxis_title_text="filters, sorted by their range before",
        yaxis=_log_axis([*before, *after]),
        margin={"r": 8, "t": 8, "b": 40},
    )


def _kinds(rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """Kind of tensor, look of its bars, and its rows with their places, for each kind."""
    for kind, color in COLORS.items():
        members = [(place, row) for place, row in enumerate(rows) if row[1] == kind]
        if members:
            yield kind, {"name": f"{kind}s", "marker": {"color": color, "line_width": 0}}, members


def layer_bars(layers: Sequence[tuple[str, str, float | None]], unit: str) -> go.Figure:
    """Draw a bar for the layer, kind and value of each quantized tensor, in network order."""
    traces = []
    for kind, look, members in _kinds(layers):
        known = [(place, layer, value) for place, (layer, _, value) in members if value is not None]
        if known:
            traces.append(
                go.Bar(
                    x=[place + 1 for place, *_ in known],
                    y=[value for *_, value in known],
                    width=0.86,
                    customdata=[escape(layer) for _, layer, _ in known],
                    hovertemplate=f"%{{customdata}}<br>{kind}: %{{y:.4g}} {unit}<extra></extra>",
                    **look,
                )
            )
    return _figure(
        traces,
        xaxis={"title_text": "tensors in network order", "range": [0, len(layers) + 1]},
        xaxis_showgrid=False,
        yaxis_zeroline=True,
        barmode="overlay",
        margin={"l": 40, "t": 34},
        **_LEGEND_ABOVE,
    )


def sensitivity_bars(rows: Sequence[tuple[str, str, int, float]]) -> go.Figure:
    """Draw the relative error of the logits when one tensor alone is quantized.

    Args:
        rows: Layer, kind, bits and SQNR of the logits in dB, the most harmful first.
    """
    traces = [
        go.Bar(
            orientation="h",
            width=0.78,
            y=[place for place, _ in members],
            x=[min(100 * 10 ** (-row[3] / 20), MOST_ERROR) for _, row in members],
            text=[format_number(row[3], 1, " dB") for _, row in members],
            textposition="auto",
            textfont_size=10,
            cliponaxis=False,
            customdata=[f"{escape(row[0])} ({row[2]} bits)" for _, row in members],
            hovertemplate="%{customdata}<br>%{x:.3g} % of the logits, %{text}<extra></extra>",
            **look,
        )
        for _, look, members in _kinds(rows)
    ]
    return _figure(
        traces,
        xaxis={"title_text": "relative error of the logits, %", "rangemode": "tozero"},
        yaxis=_names([layer for layer, *_ in rows], 24)
        | {"range": [len(rows) - 0.4, -0.6], "showgrid": False, "tickfont": {"size": 11}},
        barmode="overlay",
        margin={"l": 8, "t": 30},
        **_LEGEND_ABOVE,
    )


BARS = {"sqnr_db": ("dB", 1.0), "saturated": ("%", 100.0), "alpha_at_edge": ("%", 100.0)}
"""Columns of layers.csv that are drawn: the unit, and the factor that gives it."""


def layer_figures(layers: Sequence[Mapping[str, str]]) -> dict[str, go.Figure]:
    """Draw the columns :data:`BARS` of the rows of layers.csv, if they have values."""
    figures = {}
    for column, (unit, factor) in BARS.items():
        values = [finite(row.get(column)) for row in layers]
        if any(value is not None for value in values):
            bars = [
                (row.get("layer", ""), row.get("kind", ""), value and factor * value)
                for row, value in zip(layers, values, strict=True)
            ]
            figures[column] = layer_bars(bars, unit)
    return figures


def run_figures(directory: Path) -> dict[str, go.Figure]:
    """Draw the figures that are sent to loggers: bars of all quantizers and worst histograms.

    Args:
        directory: A run with layers.csv and details.json.
    """
    problems: list[str] = []
    details = read_json(directory / "details.json", problems) or {}
    figures = layer_figures(read_csv(directory / "layers.csv", problems) or [])
    for entry in details.get("histograms", []):
        figures[f"thresholds/{entry['layer']}.{entry['kind']}"] = histogram(
            entry["edges"], entry["counts"], entry["before"], entry["after"]
        )
    return figures
