"""Figures draw what was given; plotly's classes refuse attributes that they do not know."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fat.report.plots import (
    DARK,
    Dot,
    before_after,
    curves,
    filter_ranges,
    heat_map,
    histogram,
    layer_bars,
    scale_top,
    sensitivity_bars,
    trade_off,
)
from fat.report.sweep_grid import Cell, Panel
from tests.report.fake_runs import HOSTILE


def checked(figure: go.Figure) -> dict[str, Any]:
    """The figure as page.js gets it."""
    content = figure.to_plotly_json()
    assert isinstance(content, dict)
    return content


def cell(*runs: int, calibrated: tuple[float, ...] = (), trained: tuple[float, ...] = ()) -> Cell:
    return Cell(runs, {"calibrated": calibrated, "trained": trained})


PANEL = Panel(
    init="mse",
    options={},
    networks=("a", HOSTILE),
    bits=("W8A8", "W4A4"),
    cells={
        ("a", "W8A8"): cell(0, 3, trained=(1.0, 3.0)),
        ("a", "W4A4"): cell(1, trained=(50.0,)),
        (HOSTILE, "W4A4"): cell(2),
    },
)


def test_the_classes_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        go.Figure({"data": [{"type": "bar", "nosuch": 1}], "layout": {}})


def test_a_heat_map_shows_each_cell_once() -> None:
    status = ["finished", "finished", "failed", "finished"]
    figure = checked(heat_map(PANEL, "trained", 50.0, status))
    gaps, light, dark = figure["data"]
    assert gaps["text"] == [["", ""], ["", "failed"]]
    assert light["text"] == [["2.00", ""], ["", ""]]
    assert dark["text"] == [["", "50.0"], ["", ""]]
    assert light["z"] == [[math.sqrt(2 / 50), None], [None, None]]
    assert dark["z"] == [[None, 1.0], [None, None]]
    assert light["customdata"][0][0] == "0 3"
    assert gaps["customdata"][1][1] == "2"
    assert gaps["z"][1][0] is None  # no run, no square
    assert "&lt;/script" in figure["layout"]["yaxis"]["ticktext"][1]


def test_what_was_not_trained_is_a_dash_and_a_gain_is_the_lightest() -> None:
    cells = {("a", "W8A8"): cell(0, calibrated=(-0.5,))}
    panel = Panel("mse", {}, ("a",), ("W8A8",), cells)
    gaps, light, dark = checked(heat_map(panel, "trained", 2.0, ["finished"]))["data"]
    assert gaps["text"] == [["–"]]
    _, light, dark = checked(heat_map(panel, "calibrated", 2.0, ["finished"]))["data"]
    assert (light["z"], light["text"], dark["text"]) == ([[0.0]], [["−0.50"]], [[""]])


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_letters_can_be_read_on_every_color_and_light_is_less() -> None:
    _, light, dark = checked(heat_map(PANEL, "trained", 50.0, [""] * 4))["data"]
    scale = light["colorscale"]
    tones = [luminance(color) for _, color in scale]
    assert tones == sorted(tones, reverse=True)

    def tone(place: float) -> float:
        for (a, one), (b, two) in pairwise(scale):
            if a <= place <= b:
                weight = (place - a) / (b - a)
                mixed = [
                    round((1 - weight) * int(one[i : i + 2], 16) + weight * int(two[i : i + 2], 16))
                    for i in (1, 3, 5)
                ]
                return luminance("#{:02x}{:02x}{:02x}".format(*mixed))
        raise AssertionError(place)

    for step in range(101):
        place = step / 100
        ink = (dark if place > DARK else light)["textfont"]["color"]
        one, two = sorted((luminance(ink), tone(place)))
        assert (two + 0.05) / (one + 0.05) > 4.5, place  # WCAG's AA


def test_small_differences_do_not_fill_the_scale() -> None:
    assert scale_top([0.1, 0.3]) == 2.0
    assert scale_top([]) == 2.0
    assert scale_top([0.1, 31.0]) == 31.0


def test_the_front_is_drawn_through_its_points() -> None:
    dots = [Dot(3.0, 1.0, "a", 7), Dot(1.0, 4.0, "b", 2), Dot(3.0, 2.0, "a", 5)]
    figure = checked(trade_off(dots, "MB", "points"))
    front, first, second = figure["data"]
    assert (front["x"], front["y"]) == ([1.0, 3.0], [4.0, 1.0])
    assert first["customdata"] == ["7", "5"]
    assert second["customdata"] == ["2"]
    assert first["marker"]["color"] != second["marker"]["color"]


def test_many_networks_can_be_told_apart() -> None:
    dots = [Dot(1.0, 1.0, f"n{i}", i) for i in range(40)]
    looks = {
        (trace["marker"]["color"], trace["marker"]["symbol"])
        for trace in checked(trade_off(dots, "x", "y"))["data"][1:]
    }
    assert len(looks) == 40


def test_loose_runs_by_their_places() -> None:
    rows = [("a", 3.0, 1.0), ("b", None, None), (HOSTILE, 2.0, None)]
    figure = checked(before_after(rows, "points"))
    lines, calibrated, trained = figure["data"]
    assert lines["x"][:3] == [3.0, 1.0, None]
    assert (calibrated["customdata"], trained["customdata"]) == (["0", "2"], ["0"])
    assert figure["layout"]["yaxis"]["ticktext"][:2] == ["a", "b"]


def test_curves_leave_out_what_a_log_axis_cannot_show_and_are_thinned() -> None:
    steps = [float(i) for i in range(10_000)]
    named = {"train/loss": (steps, [0.0, *steps[1:]]), "val/loss": ([0.0, 5.0], [2.0, 1.0])}
    figure = checked(curves(named, log=True, best=5.0))
    train, val = figure["data"]
    assert train["y"][0] is None
    assert len(train["x"]) <= 1500
    assert (val["x"], val["y"]) == ([0.0, 5.0], [2.0, 1.0])
    assert figure["layout"]["shapes"][0]["x0"] == 5.0
    assert checked(curves({"train/lr": ([1.0], [0.1])}))["data"][0]["mode"] == "lines+markers"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=700))
def test_bins_that_are_joined_keep_all_counts(counts: list[int]) -> None:
    edges = [0.5 * i - 3 for i in range(len(counts) + 1)]
    figure = checked(histogram(edges, counts, [-1.0, 1.0], [-0.5, 0.5]))
    (bars,) = figure["data"]
    assert len(bars["y"]) <= 200
    assert sum(y or 0 for y in bars["y"]) == sum(counts)
    assert sum(bars["width"]) == pytest.approx(edges[-1] - edges[0])
    assert bars["x"][0] - bars["width"][0] / 2 == pytest.approx(edges[0])
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [-1.0, 1.0, -0.5, 0.5]


def test_a_histogram_holds_its_thresholds() -> None:
    figure = checked(histogram([0.0, 1.0], [5.0], [-4.0, 9.0], []))
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < -4
    assert high > 9
    constant = checked(histogram([0.0, 0.0], [5.0], [], []))
    low, high = constant["layout"]["xaxis"]["range"]
    assert low < high


def test_filters_keep_their_numbers() -> None:
    before, after = checked(filter_ranges([3.0, 0.0, 1.0], [2.0, 2.5, 1.5]))["data"]
    assert before["customdata"] == after["customdata"] == [1, 2, 0]
    assert before["y"] == [None, 1.0, 3.0]
    assert after["y"] == [2.5, 1.5, 2.0]


def test_layers_stand_in_the_order_of_the_network() -> None:
    layers = [("a", "activation", 1.0), ("b", "weight", None), (HOSTILE, "weight", 3.0)]
    weights, activations = checked(layer_bars(layers, "dB"))["data"]
    assert (weights["x"], weights["y"]) == ([3], [3.0])
    assert (activations["x"], activations["y"]) == ([1], [1.0])
    assert "<" not in weights["customdata"][0]


def test_long_bars_harm() -> None:
    figure = checked(sensitivity_bars([("a", "weight", 4, -20.0), ("b", "activation", 8, 20.0)]))
    weights, activations = figure["data"]
    assert weights["x"] == [200.0]
    assert activations["x"] == [pytest.approx(10.0)]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.08, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]),
        ([1.0, 20_000.0], ["1", "10", "100", "1k", "10k", "100k"]),
        ([], ["1", "2", "5", "10", "20", "50"]),
    ],
)
def test_ticks_of_log_axes_are_whole_figures(values: list[float], wanted: list[str]) -> None:
    figure = checked(curves({"val/loss": ([0.0] * len(values), values)}, log=True))
    assert figure["layout"]["yaxis"]["ticktext"] == wanted
