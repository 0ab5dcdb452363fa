"""W&B workspace that compares the runs of a project: ``python -m fat.dashboard ENTITY/PROJECT``.

:func:`build` needs no network; :func:`save` sends the workspace to W&B.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from fat.utils.commands import command_line
from fat.utils.errors import FatError, first_line, missing_extra

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

__all__ = ["build", "main", "save", "spec"]

PLACE = re.compile(r"([\w.-]+)/([\w.-]+)", re.ASCII)
# wandb-workspaces puts names into a quoted expression without escaping them.
SWEEP = re.compile(r"[\w./: +-]+", re.ASCII)
RUNS = 100
"""Largest number of runs in a chart."""
COLUMNS = (
    *("config:model.value.name", "config:quant.value.bits", "config:quant.value.granularity"),
    *("summary:float.top1", "summary:trained.top1", "summary:accuracy_drop"),
    *("summary:trained.agreement", "summary:trained.sqnr_db", "summary:size_mb.quantized"),
)
"""First columns of the table of runs."""


def build(entity: str, project: str, sweep: str | None = None) -> Workspace:
    """Build the workspace: charts of accuracy drop, init strategies, SQNR, training, thresholds.

    Nothing is sent. Only the ids of the panels are random.

    Args:
        entity: W&B user or team.
        project: W&B project, ``logger.project`` of the runs.
        sweep: Show only the runs of this sweep: the group of the runs, or the value of the key
            ``sweep`` in their config or summary.

    Raises:
        FatError: If wandb-workspaces is not installed, or the name of the sweep contains a
            character that filters do not support.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise missing_extra("dashboard", "wandb-workspaces") from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name="FAT" if sweep is None else f"FAT: {sweep}",
        sections=[
            ws.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=columns, rows=rows),
            )
            for name, panels, columns, rows in _sections()
        ],
        settings=ws.WorkspaceSettings(max_runs=RUNS),
        runset_settings=ws.RunsetSettings(
            filters="" if sweep is None else _of_sweep(sweep), pinned_columns=list(COLUMNS)
        ),
    )


def spec(workspace: Workspace) -> dict[str, Any]:
    """Return the JSON that is sent to W&B, as plain values."""
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)
    content: dict[str, Any] = json.loads(text)
    return content


