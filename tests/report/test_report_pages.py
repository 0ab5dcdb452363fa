"""Pages of runs and sweeps, complete and failed ones."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from fat import FatError
from fat.report.records import read_run, read_sweep
from fat.report.run_page import run_page, write_run
from fat.report.sweep_page import combine, sweep_page, write_comparison, write_sweep
from fat.report.tables import sweep_table
from tests.report.fake_runs import HOSTILE, fail, fake_run, fake_sweep, metrics

VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A parsed page: its text, tags, and figures.

    Attributes:
        text: All text outside of scripts and styles, in one line.
        tags: Each tag with its attributes.
        figures: What page.js will draw.
        runs: What page.js shows of runs.
    """

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            attributes = self.tags[-1][1]
            if attributes.get("class") == "figure":
                self.figures.append(json.loads(data))
            elif attributes.get("id") == "runs":
                self.runs = json.loads(data)
        elif inside != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("section")]


def check(source: str) -> Page:
    """Check that a page is well-formed, with valid figures, and refers to nothing outside."""
    page = Page(source)
    for figure in page.figures:
        go.Figure(figure)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        target = attributes["href"] or ""
        assert not re.match(r"[a-z]+:|//", target), target
        if target.startswith("#"):
            assert target[1:] in ids
    for attributes in page.all("img"):
        assert (attributes["src"] or "").startswith("data:image/")
        assert attributes["alt"]
    assert len(page.all("h1")) == 1
    assert all(
        attributes.get("aria-label")
        for _, attributes in page.tags
        if attributes.get("role") in ("img", "region")
    )
    assert {name for name, _ in page.tags} & {"iframe", "object", "form"} == set()
    return page


def test_a_runs_page_has_everything(tmp_path: Path) -> None:
    told = metrics(command="python train.py model=mobilenet_v2")
    page = check(run_page(fake_run(tmp_path / "run", told)))
    assert page.sections == [
        "metrics",
        "exported-files",
        "training",
        "thresholds",
        "filter-ranges",
        "layers",
        "sensitivity",
        "differing-predictions",
        "files",
    ]
    for words in (
        "mobilenet_v2 W8A8 finished",
        "per_channel · asymmetric · init mse",
        "python train.py model=mobilenet_v2 Copy",
        "Float top-1 72.50 %",
        "Accuracy drop 1.00",
        "Size 3.50 MB float 14.00 MB",
        "Latency in onnx 12.00 ms float 16.80 ms",
        "Time 7 min 04 s",
        "Measured on 500 test images, which were used neither for training",
        "all equal in 61 operations",
        "53 integer layers, float: none",
        "(0.71 of the float time)",
        "Best step 150",
        "after equalization by balanced (log axis)",
        "SQNR of the float logits after equalization: 23.4 dB",
        "The networks predict different classes for 9 of 500 test images",
        "label: Egyptian cat",
        "granularity: per_channel",
    ):
        assert words in page.text, words
    kinds = [figure["data"][0]["type"] for figure in page.figures]
    # Loss, rate, agreement, SQNR; eight histograms; three of filters; three per layer; sensitivity.
    assert kinds == ["scatter"] * 4 + ["bar"] * 8 + ["scatter"] * 3 + ["bar"] * 3 + ["bar"]
    loss = page.figures[0]
    assert loss["layout"]["yaxis"]["type"] == "log"
    assert loss["layout"]["shapes"][0]["x0"] == 150
    assert len(page.all("img")) == 5
    assert '<a href="metrics.json">' in run_page(tmp_path / "run")


