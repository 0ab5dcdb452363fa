"""docs/benchmarks.md and its figure, from what peers.py has measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["best", "markdown", "plot", "standard_error"]

OURS = "ours-"


def standard_error(percent: float, images: int) -> float:
    """Of a share of independent images, in points.

    Examples:
        >>> round(standard_error(95.0, 200), 1)
        1.5
    """
    share = percent / 100.0
    return 100.0 * math.sqrt(max(share * (1.0 - share), 0.0) / images)


def judged(cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Figures of what the tool simulates, or nothing where it failed."""
    found: Mapping[str, Any] | None = cell.get("simulation")
    return found


def one_image(figures: Mapping[str, Any]) -> float:
    """The points of agreement within which rows are ties: an image, and a float's rounding."""
    return float(100.0 / figures["images"]) + 1e-6


def slowest_others(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Machine → CPU seconds of the slowest of the others that was judged there."""
    limits: dict[str, float] = {}
    for cell in cells:
        if judged(cell) and not cell["tool"].startswith(OURS):
            machine = cell["machine"]
            limits[machine] = max(limits.get(machine, 0.0), cell["cpu_seconds"])
    return limits


def in_time(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The judged cells that took no more than the slowest of the others on the same machine."""
    limits = slowest_others(cells)
    return [
        cell
        for cell in cells
        if judged(cell) and cell["cpu_seconds"] <= limits.get(cell["machine"], 0.0)
    ]


def marks_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Machine → the mark of its times, none for the one that most were measured on."""
    machines = [name for name, _ in Counter(cell["machine"] for cell in cells).most_common()]
    return {name: f" {'†' * number}".rstrip() for number, name in enumerate(machines)}


def best(
    cells: Sequence[Mapping[str, Any]], figure: str, *, ours: bool | None = None
) -> Mapping[str, Any] | None:
    """The cell with the largest figure, among ours, among the others', or among all."""
    fitting = [
        cell
        for cell in cells
        if judged(cell) and (ours is None or cell["tool"].startswith(OURS) == ours)
    ]
    return max(fitting, key=lambda cell: cell["simulation"][figure], default=None)


def markdown(
    results: Mapping[str, Any],
    labels: Mapping[str, str],
    models: Mapping[str, str],
    settings: Sequence[str],
    pins: Mapping[str, Sequence[str]],
    recipes: Mapping[str, str],
) -> str:
    """The whole page.

    Args:
        results: What peers.py keeps: ``cells``.
        labels: Name of a tool's recipe → what the page calls it, in the order of the rows.
        models: Names of the networks → timm's names.
        settings: In the order of the sections.
        pins: Environment → its pinned versions.
        recipes: Name of a script → its docstring.
    """
    cells = list(results["cells"].values())
    head = HEAD.replace("PICTURE\n", PICTURE if any(map(judged, cells)) else "")
    marks = marks_of(cells)
    where = "; ".join(f"{name}{f', marked{mark}' if mark else ''}" for name, mark in marks.items())
    lines = [head, f"* **Machine**: {where}.", "", *summary(cells, models, settings)]
    for model in models:
        for setting in settings:
            rows = [
                cell
                for tool in labels
                for cell in cells
                if (cell["tool"], cell["model"], cell["setting"]) == (tool, model, setting)
            ]
            if rows:
                lines += ["", f"## {model}, {spelled(setting)}", "", *table(rows, labels, marks)]
    done = {(cell["tool"], cell["model"], cell["setting"]) for cell in cells}
    lines += ["", "## Not measured yet", "", *missing(done, labels, models, settings)]
    lines += ["", "## Commands", "", "Each cell by itself; `DIR` as above.", ""]
    order = [(tool, m, s) for m in models for s in settings for tool in labels]
    known = {(c["tool"], c["model"], c["setting"]): c for c in cells}
    for key in order:
        if key in known:
            cell = known[key]
            also = f", which is `{cell['train']}`" if "train" in cell else ""
            lines.append(f"* `{cell['command']}`{also}")
    lines += ["", "## Versions", "", "| environment | pinned |", "|---|---|"]
    lines += [f"| {name} | {', '.join(given)} |" for name, given in pins.items()]
    lines += ["", "## Recipes", ""]
    for name, text in recipes.items():
        lines += [f"### benchmarks/tools/{name}.py", "", text.strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


PICTURE = (
    "![SQNR of the logits of every tool against its CPU seconds, by setting]"
    "(figures/benchmarks.png)\n\n"
)
HEAD = """# Beside other tools

<!-- written by benchmarks/peers.py; edit benchmarks/peers_report.py -->

```bash
pip install -e '.[lite,plot]'
python benchmarks/peers.py --data DIR      # goes on where it was cut off; a day of one core
python benchmarks/peers.py --report-only   # this page, from benchmarks/results/peers.json
```

PICTURE
What every figure here was measured with:

* **Networks**: EfficientNet-Lite0 and -Lite2 with their ImageNet weights, the same for all tools.
* **Images**: the same 500 of ImageNet's training set, without labels, for every tool; judged on 200
  of the validation set, which nothing is chosen on. `DIR` holds `train/<wnid>/*.jpg` and
  `val/<wnid>/*.jpg`.
* **Figures**: top-1, what it lost against float, agreement with the float network (± its standard
  error) and SQNR of the logits, all of the tool's own *simulation*; then the *file* that ships, in
  its runtime (ONNX Runtime, told to be exact where the processor has no VNNI, or OpenVINO):
  agreement, SQNR, and how many convolutions and linear layers run as integer kernels. One image is
  half a point: rows within one image of the best are ties, and bold like it.
* **Time**: CPU seconds on one core, from the loaded float network to the file that ships. The
  machine is shared, so wall seconds say less (`seconds` in the results file). Times of different
  machines are not compared: *slowest other* is the slowest on the machine of ours. Ours includes
  decoding JPEG files, and the proof in ONNX Runtime that the file equals the simulation; others get
  decoded images in memory, and prove nothing.
* **Memory**: the largest resident set of the process until then, libraries included.
* **How recipes of ours were chosen**: `quick` was set before any of its figures was known. `swift`
  was added, once and without a search, after the 200 images had judged `quick` and the others, to
  fit into the time that those take. No step count was tried out on the 200. With one threshold per
  tensor these three equalize channels exactly, which was added last: GPTQ had been ahead in
  agreement, and of what was there to try it is what lowers the loss on training images most. Files
  have a clip with a bound for each channel then, where ReLU6 was.
* **What is missing**: cells that were not measured are listed below; *best of the others* and
  *slowest other* are of those that were. Cells ran beside other work on the same two cores, most
  with 1800 s at most, some with `--limit` 3600 or 7200.
* **A caution**: Brevitas' GPTQ sees 40 images here and AIMET's AdaRound 100, with 200 iterations
  for each layer, since they take a pass over them for each layer: more would be better and slower.
  Where an export fails, the simulation is judged alone, as it was before the export. At W4A4
  FAT's `best` has more SQNR than `quick` and less agreement, on both networks: it lowers squared
  errors further, and at 5 dB those say little about which logit is the largest."""


def summary(
    cells: Sequence[Mapping[str, Any]], models: Mapping[str, str], settings: Sequence[str]
) -> list[str]:
    """Who is first in each setting."""
    lines = [
        "## In short",
        "",
        "| network, setting | best of the others | FAT | FAT in the time of the slowest other |",
        "|---|---|---|---|",
    ]
    won: Counter[str] = Counter()
    for model in models:
        for setting in settings:
            here = [c for c in cells if (c["model"], c["setting"]) == (model, setting)]
            other, own = best(here, "sqnr_db", ours=False), best(here, "sqnr_db", ours=True)
            if other is None or own is None:
                continue
            agree = best(here, "agreement", ours=False)
            assert agree is not None
            quick = best(in_time(here), "sqnr_db", ours=True)
            rival = f"{short(other)} ({other['tool']})"
            if agree["tool"] != other["tool"]:
                rival += f"; {agree['simulation']['agreement']:.1f} % ({agree['tool']})"
            timely = "none"
            if quick:
                limit = slowest_others(here)[quick["machine"]]
                timely = (
                    f"{short(quick)} ({quick['tool']}, {quick['cpu_seconds']:.0f} s "
                    f"of {limit:.0f} s)"
                )
            lines.append(
                f"| {model}, {setting} | {rival} | {short(own)} ({own['tool']}) | {timely} |"
            )
            won.update(firsts(here))
    total = len(lines) - 4
    return [
        *lines,
        "",
        f"FAT is first in SQNR in {won['SQNR']} of {total}, and first or within one image of the "
        f"first in agreement in {won['agreement']}; in the time of the slowest other in "
        f"{won['SQNR in time']} and {won['agreement in time']}.",
    ]


def firsts(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """In what the best of ours is first in a setting, ties counted; also of those in time.

    One of ours for each: the recipe of most agreement need not be the one of least noise.
    """
    for figure, name in (("sqnr_db", "SQNR"), ("agreement", "agreement")):
        other = best(cells, figure, ours=False)
        assert other is not None
        least = other["simulation"][figure]
        if figure == "agreement":
            least -= one_image(other["simulation"])
        for fitting, suffix in ((cells, ""), (in_time(cells), " in time")):
            own = best(fitting, figure, ours=True)
            if own and own["simulation"][figure] >= least:
                yield name + suffix


def missing(
    done: set[tuple[str, str, str]],
    labels: Mapping[str, str],
    models: Mapping[str, str],
    settings: Sequence[str],
) -> list[str]:
    """What no figure here says anything about, the slowest and the best other among it perhaps."""
    lines = []
    for model in models:
        for setting in settings:
            left = [tool for tool in labels if (tool, model, setting) not in done]
            if left:
                lines.append(f"* {model}, {setting}: {', '.join(left)}")
    return lines or ["Nothing is missing."]


def short(cell: Mapping[str, Any]) -> str:
    """Agreement and SQNR."""
    found = cell["simulation"]
    return f"{found['agreement']:.1f} %, {found['sqnr_db']:.1f} dB"


def spelled(setting: str) -> str:
    """A setting's name for people.

    Examples:
        >>> spelled("w4a8-scalar")
        'W4A8, one threshold per tensor'
    """
    bits, _, granularity = setting.partition("-")
    return f"{bits.upper()}, one threshold per {'filter' if granularity == 'vector' else 'tensor'}"


def table(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], marks: Mapping[str, str]
) -> list[str]:
    """A row for each recipe; the best of a column in bold, ties with it too."""
    lines = [
        "| tool | top-1 | lost | agreement | SQNR | file: agreement | SQNR | integer layers "
        "| CPU s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = [judged(cell) for cell in rows]
    most = max((f["agreement"] for f in found if f), default=0.0)
    loudest = max((f["sqnr_db"] for f in found if f), default=0.0)
    for cell, figures in zip(rows, found, strict=True):
        name = labels[cell["tool"]]
        if figures is None:
            what = (
                f"refused: {cell['refused']}" if "refused" in cell else f"failed: {cell['failed']}"
            )
            lines.append(f"| {name} | {escaped(what)} | | | | | | | | |")
            continue
        error = standard_error(figures["agreement"], figures["images"])
        agreement = f"{figures['agreement']:.1f} ± {error:.1f}"
        noise = f"{figures['sqnr_db']:.1f}"
        if figures["agreement"] >= most - one_image(figures):
            agreement = f"**{agreement}**"
        if figures["sqnr_db"] >= loudest - 0.05:
            noise = f"**{noise}**"
        lines.append(
            f"| {name} | {figures['top1']:.1f} | {figures['top1_drop']:.1f} | {agreement} "
            f"| {noise} | {shipped(cell)} | {seconds(cell, marks)} | {cell['peak_mb']:.0f} |"
        )
    return lines


def shipped(cell: Mapping[str, Any]) -> str:
    """Three columns about the file."""
    file = cell.get("shipped")
    if not file:
        reason = cell.get("export_failed")
        return f"{escaped('export failed: ' + reason) if reason else 'none'} | | "
    layers = file["integer_layers"] + file["float_layers"]
    return (
        f"{file['agreement']:.1f} | {file['sqnr_db']:.1f} | {file['integer_layers']} of {layers}"
        f"{', OpenVINO' if file['runtime'].startswith('openvino') else ''}"
    )


def seconds(cell: Mapping[str, Any], marks: Mapping[str, str]) -> str:
    """CPU seconds, the mark of their machine, and what of them is our proof."""
    text = f"{cell['cpu_seconds']:.0f}{marks[cell['machine']]}"
    proof = cell.get("stages", {}).get("export")
    return f"{text} ({proof:.0f} of that export and proof)" if proof else text


def escaped(text: str) -> str:
    """Text that breaks no table."""
    return text.replace("|", "\\|").replace("\n", " ")


def plot(
    results: Mapping[str, Any],
    labels: Mapping[str, str],
    models: Sequence[str],
    settings: Sequence[str],
    path: Path,
) -> None:
    """SQNR against CPU seconds for each setting, a row of panels for each network.

    Without a single judged cell there is no picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cells = [cell for cell in results["cells"].values() if judged(cell)]
    if not cells:
        path.unlink(missing_ok=True)
        return
    shown = [m for m in models if any(c["model"] == m for c in cells)]
    used = [s for s in settings if any(c["setting"] == s for c in cells)]
    tools = [tool for tool in labels if any(c["tool"] == tool for c in cells)]
    families = sorted({tool.partition("-")[0] for tool in tools} - {"ours"})
    palette = plt.get_cmap("Set2").colors
    colours = {name: palette[i % len(palette)] for i, name in enumerate(families)}
    colours["ours"] = "#1f4e79"
    markers = ("o", "s", "^", "D", "v")
    marks: dict[str, str] = {}
    for tool in tools:
        family = tool.partition("-")[0]
        before = sum(other.partition("-")[0] == family for other in marks)
        marks[tool] = markers[before % len(markers)]
    figure, axes = plt.subplots(
        len(shown),
        len(used),
        figsize=(2.5 * len(used) + 1.9, 2.6 * len(shown) + 0.5),
        squeeze=False,
    )
    handles: dict[str, Any] = {}
    for row, model in enumerate(shown):
        for column, setting in enumerate(used):
            axis = axes[row][column]
            for cell in cells:
                if (cell["model"], cell["setting"]) != (model, setting):
                    continue
                tool = cell["tool"]
                own = tool.startswith(OURS)
                handles[tool] = axis.scatter(
                    cell["cpu_seconds"],
                    cell["simulation"]["sqnr_db"],
                    s=58 if own else 34,
                    marker=marks[tool],
                    zorder=3 if own else 2,
                    color=colours[tool.partition("-")[0]],
                    edgecolor="black",
                    linewidth=0.5,
                )
            axis.set_xscale("log")
            axis.set_xlim(20, 8000)
            axis.set_xticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1000", "3000"])
            axis.minorticks_off()
            axis.set_title(setting if row == 0 else "", fontsize=9)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=7)
            axis.margins(0.15)
            if column == 0:
                axis.set_ylabel(f"{model}\nSQNR of the logits, dB", fontsize=8)
            if row == len(shown) - 1:
                axis.set_xlabel("CPU seconds", fontsize=8)
    order = [tool for tool in tools if tool in handles]
    figure.legend(
        [handles[tool] for tool in order],
        [labels[tool].replace("*", "") for tool in order],
        loc="center right",
        fontsize=7,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / (2.5 * len(used) + 1.9), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