def save(workspace: Workspace) -> str:
    """Save a workspace as a new view of its project, and return its URL.

    Raises:
        FatError: If you are not logged in, or W&B cannot be reached or refuses.
    """
    if not _has_key():
        raise FatError(
            "You are not logged in to W&B. Type wandb login, or set WANDB_API_KEY. --dry-run "
            "prints the workspace without an account."
        )
    try:
        workspace.save()
        return str(workspace.url)
    # Whatever fails here (no connection, a refusal, no such project) is for the user to fix.
    except Exception as error:
        raise FatError(
            f"The workspace could not be saved in {workspace.entity}/{workspace.project}: "
            f"{first_line(error)} Check the names and your key; --dry-run prints the workspace "
            "without a network."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: Arguments of the command; those of this process when ``None``.
    """
    parser = argparse.ArgumentParser(
        prog=command_line("dashboard"),
        description="Save a W&B workspace that compares the runs of a project.",
    )
    parser.add_argument("place", metavar="ENTITY/PROJECT", help="user or team, and project")
    parser.add_argument("--sweep", metavar="NAME", help="show only the runs of this sweep")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the workspace as JSON and send nothing"
    )
    given = parser.parse_args(arguments)
    try:
        workspace = build(*_place(given.place), sweep=given.sweep)
        if given.dry_run:
            print(json.dumps(spec(workspace), indent=2, ensure_ascii=False))
        else:
            print(save(workspace))
    except FatError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _place(text: str) -> tuple[str, str]:
    found = PLACE.fullmatch(text)
    if found is None:
        raise FatError(
            f"{text!r} is not a W&B project. Type ENTITY/PROJECT, your user or team and the "
            "project, such as my-team/fat; logger.project of a run is fat by default."
        )
    return found[1], found[2]


def _of_sweep(sweep: str) -> str:
    if not SWEEP.fullmatch(sweep):
        raise FatError(
            f"The sweep {sweep!r} contains a character that filters do not support. Allowed are "
            "letters, digits, spaces and . / : _ + -, as in --sweep multirun/2025-01-31/12-00-00."
        )
    keys = ("Metric('Group')", "Config('sweep')", "SummaryMetric('sweep')")
    return " or ".join(f"{key} == '{sweep}'" for key in keys)


def _has_key() -> bool:
    """Return whether W&B would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _sections() -> list[tuple[str, list[Any], int, int]]:
    """(name, panels, columns, rows) of each section."""
    import wandb_workspaces.reports.v2 as wr

    config, summary = wr.Config, wr.SummaryMetric
    drop, points = "accuracy_drop", "points of top-1"
    agreement = ["calibrated.agreement", "trained.agreement"]
    sqnr = ["calibrated.sqnr_db", "trained.sqnr_db"]
    size = "size_mb.quantized"

    def bars(title: str, metrics: Sequence[str], by: str, unit: str) -> Any:
        return wr.BarPlot(
            title=title,
            metrics=list(metrics),
            groupby=config(by),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            title_x=unit,
            max_runs_to_show=RUNS,
            max_bars_to_show=RUNS,
        )

    def scatter(title: str, x: str, y: str) -> Any:
        bits = config("quant.bits")
        legend = "${run:displayName}"
        return wr.ScatterPlot(
            title=title, x=summary(x), y=summary(y), z=bits, legend_template=legend
        )

    # W&B's own step counts calls of the logger; Lightning logs this one with every metric.
    steps: Any = {"x": "trainer/global_step", "title_x": "optimizer steps"}

    def lines(title: str, metric: str, *, log: bool = False) -> Any:
        return wr.LinePlot(title=title, y=[metric], log_y=log, max_runs_to_show=RUNS, **steps)

    def factors(title: str, pattern: str) -> Any:
        # Mean, smallest and largest factor of each quantizer; line plots show no distributions.
        return wr.LinePlot(title=title, metric_regex=pattern, max_runs_to_show=RUNS, **steps)

    def parallel(title: str, options: Sequence[str], metrics: Sequence[str]) -> Any:
        columns = [*map(config, options), *map(summary, metrics)]
        shown = [wr.ParallelCoordinatesPlotColumn(column) for column in columns]
        return wr.ParallelCoordinatesPlot(title=title, columns=shown)

    drops = [
        bars("Accuracy drop by network", [drop], "model.name", points),
        bars("Accuracy drop by bits", [drop], "quant.bits", points),
        bars("Accuracy drop by granularity", [drop], "quant.granularity", points),
        scatter("Accuracy drop against size", size, drop),
        parallel(
            "Network, bits, size and accuracy drop",
            ["model.name", "quant.bits", "quant.granularity", "quant.scheme"],
            [size, drop, "trained.agreement", "trained.sqnr_db"],
        ),
        bars(
            "Top-1: float, calibrated, trained",
            ["float.top1", "calibrated.top1", "trained.top1"],
            "model.name",
            "%",
        ),
    ]
    weight, activation = "init.weight.name", "init.activation.name"
    inits = [
        bars("Agreement after calibration by activation init", agreement[:1], activation, "%"),
        bars("Agreement after calibration by weight init", agreement[:1], weight, "%"),
        bars("Accuracy drop after training by activation init", [drop], activation, points),
        bars("SQNR before and after training by activation init", sqnr, activation, "dB"),
        parallel(
            "Init strategies and results", [weight, activation, "quant.bits"], [*agreement, drop]
        ),
        wr.ParameterImportancePlot(with_respect_to="trained.sqnr_db"),
    ]
    fidelity = [
        bars("Agreement with the float network", agreement, "model.name", "%"),
        bars("SQNR of the logits", sqnr, "model.name", "dB"),
        scatter("SQNR before and after training", *sqnr),
        scatter("Agreement against size", size, "trained.agreement"),
    ]
    training = [
        lines("Training loss", "train/loss", log=True),
        lines("Validation loss", "val/loss", log=True),
        lines("Learning rate", "train/lr"),
    ]
    thresholds = [
        factors("α of activations", r"^alpha/.*\.activation$"),
        factors("α of weights, mean over the filters", r"^alpha/.*\.weight$"),
        factors("α of weights, smallest", r"^alpha/.*\.weight\.min$"),
        factors("Shift of the lower threshold", r"^shift/.*\.activation$"),
    ]
    return [
        ("Accuracy drop", drops, 3, 2),
        ("Init strategies", inits, 3, 2),
        ("Agreement and SQNR", fidelity, 2, 2),
        ("Training", training, 3, 1),
        ("Thresholds", thresholds, 2, 2),
        ("Options that differ", [wr.RunComparer(diff_only="split")], 1, 1),
    ]


if __name__ == "__main__":
    sys.exit(main())