def test_layers_are_the_rows_of_their_table(tmp_path: Path) -> None:
    directory = fake_run(tmp_path / "run", tensors=10)
    source = run_page(directory)
    table = source.partition('<table id="table-all-quantized-tensors"')[2]
    body = table.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = [re.findall(r"<td.*?</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    with (directory / "layers.csv").open() as stream:
        stored = list(csv.DictReader(stream))
    assert len(rows) == len(stored) == 10
    for row, wanted in zip(rows, stored, strict=True):
        keys = [re.findall('data-sort="([^"]*)"', cell) for cell in row]
        assert wanted["layer"] in row[0]
        assert float(keys[4][0]) == float(wanted["sqnr_db"])
        assert float(keys[5][0]) == pytest.approx(100 * float(wanted["saturated"]))
        if not wanted["alpha_mean"]:
            assert keys[8] == [""]


def test_a_run_that_failed_at_once(tmp_path: Path) -> None:
    fail(tmp_path / "run", error="FatError", message=f"{HOSTILE}\nmore", command="python t x")
    source = run_page(tmp_path / "run")
    page = check(source)
    assert page.sections == ["why-it-failed", "metrics", "files"]
    assert " ".join(f"FatError {HOSTILE} more".split()) in page.text
    assert "Traceback (most recent call last)" in page.text
    assert "Try again: python t x Copy" in page.text
    assert "config.yaml cannot be shown." in page.text
    assert "metrics.json, config.yaml, history.csv, layers.csv, details.json" in page.text
    assert len(source) < 40_000  # nothing to draw, so nothing that draws


def test_a_run_that_was_stopped_while_training(tmp_path: Path) -> None:
    told = metrics(status="calibrated")
    page = check(run_page(fake_run(tmp_path / "run", told, tensors=4)))
    assert "Its last metrics are those after calibration." in page.text
    assert "Calibrated top-1 68.50 %" in page.text
    assert "Trained top-1" not in page.text
    assert "Accuracy drop 4.00" not in page.text  # not the network that it would have ended with


def test_a_run_without_labels_says_so(tmp_path: Path) -> None:
    page = check(run_page(fake_run(tmp_path / "run", metrics(labelled=False), tensors=4)))
    assert "They have no labels" in page.text
    assert "Accuracy drop" not in page.text
    assert "Agreement 98.50 %" in page.text


def test_a_file_that_differs_is_told_where(tmp_path: Path) -> None:
    told = metrics()
    told["exported"]["onnx"]["layers"] = {
        "compared": 61,
        "differing": 2,
        "worst": {"layer": HOSTILE, "share": 0.0012, "steps": 1},
    }
    told["exported"]["onnx"]["kernels"]["float_layers"] = ["head"]
    page = check(run_page(fake_run(tmp_path / "run", told, tensors=4)))
    assert "2 of 61 operations give other integers; worst" in page.text
    assert "0.120 % by up to 1" in page.text
    assert "float: head" in page.text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    told = metrics(model=HOSTILE, init=HOSTILE, granularity=HOSTILE, command=HOSTILE)
    directory = fake_run(tmp_path / "run", told, tensors=6, name=HOSTILE + "{}")
    details = json.loads((directory / "details.json").read_text())
    details["examples"][0] |= {
        "image": "https://example.org/x.jpg",
        "name": HOSTILE,
        "label": HOSTILE,
        "float": [{"class": HOSTILE, "p": 0.5}, "no guess", {"class": None, "p": "x"}],
    }
    details["examples"][1]["image"] = 'data:image/png;base64,AA" onerror="x'
    (directory / "details.json").write_text(json.dumps(details))
    page = check(run_page(directory))
    spelled = " ".join(HOSTILE.split())
    assert page.text.count(spelled) > 10
    assert page.text.count("no picture") == 2
    assert len(page.all("img")) == 3
    assert page.all("b") != []
    assert not any("onmouseover" in attributes for _, attributes in page.tags)
    assert len(page.all("script")) == len(page.figures) + 2


def test_a_page_of_files_that_hold_anything(tmp_path: Path) -> None:
    """NaN, infinity, wrong types and truncated files still give a page."""
    directory = fake_run(tmp_path / "run", tensors=4)
    (directory / "metrics.json").write_text(
        '{"status": "trained", "model": 3, "float": {"top1": NaN}, "calibrated": {"top1": '
        'Infinity, "agreement": -Infinity, "sqnr_db": "x"}, "trained": {}, "seconds": {"a": NaN, '
        '"b": "c"}, "training": [], "equalization": 7, "exported": {"onnx": null, "litert": '
        '{"latency_ms": {"quantized": NaN}, "layers": []}}, "bits": {"weight": null}, "data": []}'
    )
    (directory / "history.csv").write_text(
        "step,name,value\n0,val/loss,nan\n1,val/loss,inf\n2,val/loss,-1\nx,val/loss,1\n,,\n3\n"
    )
    (directory / "layers.csv").write_text(
        "layer,kind,sqnr_db,saturated\na,weight,nan,inf\nb,activation,,\nc\n"
    )
    (directory / "details.json").write_text(
        json.dumps(
            {
                "histograms": [
                    3,
                    {"edges": [1], "counts": []},
                    {"edges": [0, 1], "counts": [float("nan")]},
                    {"edges": [0, 1, 2], "counts": [1]},
                    {"edges": [0, 1], "counts": [2], "before": "x", "after": [None]},
                ],
                "filters": {"a": 1},
                "examples": [None, {}, {"float": 3, "image": 5}],
                "images": "many",
                "differing": float("inf"),
            }
        )
    )
    (directory / "sensitivity.json").write_text("[]")
    (directory / "equalization.csv").write_text("")
    page = check(run_page(directory))
    assert "sensitivity" not in page.sections
    assert "is not a valid sensitivity report" in page.text
    assert "NaN" not in page.text.replace("(NaN)", "")
    assert [
        figure["data"][0]["y"] for figure in page.figures if figure["data"][0]["type"] == "bar"
    ] == [[2.0]]


@pytest.mark.parametrize(
    "name",
    [
        "history.csv",
        "layers.csv",
        "details.json",
        "config.yaml",
        "metrics.json",
        "sensitivity.json",
        "equalization.csv",
    ],
)
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"{"])
def test_every_file_may_be_missing_or_damaged(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    directory = fake_run(tmp_path / "run", tensors=4)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    page = check(run_page(directory))
    if content is not None and name.endswith((".json", ".yaml")):
        assert f"{name} " in page.text


def test_thresholds_stand_in_for_layers(tmp_path: Path) -> None:
    directory = fake_run(tmp_path / "run", tensors=4)
    (directory / "layers.csv").unlink()
    (directory / "thresholds.csv").write_text("layer,kind,alpha\nstem,weight,0.93\nx,weight,\n")
    page = check(run_page(directory))
    assert "From thresholds.csv" in page.text
    assert "stem weight 0.93" in page.text


def test_the_link_to_the_sweep_is_there_only_in_one(tmp_path: Path, sweep_directory: Path) -> None:
    inside = run_page(sweep_directory / "1-mobilenet_v2")
    assert '<a class="back" href="../report.html">' in inside
    shutil.copytree(sweep_directory / "1-mobilenet_v2", tmp_path / "alone")
    assert "../report.html" not in run_page(tmp_path / "alone")


def test_a_sweeps_page_has_everything(sweep_directory: Path) -> None:
    page = check(sweep_page(read_sweep(sweep_directory), "sweep.csv"))
    assert page.sections == [
        "swept-options",
        "accuracy-drop",
        "accuracy-and-cost",
        "all-runs",
        "failed-runs",
        "remaining-runs",
    ]
    for words in (
        "36 runs: 31 finished, 2 failed, 1 unfinished, 2 not started",
        "python train.py -m model=mobilenet_v2,mnasnet_100",
        "quant.granularity per_channel, per_tensor",
        "Points of top-1 below the float network",
        "init mse · quant.granularity=per_tensor",
        "Latency in onnxruntime 1.32.0",
        "HubError No weights of mobilenet_v2 in reach",
        "No error message was recorded",
        "not started 34-efficientnet_lite0",
    ):
        assert words in page.text, words
    maps = [figure for figure in page.figures if figure["data"][0]["type"] == "heatmap"]
    assert len(maps) == 8  # four panels, trained and calibrated
    assert [len(figure["data"]) for figure in page.figures[8:]] == [4, 4]
    links = [attributes["href"] for attributes in page.all("a")]
    assert "0-mobilenet_v2/report.html" in links
    assert "1-mobilenet_v2/report.html" not in links  # it has no page yet
    assert "sweep.csv" in links


def test_every_cell_leads_to_its_command(sweep_directory: Path) -> None:
    sweep = read_sweep(sweep_directory)
    page = check(sweep_page(sweep))
    assert [run["command"] for run in page.runs] == [run.command for run in sweep.runs]
    found = {
        int(pick)
        for figure in page.figures[:8]
        for trace in figure["data"]
        for picks in trace["customdata"]
        for pick in picks
        if pick
    }
    assert found == set(range(36))
    assert page.runs[4]["title"] == "mobilenet_v2 W6A6 mse"
    assert page.runs[4]["lines"] == [
        "quant.granularity=per_channel",
        "top-1: 72.50 → 56.50 → 70.00",
        "agreement: 76.00 % → 96.25 %",
        "size: 2.62 MB",
        "latency in onnx: 12.25 ms",
    ]
    assert page.runs[7]["lines"][-1].startswith("HubError: No weights")
    copies = [
        attributes["data-copy"] for attributes in page.all("button") if "data-copy" in attributes
    ]
    assert {run.command for run in sweep.runs} <= set(copies)
    rows = {attributes["id"] for attributes in page.all("tr") if "id" in attributes}
    assert rows == {f"run-{place}" for place in range(36)}


def test_without_labels_agreement_takes_the_place(tmp_path: Path) -> None:
    page = check(sweep_page(read_sweep(fake_sweep(tmp_path / "sweep", labelled=False))))
    assert "loss-of-agreement" in page.sections
    assert "because not every run has labels" in page.text


def test_without_files_there_is_no_latency(tmp_path: Path) -> None:
    for place, bits in enumerate((8, 4)):
        fake_run(tmp_path / f"{place}-a", metrics(bits=(bits, bits), latency=None), tensors=2)
    (tmp_path / "multirun.yaml").write_text("{}")
    page = check(sweep_page(read_sweep(tmp_path)))
    assert "There is no latency to show" in page.text
    assert page.text.count("unknown") == 2  # the commands of both


def test_a_sweep_in_which_all_failed(tmp_path: Path) -> None:
    for place in range(2):
        fail(tmp_path / f"{place}-a", error="E", message=f"{HOSTILE} {place}")
    (tmp_path / "multirun.yaml").write_text("{}")
    csv_file, html_file = write_sweep(tmp_path)
    page = check(html_file.read_text(encoding="utf-8"))
    assert page.sections == ["swept-options", "all-runs", "failed-runs"]
    assert page.figures == []
    assert csv_file.read_text().count("failed") == 2


def test_loose_runs_are_compared_one_below_the_other(tmp_path: Path) -> None:
    told = {
        "a": metrics(),
        "b": metrics(init="lp"),
        HOSTILE.replace("/", "-"): metrics(init="entropy"),
    }
    places = [fake_run(tmp_path / "in" / name, one, tensors=2) for name, one in told.items()]
    runs = [read_run(place) for place in places]
    table, written = write_comparison(tmp_path / "out/page.html", [*runs, runs[0]])
    page = check(written.read_text(encoding="utf-8"))
    assert "Comparison of 3 runs" in page.text
    assert table == tmp_path / "out/page.csv"
    assert table.read_text().splitlines()[1].startswith("../in/a,finished")
    assert "page.csv" in [attributes["href"] for attributes in page.all("a")]
    assert "calibrated only" in [trace.get("name") for trace in page.figures[0]["data"]]


def test_pages_of_version_0_1_are_those_of_todays_names(
    sweep_directory: Path, tmp_path: Path
) -> None:
    now = sweep_directory
    then = Path(shutil.copytree(now, tmp_path / "sweep"))
    changed = 0
    for file in [*then.rglob("*.json"), *then.rglob("*.yaml")]:
        text = file.read_text()
        earlier = text.replace("per_channel", "vector").replace("per_tensor", "scalar")
        changed += earlier != text
        file.write_text(earlier)
    assert changed > 60
    assert sweep_page(read_sweep(then)) == sweep_page(read_sweep(now))
    assert sweep_table(read_sweep(then)) == sweep_table(read_sweep(now))
    assert run_page(then / "1-mobilenet_v2") == run_page(now / "1-mobilenet_v2")


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(FatError, match="no run to compare"):
        combine([], tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FatError, match=r"not the directory of a run.*train\.py prints"):
        write_run(tmp_path)
    with pytest.raises(FatError, match=r"not the directory of a sweep.*train\.py -m"):
        write_sweep(tmp_path)


def test_every_section_and_column_is_documented(tmp_path: Path, sweep_directory: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/reports.md").read_text(encoding="utf-8")
    fail(tmp_path / "failed", error="E", message="m")
    sources = [run_page(fake_run(tmp_path / "run", tensors=4)), run_page(tmp_path / "failed")]
    titles = {title for source in sources for title in re.findall(r"<h2[^>]*>(.*?)</h2>", source)}
    assert {title for title in titles if f"| {title} |" not in text} == set()
    header, _ = sweep_table(read_sweep(sweep_directory))
    firsts = [name for name in header[:4] if f"| `{name}` |" not in text]
    assert firsts == []
